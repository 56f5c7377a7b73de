//! A request in terms of tokens, and what becomes of it.

use std::time::{Duration, Instant};

use ds4_engine::{
    TokenId,
    sampling::{SamplingParams, TokenLogprob},
};

use crate::grammar::AnswerGrammar;

/// Who asks; clients take turns when requests have to wait.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct ClientId(pub u64);

/// A prompt to answer.
pub struct Request {
    /// Who asks.
    pub client: ClientId,
    /// At least one token, and fewer than the context has.
    pub prompt: Vec<TokenId>,
    /// Most tokens of the answer, at least one.
    pub max_tokens: usize,
    /// How tokens are drawn.
    pub sampling: SamplingParams,
    /// Seed of the draws.
    pub seed: u64,
    /// How many of the likeliest tokens to report with each; `None` reports no probabilities.
    pub top_logprobs: Option<usize>,
    /// What the answer must look like; without a grammar, anything.
    pub grammar: Option<AnswerGrammar>,
    /// When the answer must be there.
    pub deadline: Option<Instant>,
}

/// What becomes of a request, in order: `Started`, any number of `Prefill` and then of `Token`,
/// `Finished`; or at any time `Failed`. `Finished` and `Failed` are the last.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// Its turn has come.
    Started {
        /// Tokens of the prompt that were computed before.
        cached: usize,
    },
    /// A chunk of the prompt is computed. A request that is preempted begins again.
    Prefill {
        /// Tokens of the prompt that are still to be computed.
        left: usize,
    },
    /// The answer got longer.
    Token(AnswerToken),
    /// The answer is complete.
    Finished(Finish),
    /// There is no answer, or no more of it.
    Failed(Failure),
}

impl Event {
    /// Whether no event follows.
    pub fn is_last(&self) -> bool {
        matches!(self, Event::Finished(_) | Event::Failed(_))
    }
}

/// A token of an answer.
#[derive(Debug, Clone, PartialEq)]
pub struct AnswerToken {
    /// Which one.
    pub token: TokenId,
    /// Its log-probability, and the likeliest tokens, if asked for.
    pub logprobs: Option<(f32, Vec<TokenLogprob>)>,
}

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// The model ended it, or what it had to write is complete.
    Stop,
    /// It has as many tokens as allowed.
    Length,
}

/// Why a request failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// The engine or the grammar failed.
    #[error("{0}")]
    Engine(String),
    /// Nothing is left that could be dropped to make room for this request alone.
    #[error("there is no memory for this request: {0}")]
    Memory(String),
    /// Nothing can be computed any more.
    #[error("{0}")]
    Fatal(String),
    /// Too late.
    #[error("the request took longer than allowed")]
    Deadline,
    /// The client did not take its events.
    #[error("the client reads too slowly")]
    Stalled,
    /// The runtime ends.
    #[error("the runtime is shutting down")]
    ShuttingDown,
}

/// Why a request was not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// No request that can be computed.
    #[error("{0}")]
    Invalid(String),
    /// Too many wait already.
    #[error("too many requests are waiting")]
    QueueFull {
        /// When to try again.
        retry_after: Duration,
    },
    /// The runtime ends.
    #[error("the runtime is shutting down")]
    ShuttingDown,
    /// The runtime ends because nothing can be computed any more.
    #[error("{0}")]
    Fatal(String),
}
