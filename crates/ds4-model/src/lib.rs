//! DeepSeek V4 as a file: configuration, weights, tokenizer and prompt format.

pub mod binding;
pub mod chat;
pub mod config;
pub mod detokenize;
mod error;
mod load;
pub mod profile;
pub mod prompt;
mod split;
pub mod synth;
pub mod tokenizer;
pub mod weights;

pub use error::{Error, Result};
pub use load::Model;
