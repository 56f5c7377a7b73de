//! A running request: its session, what it has still to compute, and what its client has still
//! to take.

use std::{collections::VecDeque, time::Instant};

use ds4_engine::{Backend, Engine, LogitsWanted, TokenId, Work, sampling::Sampler};
use ds4_model::tokenizer::Tokenizer;

use super::{
    Event, Failure, Job, Submitted,
    answer::{Answer, Growth},
    outbox::Outbox,
    pool::{LiveSession, Start},
};

/// A request whose turn it is.
pub(super) struct Sequence<B: Backend> {
    pub(super) live: LiveSession<B>,
    pub(super) outbox: Outbox,
    pub(super) since: Instant,
    pub(super) deadline: Option<Instant>,
    /// Tokens to compute next: the rest of the prompt, later the newest tokens of the answer.
    pending: Vec<TokenId>,
    /// How many of `pending` the step under way computes.
    slice: usize,
    /// Prompt tokens left, counting from the end of `pending`.
    prompt_left: usize,
    /// Lengths of the session at which to make a checkpoint, ascending.
    marks: VecDeque<usize>,
    answer: Answer,
    /// Tokens that the session may hold.
    context: usize,
}

/// What a step of the engine needs of a sequence, and what can be done meanwhile.
pub(super) struct Parts<'a, B: Backend> {
    pub(super) work: Work<'a, B>,
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

impl<B: Backend> Sequence<B> {
    /// Begins a request on a session that stands for the first tokens of its prompt.
    pub(super) fn new(
        submitted: Submitted,
        start: Start<B>,
        context: usize,
        tokenizer: &Tokenizer,
    ) -> Self {
        let Submitted { job, events, since } = submitted;
        let Job { prompt, max_tokens, sampling, seed, top_logprobs, guide, deadline, .. } = job;
        let kept = start.live.session.len();
        let shift = |at: usize| (at + kept).checked_sub(start.covered);
        let marks = checkpoint_places(&prompt, tokenizer);
        let marks = marks.into_iter().filter_map(shift).filter(|at| *at > kept).collect();
        let pending = prompt[start.covered..].to_vec();
        let mut outbox = Outbox::new(events);
        outbox.push(Event::Started { cached: start.covered });
        Sequence {
            live: start.live,
            outbox,
            since,
            deadline,
            slice: 0,
            prompt_left: pending.len(),
            pending,
            marks,
            answer: Answer {
                guide,
                ahead: None,
                sampler: Sampler::new(sampling, seed),
                top_logprobs,
                tokens_left: max_tokens,
            },
            context,
        }
    }

    /// Gives the session up for an empty one; all its tokens are to be computed again.
    pub(super) fn set_aside(&mut self, empty: LiveSession<B>) {
        let given_up = std::mem::replace(&mut self.live, empty);
        self.pending.splice(..0, given_up.session.tokens().iter().copied());
        self.prompt_left = self.pending.len();
    }

    /// Tokens of the prompt that are not computed yet.
    pub(super) fn prompt_left(&self) -> usize {
        self.prompt_left
    }

    /// Chooses what the next step computes of the prompt: at most `tokens`.
    pub(super) fn plan_prompt(&mut self, tokens: usize) -> usize {
        let to_mark = self.marks.front().map_or(usize::MAX, |mark| mark - self.live.session.len());
        self.slice = tokens.min(self.pending.len()).min(to_mark);
        self.slice
    }

    /// Chooses what the next step computes of the answer: all that is there.
    pub(super) fn plan_answer(&mut self) {
        self.slice = self.pending.len();
    }

    /// The planned work, and the rest.
    pub(super) fn parts(&mut self) -> Parts<'_, B> {
        let last = self.slice == self.pending.len();
        let logits = if last { LogitsWanted::Last } else { LogitsWanted::None };
        let (session, tokens) = (&mut self.live.session, &self.pending[..self.slice]);
        let work = Work { session, tokens, logits };
        Parts { work, outbox: &mut self.outbox, answer: &mut self.answer }
    }

    /// The planned work is done.
    pub(super) fn stepped(&mut self, engine: &Engine<B>) {
        self.pending.drain(..self.slice);
        self.prompt_left = self.prompt_left.min(self.pending.len());
        self.slice = 0;
        if self.marks.front() == Some(&self.live.session.len()) {
            self.marks.pop_front();
            self.live.mark(engine);
        }
    }

    /// Adds to the answer, if logits came.
    pub(super) fn extend(&mut self, tokenizer: &Tokenizer, logits: Option<&[f32]>) -> Outcome {
        let Some(logits) = logits else { return Outcome::Running };
        let grown = self.answer.grow(&mut Growth {
            tokenizer,
            logits,
            most: self.context - self.live.session.len(),
            pending: &mut self.pending,
            outbox: &mut self.outbox,
        });
        match grown {
            Ok(None) => Outcome::Running,
            Ok(Some(finish)) => Outcome::Ended(Event::Finished(finish)),
            Err(reason) => Outcome::Ended(Event::Failed(Failure::Engine(reason))),
        }
    }
}

/// Where checkpoints pay: the end of the system text and tools, which other conversations share;
/// the beginning of the last user turn, which may be edited; and the place before the last token,
/// since a later prompt without tools begins this turn without its reasoning.
fn checkpoint_places(prompt: &[TokenId], tokenizer: &Tokenizer) -> Vec<usize> {
    let user = tokenizer.special().user;
    let first = prompt.iter().position(|token| *token == user);
    let last = prompt.iter().rposition(|token| *token == user);
    let mut places: Vec<usize> = first.into_iter().chain(last).collect();
    places.push(prompt.len() - 1);
    places.dedup();
    places
}
