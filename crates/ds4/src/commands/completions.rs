//! `ds4 completions` and `ds4 man`: both made from the definition of the command line.

use std::io::{self, Write};

use anyhow::{Context, Result};
use clap::{Args, Command};
use clap_complete::Shell;

/// Options of `ds4 completions`.
#[derive(Args)]
#[command(after_help = "\
Examples:
  ds4 completions bash > ~/.local/share/bash-completion/completions/ds4
  ds4 completions zsh > ~/.zfunc/_ds4
  ds4 completions fish > ~/.config/fish/completions/ds4.fish")]
pub struct CompletionsArgs {
    /// Shell to complete in.
    shell: Shell,
}

/// Options of `ds4 man`.
#[derive(Args)]
pub struct ManArgs {
    /// Command to describe, such as `run` [default: ds4 itself].
    command: Option<String>,
}

/// Prints the completion script of `ds4`.
pub fn run(args: &CompletionsArgs, mut ds4: Command) -> Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut ds4, "ds4", &mut script);
    Ok(io::stdout().write_all(&script)?)
}

/// Prints the manual page of `ds4` or one of its commands.
pub fn man(args: &ManArgs, mut ds4: Command) -> Result<()> {
    ds4.build();
    let command = match &args.command {
        Some(name) => ds4
            .find_subcommand(name)
            .with_context(|| format!("{name}: not a command of ds4: see ds4 --help"))?,
        None => &ds4,
    };
    let mut page = Vec::new();
    clap_mangen::Man::new(command.clone()).render(&mut page)?;
    Ok(io::stdout().write_all(&page)?)
}
