//! A running request: its session, what it has still to compute, and what its client has still
//! to take.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use ds4_engine::{
    Backend, Engine, LogitsWanted, TokenId, Work,
    sampling::{self, Sampler},
};
use ds4_model::tokenizer::Tokenizer;
use tokio::sync::mpsc::{self, error::TrySendError};

use super::{AnswerToken, Event, Failure, Finish, Job, Submitted, pool::LiveSession, pool::Start};
use crate::guide::{self, Guide, Next};

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
    guide: Guide,
    sampler: Sampler,
    top_logprobs: Option<usize>,
    /// Tokens that the answer may still have.
    tokens_left: usize,
    /// Tokens that the session may hold.
    context: usize,
    masked: Vec<f32>,
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
            guide,
            sampler: Sampler::new(sampling, seed),
            top_logprobs,
            tokens_left: max_tokens,
            context,
            masked: Vec::new(),
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

    /// The planned work.
    pub(super) fn work(&mut self) -> Work<'_, B> {
        let last = self.slice == self.pending.len();
        let logits = if last { LogitsWanted::Last } else { LogitsWanted::None };
        Work { session: &mut self.live.session, tokens: &self.pending[..self.slice], logits }
    }

    /// Takes in a step: checkpoints, and the next tokens if logits came.
    pub(super) fn stepped(
        &mut self,
        engine: &Engine<B>,
        tokenizer: &Tokenizer,
        logits: Option<&[f32]>,
    ) -> Outcome {
        self.pending.drain(..self.slice);
        self.prompt_left = self.prompt_left.min(self.pending.len());
        self.slice = 0;
        if self.marks.front() == Some(&self.live.session.len()) {
            self.marks.pop_front();
            self.live.mark(engine);
        }
        let Some(logits) = logits else { return Outcome::Running };
        match self.extend(tokenizer, logits) {
            Ok(None) => Outcome::Running,
            Ok(Some(finish)) => Outcome::Ended(Event::Finished(finish)),
            Err(reason) => Outcome::Ended(Event::Failed(Failure::Engine(reason))),
        }
    }

    /// Adds the tokens that are certain, or else draws one.
    fn extend(&mut self, tokenizer: &Tokenizer, logits: &[f32]) -> Result<Option<Finish>, String> {
        let drawn = match self.guide.next()? {
            Next::Forced(mut tokens) => {
                if self.top_logprobs.is_some() {
                    // Later ones need the logits of a step of their own.
                    tokens.truncate(1);
                }
                for token in tokens {
                    if let Some(finish) = self.add(token, logits)? {
                        return Ok(Some(finish));
                    }
                }
                return Ok(None);
            }
            Next::Any => self.sampler.sample(logits),
            Next::Among { mask, greedy } => {
                guide::mask_logits(&mask, logits, &mut self.masked);
                if greedy {
                    sampling::argmax(&self.masked)
                } else {
                    self.sampler.sample(&self.masked)
                }
            }
        };
        let token = drawn.map_err(|error| error.to_string())?;
        if tokenizer.special().ends_turn(token) {
            return Ok(Some(Finish::Stop));
        }
        self.add(token, logits)
    }

    /// Adds a token to the answer; says if that ends it.
    fn add(&mut self, token: TokenId, logits: &[f32]) -> Result<Option<Finish>, String> {
        let logprobs = self
            .top_logprobs
            .map(|n| (sampling::logprob(logits, token), sampling::top_logprobs(logits, n)));
        self.outbox.push(Event::Token(AnswerToken { token, logprobs }));
        self.tokens_left -= 1;
        self.pending.push(token);
        if self.guide.accept(token)? {
            return Ok(Some(Finish::Stop));
        }
        let full = self.live.session.len() + self.pending.len() >= self.context;
        Ok((self.tokens_left == 0 || full).then_some(Finish::Length))
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

/// Events on their way to a client.
pub(super) struct Outbox {
    events: mpsc::Sender<Event>,
    /// What the client was too slow to take.
    held: VecDeque<Event>,
    held_since: Option<Instant>,
}

impl Outbox {
    pub(super) fn new(events: mpsc::Sender<Event>) -> Self {
        Outbox { events, held: VecDeque::new(), held_since: None }
    }

    /// Whether the client is gone.
    pub(super) fn is_closed(&self) -> bool {
        self.events.is_closed()
    }

    /// Since when the client is too slow.
    pub(super) fn held_since(&self) -> Option<Instant> {
        self.held_since
    }

    /// Whether it has been too slow for longer than `stall`.
    pub(super) fn is_stalled(&self, now: Instant, stall: Duration) -> bool {
        self.held_since.is_some_and(|since| now.duration_since(since) > stall)
    }

    /// Sends an event, or holds it after others that are held.
    pub(super) fn push(&mut self, event: Event) {
        self.held.push_back(event);
        self.flush();
    }

    /// Sends what is held as far as the client takes it.
    pub(super) fn flush(&mut self) {
        while let Some(event) = self.held.pop_front() {
            match self.events.try_send(event) {
                Ok(()) => {}
                Err(TrySendError::Full(event)) => {
                    self.held.push_front(event);
                    self.held_since.get_or_insert_with(Instant::now);
                    return;
                }
                Err(TrySendError::Closed(_)) => self.held.clear(),
            }
        }
        self.held_since = None;
    }
}
