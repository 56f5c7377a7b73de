//! Launches of the kernels in kernels/compressor.cu: what follows the projections of an attention
//! input.

#![allow(unsafe_code, reason = "launches kernels")]

use std::ops::Range;

use ds4_engine::backend::StageResult;

use super::{attention::AttentionLayer, columns::Columns};
use crate::{
    constants::{
        CSA_RATIO, FINISH_THREADS, HEAD_DIM, INDEX_DIM, PAIRS, PART_COMPRESSOR, PART_INDEX,
        PART_KEY_VALUES, PART_LATENT,
    },
    device::{Buffer, Grid},
    kernel::Pointer,
    params::{
        CompressorSource, FINISH_INPUTS, FinishInputsParams, STORE_INPUTS, StoreInputsParams,
    },
};

/// Threads of a block of `store_inputs`.
const STORE_THREADS: usize = 128;

/// What there is to do for the rows of a step; the parts do not depend on each other.
#[derive(Clone, Copy, Default)]
pub struct Inputs<'a> {
    /// The query latent to normalise.
    pub latent: Option<Latent<'a>>,
    /// The key/value rows to finish.
    pub key_values: Option<KeyValues<'a>>,
    /// The layer's compressor.
    pub compressor: Option<Compressor<'a>>,
    /// The indexer's compressor, in a layer that has both.
    pub index: Option<Compressor<'a>>,
}

/// A query latent.
#[derive(Clone, Copy)]
pub struct Latent<'a> {
    /// Products `[n, width]`.
    pub raw: Columns<'a>,
    /// Elements.
    pub width: usize,
    /// Weight of its norm.
    pub norm: &'a Buffer<f32>,
    /// Normalised, halves `[n, width]`.
    pub out: &'a Buffer<u16>,
    /// What the halves leave over.
    pub low: &'a Buffer<u16>,
}

/// Key/value rows.
#[derive(Clone, Copy)]
pub struct KeyValues<'a> {
    /// Products `[n, 512]`.
    pub raw: Columns<'a>,
    /// Weight of their norm.
    pub norm: &'a Buffer<f32>,
    /// Normalised, rotated and stored `[n, row bytes]`.
    pub rows: &'a Buffer<u8>,
}

/// One compressor's products and weights.
#[derive(Clone, Copy)]
pub struct Compressor<'a> {
    /// Values `[n, width]`.
    pub values: Columns<'a>,
    /// Gate scores without position bias; the stride is that of `values`.
    pub scores: Columns<'a>,
    /// Position bias, f32 `[ratio, width]`.
    pub bias: &'a Buffer<f32>,
    /// Weight of the row's norm.
    pub norm: &'a Buffer<f32>,
    /// Frequencies of its rows' rotation, f32 `[2, 32]`: the second ones.
    pub frequencies: &'a Buffer<f32>,
}

/// Finishes the inputs of all `rows` rows of a step, the first `decode_rows` in short spans (at
/// most [`MAX_REWIND`](ds4_engine::MAX_REWIND) rows each).
///
/// Compressors append the rows that become complete to the caches and keep their inputs.
pub fn finish_inputs(
    layer: &AttentionLayer<'_>,
    rows: usize,
    decode_rows: usize,
    inputs: &Inputs<'_>,
) -> StageResult {
    if inputs.compressor.is_none() {
        return finish(layer, 0..rows, inputs, false);
    }
    // Short spans keep their inputs at once; longer ones would overwrite what they still read.
    finish(layer, 0..decode_rows, inputs, true)?;
    finish(layer, decode_rows..rows, inputs, false)?;
    store(layer, decode_rows..rows, inputs)
}

fn finish(
    layer: &AttentionLayer<'_>,
    rows: Range<usize>,
    inputs: &Inputs<'_>,
    store: bool,
) -> StageResult {
    let (n, parts) = (rows.end, inputs.parts());
    let mut params = FinishInputsParams {
        at: layer.params(&rows),
        compressor: inputs.source(layer, n),
        index: inputs.index_source(n),
        frequencies: inputs.compressor.map_or(Pointer::NULL, |c| c.frequencies.range(PAIRS, PAIRS)),
        rotations: layer.rotations(n),
        raw_kv: Pointer::NULL,
        kv_norm: Pointer::NULL,
        kv_rows: Pointer::NULL,
        raw_latent: Pointer::NULL,
        latent_norm: Pointer::NULL,
        latent: Pointer::NULL,
        latent_low: Pointer::NULL,
        parts,
        store: i32::from(store),
        kv_stride: 0,
        latent_stride: 0,
        latent_width: 0,
    };
    if let Some(k) = inputs.key_values {
        params.raw_kv = k.raw.of(n, HEAD_DIM);
        params.kv_norm = k.norm.first(HEAD_DIM);
        params.kv_rows = k.rows.first(n * layer.row_bytes());
        params.kv_stride = k.raw.stride as u32;
    }
    if let Some(l) = inputs.latent {
        params.raw_latent = l.raw.of(n, l.width);
        params.latent_norm = l.norm.first(l.width);
        params.latent = l.out.first(n * l.width);
        params.latent_low = l.low.first(n * l.width);
        params.latent_stride = l.raw.stride as u32;
        params.latent_width = l.width as u32;
    }
    let blocks = [rows.len(), parts.count_ones() as usize, 1];
    let grid = Grid { blocks, threads: FINISH_THREADS, shared: 0 };
    // SAFETY: the buffers have so many rows, and the caches room for them; parts that are missing
    // are not in `parts`.
    unsafe { layer.device.launch(FINISH_INPUTS, grid, &params) }
}

/// Keeps the last inputs of long spans in the rings.
fn store(layer: &AttentionLayer<'_>, rows: Range<usize>, inputs: &Inputs<'_>) -> StageResult {
    let params = StoreInputsParams {
        at: layer.params(&rows),
        compressor: inputs.source(layer, rows.end),
        index: inputs.index_source(rows.end),
    };
    let blocks = [rows.len(), 1 + usize::from(inputs.index.is_some()), 1];
    let grid = Grid { blocks, threads: STORE_THREADS, shared: 0 };
    // SAFETY: the buffers have so many rows, and the caches room for them.
    unsafe { layer.device.launch(STORE_INPUTS, grid, &params) }
}

impl Inputs<'_> {
    /// The set of parts.
    fn parts(&self) -> u32 {
        let present = [
            (PART_COMPRESSOR, self.compressor.is_some()),
            (PART_INDEX, self.index.is_some()),
            (PART_KEY_VALUES, self.key_values.is_some()),
            (PART_LATENT, self.latent.is_some()),
        ];
        present.iter().map(|(part, is_present)| u32::from(*is_present) << part).sum()
    }

    /// The layer's compressor, for rows up to `end`.
    fn source(&self, layer: &AttentionLayer<'_>, end: usize) -> CompressorSource {
        let (ratio, width) = (layer.kind.ratio(), layer.kind.compressor_width());
        self.compressor.map_or(CompressorSource::NONE, |c| c.source(end, ratio, width, HEAD_DIM))
    }

    /// The indexer's.
    fn index_source(&self, end: usize) -> CompressorSource {
        let source = |c: Compressor<'_>| c.source(end, CSA_RATIO, 2 * INDEX_DIM, INDEX_DIM);
        self.index.map_or(CompressorSource::NONE, source)
    }
}

impl Compressor<'_> {
    fn source(&self, rows: usize, ratio: usize, width: usize, row: usize) -> CompressorSource {
        CompressorSource {
            values: self.values.of(rows, width),
            scores: self.scores.of(rows, width),
            bias: self.bias.first(ratio * width),
            norm: self.norm.first(row),
            stride: self.values.stride as u32,
        }
    }
}
