//! A running request: its session, what it has still to compute, and what its client has still
//! to take.

use std::{collections::VecDeque, time::Instant};

use ds4_engine::{Backend, Engine, Logits, LogitsWanted, TokenId, Work, sampling::Sampler};
use ds4_text::tokenizer::Tokenizer;

use super::{
    Event, Failure, Job, Submitted,
    answer::{Answer, Growth},
    outbox::Outbox,
    pool::{LiveSession, Start},
};

/// A request whose turn it is.
pub(super) struct Sequence<B: Backend> {
    pub(super) live: LiveSession<B>,
    pub(super) request: Request,
    /// How many of the request's pending tokens the step under way computes.
    slice: usize,
}

/// What there is of a request besides its session.
pub(super) struct Request {
    pub(super) outbox: Outbox,
    pub(super) since: Instant,
    pub(super) deadline: Option<Instant>,
    /// Tokens to compute next: the rest of the prompt, later the newest tokens of the answer.
    pending: Vec<TokenId>,
    /// Prompt tokens left, counting from the end of `pending`.
    prompt_left: usize,
    /// Lengths of the session at which to make a checkpoint, ascending.
    marks: VecDeque<usize>,
    answer: Answer,
    /// Tokens that the session may hold.
    context: usize,
}

impl Request {
    /// Tokens that are to be computed.
    pub(super) fn pending(&self) -> usize {
        self.pending.len()
    }
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
        let request = Request {
            outbox,
            since,
            deadline,
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
        };
        Sequence::resume(request, start.live)
    }

    /// Gives the session up; all its tokens are to be computed again.
    pub(super) fn set_aside(self) -> Request {
        let mut request = self.request;
        request.pending.splice(..0, self.live.session.tokens().iter().copied());
        request.prompt_left = request.pending.len();
        request
    }

    /// Goes on with a request on a session that holds nothing but what is not pending any more.
    pub(super) fn resume(request: Request, live: LiveSession<B>) -> Self {
        Sequence { live, request, slice: 0 }
    }

    /// Tokens of the prompt that are not computed yet.
    pub(super) fn prompt_left(&self) -> usize {
        self.request.prompt_left
    }

    /// Chooses what the next step computes of the prompt: at most `tokens`.
    pub(super) fn plan_prompt(&mut self, tokens: usize) -> usize {
        let to_mark =
            self.request.marks.front().map_or(usize::MAX, |mark| mark - self.live.session.len());
        self.slice = tokens.min(self.request.pending.len()).min(to_mark);
        self.slice
    }

    /// Chooses what the next step computes of the answer: all that is there.
    pub(super) fn plan_answer(&mut self) {
        self.slice = self.request.pending.len();
    }

    /// The planned work, and the rest.
    pub(super) fn parts(&mut self) -> Parts<'_, B> {
        let last = self.slice == self.request.pending.len();
        let logits = if last { self.request.answer.wanted() } else { LogitsWanted::None };
        let (session, tokens) = (&mut self.live.session, &self.request.pending[..self.slice]);
        let work = Work { session, tokens, logits };
        Parts { work, outbox: &mut self.request.outbox, answer: &mut self.request.answer }
    }

    /// The planned work is done.
    pub(super) fn stepped(&mut self, engine: &Engine<B>) {
        self.request.pending.drain(..self.slice);
        self.request.prompt_left = self.request.prompt_left.min(self.request.pending.len());
        self.slice = 0;
        if self.request.marks.front() == Some(&self.live.session.len()) {
            self.request.marks.pop_front();
            self.live.mark(engine);
        }
    }

    /// Adds to the answer, if the step said what comes next.
    pub(super) fn extend(&mut self, tokenizer: &Tokenizer, logits: &Logits) -> Outcome {
        if logits.is_empty() {
            return Outcome::Running;
        }
        let grown = self.request.answer.grow(&mut Growth {
            tokenizer,
            logits,
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
