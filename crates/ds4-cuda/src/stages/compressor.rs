//! Launches of the kernels in kernels/compressor.cu: what follows the projections of an attention
//! input.

use std::ops::Range;

use ds4_engine::backend::StageResult;

use super::attention::{AttentionLayer, Products};
use crate::arguments::args;
use crate::device::{Buffer, Pointer};

/// Threads of the kernel that finishes inputs, and of the one that stores them.
const FINISH_THREADS: usize = 512;
const STORE_THREADS: usize = 128;

/// What there is to do for the rows of a step; the parts do not depend on each other.
#[derive(Clone, Copy, Default)]
pub struct Inputs<'a> {
    /// The query latent to normalise.
    pub latent: Option<Latent<'a>>,
    /// The key/value rows to finish.
    pub key_values: Option<KeyValues<'a>>,
    /// The layer's compressor.
    pub compressor: Option<Compressor>,
    /// The indexer's compressor, in a layer that has both.
    pub index: Option<Compressor>,
}

/// A query latent.
#[derive(Clone, Copy)]
pub struct Latent<'a> {
    /// Products `[n, width]`.
    pub raw: Products,
    /// Elements.
    pub width: usize,
    /// Weight of its norm.
    pub norm: Pointer,
    /// Normalised, halves `[n, width]`.
    pub out: &'a Buffer<u16>,
    /// What the halves leave over.
    pub low: &'a Buffer<u16>,
}

/// Key/value rows.
#[derive(Clone, Copy)]
pub struct KeyValues<'a> {
    /// Products `[n, 512]`.
    pub raw: Products,
    /// Weight of their norm.
    pub norm: Pointer,
    /// Normalised, rotated and stored `[n, row bytes]`.
    pub rows: &'a Buffer<u8>,
}

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
    /// Frequencies of its rows' rotation, f32 `[32]`.
    pub frequencies: Pointer,
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
    let parts = inputs.parts();
    let c = inputs.compressor.unwrap_or(Compressor::NONE);
    let i = inputs.index.unwrap_or(Compressor::NONE);
    let none = (Products::NONE, Pointer::NULL, Pointer::NULL);
    let (raw_kv, kv_norm, kv_rows) =
        inputs.key_values.map_or(none, |k| (k.raw, k.norm, k.rows.pointer()));
    let (raw_latent, latent_norm, latent) =
        inputs.latent.map_or(none, |l| (l.raw, l.norm, l.out.pointer()));
    layer.device.launch(
        "finish_inputs",
        [rows.len(), parts.count_ones() as usize, 1],
        FINISH_THREADS,
        0,
        args![
            layer.step,
            rows.start,
            layer.caches,
            layer.layer,
            layer.layers,
            layer.kind.ratio(),
            parts,
            c.values.pointer,
            c.scores.pointer,
            c.values.stride,
            c.bias,
            c.norm,
            i.values.pointer,
            i.scores.pointer,
            i.values.stride,
            i.bias,
            i.norm,
            c.frequencies,
            layer.epsilon,
            layer.rounds(),
            i32::from(store),
            raw_kv.pointer,
            raw_kv.stride,
            kv_norm,
            layer.rotations,
            kv_rows,
            raw_latent.pointer,
            raw_latent.stride,
            inputs.latent.map_or(0, |l| l.width),
            latent_norm,
            latent,
            inputs.latent.map_or(Pointer::NULL, |l| l.low.pointer())
        ],
    )
}

/// Keeps the last inputs of long spans in the rings.
fn store(layer: &AttentionLayer<'_>, rows: Range<usize>, inputs: &Inputs<'_>) -> StageResult {
    let c = inputs.compressor.unwrap_or(Compressor::NONE);
    let i = inputs.index.unwrap_or(Compressor::NONE);
    layer.device.launch(
        "store_inputs",
        [rows.len(), 1 + usize::from(inputs.index.is_some()), 1],
        STORE_THREADS,
        0,
        args![
            layer.step,
            rows.start,
            layer.caches,
            layer.layer,
            layer.layers,
            layer.kind.ratio(),
            c.values.pointer,
            c.scores.pointer,
            c.values.stride,
            c.bias,
            i.values.pointer,
            i.scores.pointer,
            i.values.stride,
            i.bias
        ],
    )
}

impl Inputs<'_> {
    /// The set of parts; mirrors `Part` in kernels/compressor.cu.
    fn parts(&self) -> u32 {
        let present = [
            self.compressor.is_some(),
            self.index.is_some(),
            self.key_values.is_some(),
            self.latent.is_some(),
        ];
        present.iter().enumerate().map(|(i, p)| u32::from(*p) << i).sum()
    }
}

impl Compressor {
    const NONE: Compressor = Compressor {
        values: Products::NONE,
        scores: Products::NONE,
        bias: Pointer::NULL,
        norm: Pointer::NULL,
        frequencies: Pointer::NULL,
    };
}
