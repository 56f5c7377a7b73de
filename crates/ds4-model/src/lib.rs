//! DeepSeek V4 as a file: configuration, weights, synthetic models.

#![forbid(unsafe_code)]
#![deny(missing_docs)]
#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::expect_used))]

pub mod binding;
pub mod config;
mod error;
mod load;
mod split;
pub mod synth;
pub mod weights;

pub use error::{Error, Result, shown};
pub use load::Model;

/// A token: its row in the embedding and its column in the logits.
pub type TokenId = u32;
