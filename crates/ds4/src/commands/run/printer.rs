//! Shows an answer while it is written.

use std::io::{self, IsTerminal, Write};

use anyhow::Result;
use ds4_text::detokenize::OutputDelta;

use crate::terminal::{self, Style};

/// Prints reasoning and answer so that they can be told apart: on a terminal reasoning is dimmed,
/// or titled where there are no colours; elsewhere it goes to stderr.
pub struct Printer {
    is_terminal: bool,
    stderr_is_terminal: bool,
    dim: Style,
    last: Option<Part>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    Reasoning,
    Answer,
}

impl Printer {
    /// Prints to stdout.
    pub fn new() -> Self {
        let stdout = io::stdout();
        Printer {
            is_terminal: stdout.is_terminal(),
            stderr_is_terminal: io::stderr().is_terminal(),
            dim: Style::DIM.on(&stdout),
            last: None,
        }
    }

    /// Prints what a token added.
    pub fn print(&mut self, delta: &OutputDelta) -> Result<()> {
        self.part(Part::Reasoning, &delta.reasoning)?;
        self.part(Part::Answer, &delta.answer)
    }

    /// Ends the last line.
    pub fn end(&mut self) -> Result<()> {
        if let Some(part) = self.last {
            self.write(part, "\n")?;
        }
        Ok(())
    }

    fn part(&mut self, part: Part, text: &str) -> Result<()> {
        if text.is_empty() {
            return Ok(());
        }
        let titled = self.is_terminal && self.dim.is_plain();
        match (self.last, part) {
            (None, Part::Reasoning) if titled => self.write(part, "Thinking:\n")?,
            (Some(Part::Reasoning), Part::Answer) => {
                let title = if titled { "\n\nAnswer:\n" } else { "\n\n" };
                self.write(Part::Reasoning, title)?;
            }
            _ => {}
        }
        self.last = Some(part);
        self.write(part, text)
    }

    fn write(&self, part: Part, text: &str) -> Result<()> {
        match part {
            Part::Reasoning if !self.is_terminal => {
                let text = match self.stderr_is_terminal {
                    true => terminal::printable(text),
                    false => text.into(),
                };
                // Only the answer must arrive.
                let _ = io::stderr().write_all(text.as_bytes());
            }
            Part::Reasoning => {
                let (start, end) = (self.dim.start(), self.dim.end());
                self.to_stdout(format_args!("{start}{}{end}", terminal::printable(text)))?;
            }
            Part::Answer if self.is_terminal => {
                self.to_stdout(format_args!("{}", terminal::printable(text)))?;
            }
            Part::Answer => self.to_stdout(format_args!("{text}"))?,
        }
        Ok(())
    }

    fn to_stdout(&self, text: std::fmt::Arguments<'_>) -> io::Result<()> {
        let mut out = io::stdout().lock();
        out.write_fmt(text)?;
        out.flush()
    }
}
