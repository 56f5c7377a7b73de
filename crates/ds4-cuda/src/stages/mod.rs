//! The stages of a layer: which kernels run, on which rows, with which buffers.

pub mod argmax;
pub mod attention;
pub mod columns;
pub mod compressor;
pub mod embed;
pub mod experts;
pub mod hyper_connection;
pub mod indexer;
pub mod layer;

#[cfg(test)]
mod attention_tests;
