//! Launches of the kernels in kernels/key_value.cu, kernels/attention_decode.cu and
//! kernels/attention_prefill.cu.

use std::ops::Range;

use ds4_engine::{backend::StageResult, rope::PAIRS, rows::CacheRounding};
use ds4_model::config::{HEAD_DIM, LayerKind};

use crate::arguments::args;
use crate::device::{Buffer, Device, Pointer};
use crate::step::StepPointers;

/// Splits of a query's rows in decoding, at most; mirrors MAX_SPLITS in
/// kernels/attention_decode.cu.
pub const MAX_SPLITS: usize = 20;

/// Rows from which on a block of decoding has 64 heads instead of 16.
const MANY_ROWS: usize = 12;
/// Threads of the attention kernels.
const THREADS: usize = 256;
/// Rows of a chunk in decoding, and where shared memory is small.
const SHORT_CHUNK: usize = 32;
/// Bytes of a row in packed storage, which a chunk is copied to shared memory in.
const PACKED_ROW: usize = 712;

/// One layer's attention in a step: what all its kernels need.
#[derive(Clone, Copy)]
pub struct AttentionLayer<'a> {
    /// The device.
    pub device: &'a Device,
    /// The rows of the step.
    pub step: StepPointers,
    /// Table of [`LayerPointers`](crate::cache::LayerPointers) `[sessions, layers]`.
    pub caches: Pointer,
    /// Which layer, and of how many.
    pub layer: usize,
    /// Layers of the table.
    pub layers: usize,
    /// What the layer attends to.
    pub kind: LayerKind,
    /// How rows are stored.
    pub rounding: CacheRounding,
    /// Epsilon of the RMS norms.
    pub epsilon: f32,
    /// Cosines and sines `[n, 32]` for the layer's kind.
    pub rotations: Pointer,
}

/// Results of a matrix product, f32 `[n, stride]`, of which a stage uses the leading columns.
#[derive(Clone, Copy)]
pub struct Products {
    /// The first row's first used column.
    pub pointer: Pointer,
    /// Elements from one row to the next, a multiple of 4.
    pub stride: usize,
}

impl Products {
    pub(super) const NONE: Products = Products { pointer: Pointer::NULL, stride: 0 };
}

/// Operands of the attention proper.
pub struct Attend<'a> {
    /// Query heads.
    pub heads: usize,
    /// Raw queries, halves `[n, heads, 512]`: norm and rotation are done here.
    pub queries: &'a Buffer<u16>,
    /// Finished rows of the step, `[n, row bytes]`.
    pub kv_rows: &'a Buffer<u8>,
    /// Chosen compressed rows `[n, top_k]`, read in CSA layers where more are visible.
    pub selected: &'a Buffer<u32>,
    /// Rows that the indexer chooses.
    pub top_k: usize,
    /// Logits of the sinks `[heads]`.
    pub sinks: Pointer,
    /// Attention rotated back, halves `[n, heads, 512]`.
    pub out: &'a Buffer<u16>,
}

/// Room for the partial results of [`attend_decode`].
pub struct Partials<'a> {
    /// Halves, [`partial_len`] elements.
    pub sums: &'a Buffer<u16>,
    /// Pairs of f32, [`partial_len`] / 512 pairs.
    pub totals: &'a Buffer<f32>,
}

/// Elements of the partial sums of `rows` decoded rows.
pub fn partial_len(rows: usize, heads: usize) -> usize {
    rows * MAX_SPLITS * heads * HEAD_DIM
}

/// Computes the rotations of `rows` rows for two sets of frequencies.
///
/// `frequencies` is f32 `[2, 32]`, `out` is `[2, rows, 32]` pairs of cosine and sine.
pub fn rotations(
    device: &Device,
    step: StepPointers,
    rows: usize,
    frequencies: Pointer,
    out: Pointer,
) -> StageResult {
    let blocks = (2 * rows * PAIRS).div_ceil(THREADS);
    let args = args![step, rows, frequencies, out];
    device.launch("rotations", [blocks, 1, 1], THREADS, 0, args)
}

/// Attention of rows in short spans (at most [`MAX_REWIND`](ds4_engine::MAX_REWIND) rows each),
/// split over a query's rows; stores the rows in their windows.
///
/// How a query's rows are split depends on the query alone; how many blocks share its splits
/// changes no result.
pub fn attend_decode(
    layer: &AttentionLayer<'_>,
    rows: Range<usize>,
    a: &Attend<'_>,
    partials: &Partials<'_>,
) -> StageResult {
    debug_assert!(partial_len(rows.len(), a.heads) <= partials.sums.len());
    let (kernel, tiles, blocks) =
        decode_kernel(a.heads, rows.len(), layer.device.shared_per_block());
    let groups = a.heads.div_ceil(16 * tiles);
    let busy = blocks * layer.device.multiprocessors();
    let sharing = (busy / (groups * rows.len()).max(1)).clamp(1, MAX_SPLITS);
    layer.device.launch(
        kernel,
        [sharing + 1, groups, rows.len()],
        THREADS,
        shared_bytes(tiles, SHORT_CHUNK),
        args![
            layer.step,
            rows.start,
            layer.caches,
            layer.layer,
            layer.layers,
            layer.kind.ratio(),
            a.heads,
            a.queries.pointer(),
            a.kv_rows.pointer(),
            a.selected.pointer(),
            a.top_k,
            layer.rotations,
            layer.rounds(),
            layer.epsilon,
            scale(),
            partials.sums.pointer(),
            partials.totals.pointer()
        ],
    )?;
    layer.device.launch(
        "merge_attention",
        [a.heads, rows.len(), 1],
        HEAD_DIM / 4,
        0,
        args![
            layer.step,
            rows.start,
            layer.kind.ratio(),
            a.heads,
            a.top_k,
            layer.rotations,
            a.sinks,
            partials.sums.pointer(),
            partials.totals.pointer(),
            a.out.pointer()
        ],
    )
}

/// Attention of rows in spans of any length, one query a block; does not store the rows.
pub fn attend_prefill(
    layer: &AttentionLayer<'_>,
    rows: Range<usize>,
    a: &Attend<'_>,
) -> StageResult {
    let (kernel, tiles, chunk) = prefill_kernel(a.heads, layer.device.shared_per_block());
    layer.device.launch(
        kernel,
        [rows.len(), a.heads.div_ceil(16 * tiles), 1],
        THREADS,
        shared_bytes(tiles, chunk),
        args![
            layer.step,
            rows.start,
            layer.caches,
            layer.layer,
            layer.layers,
            layer.kind.ratio(),
            a.heads,
            a.queries.pointer(),
            a.kv_rows.pointer(),
            a.selected.pointer(),
            a.top_k,
            layer.rotations,
            a.sinks,
            layer.rounds(),
            layer.epsilon,
            scale(),
            a.out.pointer()
        ],
    )
}

/// Stores rows of whole spans in their windows, after their attention.
pub fn store_window(
    layer: &AttentionLayer<'_>,
    rows: Range<usize>,
    kv_rows: &Buffer<u8>,
) -> StageResult {
    layer.device.launch(
        "store_window",
        [rows.len(), 1, 1],
        128,
        0,
        args![
            layer.step,
            rows.start,
            layer.caches,
            layer.layer,
            layer.layers,
            layer.rounds(),
            kv_rows.pointer()
        ],
    )
}

impl AttentionLayer<'_> {
    /// The kernels' `rounding` argument.
    pub(super) fn rounds(&self) -> i32 {
        i32::from(self.rounding == CacheRounding::On)
    }
}

fn scale() -> f32 {
    (HEAD_DIM as f32).sqrt().recip()
}

/// Kernel, tiles of 16 heads and rows of a chunk, for this many heads and bytes of shared memory.
fn prefill_kernel(heads: usize, shared: usize) -> (&'static str, usize, usize) {
    let fits = |tiles, chunk| heads > 16 && shared_bytes(tiles, chunk) <= shared;
    if fits(4, 64) {
        ("attend_prefill_64x64", 4, 64)
    } else if fits(4, SHORT_CHUNK) {
        ("attend_prefill_64x32", 4, SHORT_CHUNK)
    } else {
        ("attend_prefill_16x32", 1, SHORT_CHUNK)
    }
}

/// Kernel, tiles of 16 heads, and blocks that a multiprocessor holds at a time (see its launch bounds),
/// for so many heads, decoded rows and bytes of shared memory.
fn decode_kernel(heads: usize, rows: usize, shared: usize) -> (&'static str, usize, usize) {
    if heads > 16 && rows >= MANY_ROWS && shared_bytes(4, SHORT_CHUNK) <= shared {
        ("attend_splits_64", 4, 1)
    } else {
        ("attend_splits_16", 1, 2)
    }
}

/// Shared memory of a block; mirrors `Shared` in kernels/attention.cuh.
fn shared_bytes(tiles: usize, chunk: usize) -> usize {
    let heads = 16 * tiles;
    let (head_tiles, score_rows) = if tiles == 1 { (1, 16) } else { (2, 32) };
    let parts = 8 / (tiles / head_tiles * (chunk / score_rows));
    let halves = (heads + chunk) * (HEAD_DIM + 8) + heads * (chunk + 8);
    let floats = parts * heads * (chunk + 4) + 3 * heads;
    2 * halves + 4 * floats + chunk * PACKED_ROW
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_generation_gets_the_largest_kernel_that_fits() {
        let kernel = |heads, kib: usize| prefill_kernel(heads, kib << 10).0;
        assert_eq!(kernel(64, 227), "attend_prefill_64x64");
        assert_eq!(kernel(64, 163), "attend_prefill_64x32");
        assert_eq!(kernel(64, 99), "attend_prefill_16x32");
        assert_eq!(kernel(8, 227), "attend_prefill_16x32");
        assert!(shared_bytes(1, SHORT_CHUNK) <= 99 << 10);
    }
}
