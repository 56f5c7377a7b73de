//! Launches of the compressor kernels (kernels/compressor.cu).

use std::ops::Range;

use ds4_engine::backend::StageResult;

use super::attention::{AttentionLayer, Products};
use crate::device::{Arg, Pointer, args};

/// Threads of the compressor kernels.
const THREADS: usize = 512;

/// One compressor's products and weights.
#[derive(Clone, Copy)]
pub struct Compressor {
    /// Values `[n, width]`.
    pub values: Products,
    /// Gate scores without position bias; the stride is that of `values`.
    pub scores: Products,
    /// Position bias, f32 `[ratio, width]`.
    pub bias: Pointer,
    /// Weight of the row's norm.
    pub norm: Pointer,
}

/// Feeds the layer's compressor, and in CSA layers the indexer's, and appends the rows that become
/// complete.
///
/// `rows` are all rows of the step, the first `decode_rows` in short spans (at most
/// [`MAX_REWIND`](ds4_engine::MAX_REWIND) rows each). `frequencies` are f32 `[32]`.
pub fn compress(
    layer: &AttentionLayer<'_>,
    rows: usize,
    decode_rows: usize,
    compressor: &Compressor,
    index: Option<&Compressor>,
    frequencies: Pointer,
) -> StageResult {
    // Short spans keep their inputs at once; longer ones would overwrite what they still read.
    emit(layer, 0..decode_rows, compressor, index, frequencies, true)?;
    emit(layer, decode_rows..rows, compressor, index, frequencies, false)?;
    store(layer, decode_rows..rows, compressor, index)
}

fn emit(
    layer: &AttentionLayer<'_>,
    rows: Range<usize>,
    compressor: &Compressor,
    index: Option<&Compressor>,
    frequencies: Pointer,
    store: bool,
) -> StageResult {
    let i = index.unwrap_or(compressor);
    layer.device.launch(
        "compress_rows",
        [rows.len(), 1 + usize::from(index.is_some()), 1],
        THREADS,
        0,
        args![
            Arg::value(layer.step),
            rows.start,
            layer.caches,
            layer.layer,
            layer.layers,
            layer.kind.ratio(),
            compressor.values.pointer,
            compressor.scores.pointer,
            compressor.values.stride,
            compressor.bias,
            compressor.norm,
            i.values.pointer,
            i.scores.pointer,
            i.values.stride,
            i.bias,
            i.norm,
            frequencies,
            layer.epsilon,
            layer.rounds(),
            i32::from(store)
        ],
    )
}

fn store(
    layer: &AttentionLayer<'_>,
    rows: Range<usize>,
    compressor: &Compressor,
    index: Option<&Compressor>,
) -> StageResult {
    let i = index.unwrap_or(compressor);
    layer.device.launch(
        "store_inputs",
        [rows.len(), 1 + usize::from(index.is_some()), 1],
        THREADS / 4,
        0,
        args![
            Arg::value(layer.step),
            rows.start,
            layer.caches,
            layer.layer,
            layer.layers,
            layer.kind.ratio(),
            compressor.values.pointer,
            compressor.scores.pointer,
            compressor.values.stride,
            compressor.bias,
            i.values.pointer,
            i.scores.pointer,
            i.values.stride,
            i.bias
        ],
    )
}
