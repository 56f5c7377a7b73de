//! `ds4 bench`: speed of prefill and decode at given depths of context.
//!
//! At each depth the last tokens before it are prefilled and timed, then a fixed number of tokens
//! is decoded greedily and timed, and the session goes back. So a row depends neither on the rows
//! before it nor on what the model happens to answer. A first, untimed round fills caches.

use std::{
    fs,
    num::NonZeroUsize,
    path::{Path, PathBuf},
    str::FromStr,
};

use anyhow::{Context, Result, ensure};
use clap::Args;
use ds4_engine::{Backend, LogitsWanted, TokenId, sampling};
use ds4_model::Model;
use indicatif::ProgressBar;

use crate::{
    compute::{ComputeArgs, Engine, Session},
    generation::{self, Speed},
    memory,
    model::ModelArgs,
    terminal::{self, Unit},
    text,
};

mod bandwidth;
mod report;

use report::{Machine, Report, Row};

/// Options of `ds4 bench`.
#[derive(Args)]
#[command(after_help = "\
Examples:
  ds4 bench                                  512 tokens of prompt, 64 of answer
  ds4 bench --ctx 2048,8192,32768            the same at three depths of context
  ds4 bench --prompt-file novel.txt --csv results.csv

The share is that of the memory bandwidth measured in the same run: decode cannot exceed it.")]
pub struct BenchArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Depths of context to measure at, ascending [default: as many as --prefill]
    #[arg(long, value_name = "LIST")]
    ctx: Option<Depths>,
    /// Tokens to prefill and time before each depth
    #[arg(long, value_name = "N", default_value = "512")]
    prefill: NonZeroUsize,
    /// Tokens to decode and time at each depth (0: prefill only)
    #[arg(long, value_name = "N", default_value = "64")]
    decode: usize,
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
    #[command(flatten)]
    compute: ComputeArgs,
}

/// Depths of context, ascending.
#[derive(Debug, Clone, PartialEq)]
struct Depths(Vec<usize>);

/// Measures and reports.
pub fn run(args: &BenchArgs) -> Result<()> {
    let model = args.model.open()?;
    let engine = args.compute.engine(model.clone())?;
    let depths = args.depths(&engine)?;
    let text = args.text(&model, depths[depths.len() - 1])?;
    let machine = Machine {
        kernels: args.compute.kernels().to_string(),
        threads: rayon::current_num_threads(),
        read_bytes_per_second: bandwidth::measure(),
    };
    let mut report = Report::new(&model, machine);
    report.print_head()?;
    let rounds = depths.len() * args.repeat.get() + 1;
    let mut bench = Bench {
        engine: &engine,
        model: &model,
        args,
        session: engine.new_session()?,
        // A model without a tokenizer can be measured all the same.
        end: text::tokenizer(&model).ok().map(|tokenizer| tokenizer.special().eos),
        bar: terminal::progress_bar(rounds as u64, "measuring", Unit::Steps),
    };
    for (i, &depth) in depths.iter().enumerate() {
        let row = bench.measure(&text[..depth], i == 0)?;
        bench.bar.suspend(|| report.add(row))?;
    }
    bench.bar.finish_and_clear();
    write(args.csv.as_deref(), || Ok(report.csv().into_bytes()))?;
    write(args.json.as_deref(), || Ok(serde_json::to_vec_pretty(&report.json())?))
}

fn write(path: Option<&Path>, content: impl FnOnce() -> Result<Vec<u8>>) -> Result<()> {
    match path {
        Some(path) => fs::write(path, content()?).with_context(|| path.display().to_string()),
        None => Ok(()),
    }
}

impl BenchArgs {
    fn depths(&self, engine: &Engine) -> Result<Vec<usize>> {
        let prefill = self.prefill.get();
        let depths = self.ctx.as_ref().map_or(vec![prefill], |depths| depths.0.clone());
        let (first, last) = (depths[0], depths[depths.len() - 1]);
        ensure!(
            first >= prefill,
            "--ctx: found {first}, expected at least {prefill}, the tokens of --prefill"
        );
        let limit = engine.config().context_length;
        ensure!(
            last.saturating_add(self.decode) <= limit,
            "--ctx: {last} and {} decoded tokens are more than {limit}, the model's longest context",
            self.decode,
        );
        Ok(depths)
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

struct Bench<'a> {
    engine: &'a Engine,
    model: &'a Model,
    args: &'a BenchArgs,
    session: Session,
    /// The token that would end the text.
    end: Option<TokenId>,
    bar: ProgressBar,
}

impl Bench<'_> {
    /// Measures at the end of `text`.
    fn measure(&mut self, text: &[TokenId], warm_up: bool) -> Result<Row> {
        let prefill = self.args.prefill.get();
        let (before, interval) = text.split_at(text.len() - prefill);
        self.go_to(before)?;
        let start = self.engine.checkpoint(&self.session);
        let (mut prefill_seconds, mut token_seconds) = (Vec::new(), Vec::new());
        for round in 0..self.args.repeat.get() + usize::from(warm_up) {
            self.engine.truncate(&mut self.session, &start)?;
            let (logits, seconds) = self.prefill(interval)?;
            let end = self.engine.checkpoint(&self.session);
            let tokens = self.decode(logits)?;
            self.engine.truncate(&mut self.session, &end)?;
            if round > 0 || !warm_up {
                prefill_seconds.push(seconds);
                token_seconds.push(tokens);
            }
            self.bar.inc(1);
        }
        let rounding = self.engine.backend().cache_rounding();
        let cache_read = memory::cache_bytes_per_token(&self.model.config, rounding, text.len());
        Ok(Row {
            ctx_tokens: text.len(),
            prefill_tokens: prefill,
            prefill_seconds,
            gen_tokens: self.args.decode,
            token_seconds,
            kvcache_bytes: self.engine.cache_bytes(&self.session) as u64,
            read_bytes_per_token: memory::weight_bytes_per_token(self.model) + cache_read,
        })
    }

    /// Brings the session to where it holds `tokens`, without timing.
    fn go_to(&mut self, tokens: &[TokenId]) -> Result<()> {
        if self.session.len() > tokens.len() {
            self.session = self.engine.new_session()?;
        }
        let rest = &tokens[self.session.len()..];
        if !rest.is_empty() {
            self.prefill(rest)?;
        }
        Ok(())
    }

    /// Appends `tokens`; returns the logits after the last, and the seconds it took.
    fn prefill(&mut self, tokens: &[TokenId]) -> Result<(Vec<f32>, f64)> {
        let mut speed = Speed::default();
        let logits = generation::prefill(
            self.engine,
            &mut self.session,
            tokens,
            LogitsWanted::Last,
            None,
            &mut speed,
        )?;
        Ok((logits.unwrap_or_default(), speed.time.as_secs_f64()))
    }

    /// Decodes greedily, never choosing the token that would end the text; returns the seconds
    /// each token took.
    fn decode(&mut self, mut logits: Vec<f32>) -> Result<Vec<f64>> {
        let mut seconds = Vec::with_capacity(self.args.decode);
        for _ in 0..self.args.decode {
            if let Some(end) = self.end {
                logits[end as usize] = f32::NEG_INFINITY;
            }
            let token = sampling::argmax(&logits)?;
            let mut speed = Speed::default();
            logits = generation::step(
                self.engine,
                &mut self.session,
                &[token],
                LogitsWanted::Last,
                &mut speed,
            )?;
            seconds.push(speed.time.as_secs_f64());
        }
        Ok(seconds)
    }
}

impl FromStr for Depths {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parsed: Option<Vec<usize>> =
            text.split(',').map(|item| item.trim().parse().ok().filter(|n| *n > 0)).collect();
        match parsed {
            Some(depths) if depths.is_sorted_by(|a, b| a < b) => Ok(Depths(depths)),
            _ => Err("expected ascending numbers of tokens, such as `512,2048,8192`".to_owned()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn depths_are_parsed() {
        assert_eq!("512".parse(), Ok(Depths(vec![512])));
        assert_eq!("512, 2048".parse(), Ok(Depths(vec![512, 2048])));
        for wrong in ["", "0", "512,512", "2048,512", "1k", "512,"] {
            assert!(wrong.parse::<Depths>().is_err(), "{wrong}");
        }
    }
}
