//! Prompt in, tokens out: prefill in chunks, then one token after the other until something ends
//! the answer.

use std::time::{Duration, Instant};

use anyhow::Result;
use ds4_engine::{
    Engine, Phase, Session, StepOutput, TokenId, Wanted, Work,
    sampling::{self, Sampler, TokenLogprob},
};
use indicatif::ProgressBar;
use serde::Serialize;

use crate::interrupt;

/// How to continue a session.
pub struct Limits<'a> {
    /// Tokens that the session may hold.
    pub context: usize,
    /// Tokens that the answer may have.
    pub answer: usize,
    /// Tokens that end the answer.
    pub stops: &'a [TokenId],
    /// How many of the likeliest tokens to report with each; `None` reports no probabilities.
    pub top_logprobs: Option<usize>,
}

impl Limits<'_> {
    /// What [`decode`] with `sampler` needs of each step.
    pub fn wanted(&self, sampler: &Sampler) -> Wanted {
        if self.top_logprobs.is_some() { Wanted::Logits } else { sampler.wants() }
    }
}

/// A token of the answer.
pub struct Drawn {
    /// The token.
    pub token: TokenId,
    /// Its log-probability at temperature 1, and the likeliest tokens, if asked for.
    pub logprobs: Option<(f32, Vec<TokenLogprob>)>,
}

/// Why the answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Finish {
    /// The model ended it.
    Stop,
    /// It has as many tokens as allowed.
    Length,
    /// The session has as many tokens as allowed.
    ContextFull,
    /// Ctrl-C.
    Interrupted,
}

/// Tokens and the time they took.
#[derive(Debug, Clone, Copy, Default)]
pub struct Speed {
    /// Tokens computed.
    pub tokens: usize,
    /// In this time.
    pub time: Duration,
}

impl Speed {
    /// Tokens per second; 0 for no tokens.
    pub fn per_second(self) -> f64 {
        if self.tokens == 0 { 0.0 } else { self.tokens as f64 / self.time.as_secs_f64() }
    }
}

/// Appends `tokens` and returns what is wanted of the last chunk; `None` if Ctrl-C came first,
/// and then the session holds a part of them.
pub fn prefill(
    engine: &Engine,
    session: &mut Session,
    tokens: &[TokenId],
    wanted: Option<Wanted>,
    bar: Option<&ProgressBar>,
    speed: &mut Speed,
) -> Result<Option<StepOutput>> {
    let mut logits = StepOutput::default();
    let size = engine.backend().prefill_chunk();
    let last = tokens.len().div_ceil(size);
    for (i, chunk) in (1..).zip(tokens.chunks(size)) {
        if interrupt::pressed() {
            return Ok(None);
        }
        // The head reads as much as a layer; what nobody asks for is not computed.
        let wanted = wanted.filter(|_| i == last);
        logits = step(engine, session, chunk, Phase::Prefill, wanted, speed)?;
        if let Some(bar) = bar {
            bar.inc(chunk.len() as u64);
        }
    }
    Ok(Some(logits))
}

/// Appends `tokens` in one step; returns the logits that are wanted.
pub fn step(
    engine: &Engine,
    session: &mut Session,
    tokens: &[TokenId],
    phase: Phase,
    wanted: Option<Wanted>,
    speed: &mut Speed,
) -> Result<StepOutput> {
    let start = Instant::now();
    let work = Work { session, tokens, phase, wanted: wanted.as_slice() };
    let mut logits = engine.step(&mut [work])?;
    speed.tokens += tokens.len();
    speed.time += start.elapsed();
    Ok(logits.remove(0))
}

/// Continues a session that has just produced `logits`, those of [`Limits::wanted`]; gives every token to `each`.
pub fn decode(
    engine: &Engine,
    session: &mut Session,
    mut logits: StepOutput,
    sampler: &mut Sampler,
    limits: &Limits<'_>,
    speed: &mut Speed,
    mut each: impl FnMut(Drawn) -> Result<()>,
) -> Result<Finish> {
    for left in (0..limits.answer).rev() {
        if interrupt::pressed() {
            return Ok(Finish::Interrupted);
        }
        let token = sampler.sample_after(&logits)?;
        if limits.stops.contains(&token) {
            return Ok(Finish::Stop);
        }
        let logprobs = limits.top_logprobs.zip(logits.last_logits());
        let logprobs = logprobs.map(|(n, row)| sampling::logprobs(row, token, n)).transpose()?;
        each(Drawn { token, logprobs })?;
        if session.len() >= limits.context {
            return Ok(Finish::ContextFull);
        }
        // The logits after the last token are of no use.
        if left > 0 {
            let wanted = Some(limits.wanted(sampler));
            logits = step(engine, session, &[token], Phase::Decode, wanted, speed)?;
        }
    }
    Ok(Finish::Length)
}
