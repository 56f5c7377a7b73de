//! How requests end: complete, cancelled, too late, failed, or refused before they began.

use std::{
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use ds4_engine::BackendError;

use super::Worker;
use crate::{
    request::{Event, Failure},
    scheduler::{
        outbox::Outbox,
        queue::Submitted,
        sequence::{Admitted, Sequence},
    },
};

impl Worker {
    /// Ends requests whose clients are gone or too slow, or whose time is up.
    pub(super) fn end_due(&mut self) {
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

    /// Ends requests whose sessions are of no use.
    pub(super) fn fail(&mut self, indices: &[usize], failure: &Failure) {
        tracing::error!(%failure, requests = indices.len(), "a step failed");
        for index in indices.iter().rev() {
            let sequence = self.running.remove(*index);
            self.end(sequence.request, Some(Event::Failed(failure.clone())));
        }
    }

    /// Nothing can be computed any more: says so to everyone, and ends.
    pub(super) fn give_up(&mut self, error: &BackendError) {
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
    pub(super) fn end_and_keep(&mut self, sequence: Sequence, event: Option<Event>) {
        self.end(sequence.request, event);
        self.prefix_cache.keep(sequence.live);
    }

    /// Ends a request; without an event its client is gone.
    pub(super) fn end(&mut self, mut request: Admitted, event: Option<Event>) {
        if let Some(event) = event {
            self.observer.ended(&event, request.since.elapsed());
            request.outbox.push(event);
        } else {
            self.observer.cancelled();
        }
        self.note_duration(request.since.elapsed());
        self.drain(request.outbox);
    }

    /// Keeps sending what an ended request's client has not taken yet.
    fn drain(&mut self, outbox: Outbox) {
        if outbox.held_since().is_some() {
            self.draining.push(outbox);
        }
    }

    /// Ends a request whose turn has not come.
    pub(super) fn refuse(&mut self, request: Submitted, failure: Failure) {
        self.load.waiting.fetch_sub(1, Ordering::Relaxed);
        let mut outbox = Outbox::new(request.events);
        outbox.push(Event::Failed(failure));
    }

    fn note_duration(&self, time: Duration) {
        let (old, new) =
            (self.load.usual_millis.load(Ordering::Relaxed), time.as_millis() as usize);
        let usual = if old == 0 { new } else { (old * 7 + new) / 8 };
        self.load.usual_millis.store(usual, Ordering::Relaxed);
    }
}

/// Whether a request must end, and with what; with nothing if its client is gone.
fn due_end(
    request: &mut Admitted,
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
