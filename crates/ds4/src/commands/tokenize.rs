//! `ds4 tokenize`: how a model reads a text or a chat request.

use std::{
    fs,
    io::{self, Read, Write},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use clap::Args;
use ds4_model::TokenId;
use ds4_text::{request, tokenizer::Tokenizer};

use crate::{
    model::ModelArgs,
    terminal,
    text::{self, ProfileArgs},
};

/// Options of `ds4 tokenize`.
#[derive(Args)]
#[command(after_help = "\
Prints one token a line: its id and its text. Without TEXT, --file or --chat, reads standard
input. In plain text the spelling of a marker such as <think> is text like any other.")]
pub struct TokenizeArgs {
    /// Text
    #[arg(conflicts_with_all = ["file", "chat"])]
    text: Option<String>,
    /// File with the text (`-`: standard input)
    #[arg(long, value_name = "FILE", conflicts_with = "chat")]
    file: Option<PathBuf>,
    /// File with a Chat Completions request as JSON, rendered as `ds4 serve` does
    #[arg(long, value_name = "FILE")]
    chat: Option<PathBuf>,
    /// Take spellings of markers as markers (for text that is a whole prompt)
    #[arg(long, conflicts_with = "chat")]
    special: bool,
    /// Print only the ids, separated by spaces
    #[arg(long)]
    ids: bool,
    #[command(flatten)]
    profile: ProfileArgs,
    #[command(flatten)]
    model: ModelArgs,
}

/// Prints the tokens.
pub fn run(args: &TokenizeArgs) -> Result<()> {
    let model = args.model.open()?;
    let (tokenizer, ids) = match &args.chat {
        Some(path) => {
            let encoder = args.profile.encoder(&model)?;
            let request = request::chat::read(request::parse(&read(path)?)?)
                .with_context(|| path.display().to_string())?;
            for warning in &request.options.warnings {
                terminal::note(format_args!("warning: {warning}"));
            }
            let ids = request.encode(&encoder, &mut || ())?.ids;
            (encoder.tokenizer().clone(), ids)
        }
        None => {
            let tokenizer = text::tokenizer(&model)?;
            let text = args.text()?;
            let encode =
                if args.special { Tokenizer::encode_with_markers } else { Tokenizer::encode };
            let ids = encode(&tokenizer, &text)?;
            (tokenizer, ids)
        }
    };
    print(&tokenizer, &ids, args.ids)
}

impl TokenizeArgs {
    fn text(&self) -> Result<String> {
        if let Some(text) = &self.text {
            return Ok(text.clone());
        }
        let path = self.file.as_deref().unwrap_or(Path::new("-"));
        String::from_utf8(read(path)?)
            .with_context(|| format!("{}: expected UTF-8 text", path.display()))
    }
}

/// The content of a file, or of standard input if that is what `-` says.
fn read(path: &Path) -> Result<Vec<u8>> {
    if path != Path::new("-") {
        return fs::read(path).with_context(|| path.display().to_string());
    }
    let mut bytes = Vec::new();
    io::stdin().read_to_end(&mut bytes).context("standard input")?;
    Ok(bytes)
}

fn print(tokenizer: &Tokenizer, ids: &[TokenId], only_ids: bool) -> Result<()> {
    let mut out = io::stdout().lock();
    if only_ids {
        let ids: Vec<String> = ids.iter().map(TokenId::to_string).collect();
        writeln!(out, "{}", ids.join(" "))?;
        return Ok(());
    }
    for &id in ids {
        writeln!(out, "{id:>7}  {}", tokenizer.piece(id))?;
    }
    Ok(())
}
