//! A running request: its session, what it has still to compute, and what its client has still
//! to take.

use std::time::Instant;

use ds4_engine::{Engine, MAX_REWIND, Phase, StepOutput, TokenId, Wanted, Work, sampling::Sampler};
use ds4_text::tokenizer::Tokenizer;

use super::{
    answer::{Answer, Growth},
    outbox::Outbox,
    prefix_cache::{LiveSession, Start},
    queue::Submitted,
};
use crate::request::{Event, Failure, Request};

/// Prompts are cut at multiples of so many tokens, counted from their start.
pub(super) const PREFILL_GRAIN: usize = 8;

/// A request whose turn it is.
pub(super) struct Sequence {
    pub(super) live: LiveSession,
    pub(super) request: Admitted,
    /// How many of the request's pending tokens the step under way computes.
    chunk: usize,
    /// Results that this step returns.
    wanted: Vec<Wanted>,
}

/// A request that was admitted, without its session.
pub(super) struct Admitted {
    pub(super) outbox: Outbox,
    pub(super) since: Instant,
    pub(super) deadline: Option<Instant>,
    /// Tokens to compute next: the rest of the prompt, and then tokens of the answer.
    pending: Vec<TokenId>,
    /// Tokens of the prompt.
    prompt: usize,
    /// Positions in the prompt at which to make a checkpoint, ascending.
    checkpoints: Vec<usize>,
    answer: Answer,
    /// Tokens that the session may hold.
    context: usize,
}

impl Admitted {
    /// Tokens that are to be computed.
    pub(super) fn pending(&self) -> usize {
        self.pending.len()
    }
}

/// What a step of the engine needs of a sequence, and what can be done meanwhile.
pub(super) struct Parts<'a> {
    pub(super) work: Work<'a>,
    pub(super) outbox: &'a mut Outbox,
    pub(super) answer: &'a mut Answer,
}

/// What a step made of a sequence.
#[derive(Debug, PartialEq)]
pub(super) enum Outcome {
    /// It goes on.
    Running,
    /// It is over.
    Ended(Event),
}

impl Sequence {
    /// Begins a request on a session that holds the first tokens of its prompt.
    pub(super) fn new(
        submitted: Submitted,
        start: Start,
        context: usize,
        tokenizer: &Tokenizer,
    ) -> Self {
        let Submitted { request, events, since } = submitted;
        let Request { prompt, max_tokens, sampling, seed, top_logprobs, grammar, deadline, .. } =
            request;
        let cached = start.live.session.len();
        let mut outbox = Outbox::new(events);
        outbox.push(Event::Started { cached });
        let request = Admitted {
            outbox,
            since,
            deadline,
            pending: prompt[cached..].to_vec(),
            prompt: prompt.len(),
            checkpoints: checkpoint_positions(&prompt, tokenizer),
            answer: Answer {
                grammar,
                ahead: None,
                sampler: Sampler::new(sampling, seed),
                top_logprobs,
                tokens_left: max_tokens,
            },
            context,
        };
        Sequence::resume(request, start.live)
    }

    /// Gives the session up. All its tokens are to be computed again, each in the phase in which
    /// it was computed before.
    pub(super) fn preempt(self) -> Admitted {
        let mut request = self.request;
        request.pending.splice(..0, self.live.session.tokens().iter().copied());
        request
    }

    /// Goes on with a request on a session that holds all tokens that are not pending.
    pub(super) fn resume(request: Admitted, live: LiveSession) -> Self {
        Sequence { live, request, chunk: 0, wanted: Vec::new() }
    }

    /// Tokens of the prompt that are still to be prefilled: all but the last, which is decoded with
    /// the answer's. It needs a step of its own, since there is a checkpoint before it, and a step of
    /// one row is cheaper in decode.
    pub(super) fn prefill_left(&self) -> usize {
        (self.request.prompt - 1).saturating_sub(self.live.session.len())
    }

    /// Tokens that the session may hold in the end, with an answer of `answer` tokens or what is
    /// left of it.
    pub(super) fn expected_tokens(&self, answer: usize) -> usize {
        let request = &self.request;
        let answer = answer.min(request.answer.tokens_left);
        (self.live.session.len() + request.pending.len() + answer).min(request.context)
    }

    /// Chooses the chunk of the prompt that the next step computes: about `tokens`, up to the end of
    /// a grain or to a checkpoint. Returns its tokens.
    pub(super) fn plan_prompt(&mut self, tokens: usize) -> usize {
        let start = self.live.session.len();
        let grains = (start + tokens) / PREFILL_GRAIN;
        let end = grains.max(start / PREFILL_GRAIN + 1) * PREFILL_GRAIN;
        let checkpoint = self.request.checkpoints.iter().find(|at| **at > start);
        let end = end.min(checkpoint.copied().unwrap_or(self.request.prompt - 1));
        self.plan(end - start)
    }

    /// Chooses the tokens that the next step decodes: as many as can be decoded at once. Returns how
    /// many.
    pub(super) fn plan_answer(&mut self) -> usize {
        self.plan(self.request.pending.len().min(MAX_REWIND))
    }

    fn plan(&mut self, chunk: usize) -> usize {
        self.chunk = chunk;
        self.wanted.clear();
        if chunk == self.request.pending.len() {
            self.wanted.push(self.request.answer.wanted());
        }
        chunk
    }

    /// The planned work, and the rest.
    pub(super) fn parts(&mut self) -> Parts<'_> {
        let phase = if self.prefill_left() > 0 { Phase::Prefill } else { Phase::Decode };
        let (session, tokens) = (&mut self.live.session, &self.request.pending[..self.chunk]);
        let work = Work { session, tokens, phase, wanted: &self.wanted };
        Parts { work, outbox: &mut self.request.outbox, answer: &mut self.request.answer }
    }

    /// The planned work is done.
    pub(super) fn stepped(&mut self, engine: &Engine) {
        self.request.pending.drain(..self.chunk);
        self.chunk = 0;
        let position = self.live.session.len();
        if let Some(left) = self.request.prompt.checked_sub(position) {
            self.request.outbox.hold(Event::Prefill { left });
        }
        if position < self.request.prompt {
            self.live.note_prefilled();
            if self.request.checkpoints.contains(&position) {
                self.live.checkpoint(engine);
            }
        }
    }

    /// Adds to the answer, if the step said what comes next.
    pub(super) fn extend(&mut self, tokenizer: &Tokenizer, output: &StepOutput) -> Outcome {
        if output.is_empty() {
            return Outcome::Running;
        }
        let grown = self.request.answer.grow(&mut Growth {
            tokenizer,
            output,
            most: self.request.context - self.live.session.len(),
            pending: &mut self.request.pending,
            outbox: &mut self.request.outbox,
        });
        match grown {
            Ok(None) => Outcome::Running,
            Ok(Some(finish)) => Outcome::Ended(Event::Finished(finish)),
            Err(reason) => Outcome::Ended(Event::Failed(Failure::Engine(reason))),
        }
    }
}

/// Positions at which checkpoints pay: the end of the system text and tools, which other
/// conversations share; the beginning of the last user turn, which may be edited; and the place
/// before the last token, since a later prompt without tools begins this turn without its
/// reasoning.
fn checkpoint_positions(prompt: &[TokenId], tokenizer: &Tokenizer) -> Vec<usize> {
    let user = tokenizer.special().user;
    let first = prompt.iter().position(|token| *token == user);
    let last = prompt.iter().rposition(|token| *token == user);
    let mut positions: Vec<usize> = first.into_iter().chain(last).collect();
    positions.push(prompt.len() - 1);
    positions.dedup();
    positions
}
