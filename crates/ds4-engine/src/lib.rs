//! The forward pass, sessions and their KV state, and sampling, over any backend.
//!
//! [`forward`] is the model: one short function over the stages of a [`Backend`]. Everything
//! here is written once for all backends; tokens, logits and snapshots are the only data that
//! cross the boundary.

pub mod backend;
mod engine;
mod forward;
pub mod observer;
pub mod rope;
pub mod rows;
pub mod sampling;
mod session;
mod snapshot;

pub use backend::{Backend, BackendError};
pub use ds4_model::TokenId;
pub use engine::{Engine, LogitRows, Logits, LogitsWanted, StepError, Work};
pub use session::{Checkpoint, RewindError, Session};
pub use snapshot::SnapshotError;

/// Tokens by which a session can be rewound without a checkpoint (docs/model.md, "Rewind").
///
/// Each costs every session 333 KiB at the full model's shape; 16 covers stop strings and
/// drafted tokens.
pub const MAX_REWIND: usize = 16;
