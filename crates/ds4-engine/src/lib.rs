//! The forward pass, sessions and their KV state, and sampling, over any backend.
//!
//! [`forward`] is the model: one short function over the stages of a [`Step`](backend::Step).
//! Everything here is written once for all backends; tokens, logits and snapshots are the only
//! data that cross the boundary.

#![forbid(unsafe_code)]
#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::expect_used))]

pub mod backend;
mod engine;
pub mod experts;
mod forward;
pub mod layout;
pub mod observer;
mod output;
mod plan;
pub mod rope;
pub mod rows;
pub mod sampling;
mod session;
mod snapshot;
#[cfg(test)]
mod tests;

pub use backend::{Backend, BackendError, Phase};
pub use ds4_model::TokenId;
pub use engine::{Engine, StepError, Work};
pub use output::{LogitRow, RowOutput, StepOutput, Wanted};
pub use session::{Checkpoint, Session, SessionError};
pub use snapshot::SnapshotError;

/// Tokens by which a session can be rewound without a checkpoint (docs/model.md, "Rewind").
///
/// Each costs every session 333 KiB at the full model's shape; 16 covers stop strings and
/// drafted tokens.
pub const MAX_REWIND: usize = 16;
