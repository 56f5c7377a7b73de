//! The scheduler's thread.

mod admission;

use std::{
    sync::{
        Arc,
        atomic::Ordering,
        mpsc::{Receiver, RecvTimeoutError, TryRecvError},
    },
    time::{Duration, Instant},
};

use ds4_engine::{BackendError, Engine, StepError, StepOutput};
use ds4_text::tokenizer::Tokenizer;
use rayon::prelude::*;

use super::{
    outbox::Outbox,
    pace::Pace,
    prefix_cache::PrefixCache,
    queue::{Queue, Submitted},
    sequence::{Outcome, Request, Sequence},
};
use crate::{
    limits::Limits,
    load::Load,
    observer::Observer,
    request::{Event, Failure},
};

/// How long to sleep when every running request waits for its client.
const NAP: Duration = Duration::from_millis(2);

/// How often to look for clients that have gone while nothing runs.
const IDLE: Duration = Duration::from_millis(200);

/// So many logits are worth looking at on several threads: two rows of the real model.
const WORTH_SHARING: usize = 1 << 18;

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
    preempted: Vec<Request>,
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
            prefix_cache: PrefixCache::default(),
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
            self.part_with_clients();
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

    /// Ends requests whose clients are gone or too slow, or whose time is up.
    fn part_with_clients(&mut self) {
        let now = Instant::now();
        let gone = |request: &Submitted| {
            request.events.is_closed() || request.request.deadline.is_some_and(|at| at <= now)
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
        for index in (0..self.preempted.len()).rev() {
            if let Some(end) = due_end(&mut self.preempted[index], now, stall, closing) {
                let request = self.preempted.remove(index);
                self.end(request, end);
            }
        }
        self.draining.retain_mut(|outbox| {
            outbox.flush();
            outbox.held_since().is_some() && !outbox.is_closed() && !outbox.is_stalled(now, stall)
        });
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
        self.observer.step(planned.answers, planned.prompt_tokens, time);
        match result {
            Ok(outputs) => self.take_in(&planned.indices, &outputs),
            Err(error) => self.failed(&planned.indices, error),
        }
        true
    }

    /// Runs the engine. Meanwhile other threads tell clients of the last step's tokens, and find
    /// out what may come next in answers that have rules.
    fn compute(&mut self, indices: &[usize]) -> (Result<Vec<StepOutput>, StepError>, Duration) {
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
        let (mut prompts, mut answer_rows) = (Vec::new(), 0);
        for (index, sequence) in self.running.iter_mut().enumerate() {
            if sequence.request.outbox.held_since().is_some() {
                continue;
            }
            if sequence.prompt_left() > 0 {
                prompts.push(index);
            } else {
                answer_rows += sequence.plan_answer();
                plan.answers += 1;
                plan.indices.push(index);
            }
        }
        // Activations are there for a chunk of rows in all.
        let most = self.limits.prefill_chunk.saturating_sub(answer_rows);
        let mut budget = self.pace.prompt_tokens(plan.answers).min(most);
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
        if share.min(*budget) == 0 {
            return;
        }
        let tokens = self.running[index].plan_prompt(share);
        *budget = budget.saturating_sub(tokens);
        plan.prompt_tokens += tokens;
        plan.indices.push(index);
    }

    /// Adds a token to each answer that has new logits.
    fn take_in(&mut self, indices: &[usize], outputs: &[StepOutput]) {
        let (engine, tokenizer) = (&self.engine, &*self.tokenizer);
        let running = self.running.iter_mut().enumerate();
        let stepped = running.filter(|(index, _)| indices.binary_search(index).is_ok());
        let mut stepped: Vec<_> = stepped.map(|(_, sequence)| sequence).zip(outputs).collect();
        stepped.iter_mut().for_each(|(sequence, _)| sequence.stepped(engine));
        let extend =
            |(sequence, output): (&mut Sequence, &StepOutput)| sequence.extend(tokenizer, output);
        let size: usize = outputs.iter().flat_map(StepOutput::logits).map(<[f32]>::len).sum();
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
                self.observer.out_of_memory();
                self.note_full_memory();
                if self.evict() {
                    return;
                }
                if self.running.len() > 1 {
                    self.preempt(self.running.len() - 1);
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
                indices.iter().rev().for_each(|index| self.preempt(*index));
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
        for request in running.chain(self.preempted.drain(..)).collect::<Vec<_>>() {
            self.end(request, Some(Event::Failed(failure.clone())));
        }
        for request in self.queue.remove(|_| true) {
            self.refuse(request, failure.clone());
        }
        self.closing = Some(Instant::now());
    }

    /// Ends a request and keeps its session; without an event its client is gone.
    fn end_and_keep(&mut self, sequence: Sequence, event: Option<Event>) {
        self.end(sequence.request, event);
        self.prefix_cache.keep(sequence.live);
    }

    /// Ends a request; without an event its client is gone.
    fn end(&mut self, mut request: Request, event: Option<Event>) {
        if let Some(event) = event {
            self.observer.ended(&event, request.since.elapsed());
            request.outbox.push(event);
        } else {
            self.observer.cancelled();
        }
        self.note_duration(request.since.elapsed());
        self.drain(request.outbox);
    }

    fn drain(&mut self, outbox: Outbox) {
        if outbox.held_since().is_some() {
            self.draining.push(outbox);
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
        let running = self.running.len() + self.preempted.len();
        self.load.running.store(running, Ordering::Relaxed);
        let (idle, bytes) = (self.prefix_cache.len(), self.prefix_cache.bytes());
        self.observer.sessions(running, idle, self.queue.len(), bytes);
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
