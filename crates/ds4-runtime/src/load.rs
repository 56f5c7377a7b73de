//! Figures that the scheduler's thread and its clients need at once.

use std::sync::{
    OnceLock,
    atomic::{AtomicBool, AtomicUsize, Ordering},
};

use tokio::sync::Notify;

/// How a runtime is doing.
#[derive(Debug, Default)]
pub struct Load {
    pub(crate) waiting: AtomicUsize,
    pub(crate) running: AtomicUsize,
    /// Usual time of a request, in milliseconds.
    pub(crate) usual_millis: AtomicUsize,
    pub(crate) closed: AtomicBool,
    fatal: OnceLock<String>,
    fatal_was_set: Notify,
}

impl Load {
    /// Requests that wait for their turn.
    pub fn waiting(&self) -> usize {
        self.waiting.load(Ordering::Relaxed)
    }

    /// Requests whose turn it is, also if they are preempted.
    pub fn running(&self) -> usize {
        self.running.load(Ordering::Relaxed)
    }

    /// Whether no more requests are taken.
    pub fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Relaxed)
    }

    /// Why nothing can be computed any more; none as long as all is well.
    pub fn fatal(&self) -> Option<&str> {
        self.fatal.get().map(String::as_str)
    }

    /// Waits until nothing can be computed any more.
    pub async fn until_fatal(&self) {
        self.fatal_was_set.notified().await;
    }

    /// From here on nothing can be computed. The first reason counts.
    pub(crate) fn set_fatal(&self, reason: String) {
        if self.fatal.set(reason).is_ok() {
            self.closed.store(true, Ordering::Relaxed);
            self.fatal_was_set.notify_one();
        }
    }
}
