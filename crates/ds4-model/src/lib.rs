//! DeepSeek V4 as a file: configuration, weights, tokenizer and prompt format.

pub mod binding;
pub mod config;
mod error;
mod load;
mod split;
pub mod tokenizer;
pub mod weights;

pub use error::{Error, Result};
pub use load::Model;
