//! Bounds of what a runtime takes on.

use std::time::Duration;

/// Bounds of what a runtime takes on.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Tokens of a prompt and its answer together.
    pub context: usize,
    /// Requests that run at the same time.
    pub running: usize,
    /// Requests that may wait.
    pub waiting: usize,
    /// Prompt tokens to compute together when no answer is running. Weights are read once per
    /// chunk, so small chunks are slow; a vanished client is noticed only between chunks, so
    /// large ones are unwieldy.
    pub prefill_chunk: usize,
    /// Bytes of KV state, of running requests and of the prefix cache together. Fewer count where
    /// the device has less memory left.
    pub kv_bytes: u64,
    /// How long a client may leave its events untaken.
    pub stall: Duration,
    /// Whether the prefix cache gives tokens of earlier answers too. They were decoded, so a prompt
    /// that reuses them may differ in its last bits from the same prompt without a cache.
    pub reuse_answers: bool,
}
