//! The measurements themselves.

use std::{iter, slice, time::Instant};

use anyhow::{Context, Result};
use ds4_engine::{
    Engine, Phase, Session, StepOutput, TokenId, Wanted, Work, sampling::UnusableLogits,
};
use ds4_model::Model;
use indicatif::ProgressBar;

use super::{
    BenchArgs,
    report::{Prefill, Report, Row, median},
};
use crate::{
    memory,
    terminal::{self, Unit},
    text,
};

/// Untimed steps before sessions decode together: enough to make what is made once for each
/// number of them.
const WARM_UP_STEPS: usize = 2;

/// A session on its way through the depths.
pub struct Bench<'a> {
    engine: &'a Engine,
    model: &'a Model,
    args: &'a BenchArgs,
    text: &'a [TokenId],
    session: Session,
    /// What it took to read all that the session holds.
    seconds: f64,
    next: Next<'a>,
    bar: ProgressBar,
}

impl<'a> Bench<'a> {
    /// Ready to begin; `text` reaches the last depth.
    pub fn new(
        engine: &'a Engine,
        model: &'a Model,
        args: &'a BenchArgs,
        text: &'a [TokenId],
    ) -> Result<Self> {
        let rounds = args.ctx.0.len() * args.repeat.get() * (1 + args.sessions.0.len());
        Ok(Bench {
            engine,
            model,
            args,
            text,
            session: engine.new_session()?,
            seconds: 0.0,
            next: Next {
                text,
                // A model without a tokenizer can be measured all the same.
                end: text::tokenizer(model).ok().map(|tokenizer| tokenizer.special().eos),
            },
            bar: terminal::progress_bar(rounds as u64, "measuring", Unit::Steps),
        })
    }

    /// Measures at every depth.
    pub fn run(mut self, report: &mut Report) -> Result<()> {
        self.warm_up()?;
        let mut before = 0;
        for &depth in &self.args.ctx.0 {
            let interval = depth - before;
            let timed = self.args.prefill.map_or(interval, |n| n.get().min(interval));
            let (prefill, first) = self.prefill_to(depth, timed)?;
            let mut prefill = Some(prefill);
            for &sessions in &self.args.sessions.0 {
                let row = self
                    .decode(first, sessions, prefill.take())
                    .with_context(|| format!("{sessions} sessions of {depth} tokens"))?;
                self.bar.suspend(|| report.add(row))?;
            }
            before = depth;
        }
        self.bar.finish_and_clear();
        Ok(())
    }

    /// Reads a chunk, so that weights are where they are read from.
    fn warm_up(&mut self) -> Result<()> {
        let chunk = self.engine.backend().prefill_chunk().min(self.text.len());
        self.read(chunk)?;
        self.session = self.engine.new_session()?;
        Ok(())
    }

    /// Brings the session to `depth`, the last `timed` tokens as often as asked for; returns the
    /// token that follows too.
    fn prefill_to(&mut self, depth: usize, timed: usize) -> Result<(Prefill, TokenId)> {
        if depth - timed > self.session.len() {
            self.seconds += self.read(depth - timed)?.0;
        }
        let start = self.engine.checkpoint(&self.session)?;
        let (mut seconds, mut first) = (Vec::new(), 0);
        for _ in 0..self.args.repeat.get() {
            self.engine.truncate(&mut self.session, &start)?;
            let (time, token) = self.read(depth)?;
            seconds.push(time);
            first = token;
            self.bar.inc(1);
        }
        self.seconds += median(seconds.clone());
        Ok((Prefill { tokens: timed, seconds, first_token_seconds: self.seconds }, first))
    }

    /// Reads the text up to `position`; returns the seconds it took, and the token that follows.
    fn read(&mut self, position: usize) -> Result<(f64, TokenId)> {
        let tokens = &self.text[self.session.len()..position];
        let start = Instant::now();
        let chunks = tokens.chunks(self.engine.backend().prefill_chunk());
        let (count, mut best) = (chunks.len(), None);
        for (i, tokens) in (1..).zip(chunks) {
            // The head reads as much as a layer; what nobody asks for is not computed.
            let wanted = if i == count { &[Wanted::Argmax][..] } else { &[] };
            let phase = Phase::Prefill;
            let work = Work { session: &mut self.session, tokens, phase, wanted };
            best = self.engine.step(&mut [work])?.first().and_then(StepOutput::argmax);
        }
        let token = self.next.after(position, best)?;
        Ok((start.elapsed().as_secs_f64(), token))
    }

    /// Decodes with the session and copies of it, and goes back.
    fn decode(&mut self, first: TokenId, sessions: usize, prefill: Option<Prefill>) -> Result<Row> {
        let (engine, depth) = (self.engine, self.session.len());
        let start = engine.checkpoint(&self.session)?;
        let mut copies = self.copies(sessions - 1)?;
        let mut group: Vec<&mut Session> =
            iter::once(&mut self.session).chain(&mut copies).collect();
        let kvcache_bytes: u64 = group.iter().map(|session| session.bytes()).sum();
        let firsts = spread(first, sessions, engine.config().vocab);

        let mut step_seconds = Vec::new();
        let mut round = |steps: usize| {
            let seconds = decode(engine, &mut group, firsts.clone(), steps, self.next)?;
            for session in &mut group {
                engine.truncate(session, &start)?;
            }
            anyhow::Ok(seconds)
        };
        if self.args.decode > 0 {
            round(WARM_UP_STEPS.min(self.args.decode))?;
        }
        for _ in 0..self.args.repeat.get() {
            step_seconds.push(round(self.args.decode)?);
            self.bar.inc(1);
        }
        let (config, rounding) = (&self.model.config, engine.layout().rounding());
        let cache_read = memory::cache_bytes_per_token(config, rounding, depth);
        Ok(Row {
            ctx_tokens: depth,
            sessions,
            prefill,
            gen_tokens: self.args.decode,
            step_seconds,
            kvcache_bytes,
            read_bytes_per_step: memory::weight_bytes_per_step(self.model, sessions)
                + sessions as u64 * cache_read,
        })
    }

    fn copies(&self, n: usize) -> Result<Vec<Session>> {
        (0..n).map(|_| Ok(self.engine.fork(&self.session)?)).collect()
    }
}

/// Decodes greedily with all sessions together, each from its own token on; returns the seconds
/// that each step took.
fn decode(
    engine: &Engine,
    group: &mut [&mut Session],
    mut tokens: Vec<TokenId>,
    steps: usize,
    next: Next<'_>,
) -> Result<Vec<f64>> {
    let mut step = || {
        let start = Instant::now();
        let work = group.iter_mut().zip(&tokens).map(|(session, token)| Work {
            session,
            tokens: slice::from_ref(token),
            phase: Phase::Decode,
            wanted: &[Wanted::Argmax],
        });
        let logits = engine.step(&mut work.collect::<Vec<_>>())?;
        let each = group.iter().zip(&logits);
        tokens = each
            .map(|(session, logits)| next.after(session.len(), logits.argmax()))
            .collect::<Result<_>>()?;
        Ok(start.elapsed().as_secs_f64())
    };
    (0..steps).map(|_| step()).collect()
}

/// What a step says of the likeliest token.
type Best = Result<TokenId, UnusableLogits>;

/// What follows in a session: the likeliest token, but never the one that would end the text.
#[derive(Clone, Copy)]
struct Next<'a> {
    /// Goes on where the model would not.
    text: &'a [TokenId],
    end: Option<TokenId>,
}

impl Next<'_> {
    fn after(self, position: usize, best: Option<Best>) -> Result<TokenId> {
        let best = best.unwrap_or(Err(UnusableLogits))?;
        Ok(if Some(best) == self.end { self.text[position % self.text.len()] } else { best })
    }
}

/// `n` different tokens, `first` among them: sessions that agreed would share their experts.
fn spread(first: TokenId, n: usize, vocab: usize) -> Vec<TokenId> {
    let step = (vocab / n).max(1);
    (0..n).map(|i| ((first as usize + i * step) % vocab) as TokenId).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn sessions_begin_with_different_tokens() {
        let tokens = spread(99, 32, 100);
        assert_eq!(tokens[0], 99);
        assert_eq!(tokens.iter().collect::<HashSet<_>>().len(), 32);
        assert!(tokens.iter().all(|token| *token < 100));
    }

    #[test]
    fn the_end_is_never_chosen() {
        let next = Next { text: &[5, 6, 7], end: Some(1) };
        let after = |position, token| next.after(position, Some(Ok(token))).unwrap();
        assert_eq!(after(4, 2), 2);
        assert_eq!(after(4, 1), 6);
        assert_eq!(Next { end: None, ..next }.after(4, Some(Ok(1))).unwrap(), 1);
        assert!(next.after(4, Some(Err(UnusableLogits))).is_err());
    }
}
