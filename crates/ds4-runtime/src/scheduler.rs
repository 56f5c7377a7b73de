//! The scheduler's thread: runs requests on the engine, many at a time.
//!
//! Every step of the engine advances all running answers by a token and, within a token budget,
//! computes a chunk of the prompts of newer requests. Nothing here blocks on a client: a request
//! whose events are not taken pauses, and one whose receiver is gone ends.

mod answer;
mod outbox;
mod pace;
pub(crate) mod prefix_cache;
pub(crate) mod queue;
mod sequence;
pub(crate) mod worker;
