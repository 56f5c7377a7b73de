//! Answers many cases at once.
//!
//! A fixed number of sessions is kept busy: each step decodes a token for every case that is being
//! answered and reads a piece of the prompts of others. Tokens are the most likely ones, and a
//! session's logits don't depend on what else is in a step, so answers don't depend on how many
//! cases run at once.

use std::{collections::HashMap, ops::ControlFlow};

use ds4_engine::{Backend, Engine, LogitsWanted, Session, TokenId, Work};
use ds4_text::{
    detokenize::{OutputDelta, OutputSplitter},
    prompt::PromptEncoder,
};
use serde::{Deserialize, Serialize};

use crate::{Error, Result, suite::Case};

/// Tokens of prompts that are read in one step.
const PROMPT_TOKENS: usize = 512;

/// How to answer.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// Cases that are answered at once.
    pub at_once: usize,
    /// Tokens that an answer may have, where the case doesn't say.
    pub max_tokens: usize,
}

/// Whether an answer is right.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// It is.
    Right,
    /// It is not.
    Wrong,
}

/// A graded answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Answer {
    /// Id of the case.
    pub id: String,
    /// Its task.
    pub task: String,
    /// The verdict.
    pub verdict: Verdict,
    /// Whether the answer reached its limit of tokens before it ended.
    pub cut: bool,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens of the answer, the end not counted.
    pub answer_tokens: usize,
    /// Its reasoning.
    pub reasoning: String,
    /// What was graded.
    pub answer: String,
    /// Hash of the case, in hexadecimal.
    pub case: String,
}

/// How far a run is.
#[derive(Debug, Clone, Copy, Default)]
pub struct Status {
    /// Cases that were answered.
    pub answered: usize,
    /// Tokens that were computed.
    pub tokens: usize,
}

impl Answer {
    /// Grades the answer again; `None` if it is an answer to another case.
    pub fn regraded(mut self, case: &Case) -> Option<Answer> {
        if self.case != hex(&case.hash) {
            return None;
        }
        self.verdict = verdict(case, &self.answer);
        self.task = case.task.clone();
        Some(self)
    }
}

/// Of `earlier` answers those to `cases`, graded again, and the cases without one.
pub fn resume(cases: &[Case], earlier: Vec<Answer>) -> (Vec<Answer>, Vec<&Case>) {
    let mut by_id: HashMap<String, Answer> =
        earlier.into_iter().map(|answer| (answer.id.clone(), answer)).collect();
    let (mut answers, mut rest) = (Vec::new(), Vec::new());
    for case in cases {
        match by_id.remove(&case.id).and_then(|answer| answer.regraded(case)) {
            Some(answer) => answers.push(answer),
            None => rest.push(case),
        }
    }
    (answers, rest)
}

/// Answers `cases` and gives each answer to `answered` as soon as it is complete. `progress`
/// hears of every step and stops the run by breaking.
///
/// # Errors
/// [`Error::Stopped`] if it was stopped, or if a case is too long, or the engine or `answered`
/// fails.
pub fn run<B: Backend>(
    engine: &Engine<B>,
    encoder: &PromptEncoder,
    cases: &[&Case],
    settings: Settings,
    mut answered: impl FnMut(Answer) -> Result<()>,
    mut progress: impl FnMut(Status) -> ControlFlow<()>,
) -> Result<()> {
    let mut waiting = cases.iter();
    let mut active: Vec<Active<'_, B>> = Vec::new();
    let mut status = Status::default();
    loop {
        while active.len() < settings.at_once.max(1) {
            let Some(case) = waiting.next() else { break };
            active.push(Active::new(engine, encoder, case, settings)?);
        }
        if active.is_empty() {
            return Ok(());
        }
        status.tokens += step(engine, &mut active)?;
        for index in (0..active.len()).rev() {
            if active[index].ended.is_some() {
                answered(active.swap_remove(index).finish())?;
                status.answered += 1;
            }
        }
        if progress(status).is_break() {
            return Err(Error::Stopped);
        }
    }
}

/// A case that is being answered.
struct Active<'c, B: Backend> {
    case: &'c Case,
    session: Session<B>,
    /// Prompt, and what was sampled after it.
    tokens: Vec<TokenId>,
    prompt_tokens: usize,
    limit: usize,
    stops: Vec<TokenId>,
    splitter: OutputSplitter,
    output: OutputDelta,
    ended: Option<Ended>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Ended {
    ByItself,
    AtTheLimit,
}

impl<'c, B: Backend> Active<'c, B> {
    fn new(
        engine: &Engine<B>,
        encoder: &PromptEncoder,
        case: &'c Case,
        settings: Settings,
    ) -> Result<Self> {
        let failed = |source| Error::Prompt { case: case.id.clone(), source: Box::new(source) };
        let tokens = encoder.encode(&case.conversation).map_err(failed)?.ids;
        let limit = case.max_tokens.unwrap_or(settings.max_tokens).max(1);
        let (found, longest) = (tokens.len() + limit, engine.config().context_length);
        if found > longest {
            return Err(Error::LongCase { case: case.id.clone(), found, limit: longest });
        }
        let tokenizer = encoder.tokenizer().clone();
        Ok(Active {
            case,
            session: engine.new_session()?,
            prompt_tokens: tokens.len(),
            limit,
            stops: tokenizer.special().turn_ends().to_vec(),
            splitter: OutputSplitter::after_prompt(tokenizer, &tokens),
            tokens,
            output: OutputDelta::default(),
            ended: None,
        })
    }

    /// Tokens that the session doesn't hold yet.
    fn pending(&self) -> usize {
        self.tokens.len() - self.session.len()
    }

    /// Takes the next token.
    fn take(&mut self, token: TokenId) {
        if self.stops.contains(&token) {
            self.ended = Some(Ended::ByItself);
            return;
        }
        self.tokens.push(token);
        let delta = self.splitter.push(token);
        self.add(delta);
        if self.tokens.len() - self.prompt_tokens >= self.limit {
            self.ended = Some(Ended::AtTheLimit);
        }
    }

    fn add(&mut self, delta: OutputDelta) {
        self.output.reasoning.push_str(&delta.reasoning);
        self.output.answer.push_str(&delta.answer);
    }

    fn finish(mut self) -> Answer {
        let splitter = self.splitter;
        let rest = splitter.finish();
        self.output.reasoning.push_str(&rest.reasoning);
        self.output.answer.push_str(&rest.answer);
        Answer {
            id: self.case.id.clone(),
            task: self.case.task.clone(),
            verdict: verdict(self.case, &self.output.answer),
            cut: self.ended == Some(Ended::AtTheLimit),
            prompt_tokens: self.prompt_tokens,
            answer_tokens: self.tokens.len() - self.prompt_tokens,
            reasoning: self.output.reasoning,
            answer: self.output.answer,
            case: hex(&self.case.hash),
        }
    }
}

/// One step for all that have something to compute; returns the tokens computed.
fn step<B: Backend>(engine: &Engine<B>, active: &mut [Active<'_, B>]) -> Result<usize> {
    let mut room = PROMPT_TOKENS;
    let mut wanted = Vec::with_capacity(active.len());
    for case in active.iter() {
        let count = match case.pending() {
            1 => 1,
            pending => {
                let count = pending.min(room);
                room -= count;
                count
            }
        };
        wanted.push(count);
    }
    let mut indices = Vec::new();
    let mut work = Vec::new();
    for (index, (case, &count)) in active.iter_mut().zip(&wanted).enumerate() {
        if count == 0 {
            continue;
        }
        let start = case.session.len();
        let is_last = start + count == case.tokens.len();
        indices.push(index);
        work.push(Work {
            session: &mut case.session,
            tokens: &case.tokens[start..start + count],
            logits: if is_last { LogitsWanted::Best } else { LogitsWanted::None },
        });
    }
    let logits = engine.step(&mut work)?;
    for (index, logits) in indices.into_iter().zip(logits) {
        if let Some(token) = logits.best() {
            active[index].take(token?);
        }
    }
    Ok(wanted.iter().sum())
}

fn verdict(case: &Case, answer: &str) -> Verdict {
    if case.grader.is_right(answer) { Verdict::Right } else { Verdict::Wrong }
}

fn hex(hash: &[u8; 32]) -> String {
    blake3::Hash::from_bytes(*hash).to_hex()[..16].to_owned()
}
