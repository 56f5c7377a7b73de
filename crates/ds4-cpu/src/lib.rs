//! The CPU backend.
//!
//! [`CpuBackend`] runs the stages of the model; each file here holds one stage. The hot routines
//! that stages call exist twice: in [`reference`], plain Rust in f32, and in [`simd`], for the
//! processor found at run time. [`Kernels`] chooses.

mod activations;
mod attention;
mod backend;
mod bandwidth;
mod cache;
mod compressor;
mod experts;
mod hyper_connection;
mod indexer;
mod kernels;
pub mod reference;
mod router;
pub mod simd;
mod step;

pub use activations::Activations;
pub use backend::{CpuBackend, PREFILL_CHUNK};
pub use cache::Cache;
pub use experts::CpuExperts;
pub use kernels::Kernels;
pub use step::CpuStep;
