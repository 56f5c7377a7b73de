//! Runs requests on the engine, many at a time, on one thread of its own.
//!
//! Every step of the engine advances all running answers by a token and, in what time that
//! leaves, computes a slice of the prompts of newer requests. A request is a [`Job`]; what becomes of it
//! arrives as [`Event`]s. Nothing here knows HTTP or a dialect, and nothing here blocks on a
//! client: a request whose events are not taken pauses, and one whose receiver is gone ends.

mod answer;
mod outbox;
mod overlap;
mod pace;
mod pool;
mod queue;
mod sequence;
mod worker;

use std::{
    sync::{
        Arc, OnceLock,
        atomic::{AtomicUsize, Ordering},
        mpsc as std_mpsc,
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use ds4_engine::{
    Backend, Engine, TokenId,
    sampling::{SamplingParams, TokenLogprob},
};
use ds4_text::tokenizer::Tokenizer;
use tokio::sync::{Notify, mpsc};

use crate::{guide::Guide, metrics::Metrics};

pub(crate) use pool::ReuseSource;

/// Events that a request may be ahead of its client before it pauses.
const EVENTS_AHEAD: usize = 256;

/// Bounds of what the scheduler takes on.
#[derive(Debug, Clone, Copy)]
pub struct SchedulerLimits {
    /// Tokens of a prompt and its answer together.
    pub context: usize,
    /// Requests that run at the same time.
    pub running: usize,
    /// Requests that may wait.
    pub waiting: usize,
    /// Prompt tokens to compute together when no answer is running. Weights are read once per
    /// chunk, so small chunks are slow; a vanished client is noticed only between chunks, so
    /// large ones are unwieldy.
    pub prefill_chunk: usize,
    /// Bytes of KV state, of running requests and sessions kept for later together.
    pub kv_bytes: u64,
    /// How long a client may leave its events untaken.
    pub stall: Duration,
}

/// Estimates the bytes of KV state of a session by its number of tokens.
pub type SessionBytes = Box<dyn Fn(usize) -> u64 + Send>;

/// Who asks; clients take turns when requests have to wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct ClientId(pub(crate) u64);

/// A request in terms of tokens.
pub(crate) struct Job {
    pub(crate) client: ClientId,
    /// At least one token.
    pub(crate) prompt: Vec<TokenId>,
    /// Most tokens of the answer, at least one.
    pub(crate) max_tokens: usize,
    pub(crate) sampling: SamplingParams,
    pub(crate) seed: u64,
    /// How many of the likeliest tokens to report with each; `None` reports no probabilities.
    pub(crate) top_logprobs: Option<usize>,
    pub(crate) guide: Guide,
    /// When the answer must be there.
    pub(crate) deadline: Option<Instant>,
}

/// What becomes of a request, in order: `Started`, any number of `Token`, `Finished`; or at any
/// time `Failed`, which is the last.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Event {
    /// Its turn has come.
    Started {
        /// Tokens of the prompt that were computed before.
        cached: usize,
    },
    /// The answer got longer.
    Token(AnswerToken),
    /// The answer is complete.
    Finished(Finish),
    /// There is no answer, or no more of it.
    Failed(Failure),
}

/// A token of an answer.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct AnswerToken {
    pub(crate) token: TokenId,
    /// Its log-probability, and the likeliest tokens, if asked for.
    pub(crate) logprobs: Option<(f32, Vec<TokenLogprob>)>,
}

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Finish {
    /// The model ended it, or what it had to write is complete.
    Stop,
    /// It has as many tokens as allowed.
    Length,
}

/// Why a request failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Failure {
    /// The engine or the grammar failed.
    #[error("{0}")]
    Engine(String),
    /// Nothing is left that the server could do without to make room for this request alone.
    #[error("there is no memory for this request: {0}")]
    Memory(String),
    /// Nothing can be computed any more.
    #[error("{0}: the server is ending")]
    Fatal(String),
    /// Too late.
    #[error("the request took longer than this server allows")]
    Deadline,
    /// The client did not take its events.
    #[error("the client reads too slowly")]
    Stalled,
    /// The server ends.
    #[error("the server is shutting down")]
    ShuttingDown,
}

/// Why a request was not taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Refused {
    /// Too many wait already.
    QueueFull {
        /// When to try again.
        retry_after: Duration,
    },
    /// The server ends.
    ShuttingDown,
    /// The server ends because nothing can be computed any more.
    Fatal(String),
}

/// The way to the scheduler's thread.
#[derive(Clone)]
pub(crate) struct Scheduler {
    inbox: std_mpsc::Sender<Message>,
    load: Arc<Load>,
    waiting_limit: usize,
}

/// Figures that both sides need at once.
#[derive(Debug, Default)]
pub(crate) struct Load {
    /// Requests that wait for their turn.
    pub(crate) waiting: AtomicUsize,
    /// Requests whose turn it is.
    pub(crate) running: AtomicUsize,
    /// Usual time of a request, in milliseconds.
    pub(crate) usual_millis: AtomicUsize,
    /// Not 0 once the server ends.
    pub(crate) closed: AtomicUsize,
    /// Why nothing can be computed any more.
    fatal: OnceLock<String>,
    fatal_was_set: Notify,
}

impl Load {
    /// Why nothing can be computed any more; none as long as all is well.
    pub(crate) fn fatal(&self) -> Option<&str> {
        self.fatal.get().map(String::as_str)
    }

    /// Waits until nothing can be computed any more.
    pub(crate) async fn until_fatal(&self) {
        self.fatal_was_set.notified().await;
    }

    /// From here on nothing can be computed. The first reason counts.
    fn set_fatal(&self, reason: String) {
        if self.fatal.set(reason).is_ok() {
            self.closed.store(1, Ordering::Relaxed);
            self.fatal_was_set.notify_one();
        }
    }
}

/// Tells of a panic on the scheduler's thread, which would go unnoticed otherwise.
struct Alarm(Arc<Load>);

impl Drop for Alarm {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.set_fatal("the scheduler panicked (a bug: see above)".to_owned());
        }
    }
}

enum Message {
    Job(Box<Submitted>),
    /// End what runs by this time, and begin nothing.
    Close(Instant),
}

struct Submitted {
    job: Job,
    events: mpsc::Sender<Event>,
    since: Instant,
}

impl Scheduler {
    /// Starts the thread. It ends after [`close`](Self::close), or when every clone is gone.
    pub(crate) fn start<B>(
        engine: Engine<B>,
        tokenizer: Arc<Tokenizer>,
        limits: SchedulerLimits,
        session_bytes: SessionBytes,
        metrics: Metrics,
    ) -> std::io::Result<(Scheduler, JoinHandle<()>)>
    where
        B: Backend + 'static,
    {
        let (inbox, messages) = std_mpsc::channel();
        let load = Arc::new(Load::default());
        let scheduler = Scheduler { inbox, load: load.clone(), waiting_limit: limits.waiting };
        let thread =
            std::thread::Builder::new().name("ds4-scheduler".to_owned()).spawn(move || {
                let _alarm = Alarm(load.clone());
                worker::Worker::new(
                    engine,
                    tokenizer,
                    limits,
                    session_bytes,
                    metrics,
                    load,
                    messages,
                )
                .run();
            })?;
        Ok((scheduler, thread))
    }

    /// Queues a request.
    pub(crate) fn submit(&self, job: Job) -> Result<mpsc::Receiver<Event>, Refused> {
        if let Some(reason) = self.load.fatal() {
            return Err(Refused::Fatal(reason.to_owned()));
        }
        if self.load.closed.load(Ordering::Relaxed) != 0 {
            return Err(Refused::ShuttingDown);
        }
        let counted = self.load.waiting.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| {
            (n < self.waiting_limit).then_some(n + 1)
        });
        if counted.is_err() {
            return Err(Refused::QueueFull { retry_after: self.retry_after() });
        }
        let (events, receiver) = mpsc::channel(EVENTS_AHEAD);
        let submitted = Box::new(Submitted { job, events, since: Instant::now() });
        self.inbox.send(Message::Job(submitted)).map_err(|_| Refused::ShuttingDown)?;
        Ok(receiver)
    }

    /// Takes no more requests, and ends the running ones by `until`.
    pub(crate) fn close(&self, until: Instant) {
        self.load.closed.store(1, Ordering::Relaxed);
        // If the thread has ended already, there is nothing left to close.
        let _ = self.inbox.send(Message::Close(until));
    }

    /// Figures for the operator and the metrics.
    pub(crate) fn load(&self) -> &Load {
        &self.load
    }

    /// The usual time of a request is when a place in the queue becomes free, if one request runs.
    fn retry_after(&self) -> Duration {
        let running = self.load.running.load(Ordering::Relaxed).max(1);
        let usual = self.load.usual_millis.load(Ordering::Relaxed);
        Duration::from_millis((usual / running) as u64)
            .clamp(Duration::from_secs(1), Duration::from_secs(60))
    }
}
