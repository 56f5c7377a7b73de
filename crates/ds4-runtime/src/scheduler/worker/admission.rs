//! Admission: which requests run, and the KV memory that they take.
//!
//! A request is admitted if the bytes that the device allocates for its prompt and a usual answer fit
//! beside those of the running requests. When running requests outgrow the memory, idle sessions go
//! first, and then the newest request is preempted.

use std::sync::atomic::Ordering;

use ds4_engine::{BackendError, MAX_REWIND};

use super::Worker;
use crate::{
    request::{Event, Failure},
    scheduler::{
        prefix_cache::LiveSession,
        queue::Submitted,
        sequence::{Request, Sequence},
    },
};

/// Tokens of an answer to reserve memory for. Most answers are shorter, and the memory in use is
/// checked before every step.
const USUAL_ANSWER: usize = 2048;

impl Worker {
    /// Goes on with preempted requests, and then begins waiting ones, as long as there is a place
    /// and memory for them.
    pub(super) fn admit(&mut self) {
        while let Some(next) = self.preempted.first() {
            let tokens = next.pending() + USUAL_ANSWER;
            if !self.has_room(self.session_bytes(tokens)) {
                break;
            }
            let request = self.preempted.remove(0);
            if !self.resume(request, tokens) {
                break;
            }
        }
        while self.preempted.is_empty() && self.running.len() < self.limits.running {
            let Some(next) = self.queue.peek() else { break };
            let tokens = next.request.prompt.len() + next.request.max_tokens.min(USUAL_ANSWER);
            if !self.has_room(self.session_bytes(tokens)) {
                break;
            }
            if !self.queue.pop().is_some_and(|request| self.begin(request, tokens)) {
                break;
            }
        }
        self.publish_load();
    }

    /// Bytes that a session with capacity for `tokens` tokens takes on the device.
    fn session_bytes(&self, tokens: usize) -> u64 {
        self.engine.backend().session_bytes(tokens.min(self.limits.context))
    }

    /// Whether a request that needs so much may run with the others; one alone always may.
    fn has_room(&self, needed: u64) -> bool {
        self.running.is_empty() || self.running_bytes() + needed <= self.kv_bytes()
    }

    /// Bytes of KV state that there may be.
    fn kv_bytes(&self) -> u64 {
        self.found_bytes.unwrap_or(u64::MAX).min(self.limits.kv_bytes)
    }

    fn running_bytes(&self) -> u64 {
        self.running.iter().map(|sequence| self.reserved_bytes(sequence)).sum()
    }

    /// Puts a request among the running ones.
    fn run_sequence(&mut self, sequence: Sequence) {
        let place =
            self.running.partition_point(|other| other.request.since <= sequence.request.since);
        self.running.insert(place, sequence);
    }

    /// Bytes that a running request may come to need soon.
    fn reserved_bytes(&self, sequence: &Sequence) -> u64 {
        let tokens = sequence.expected_tokens(USUAL_ANSWER);
        let live = &sequence.live;
        live.session.bytes().max(self.session_bytes(tokens)) + live.checkpoint_bytes()
    }

    /// Begins a request with capacity for `tokens` tokens; false if it has to wait.
    fn begin(&mut self, request: Submitted, tokens: usize) -> bool {
        let start = self.with_room(|worker| {
            let needed = worker.running_bytes() + worker.session_bytes(tokens);
            let room = worker.prefix_cache.bytes() + needed <= worker.kv_bytes();
            let running: Vec<_> = worker.running.iter().map(|sequence| &sequence.live).collect();
            let (engine, cache) = (&worker.engine, &mut worker.prefix_cache);
            let prompt = &request.request.prompt;
            let mut start = cache.start(engine, prompt, &running, room)?;
            worker.reserve(&mut start.live, prompt.len(), tokens)?;
            Ok(start)
        });
        match start {
            Ok(start) => {
                self.load.waiting.fetch_sub(1, Ordering::Relaxed);
                let (prompt, cached) = (request.request.prompt.len(), start.live.session.len());
                self.observer.prompt(prompt, cached, start.source);
                self.observer.queued(request.since.elapsed());
                let context = self.limits.context;
                let sequence = Sequence::new(request, start, context, &self.tokenizer);
                self.run_sequence(sequence);
                true
            }
            Err(Some(failure)) => {
                self.refuse(request, failure);
                true
            }
            Err(None) => {
                self.queue.put_back(request);
                false
            }
        }
    }

    /// Ensures capacity for the tokens that are there to compute, and for `expected` tokens if the
    /// device has room for so many: a session that grows is copied.
    fn reserve(
        &mut self,
        live: &mut LiveSession,
        known: usize,
        expected: usize,
    ) -> Result<(), BackendError> {
        let context = self.limits.context;
        let needed = live.bytes().max(self.session_bytes(expected));
        while self.running_bytes() + needed + self.prefix_cache.bytes() > self.kv_bytes() {
            if !self.evict() {
                break;
            }
        }
        self.engine.reserve(&mut live.session, known.min(context))?;
        match self.engine.reserve(&mut live.session, expected.min(context)) {
            Err(BackendError::OutOfMemory(_)) => {
                self.observer.out_of_memory();
                Ok(())
            }
            result => result,
        }
    }

    /// Goes on with a preempted request, with capacity for `tokens` tokens; false if it has to
    /// wait longer.
    fn resume(&mut self, request: Request, tokens: usize) -> bool {
        let live = self.with_room(|worker| {
            let mut live = LiveSession::empty(&worker.engine)?;
            worker.reserve(&mut live, request.pending(), tokens)?;
            Ok(live)
        });
        match live {
            Ok(live) => {
                self.run_sequence(Sequence::resume(request, live));
                true
            }
            Err(Some(failure)) => {
                self.end(request, Some(Event::Failed(failure)));
                true
            }
            Err(None) => {
                self.preempted.insert(0, request);
                false
            }
        }
    }

    /// Makes something that the device must have room for. If it has none, idle sessions go; if
    /// that does not help, there is a failure, or nothing if running requests may leave some.
    fn with_room<T>(
        &mut self,
        mut make: impl FnMut(&mut Self) -> Result<T, BackendError>,
    ) -> Result<T, Option<Failure>> {
        loop {
            let error = match make(self) {
                Ok(made) => return Ok(made),
                Err(error) => error,
            };
            if error.is_fatal() {
                self.give_up(&error);
                return Err(Some(Failure::Fatal(error.to_string())));
            }
            self.observer.out_of_memory();
            if !self.evict() {
                self.note_full_memory();
                let alone = self.running.is_empty();
                return Err(alone.then(|| Failure::Memory(error.to_string())));
            }
        }
    }

    /// Drops idle sessions, and if that is not enough preempts the newest requests, until the next
    /// step fits into memory. The oldest request always goes on.
    pub(super) fn make_room(&mut self) {
        while self.used_bytes() > self.kv_bytes() {
            if self.evict() {
                continue;
            }
            if self.running.len() < 2 {
                break;
            }
            self.preempt(self.running.len() - 1);
        }
    }

    /// Bytes of KV state that there are, and that the next step adds.
    fn used_bytes(&self) -> u64 {
        let next = |s: &Sequence| {
            let grown = self.session_bytes(s.live.session.len() + MAX_REWIND);
            s.live.session.bytes().max(grown) + s.live.checkpoint_bytes()
        };
        self.running.iter().map(next).sum::<u64>() + self.prefix_cache.bytes()
    }

    /// Drops the least recently used session, if there is one.
    pub(super) fn evict(&mut self) -> bool {
        let evicted = self.prefix_cache.evict();
        if evicted {
            self.observer.evicted();
        }
        evicted
    }

    /// No more than now is going to fit onto the device.
    pub(super) fn note_full_memory(&mut self) {
        let used = self.used_bytes();
        tracing::warn!(
            used,
            limit = self.limits.kv_bytes,
            "the device has less memory than allowed"
        );
        self.found_bytes = Some(used);
    }

    /// Takes a request's memory away; its tokens are computed again when there is room.
    pub(super) fn preempt(&mut self, index: usize) {
        self.observer.preempted();
        let mut request = self.running.remove(index).preempt();
        request.outbox.flush();
        let place = self.preempted.partition_point(|other| other.since <= request.since);
        self.preempted.insert(place, request);
    }
}
