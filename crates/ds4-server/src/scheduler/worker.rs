//! The scheduler's thread.

use std::{
    sync::{
        Arc,
        atomic::Ordering,
        mpsc::{Receiver, RecvTimeoutError, TryRecvError},
    },
    time::{Duration, Instant},
};

use ds4_engine::{Backend, Engine, Logits, StepError};
use ds4_model::tokenizer::Tokenizer;
use rayon::prelude::*;

use super::{
    Event, Failure, Load, Message, SchedulerLimits, SessionBytes, Submitted,
    outbox::Outbox,
    pace::Pace,
    pool::{LiveSession, Pool},
    queue::Queue,
    sequence::{Outcome, Sequence},
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
    aside: Vec<Sequence<B>>,
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
            if let Some(end) = due_end(&mut self.running[index], now, stall, closing) {
                let sequence = self.running.remove(index);
                self.end(sequence, end);
            }
        }
        for index in (0..self.aside.len()).rev() {
            if let Some(end) = due_end(&mut self.aside[index], now, stall, closing) {
                let sequence = self.aside.remove(index);
                self.end(sequence, end);
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
            if !self.has_room(self.reserved_bytes(next)) {
                break;
            }
            let sequence = self.aside.remove(0);
            self.run_sequence(sequence);
        }
        while self.aside.is_empty() && self.running.len() < self.limits.running {
            let Some(next) = self.queue.peek() else { break };
            let tokens = next.job.prompt.len() + next.job.max_tokens.min(USUAL_ANSWER);
            let needed = (self.session_bytes)(tokens);
            if !self.has_room(needed) {
                break;
            }
            if let Some(request) = self.queue.pop() {
                self.begin(request, self.running_bytes() + needed);
            }
        }
        self.publish_load();
    }

    /// Whether a request that needs so much may run with the others; one alone always may.
    fn has_room(&self, needed: u64) -> bool {
        self.running.is_empty() || self.running_bytes() + needed <= self.limits.kv_bytes
    }

    fn running_bytes(&self) -> u64 {
        self.running.iter().map(|sequence| self.reserved_bytes(sequence)).sum()
    }

    /// Puts a request among the running ones.
    fn run_sequence(&mut self, sequence: Sequence<B>) {
        let place = self.running.partition_point(|other| other.since <= sequence.since);
        self.running.insert(place, sequence);
    }

    /// Bytes that a running request may come to need soon.
    fn reserved_bytes(&self, sequence: &Sequence<B>) -> u64 {
        let tokens = sequence.live.session.len() + sequence.prompt_left() + USUAL_ANSWER;
        (self.session_bytes)(tokens.min(self.limits.context))
            + sequence.live.checkpoint_bytes() as u64
    }

    fn begin(&mut self, request: Submitted, reserved: u64) {
        self.load.waiting.fetch_sub(1, Ordering::Relaxed);
        let idle = self.pool.bytes() as u64;
        let room = idle + reserved <= self.limits.kv_bytes;
        let running: Vec<_> = self.running.iter().map(|sequence| &sequence.live).collect();
        let prompt = &request.job.prompt;
        let start = self.pool.start(&self.engine, &self.tokenizer, prompt, &running, room);
        match start {
            Ok(start) => {
                self.metrics.prompt(prompt.len(), start.covered, start.source);
                self.metrics.queue_seconds.observe(request.since.elapsed().as_secs_f64());
                let context = self.limits.context;
                let sequence = Sequence::new(request, start, context, &self.tokenizer);
                self.run_sequence(sequence);
            }
            Err(error) => {
                let mut outbox = Outbox::new(request.events);
                outbox.push(Event::Failed(Failure::Engine(error.to_string())));
            }
        }
    }

    /// Drops idle sessions, and if that is not enough sets the newest requests aside, until what
    /// is used fits into memory. The oldest request always goes on.
    fn make_room(&mut self) {
        loop {
            let running: usize = self.running.iter().map(|s| s.live.bytes(&self.engine)).sum();
            let used = running + self.pool.bytes();
            if used as u64 <= self.limits.kv_bytes {
                break;
            }
            if self.pool.evict() {
                self.metrics.evicted.inc();
                continue;
            }
            if self.running.len() < 2 {
                break;
            }
            let Some(sequence) = self.running.pop() else { break };
            self.set_aside(sequence);
        }
    }

    /// Takes a request's memory away; its tokens are computed again when there is room.
    fn set_aside(&mut self, mut sequence: Sequence<B>) {
        match LiveSession::empty(&self.engine) {
            Ok(empty) => {
                self.metrics.set_aside.inc();
                sequence.outbox.flush();
                sequence.set_aside(empty);
                self.aside.insert(0, sequence);
            }
            Err(error) => {
                self.end(sequence, Some(Event::Failed(Failure::Engine(error.to_string()))));
            }
        }
    }

    /// One step of the engine; false if there was nothing to compute.
    fn step(&mut self) -> bool {
        let planned = self.plan();
        if planned.indices.is_empty() {
            self.running.iter_mut().for_each(|sequence| sequence.outbox.flush());
            return false;
        }
        let (result, time) = self.compute(&planned.indices);
        self.pace.measured(planned.answers, planned.prompt_tokens, time);
        self.metrics.step(planned.answers, planned.prompt_tokens, time);
        match result {
            Ok(logits) => self.take_in(&planned.indices, &logits),
            Err(error) => self.fail(&planned.indices, &error),
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
            if sequence.outbox.held_since().is_some() {
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
            self.plan_prompt(oldest, budget / 2, &mut budget, &mut plan);
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
        let extend = |(sequence, logits): (&mut Sequence<B>, &Logits)| {
            sequence.extend(tokenizer, logits.last())
        };
        let size: usize = logits.iter().map(|logits| logits.data.len()).sum();
        let outcomes: Vec<_> = if size >= WORTH_SHARING {
            stepped.into_par_iter().map(extend).collect()
        } else {
            stepped.into_iter().map(extend).collect()
        };
        for (index, outcome) in indices.iter().zip(outcomes).rev() {
            if let Outcome::Ended(event) = outcome {
                let sequence = self.running.remove(*index);
                self.end(sequence, Some(event));
            }
        }
    }

    /// After a failed step its sessions are unusable.
    fn fail(&mut self, indices: &[usize], error: &StepError) {
        tracing::error!(%error, requests = indices.len(), "a step failed");
        for index in indices.iter().rev() {
            let mut sequence = self.running.remove(*index);
            sequence.outbox.push(Event::Failed(Failure::Engine(error.to_string())));
            self.leave(sequence.outbox);
        }
    }

    /// Ends a request and keeps its session; without an event its client is gone.
    fn end(&mut self, mut sequence: Sequence<B>, event: Option<Event>) {
        if let Some(event) = event {
            self.metrics.ended(&event, sequence.since.elapsed());
            sequence.outbox.push(event);
        } else {
            self.metrics.cancelled.inc();
        }
        self.note_duration(sequence.since.elapsed());
        self.leave(sequence.outbox);
        self.pool.keep(&self.engine, sequence.live);
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
fn due_end<B: Backend>(
    sequence: &mut Sequence<B>,
    now: Instant,
    stall: Duration,
    closing: bool,
) -> Option<Option<Event>> {
    if sequence.outbox.held_since().is_some() {
        sequence.outbox.flush();
    }
    let failure = if sequence.outbox.is_closed() {
        return Some(None);
    } else if sequence.outbox.is_stalled(now, stall) {
        Failure::Stalled
    } else if sequence.deadline.is_some_and(|at| at <= now) {
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
