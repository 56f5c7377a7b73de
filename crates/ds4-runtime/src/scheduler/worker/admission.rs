//! Which requests run: preempted ones go on first, then new requests begin, as long as there is a
//! place and memory for them.

use std::sync::atomic::Ordering;

use ds4_engine::BackendError;

use super::{Worker, memory::USUAL_ANSWER};
use crate::{
    request::{Event, Failure},
    scheduler::{
        prefix_cache::LiveSession,
        queue::Submitted,
        sequence::{Admitted, Sequence},
    },
};

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

    /// Whether a request that needs so much may run with the others; one alone always may.
    fn has_room(&self, needed: u64) -> bool {
        self.running.is_empty() || self.running_bytes() + needed <= self.kv_bytes()
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
    fn resume(&mut self, request: Admitted, tokens: usize) -> bool {
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

    /// Puts a request among the running ones.
    fn run_sequence(&mut self, sequence: Sequence) {
        let place =
            self.running.partition_point(|other| other.request.since <= sequence.request.since);
        self.running.insert(place, sequence);
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
}
