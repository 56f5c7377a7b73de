//! The way to the scheduler's thread.

use std::{
    sync::{Arc, Mutex, PoisonError, atomic::Ordering, mpsc as std_mpsc},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use ds4_engine::Engine;
use ds4_text::tokenizer::Tokenizer;
use tokio::sync::mpsc;

use crate::{
    events::Events,
    limits::Limits,
    load::Load,
    observer::Observer,
    request::{Refused, Request},
    scheduler::{
        queue::Submitted,
        worker::{Message, Worker},
    },
};

/// Events that a request may be ahead of its client before it pauses.
const EVENTS_AHEAD: usize = 256;

/// Runs requests on an engine, many at a time, on a thread of its own.
///
/// Dropping it ends all requests, and returns when the engine is gone.
pub struct Runtime {
    inbox: std_mpsc::Sender<Message>,
    load: Arc<Load>,
    waiting_limit: usize,
    /// Tokens of a prompt and its answer together.
    context: usize,
    /// Tokens that the model knows.
    vocab: usize,
    /// None once it has been joined.
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Runtime {
    /// Starts the thread. `observer` hears what happens.
    ///
    /// # Errors
    /// If the system has no thread.
    pub fn start(
        engine: Engine,
        tokenizer: Arc<Tokenizer>,
        limits: Limits,
        observer: Box<dyn Observer>,
    ) -> std::io::Result<Runtime> {
        let (context, vocab) = (limits.context, engine.config().vocab);
        let (inbox, messages) = std_mpsc::channel();
        let load = Arc::new(Load::default());
        let alarm = Alarm(load.clone());
        let worker = load.clone();
        let run = move || {
            let alarm = alarm;
            Worker::new(engine, tokenizer, limits, observer, worker, messages).run();
            drop(alarm);
        };
        let thread = std::thread::Builder::new().name("ds4-scheduler".to_owned()).spawn(run)?;
        let thread = Mutex::new(Some(thread));
        Ok(Runtime { inbox, load, waiting_limit: limits.waiting, context, vocab, thread })
    }

    /// Queues a request.
    ///
    /// # Errors
    /// If it cannot be computed, too many wait already, or the runtime takes no more.
    pub fn submit(&self, request: Request) -> Result<Events, Refused> {
        self.check(&request).map_err(Refused::Invalid)?;
        if let Some(reason) = self.load.fatal() {
            return Err(Refused::Fatal(reason.to_owned()));
        }
        if self.load.is_closed() {
            return Err(Refused::ShuttingDown);
        }
        let waiting = &self.load.waiting;
        let counted = waiting.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| {
            (n < self.waiting_limit).then_some(n + 1)
        });
        if counted.is_err() {
            return Err(Refused::QueueFull { retry_after: self.retry_after() });
        }
        let (events, receiver) = mpsc::channel(EVENTS_AHEAD);
        let submitted = Box::new(Submitted { request, events, since: Instant::now() });
        self.inbox.send(Message::Submitted(submitted)).map_err(|_| Refused::ShuttingDown)?;
        Ok(Events::new(receiver))
    }

    fn check(&self, request: &Request) -> Result<(), String> {
        let (tokens, context) = (request.prompt.len(), self.context);
        if tokens == 0 || request.max_tokens == 0 {
            return Err("a request needs a token of prompt and one of answer".to_owned());
        }
        if tokens >= context {
            return Err(format!("the prompt has {tokens} tokens, the context takes {context}"));
        }
        match request.prompt.iter().find(|token| **token as usize >= self.vocab) {
            Some(token) => Err(format!("there is no token {token}: the model has {}", self.vocab)),
            None => Ok(()),
        }
    }

    /// Takes no more requests, and ends the running ones by `until`.
    pub fn close(&self, until: Instant) {
        self.load.closed.store(true, Ordering::Relaxed);
        // If the thread has ended already, there is nothing left to close.
        let _ = self.inbox.send(Message::Close(until));
    }

    /// Waits until all requests have ended after [`close`](Self::close), and the engine is gone.
    pub fn join(&self) {
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        // A panic of the thread is known already: the alarm has noted it as fatal.
        let _ = thread.map(JoinHandle::join);
    }

    /// How it is doing.
    pub fn load(&self) -> &Load {
        &self.load
    }

    /// The usual time of a request is when a place in the queue becomes free, if one request runs.
    fn retry_after(&self) -> Duration {
        let usual = self.load.usual_millis.load(Ordering::Relaxed);
        Duration::from_millis((usual / self.load.running().max(1)) as u64)
            .clamp(Duration::from_secs(1), Duration::from_secs(60))
    }
}

impl Drop for Runtime {
    fn drop(&mut self) {
        self.close(Instant::now());
        self.join();
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
