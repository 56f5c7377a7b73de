//! The scheduler's thread.

use std::{
    sync::{
        Arc,
        atomic::Ordering,
        mpsc::{Receiver, RecvTimeoutError, TryRecvError},
    },
    time::{Duration, Instant},
};

use ds4_engine::{Backend, BackendError, Engine, Logits, StepError};
use ds4_text::tokenizer::Tokenizer;
use rayon::prelude::*;

use super::{
    Event, Failure, Load, Message, SchedulerLimits, SessionBytes, Submitted,
    outbox::Outbox,
    pace::Pace,
    pool::{LiveSession, Pool},
    queue::Queue,
    sequence::{Outcome, Request, Sequence},
};
use crate::metrics::Metrics;

/// How long to sleep when every running request waits for its client.
const NAP: Duration = Duration::from_millis(2);

/// How often to look for clients that have gone while nothing runs.
const IDLE: Duration = Duration::from_millis(200);

/// So many logits are worth looking at on several threads: two rows of the real model.
const WORTH_SHARING: usize = 1 << 18;

/// Tokens of an answer to reserve memory for; most are shorter, and what is really used is
/// looked at before every step.
const USUAL_ANSWER: usize = 2048;

pub(super) struct Worker<B: Backend> {
    engine: Engine<B>,
    tokenizer: Arc<Tokenizer>,
    limits: SchedulerLimits,
    session_bytes: SessionBytes,
    metrics: Metrics,
    load: Arc<Load>,
    messages: Receiver<Message>,
    queue: Queue,
    pool: Pool<B>,
    /// In the order in which they came.
    running: Vec<Sequence<B>>,
    /// Running requests that gave their memory to older ones, in the same order.
    aside: Vec<Request>,
    /// Bytes that were in use when the device had no more, though the limit is higher.
    found_bytes: Option<u64>,
    /// Ended requests whose clients have not taken all yet.
    leaving: Vec<Outbox>,
    pace: Pace,
    closing: Option<Instant>,
}

impl<B: Backend> Worker<B> {
    pub(super) fn new(
        engine: Engine<B>,
        tokenizer: Arc<Tokenizer>,
        limits: SchedulerLimits,
        session_bytes: SessionBytes,
        metrics: Metrics,
        load: Arc<Load>,
        messages: Receiver<Message>,
    ) -> Self {
        Worker {
            engine,
            tokenizer,
            pace: Pace::new(limits.prefill_chunk),
            limits,
            session_bytes,
            metrics,
            load,
            messages,
            queue: Queue::default(),
            pool: Pool::new(),
            running: Vec::new(),
            aside: Vec::new(),
            found_bytes: None,
            leaving: Vec::new(),
            closing: None,
        }
    }

    /// Works until closed, or until nobody can send requests any more.
    pub(super) fn run(mut self) {
        while self.receive() {
            self.part_with_clients();
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
                || !self.aside.is_empty()
                || !self.leaving.is_empty()
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
                Message::Job(submitted) => self.queue.push(*submitted),
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

    /// Ends requests whose clients are gone or too slow, or whose time is up.
    fn part_with_clients(&mut self) {
        let now = Instant::now();
        let gone = |request: &Submitted| {
            request.events.is_closed() || request.job.deadline.is_some_and(|at| at <= now)
        };
        for request in self.queue.remove(gone) {
            self.refuse(request, Failure::Deadline);
        }
        let stall = self.limits.stall;
        let closing = self.closing.is_some_and(|until| until <= now);
        for index in (0..self.running.len()).rev() {
            if let Some(end) = due_end(&mut self.running[index].request, now, stall, closing) {
                let sequence = self.running.remove(index);
                self.end_and_keep(sequence, end);
            }
        }
        for index in (0..self.aside.len()).rev() {
            if let Some(end) = due_end(&mut self.aside[index], now, stall, closing) {
                let request = self.aside.remove(index);
                self.end(request, end);
            }
        }
        self.leaving.retain_mut(|outbox| {
            outbox.flush();
            outbox.held_since().is_some() && !outbox.is_closed() && !outbox.is_stalled(now, stall)
        });
    }

    /// Goes on with requests that were set aside, and then begins waiting ones, as long as there
    /// is a place and memory for them.
    fn admit(&mut self) {
        while let Some(next) = self.aside.first() {
            if !self.has_room((self.session_bytes)(next.pending() + USUAL_ANSWER)) {
                break;
            }
            let request = self.aside.remove(0);
            if !self.resume(request) {
                break;
            }
        }
        while self.aside.is_empty() && self.running.len() < self.limits.running {
            let Some(next) = self.queue.peek() else { break };
            let tokens = next.job.prompt.len() + next.job.max_tokens.min(USUAL_ANSWER);
            let needed = (self.session_bytes)(tokens);
            if !self.has_room(needed) {
                break;
            }
            let reserved = self.running_bytes() + needed;
            if !self.queue.pop().is_some_and(|request| self.begin(request, reserved)) {
                break;
            }
        }
        self.publish_load();
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
    fn run_sequence(&mut self, sequence: Sequence<B>) {
        let place =
            self.running.partition_point(|other| other.request.since <= sequence.request.since);
        self.running.insert(place, sequence);
    }

    /// Bytes that a running request may come to need soon.
    fn reserved_bytes(&self, sequence: &Sequence<B>) -> u64 {
        let tokens = sequence.live.session.len() + sequence.prompt_left() + USUAL_ANSWER;
        (self.session_bytes)(tokens.min(self.limits.context))
            + sequence.live.checkpoint_bytes() as u64
    }

    /// Begins a request; false if it has to wait.
    fn begin(&mut self, request: Submitted, reserved: u64) -> bool {
        let start = self.with_room(|worker| {
            let room = worker.pool.bytes() as u64 + reserved <= worker.kv_bytes();
            let running: Vec<_> = worker.running.iter().map(|sequence| &sequence.live).collect();
            let (engine, tokenizer) = (&worker.engine, &*worker.tokenizer);
            worker.pool.start(engine, tokenizer, &request.job.prompt, &running, room)
        });
        match start {
            Ok(start) => {
                self.load.waiting.fetch_sub(1, Ordering::Relaxed);
                self.metrics.prompt(request.job.prompt.len(), start.covered, start.source);
                self.metrics.queue_seconds.observe(request.since.elapsed().as_secs_f64());
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

    /// Goes on with a request that was set aside; false if it has to wait longer.
    fn resume(&mut self, request: Request) -> bool {
        match self.with_room(|worker| LiveSession::empty(&worker.engine)) {
            Ok(live) => {
                self.run_sequence(Sequence::resume(request, live));
                true
            }
            Err(Some(failure)) => {
                self.end(request, Some(Event::Failed(failure)));
                true
            }
            Err(None) => {
                self.aside.insert(0, request);
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
            if !self.evict() {
                self.note_full_memory();
                let alone = self.running.is_empty();
                return Err(alone.then(|| Failure::Memory(error.to_string())));
            }
        }
    }

    /// Drops idle sessions, and if that is not enough sets the newest requests aside, until what
    /// is used fits into memory. The oldest request always goes on.
    fn make_room(&mut self) {
        while self.used_bytes() > self.kv_bytes() {
            if self.evict() {
                continue;
            }
            if self.running.len() < 2 {
                break;
            }
            self.set_aside(self.running.len() - 1);
        }
    }

    /// Bytes of KV state that there are.
    fn used_bytes(&self) -> u64 {
        let running: usize = self.running.iter().map(|s| s.live.bytes(&self.engine)).sum();
        (running + self.pool.bytes()) as u64
    }

    /// Drops the longest unused session, if there is one.
    fn evict(&mut self) -> bool {
        let evicted = self.pool.evict();
        if evicted {
            self.metrics.evicted.inc();
        }
        evicted
    }

    /// No more than now is going to fit onto the device.
    fn note_full_memory(&mut self) {
        let used = self.used_bytes();
        tracing::warn!(
            used,
            limit = self.limits.kv_bytes,
            "the device has less memory than allowed"
        );
        self.found_bytes = Some(used);
    }

    /// Takes a request's memory away; its tokens are computed again when there is room.
    fn set_aside(&mut self, index: usize) {
        self.metrics.set_aside.inc();
        let mut request = self.running.remove(index).set_aside();
        request.outbox.flush();
        let place = self.aside.partition_point(|other| other.since <= request.since);
        self.aside.insert(place, request);
    }

    /// One step of the engine; false if there was nothing to compute.
    fn step(&mut self) -> bool {
        let planned = self.plan();
        if planned.indices.is_empty() {
            self.running.iter_mut().for_each(|sequence| sequence.request.outbox.flush());
            return false;
        }
        let (result, time) = self.compute(&planned.indices);
        self.pace.measured(planned.answers, planned.prompt_tokens, time);
        self.metrics.step(planned.answers, planned.prompt_tokens, time);
        match result {
            Ok(logits) => self.take_in(&planned.indices, &logits),
            Err(error) => self.failed(&planned.indices, error),
        }
        true
    }

    /// Runs the engine. Meanwhile other threads tell clients of the last step's tokens, and find
    /// out what may come next in answers that have rules.
    fn compute(&mut self, indices: &[usize]) -> (Result<Vec<Logits>, StepError>, Duration) {
        let engine = &self.engine;
        let (mut work, mut outboxes) = (Vec::with_capacity(indices.len()), Vec::new());
        rayon::in_place_scope(|scope| {
            for (index, sequence) in self.running.iter_mut().enumerate() {
                let parts = sequence.parts();
                outboxes.push(parts.outbox);
                if indices.binary_search(&index).is_ok() {
                    work.push(parts.work);
                    if parts.answer.wants_look_ahead() {
                        scope.spawn(|_| parts.answer.look_ahead());
                    }
                }
            }
            scope.spawn(|_| outboxes.into_iter().for_each(Outbox::flush));
            let begun = Instant::now();
            (engine.step(&mut work), begun.elapsed())
        })
    }

    /// Every running answer, and slices of prompts: half of the time for the oldest, the rest
    /// for the shortest, so that short ones need not wait for long ones nor long ones forever.
    fn plan(&mut self) -> Plan {
        let mut plan = Plan::default();
        let mut prompts = Vec::new();
        for (index, sequence) in self.running.iter_mut().enumerate() {
            if sequence.request.outbox.held_since().is_some() {
                continue;
            }
            if sequence.prompt_left() > 0 {
                prompts.push(index);
            } else {
                sequence.plan_answer();
                plan.answers += 1;
                plan.indices.push(index);
            }
        }
        let mut budget = self.pace.prompt_tokens(plan.answers);
        if let [oldest, _, ..] = prompts[..] {
            self.plan_prompt(oldest, budget.div_ceil(2), &mut budget, &mut plan);
            prompts.remove(0);
        }
        prompts.sort_by_key(|index| self.running[*index].prompt_left());
        for index in prompts {
            self.plan_prompt(index, budget, &mut budget, &mut plan);
        }
        plan.indices.sort_unstable();
        plan
    }

    fn plan_prompt(&mut self, index: usize, share: usize, budget: &mut usize, plan: &mut Plan) {
        let tokens = self.running[index].plan_prompt(share);
        if tokens > 0 {
            *budget -= tokens;
            plan.prompt_tokens += tokens;
            plan.indices.push(index);
        }
    }

    /// Adds a token to each answer that has new logits.
    fn take_in(&mut self, indices: &[usize], logits: &[Logits]) {
        let (engine, tokenizer) = (&self.engine, &*self.tokenizer);
        let running = self.running.iter_mut().enumerate();
        let stepped = running.filter(|(index, _)| indices.binary_search(index).is_ok());
        let mut stepped: Vec<_> = stepped.map(|(_, sequence)| sequence).zip(logits).collect();
        stepped.iter_mut().for_each(|(sequence, _)| sequence.stepped(engine));
        let extend =
            |(sequence, logits): (&mut Sequence<B>, &Logits)| sequence.extend(tokenizer, logits);
        let size: usize = logits.iter().map(|logits| logits.data.len()).sum();
        let outcomes: Vec<_> = if size >= WORTH_SHARING {
            stepped.into_par_iter().map(extend).collect()
        } else {
            stepped.into_iter().map(extend).collect()
        };
        for (index, outcome) in indices.iter().zip(outcomes).rev() {
            if let Outcome::Ended(event) = outcome {
                let sequence = self.running.remove(*index);
                self.end_and_keep(sequence, Some(event));
            }
        }
    }

    /// A step failed. Who asks for more memory than there is waits or fails alone.
    fn failed(&mut self, indices: &[usize], error: StepError) {
        match error {
            StepError::NoRoom { work, reason } => {
                self.note_full_memory();
                if self.evict() {
                    return;
                }
                if self.running.len() > 1 {
                    self.set_aside(self.running.len() - 1);
                } else {
                    self.fail(&indices[work..=work], &Failure::Memory(reason));
                }
            }
            StepError::Backend(BackendError::OutOfMemory(reason)) => {
                self.note_full_memory();
                let alone = self.running.len() == 1;
                let easier = self.pace.halve() | self.evict();
                if alone && !easier {
                    return self.fail(indices, &Failure::Memory(reason));
                }
                // What the step's sessions hold is incomplete.
                indices.iter().rev().for_each(|index| self.set_aside(*index));
            }
            StepError::Backend(error) => self.give_up(&error),
            error => self.fail(indices, &Failure::Engine(error.to_string())),
        }
    }

    /// Ends requests whose sessions are of no use.
    fn fail(&mut self, indices: &[usize], failure: &Failure) {
        tracing::error!(%failure, requests = indices.len(), "a step failed");
        for index in indices.iter().rev() {
            let sequence = self.running.remove(*index);
            self.end(sequence.request, Some(Event::Failed(failure.clone())));
        }
    }

    /// Nothing can be computed any more: says so to everyone, and ends.
    fn give_up(&mut self, error: &BackendError) {
        tracing::error!(%error, "nothing can be computed any more");
        self.load.set_fatal(error.to_string());
        let failure = Failure::Fatal(error.to_string());
        let running = self.running.drain(..).map(|sequence| sequence.request);
        for request in running.chain(self.aside.drain(..)).collect::<Vec<_>>() {
            self.end(request, Some(Event::Failed(failure.clone())));
        }
        for request in self.queue.remove(|_| true) {
            self.refuse(request, failure.clone());
        }
        self.closing = Some(Instant::now());
    }

    /// Ends a request and keeps its session; without an event its client is gone.
    fn end_and_keep(&mut self, sequence: Sequence<B>, event: Option<Event>) {
        self.end(sequence.request, event);
        self.pool.keep(&self.engine, sequence.live);
    }

    /// Ends a request; without an event its client is gone.
    fn end(&mut self, mut request: Request, event: Option<Event>) {
        if let Some(event) = event {
            self.metrics.ended(&event, request.since.elapsed());
            request.outbox.push(event);
        } else {
            self.metrics.cancelled.inc();
        }
        self.note_duration(request.since.elapsed());
        self.leave(request.outbox);
    }

    fn leave(&mut self, outbox: Outbox) {
        if outbox.held_since().is_some() {
            self.leaving.push(outbox);
        }
    }

    fn note_duration(&self, time: Duration) {
        let (old, new) =
            (self.load.usual_millis.load(Ordering::Relaxed), time.as_millis() as usize);
        let usual = if old == 0 { new } else { (old * 7 + new) / 8 };
        self.load.usual_millis.store(usual, Ordering::Relaxed);
    }

    fn refuse(&mut self, request: Submitted, failure: Failure) {
        self.load.waiting.fetch_sub(1, Ordering::Relaxed);
        let mut outbox = Outbox::new(request.events);
        outbox.push(Event::Failed(failure));
    }

    fn publish_load(&self) {
        let running = self.running.len() + self.aside.len();
        self.load.running.store(running, Ordering::Relaxed);
        let (idle, bytes) = (self.pool.len(), self.pool.bytes());
        self.metrics.sessions(running, idle, self.queue.len(), bytes);
    }
}

/// Whether a request must end, and with what; with nothing if its client is gone.
fn due_end(
    request: &mut Request,
    now: Instant,
    stall: Duration,
    closing: bool,
) -> Option<Option<Event>> {
    if request.outbox.held_since().is_some() {
        request.outbox.flush();
    }
    let failure = if request.outbox.is_closed() {
        return Some(None);
    } else if request.outbox.is_stalled(now, stall) {
        Failure::Stalled
    } else if request.deadline.is_some_and(|at| at <= now) {
        Failure::Deadline
    } else if closing {
        Failure::ShuttingDown
    } else {
        return None;
    };
    Some(Some(Event::Failed(failure)))
}

/// What a step computes.
#[derive(Default)]
struct Plan {
    /// Running requests that take part, ascending.
    indices: Vec<usize>,
    answers: usize,
    prompt_tokens: usize,
}
