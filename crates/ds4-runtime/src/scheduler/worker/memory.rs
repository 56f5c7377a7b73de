//! KV memory: the bytes that requests use and may come to need, as the device allocates them, and
//! preemption. When memory is short, the prefix cache goes first, and then the newest request is
//! preempted.

use ds4_engine::MAX_REWIND;

use super::Worker;
use crate::scheduler::sequence::Sequence;

/// Tokens of an answer to reserve memory for. Most answers are shorter, and the memory in use is
/// checked before every step.
pub(super) const USUAL_ANSWER: usize = 2048;

impl Worker {
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

    /// Bytes that a session with capacity for `tokens` tokens takes on the device.
    pub(super) fn session_bytes(&self, tokens: usize) -> u64 {
        self.engine.backend().session_bytes(tokens.min(self.limits.context))
    }

    /// Bytes of KV state that there may be.
    pub(super) fn kv_bytes(&self) -> u64 {
        self.found_bytes.unwrap_or(u64::MAX).min(self.limits.kv_bytes)
    }

    /// Bytes that all running requests may come to need soon.
    pub(super) fn running_bytes(&self) -> u64 {
        self.running.iter().map(|sequence| self.reserved_bytes(sequence)).sum()
    }

    /// Bytes that a running request may come to need soon.
    fn reserved_bytes(&self, sequence: &Sequence) -> u64 {
        let tokens = sequence.expected_tokens(USUAL_ANSWER);
        let live = &sequence.live;
        live.session.bytes().max(self.session_bytes(tokens)) + live.checkpoint_bytes()
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

    /// Takes a request's memory away; its tokens are computed again when there is room.
    pub(super) fn preempt(&mut self, index: usize) {
        self.observer.preempted();
        let mut request = self.running.remove(index).preempt();
        request.outbox.flush();
        let place = self.preempted.partition_point(|other| other.since <= request.since);
        self.preempted.insert(place, request);
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
}
