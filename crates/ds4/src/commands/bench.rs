//! `ds4 bench`: speed of prefill and decode at given depths of context.
//!
//! The method of frontiers: one fixed sequence of tokens; at each depth the tokens since the depth
//! before are prefilled and timed, then a fixed number of tokens is decoded greedily and timed, and
//! the session goes back. So a row depends neither on the rows before it nor on what the model
//! happens to answer. Several sessions that decode together start at the same depth, each with
//! another token. Untimed rounds come first: they fill caches and make what is made once.

use std::{
    fs,
    num::NonZeroUsize,
    path::{Path, PathBuf},
    str::FromStr,
};

use anyhow::{Context, Result, ensure};
use clap::Args;
use ds4_engine::TokenId;
use ds4_model::Model;

use crate::{compute::ComputeArgs, model::ModelArgs, text};

mod machine;
mod measure;
mod plot;
mod report;

use machine::Machine;
use measure::Bench;
use report::Report;

/// Options of `ds4 bench`.
#[derive(Args)]
#[command(after_help = "\
Examples:
  ds4 bench                                  512 tokens of prompt, 64 of answer
  ds4 bench --ctx 2k..32k --svg speed.svg    at 2048, 4096, … 32768 tokens of context
  ds4 bench --dummy flash-q2:4               four layers of the real widths, without a file
  ds4 bench --sessions 1,4,16,32             sessions that decode together
  ds4 bench --prompt-file novel.txt --csv results.csv

The share is that of the memory bandwidth measured in the same run: decode cannot exceed it.")]
pub struct BenchArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Depths of context to measure at, ascending: numbers of tokens; 2k is 2048, 2k..32k all
    /// doublings from one to the other
    #[arg(long, value_name = "LIST", default_value = "512")]
    ctx: Counts,
    /// Tokens to prefill and time before each depth [default: all since the depth before]
    #[arg(long, value_name = "N")]
    prefill: Option<NonZeroUsize>,
    /// Tokens to decode and time at each depth (0: prefill only)
    #[arg(long, value_name = "N", default_value = "64")]
    decode: usize,
    /// Numbers of sessions that decode together, such as 1,4,16
    #[arg(long, value_name = "LIST", default_value = "1")]
    sessions: Counts,
    /// Runs of each measurement; the median is reported
    #[arg(long, value_name = "N", default_value = "3")]
    repeat: NonZeroUsize,
    /// Text to read [default: random tokens]
    #[arg(long, value_name = "FILE")]
    prompt_file: Option<PathBuf>,
    /// Write the table as CSV too
    #[arg(long, value_name = "FILE")]
    csv: Option<PathBuf>,
    /// Write everything measured as JSON too
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Draw the table as a plot too
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    #[command(flatten)]
    compute: ComputeArgs,
}

/// Ascending numbers, none of them 0.
#[derive(Debug, Clone, PartialEq)]
struct Counts(Vec<usize>);

/// Measures and reports.
pub fn run(args: &BenchArgs) -> Result<()> {
    let model = args.model.open()?;
    let deepest = args.deepest(&model)?;
    let engine = args.compute.engine(model.clone(), args.context(deepest))?;
    let text = args.text(&model, deepest)?;
    engine.warm_up(args.sessions.0.last().copied().unwrap_or(1))?;
    let mut report = Report::new(&model, Machine::of(&engine)?);
    report.print_head()?;
    let measured = Bench::new(&engine, &model, args, &text)?.run(&mut report);
    // What was measured before something failed is worth keeping.
    write(args.csv.as_deref(), || Ok(report.csv().into_bytes()))?;
    write(args.json.as_deref(), || Ok(serde_json::to_vec_pretty(&report.json())?))?;
    write(args.svg.as_deref(), || Ok(plot::svg(&report)?.into_bytes()))?;
    measured
}

fn write(path: Option<&Path>, content: impl FnOnce() -> Result<Vec<u8>>) -> Result<()> {
    match path {
        Some(path) => fs::write(path, content()?).with_context(|| path.display().to_string()),
        None => Ok(()),
    }
}

impl BenchArgs {
    /// The last depth; all are checked.
    fn deepest(&self, model: &Model) -> Result<usize> {
        let Counts(depths) = &self.ctx;
        let (first, last) = (depths[0], depths[depths.len() - 1]);
        let prefill = self.prefill.map_or(1, NonZeroUsize::get);
        ensure!(
            first >= prefill,
            "--ctx: found {first}, expected at least {prefill}, the tokens of --prefill"
        );
        let limit = model.config.context_length;
        ensure!(
            last.saturating_add(self.decode) <= limit,
            "--ctx: {last} and {} decoded tokens are more than {limit}, the model's longest context",
            self.decode,
        );
        Ok(last)
    }

    /// Tokens that all sessions hold together at most.
    fn context(&self, deepest: usize) -> usize {
        let most = self.sessions.0.last().copied().unwrap_or(1);
        deepest.saturating_add(self.decode).saturating_mul(most)
    }

    fn text(&self, model: &Model, n: usize) -> Result<Vec<TokenId>> {
        let Some(path) = &self.prompt_file else {
            let mut rng = fastrand::Rng::with_seed(1);
            return Ok((0..n).map(|_| rng.u32(..model.config.vocab as u32)).collect());
        };
        let name = path.display();
        let text = fs::read_to_string(path).with_context(|| name.to_string())?;
        let mut tokens = text::tokenizer(model)?.encode(&text)?;
        let found = tokens.len();
        ensure!(found >= n, "{name}: found {found} tokens, expected {n} or more for this --ctx");
        tokens.truncate(n);
        Ok(tokens)
    }
}

impl FromStr for Counts {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || "expected ascending numbers such as `512,2k,8k`, or `2k..32k`".to_owned();
        let mut counts = Vec::new();
        for item in text.split(',') {
            let (first, last) = item.split_once("..").unwrap_or((item, item));
            let first = count(first).ok_or_else(wrong)?;
            let last = count(last).ok_or_else(wrong)?;
            let doublings = std::iter::successors(Some(first), |n| n.checked_mul(2));
            counts.extend(doublings.take_while(|n| *n <= last));
            if first > last {
                return Err(wrong());
            }
        }
        if counts.is_sorted_by(|a, b| a < b) { Ok(Counts(counts)) } else { Err(wrong()) }
    }
}

/// A number above 0; `k` stands for 1024.
fn count(text: &str) -> Option<usize> {
    let text = text.trim();
    let (digits, unit) = text.strip_suffix('k').map_or((text, 1), |digits| (digits, 1024));
    digits.parse::<usize>().ok()?.checked_mul(unit).filter(|n| *n > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_parsed() {
        assert_eq!("512".parse(), Ok(Counts(vec![512])));
        assert_eq!("512, 2k".parse(), Ok(Counts(vec![512, 2048])));
        assert_eq!("1k..4k,6000".parse(), Ok(Counts(vec![1024, 2048, 4096, 6000])));
        for wrong in ["", "0", "512,512", "2048,512", "1m", "512,", "4k..2k", "1..0", "..4", "k"] {
            assert!(wrong.parse::<Counts>().is_err(), "{wrong}");
        }
    }
}
