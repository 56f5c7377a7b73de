//! A conversation at the terminal.

use std::{
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context, Result, bail};
use directories::ProjectDirs;
use ds4_runtime::{Failure, Refused};
use ds4_text::{dialogue::Dialogue, profile::Thinking};
use rustyline::{Config, DefaultEditor, error::ReadlineError};

use super::{conversation::Conversation, printer::Printer};
use crate::{
    interrupt::{self, Again},
    terminal, text,
};

/// Lines of history that are kept.
const HISTORY: usize = 512;

const HELP: &str = "\
/help             this list
/think            think before answering
/think-max        think as much as the model can
/nothink          answer at once
/ctx N            context of N tokens
/read FILE        say what is in a file
/system TEXT      start anew with this system message
/new              start anew
/quit, /exit      leave (so does Ctrl-D)
Ctrl-C stops an answer. A line that ends in \\ goes on in the next one.";

/// Reads, answers, and so on, until the user leaves.
pub fn run(
    conversation: Conversation,
    system: Option<String>,
    thinking: Thinking,
) -> Result<ExitCode> {
    interrupt::catch(Again::Wait)?;
    let config = Config::builder().max_history_size(HISTORY)?.auto_add_history(true).build();
    let mut editor = DefaultEditor::with_config(config)?;
    let history = history_file();
    if let Some(file) = &history {
        // The first conversation has no history yet.
        let _ = editor.load_history(file);
    }
    terminal::note("/help lists commands, Ctrl-D leaves.");
    let mut repl = Repl { conversation, system, thinking };
    let mut ended = Ok(ExitCode::SUCCESS);
    while let Some(line) = read_line(&mut editor)? {
        interrupt::reset();
        match repl.handle(line.trim()) {
            Ok(true) => {}
            Ok(false) => break,
            Err(error) if is_fatal(&error) => {
                ended = Err(error);
                break;
            }
            Err(error) => terminal::print_error(&error),
        }
    }
    if let Some(file) = &history {
        save_history(&mut editor, file);
    }
    ended
}

/// Whether no further answer can be computed.
fn is_fatal(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref(), Some(Failure::Fatal(_)))
        || matches!(error.downcast_ref(), Some(Refused::Fatal(_)))
}

struct Repl {
    conversation: Conversation,
    system: Option<String>,
    thinking: Thinking,
}

impl Repl {
    /// Does what a line says; `false` to leave.
    fn handle(&mut self, line: &str) -> Result<bool> {
        let (command, argument) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        let argument = argument.trim();
        match command {
            "" => {}
            "/help" => writeln!(io::stdout(), "{HELP}")?,
            "/think" => self.set_thinking(Thinking::High),
            "/think-max" => self.set_thinking(Thinking::Max),
            "/nothink" => self.set_thinking(Thinking::Off),
            "/ctx" => {
                let context = argument.parse().context("/ctx: expected a number of tokens")?;
                self.conversation.set_context(context).context("/ctx")?;
            }
            "/read" => {
                let text =
                    fs::read_to_string(argument).with_context(|| format!("/read: {argument}"))?;
                self.say(text::of_file(&text).to_owned())?;
            }
            "/system" => {
                self.system = Some(argument.to_owned()).filter(|text| !text.is_empty());
                self.restart();
            }
            "/new" => self.restart(),
            "/quit" | "/exit" => return Ok(false),
            _ if command.starts_with('/') => bail!("{command}: no such command: /help lists them"),
            _ => self.say(line.to_owned())?,
        }
        Ok(true)
    }

    fn say(&mut self, text: String) -> Result<()> {
        let mut printer = Printer::new();
        let turn = self.conversation.reply(text, None, |delta| printer.print(delta))?;
        printer.end()?;
        terminal::note(self.conversation.statistics(&turn));
        Ok(())
    }

    fn set_thinking(&mut self, thinking: Thinking) {
        self.thinking = thinking;
        self.conversation.set_thinking(thinking);
    }

    fn restart(&mut self) {
        self.conversation.restart(Dialogue::new(self.system.clone(), self.thinking));
    }
}

/// The next input, of several lines if they end in a backslash; `None` at its end.
fn read_line(editor: &mut DefaultEditor) -> Result<Option<String>> {
    let mut text = String::new();
    loop {
        let prompt = if text.is_empty() { "> " } else { "… " };
        match editor.readline(prompt) {
            Ok(line) => match line.strip_suffix('\\') {
                Some(start) => {
                    text.push_str(start);
                    text.push('\n');
                }
                None => {
                    text.push_str(&line);
                    return Ok(Some(text));
                }
            },
            Err(ReadlineError::Interrupted) => {
                text.clear();
                terminal::note("Ctrl-D leaves.");
            }
            Err(ReadlineError::Eof) => return Ok(None),
            Err(ReadlineError::Io(error)) if error.kind() == io::ErrorKind::InvalidData => {
                text.clear();
                terminal::note(
                    "The line is not UTF-8 and was dropped: paste text, or use /read FILE.",
                );
            }
            Err(error) => return Err(error.into()),
        }
    }
}

fn history_file() -> Option<PathBuf> {
    Some(ProjectDirs::from("", "", "ds4")?.data_dir().join("history"))
}

/// A history that can't be saved is not worth an error.
fn save_history(editor: &mut DefaultEditor, file: &Path) {
    if let Some(folder) = file.parent() {
        let _ = fs::create_dir_all(folder);
    }
    let _ = editor.save_history(file);
}
