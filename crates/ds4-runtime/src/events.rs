//! The receiving end of a request's events.

use tokio::sync::mpsc;

use crate::request::{Event, Failure};

/// What becomes of a request, event by event. Dropping it cancels the request before the next step.
///
/// Events that nobody takes pause the request, and end it after the time of
/// [`Limits::stall`](crate::Limits::stall).
pub struct Events {
    receiver: mpsc::Receiver<Event>,
    ended: bool,
}

impl Events {
    pub(crate) fn new(receiver: mpsc::Receiver<Event>) -> Self {
        Events { receiver, ended: false }
    }

    /// The next event; none after the last one.
    pub async fn next(&mut self) -> Option<Event> {
        let event = if self.ended { None } else { Some(self.receiver.recv().await) };
        event.map(|event| self.taken(event))
    }

    /// The same for threads that may wait.
    ///
    /// # Panics
    /// If the thread runs asynchronous tasks.
    pub fn next_blocking(&mut self) -> Option<Event> {
        let event = if self.ended { None } else { Some(self.receiver.blocking_recv()) };
        event.map(|event| self.taken(event))
    }

    /// A channel that closes without a last event was closed by a panic.
    fn taken(&mut self, event: Option<Event>) -> Event {
        let stopped = || Event::Failed(Failure::Engine("the engine stopped".to_owned()));
        let event = event.unwrap_or_else(stopped);
        self.ended = event.is_last();
        event
    }
}
