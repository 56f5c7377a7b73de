//! The scheduler's thread: its state and its loop. Each subject of its work has a file:
//! `admission`, `memory` (with preemption), `planning`, `stepping`, `ending`.

mod admission;
mod ending;
mod memory;
mod planning;
mod stepping;

use std::{
    sync::{
        Arc,
        atomic::Ordering,
        mpsc::{Receiver, RecvTimeoutError, TryRecvError},
    },
    time::{Duration, Instant},
};

use ds4_engine::Engine;
use ds4_text::tokenizer::Tokenizer;

use super::{
    outbox::Outbox,
    pace::Pace,
    prefix_cache::PrefixCache,
    queue::{Queue, Submitted},
    sequence::{Admitted, Sequence},
};
use crate::{limits::Limits, load::Load, observer::Observer, request::Failure};

/// How long to sleep when every running request waits for its client.
const NAP: Duration = Duration::from_millis(2);

/// How often to look for clients that have gone while nothing runs.
const IDLE: Duration = Duration::from_millis(200);

/// What clients tell the thread.
pub(crate) enum Message {
    /// A request.
    Submitted(Box<Submitted>),
    /// End what runs by this time, and begin nothing.
    Close(Instant),
}

pub(crate) struct Worker {
    engine: Engine,
    tokenizer: Arc<Tokenizer>,
    limits: Limits,
    observer: Box<dyn Observer>,
    load: Arc<Load>,
    messages: Receiver<Message>,
    queue: Queue,
    prefix_cache: PrefixCache,
    /// In the order in which they came.
    running: Vec<Sequence>,
    /// Running requests that gave their memory to older ones, in the same order.
    preempted: Vec<Admitted>,
    /// Bytes that were in use when the device had no more, though the limit is higher.
    found_bytes: Option<u64>,
    /// Ended requests whose clients have not taken all yet.
    draining: Vec<Outbox>,
    pace: Pace,
    closing: Option<Instant>,
}

impl Worker {
    pub(crate) fn new(
        engine: Engine,
        tokenizer: Arc<Tokenizer>,
        limits: Limits,
        observer: Box<dyn Observer>,
        load: Arc<Load>,
        messages: Receiver<Message>,
    ) -> Self {
        // A device that can't be asked says so at the first step.
        let report = engine.backend().memory(limits.context).ok();
        let left = report.and_then(|report| report.left).unwrap_or(u64::MAX);
        Worker {
            engine,
            tokenizer,
            pace: Pace::new(limits.prefill_chunk),
            limits: Limits { kv_bytes: limits.kv_bytes.min(left), ..limits },
            observer,
            load,
            messages,
            queue: Queue::default(),
            prefix_cache: PrefixCache::new(limits.reuse_answers),
            running: Vec::new(),
            preempted: Vec::new(),
            found_bytes: None,
            draining: Vec::new(),
            closing: None,
        }
    }

    /// Works until closed, or until nobody can send requests any more.
    pub(crate) fn run(mut self) {
        while self.receive() {
            self.end_due();
            // Before, since a request that ended may have left more than there is memory for.
            self.make_room();
            self.admit();
            self.make_room();
            if !self.step() && !self.running.is_empty() {
                std::thread::sleep(NAP);
            }
        }
    }

    /// Takes in what was sent; waits if there is nothing else to do. False ends the thread.
    fn receive(&mut self) -> bool {
        loop {
            let busy = !self.running.is_empty()
                || !self.preempted.is_empty()
                || !self.draining.is_empty()
                || self.queue.len() > 0;
            if self.closing.is_some() && !busy {
                return false;
            }
            let message = if busy {
                match self.messages.try_recv() {
                    Ok(message) => message,
                    Err(TryRecvError::Empty) => return true,
                    Err(TryRecvError::Disconnected) => {
                        self.close(Instant::now());
                        return true;
                    }
                }
            } else {
                self.publish_load();
                self.found_bytes = None;
                match self.messages.recv_timeout(IDLE) {
                    Ok(message) => message,
                    Err(RecvTimeoutError::Timeout) => continue,
                    Err(RecvTimeoutError::Disconnected) => return false,
                }
            };
            match message {
                Message::Submitted(submitted) => self.queue.push(*submitted),
                Message::Close(until) => self.close(until),
            }
        }
    }

    fn close(&mut self, until: Instant) {
        self.closing = Some(self.closing.map_or(until, |earlier| earlier.min(until)));
        for request in self.queue.remove(|_| true) {
            self.refuse(request, Failure::ShuttingDown);
        }
    }

    fn publish_load(&self) {
        let running = self.running.len() + self.preempted.len();
        self.load.running.store(running, Ordering::Relaxed);
        let (idle, bytes) = (self.prefix_cache.len(), self.prefix_cache.bytes());
        self.observer.sessions(running, idle, self.queue.len(), bytes);
    }
}
