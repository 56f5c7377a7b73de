//! Makes model files: checkpoints in safetensors or GGUF to GGUF, in a recipe of types.
//!
//! [`Source`] is what is read, [`Plan`] says what becomes of each tensor, and [`convert`] carries
//! it out, tensor by tensor and never with a whole one in memory. [`ImportanceMatrix`] tells the
//! quantisers which columns matter. docs/quantization.md describes all of it for users.
//!
//! Checkpoints, templates and importance files are hostile input: everything that they say is
//! checked before it is used, and what is wrong with them is an [`Error`] of one line.

#![forbid(unsafe_code)]

mod convert;
mod error;
mod imatrix;
mod journal;
mod metadata;
mod overrides;
mod plan;
mod source;

pub use convert::{Outcome, Progress, convert};
pub use ds4_model::synth::Recipe;
pub use error::{Error, Result};
pub use imatrix::{Collector, ImportanceMatrix};
pub use metadata::ModelMetadata;
pub use overrides::Override;
pub use plan::{Options, Plan, PlannedTensor};
pub use source::Source;
