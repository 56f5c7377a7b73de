//! Measures models on any backend.
//!
//! [`suite`] has cases that are answered and graded, [`perplexity`] and [`divergence`] judge
//! every token of a text. docs/evaluation.md describes all of it for users, with the formats.

#![forbid(unsafe_code)]

pub mod divergence;
mod error;
pub mod grade;
pub mod logits_file;
pub mod nano;
pub mod perplexity;
pub mod runner;
pub mod suite;
pub mod summary;

pub use error::{Error, Result};
