//! The command line as a whole; each command's own options are beside its code.

use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

use crate::{
    commands::{
        bench, completions, eval, imatrix, inspect, logits, perplexity, quantize, run, serve,
        synth, tokenize,
    },
    model,
};

/// Run DeepSeek V4 Flash locally.
#[derive(Parser)]
#[command(name = "ds4", version, max_term_width = 100, after_help = after_help())]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

fn after_help() -> String {
    let place = model::models_directory_name().unwrap_or_else(|| "the models directory".to_owned());
    format!(
        "{EXAMPLES}\n\nWithout -m, commands use $DS4_MODEL, else the newest model in {place},\n\
         else a small model built into the program."
    )
}

const EXAMPLES: &str = "\
Examples:
  ds4 run                                 Chat in the terminal
  ds4 run -p 'Why is the sky blue?'       Answer one question
  ds4 run --nothink < notes.txt           The prompt from standard input
  ds4 inspect -m model.gguf --ctx 100000  What is in a file, and the memory it needs";

#[derive(Subcommand)]
enum Command {
    /// Chat, or answer one prompt.
    Run(run::RunArgs),
    /// Serve OpenAI and Anthropic clients over HTTP, and a page to chat on.
    Serve(serve::ServeArgs),
    /// Say what a model file holds and how much memory it needs.
    Inspect(inspect::InspectArgs),
    /// Show how the model reads a text or a chat request.
    Tokenize(tokenize::TokenizeArgs),
    /// Make a model of real shape with random weights.
    Synth(synth::SynthArgs),
    /// Convert a checkpoint or a model to smaller types.
    Quantize(quantize::QuantizeArgs),
    /// Measure which columns of the experts matter, for quantize.
    Imatrix(imatrix::ImatrixArgs),
    /// Answer and grade a suite of prompts.
    Eval(eval::EvalArgs),
    /// Measure how well a model predicts a text, and how far it is from another.
    Perplexity(perplexity::PerplexityArgs),
    /// Measure the speed of prefill and decode.
    Bench(bench::BenchArgs),
    /// Write the logits for given tokens to a file.
    Logits(logits::LogitsArgs),
    /// Print a completion script for a shell.
    Completions(completions::CompletionsArgs),
    /// Print the manual page of ds4, or of one of its commands.
    #[command(hide = true)]
    Man(completions::ManArgs),
}

impl Cli {
    /// Runs the command.
    pub fn run(self) -> anyhow::Result<ExitCode> {
        match self.command {
            Command::Run(args) => return run::run(&args),
            Command::Serve(args) => serve::run(&args)?,
            Command::Tokenize(args) => tokenize::run(&args)?,
            Command::Synth(args) => return synth::run(&args),
            Command::Eval(args) => return eval::run(&args),
            Command::Perplexity(args) => return perplexity::run(&args),
            Command::Quantize(args) => return quantize::run(&args),
            Command::Imatrix(args) => return imatrix::run(&args),
            Command::Inspect(args) => inspect::run(&args)?,
            Command::Bench(args) => bench::run(&args)?,
            Command::Logits(args) => logits::run(&args)?,
            Command::Completions(args) => completions::run(&args, Cli::command())?,
            Command::Man(args) => completions::man(&args, Cli::command())?,
        }
        Ok(ExitCode::SUCCESS)
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        super::Cli::command().debug_assert();
    }
}
