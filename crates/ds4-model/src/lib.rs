//! DeepSeek V4 as a file: configuration, weights, tokenizer and prompt format.

pub mod config;
pub mod weights;
mod model;

pub use model::Model;
