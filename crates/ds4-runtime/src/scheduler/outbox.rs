//! Events on their way to a client, who may be slower than the engine, or gone.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use tokio::sync::mpsc::{self, error::TrySendError};

use crate::request::Event;

/// Events that a client has not been told of yet.
pub(super) struct Outbox {
    events: mpsc::Sender<Event>,
    held: VecDeque<Event>,
    /// Since when the client is too slow.
    held_since: Option<Instant>,
}

impl Outbox {
    pub(super) fn new(events: mpsc::Sender<Event>) -> Self {
        Outbox { events, held: VecDeque::new(), held_since: None }
    }

    /// Whether the client is gone.
    pub(super) fn is_closed(&self) -> bool {
        self.events.is_closed()
    }

    /// Since when the client is too slow.
    pub(super) fn held_since(&self) -> Option<Instant> {
        self.held_since
    }

    /// Whether it has been too slow for longer than `stall`.
    pub(super) fn is_stalled(&self, now: Instant, stall: Duration) -> bool {
        self.held_since.is_some_and(|since| now.duration_since(since) > stall)
    }

    /// Keeps an event for the next [`flush`](Self::flush). Telling a client wakes a thread, for
    /// which the engine need not wait.
    pub(super) fn hold(&mut self, event: Event) {
        self.held.push_back(event);
    }

    /// Sends an event, after those that are held.
    pub(super) fn push(&mut self, event: Event) {
        self.hold(event);
        self.flush();
    }

    /// Sends what is held as far as the client takes it.
    pub(super) fn flush(&mut self) {
        while let Some(event) = self.held.pop_front() {
            match self.events.try_send(event) {
                Ok(()) => {}
                Err(TrySendError::Full(event)) => {
                    self.held.push_front(event);
                    self.held_since.get_or_insert_with(Instant::now);
                    return;
                }
                Err(TrySendError::Closed(_)) => self.held.clear(),
            }
        }
        self.held_since = None;
    }
}
