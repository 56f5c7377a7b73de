//! The `ds4` command.
//!
//! This file parses the command line, runs one of [`commands`], and turns an error into one line
//! and an exit code: 1 for errors, 2 for a wrong command line, 130 after Ctrl-C.

#![forbid(unsafe_code)]

mod cli;
mod commands;
mod compute;
mod dummy;
mod interrupt;
mod memory;
mod model;
mod terminal;
mod text;

use std::{io, process::ExitCode};

use clap::Parser;

fn main() -> ExitCode {
    match cli::Cli::parse().run() {
        Ok(code) => code,
        // Whoever read our output has closed it: nobody is left to tell.
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            terminal::print_error(&error);
            ExitCode::FAILURE
        }
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let mut causes = error.chain().filter_map(|cause| cause.downcast_ref::<io::Error>());
    causes.any(|cause| cause.kind() == io::ErrorKind::BrokenPipe)
}
