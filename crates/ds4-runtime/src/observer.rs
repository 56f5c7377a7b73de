//! Who hears what the runtime does, for an operator's figures.

use std::time::Duration;

use crate::{request::Event, scheduler::prefix_cache::ReuseSource};

/// Hears what the runtime does. All calls come from the scheduler's thread, between two steps, so
/// none may take long. Each does nothing unless it is overridden.
pub trait Observer: Send {
    /// A request waited so long for its turn.
    fn queued(&self, _time: Duration) {}

    /// A prompt of `tokens` begins; `cached` of them need not be computed, by way of `source`.
    fn prompt(&self, _tokens: usize, _cached: usize, _source: ReuseSource) {}

    /// A step with tokens of so many answers, and so many tokens of prompts.
    fn step(&self, _answers: usize, _prompt_tokens: usize, _time: Duration) {}

    /// A request ended with its last event, this long after it was submitted.
    fn ended(&self, _last: &Event, _time: Duration) {}

    /// A request ended because its client went away.
    fn cancelled(&self) {}

    /// An idle session was dropped.
    fn evicted(&self) {}

    /// The device had no room for memory that admission had counted on.
    fn out_of_memory(&self) {}

    /// A running request gave its memory to an older one.
    fn preempted(&self) {}

    /// What there is now: requests that run and wait, idle sessions and their bytes.
    fn sessions(&self, _running: usize, _idle: usize, _waiting: usize, _idle_bytes: u64) {}
}

/// Nobody hears anything.
impl Observer for () {}
