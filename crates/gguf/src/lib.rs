//! GGUF files: reads and writes the container, and converts its block formats
//! to and from f32. Knows no model.
//!
//! Files are hostile input: every count, size and offset is checked before it
//! is used, and a bad file gives an [`Error`] of one line, never a panic. The
//! format and its checks are described in docs/gguf.md.

#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::expect_used))]

mod cursor;
mod dequantize;
mod error;
mod file;
mod iq2_tables;
mod layout;
mod mapping;
mod metadata;
mod parse;
mod quantize;
mod tensor_type;
mod writer;

pub use dequantize::dequantize_row;
pub use error::{Error, Place, Problem, Turn};
pub use file::{GgufFile, TensorInfo};
pub use iq2_tables::{IQ2_SIGNS, IQ2_XXS_GRID};
pub use mapping::Mapping;
pub use metadata::{Array, FromValue, Metadata, Value};
pub use quantize::{mxfp4_from_fp4, quantize_row};
pub use tensor_type::TensorType;
pub use writer::{FileLayout, TensorSpec, Writer};
