//! Launches of the kernels in kernels/key_value.cu, kernels/attention_decode.cu and
//! kernels/attention_prefill.cu.

#![allow(unsafe_code, reason = "launches kernels")]

use std::ops::Range;

use ds4_engine::{backend::StageResult, rows::CacheRounding};
use ds4_model::config::LayerKind;

use super::columns::Columns;
use crate::{
    cache::LayerPointers,
    constants::{
        ATTEND_SHARED_16X32, ATTEND_SHARED_64X32, ATTEND_SHARED_64X64, ATTEND_THREADS, HEAD_DIM,
        LONG_CHUNK, MAX_SPLITS, PAIRS, SHORT_CHUNK, TILE_HEADS,
    },
    device::{Buffer, Device, Grid},
    kernel::{Kernel, Pointer},
    params::{
        ATTEND_PREFILL_16X32, ATTEND_PREFILL_64X32, ATTEND_PREFILL_64X64, AttentionParams,
        COMBINE_SPLITS, FLASH_DECODE_16, FLASH_DECODE_64, ROTATIONS, RotationsParams, STORE_WINDOW,
        StepLayer, StoreWindowParams,
    },
    step::StepRows,
};

/// Rows from which on a block of decoding has 64 heads instead of 16.
const MANY_ROWS: usize = 12;
/// Threads of the kernels that rotate and that store windows.
const ROTATE_THREADS: usize = 256;
const STORE_THREADS: usize = 128;

/// One layer's attention in a step: what all its kernels need.
#[derive(Clone, Copy)]
pub struct AttentionLayer<'a> {
    /// The device.
    pub device: &'a Device,
    /// The rows of the step.
    pub step: StepRows<'a>,
    /// Table `[sessions, layers]` with the addresses of the step's caches, which have room for all
    /// rows.
    pub caches: &'a Buffer<LayerPointers>,
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
    /// Pairs of cosine and sine `[n, 32]` for the layer's kind.
    pub rotations: Columns<'a>,
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
    pub sinks: &'a Buffer<f32>,
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
    step: StepRows<'_>,
    rows: usize,
    frequencies: &Buffer<f32>,
    out: &Buffer<f32>,
) -> StageResult {
    let pairs = 2 * rows * PAIRS;
    let params = RotationsParams {
        step: step.params(rows),
        frequencies: frequencies.first(2 * PAIRS),
        rotations: out.first(2 * pairs),
        rows: rows as u32,
    };
    let blocks = [pairs.div_ceil(ROTATE_THREADS), 1, 1];
    let grid = Grid { blocks, threads: ROTATE_THREADS, shared: 0 };
    // SAFETY: the buffers have so many rows.
    unsafe { device.launch(ROTATIONS, grid, &params) }
}

/// Flash-decoding: attention of rows in short spans (at most
/// [`MAX_REWIND`](ds4_engine::MAX_REWIND) rows each), split over a query's rows, with a combine;
/// stores the rows in their windows.
///
/// How a query's rows are split depends on the query alone; how many blocks share its splits
/// changes no result.
///
/// # Panics
/// If a buffer has no room for the rows.
pub fn attend_decode(
    layer: &AttentionLayer<'_>,
    rows: Range<usize>,
    a: &Attend<'_>,
    partials: &Partials<'_>,
) -> StageResult {
    let (kernel, tiles, blocks) =
        decode_kernel(a.heads, rows.len(), layer.device.shared_per_block());
    let groups = a.heads.div_ceil(TILE_HEADS * tiles);
    let busy = blocks * layer.device.multiprocessors();
    let sharing = (busy / (groups * rows.len()).max(1)).clamp(1, MAX_SPLITS);
    let partial = partial_len(rows.len(), a.heads);
    let params = AttentionParams {
        partial_sums: partials.sums.first(partial),
        partial_totals: partials.totals.first(2 * partial / HEAD_DIM),
        ..a.params(layer, &rows)
    };
    let grid = Grid {
        blocks: [sharing + 1, groups, rows.len()],
        threads: ATTEND_THREADS,
        shared: shared_bytes(tiles, SHORT_CHUNK),
    };
    // SAFETY: the buffers have so many rows, and the caches room for them.
    unsafe { layer.device.launch(kernel, grid, &params) }?;
    let grid = Grid { blocks: [a.heads, rows.len(), 1], threads: HEAD_DIM / 4, shared: 0 };
    // SAFETY: as above.
    unsafe { layer.device.launch(COMBINE_SPLITS, grid, &params) }
}

/// Attention of rows in spans of any length, one query a block; does not store the rows.
///
/// # Panics
/// If a buffer has no room for the rows.
pub fn attend_prefill(
    layer: &AttentionLayer<'_>,
    rows: Range<usize>,
    a: &Attend<'_>,
) -> StageResult {
    let (kernel, tiles, chunk) = prefill_kernel(a.heads, layer.device.shared_per_block());
    let grid = Grid {
        blocks: [rows.len(), a.heads.div_ceil(TILE_HEADS * tiles), 1],
        threads: ATTEND_THREADS,
        shared: shared_bytes(tiles, chunk),
    };
    // SAFETY: the buffers have so many rows, and the caches room for them.
    unsafe { layer.device.launch(kernel, grid, &a.params(layer, &rows)) }
}

/// Stores rows of whole spans in their windows, after their attention.
///
/// # Panics
/// If the buffer has not so many rows.
pub fn store_window(
    layer: &AttentionLayer<'_>,
    rows: Range<usize>,
    kv_rows: &Buffer<u8>,
) -> StageResult {
    let params = StoreWindowParams {
        at: layer.params(&rows),
        kv_rows: kv_rows.first(rows.end * layer.row_bytes()),
    };
    let grid = Grid { blocks: [rows.len(), 1, 1], threads: STORE_THREADS, shared: 0 };
    // SAFETY: the buffer has so many rows, and the caches room for them.
    unsafe { layer.device.launch(STORE_WINDOW, grid, &params) }
}

impl AttentionLayer<'_> {
    /// What the kernels know of `rows`.
    pub(super) fn params(&self, rows: &Range<usize>) -> StepLayer {
        assert!(self.layer < self.layers, "layer {} of {}", self.layer, self.layers);
        StepLayer {
            step: self.step.params(rows.end),
            caches: self.caches.first(self.layers),
            first_row: rows.start as u32,
            layer: self.layer as u32,
            layers: self.layers as u32,
            ratio: self.kind.ratio() as u32,
            rounding: i32::from(self.rounding == CacheRounding::On),
            epsilon: self.epsilon,
        }
    }

    /// Address of the rotations of rows up to `end`.
    pub(super) fn rotations(&self, end: usize) -> Pointer {
        self.rotations.of(end, 2 * PAIRS)
    }

    /// Bytes of a key/value row.
    pub(super) fn row_bytes(&self) -> usize {
        self.rounding.kv_codec().row_bytes()
    }
}

impl Attend<'_> {
    fn params(&self, layer: &AttentionLayer<'_>, rows: &Range<usize>) -> AttentionParams {
        let (n, width) = (rows.end, self.heads * HEAD_DIM);
        AttentionParams {
            at: layer.params(rows),
            queries: self.queries.first(n * width),
            kv_rows: self.kv_rows.first(n * layer.row_bytes()),
            selected: self.selected.first(n * self.top_k),
            rotations: layer.rotations(n),
            sinks: self.sinks.first(self.heads),
            partial_sums: Pointer::NULL,
            partial_totals: Pointer::NULL,
            out: self.out.first(n * width),
            heads: self.heads as u32,
            top_k: self.top_k as u32,
            scale: (HEAD_DIM as f32).sqrt().recip() * std::f32::consts::LOG2_E,
        }
    }
}

/// Kernel, tiles of 16 heads and rows of a chunk, for this many heads and bytes of shared memory.
fn prefill_kernel(heads: usize, shared: usize) -> (Kernel<AttentionParams>, usize, usize) {
    let fits = |tiles, chunk| heads > TILE_HEADS && shared_bytes(tiles, chunk) <= shared;
    if fits(4, LONG_CHUNK) {
        (ATTEND_PREFILL_64X64, 4, LONG_CHUNK)
    } else if fits(4, SHORT_CHUNK) {
        (ATTEND_PREFILL_64X32, 4, SHORT_CHUNK)
    } else {
        (ATTEND_PREFILL_16X32, 1, SHORT_CHUNK)
    }
}

/// Kernel, tiles of 16 heads, and blocks that a multiprocessor holds at a time (see its launch
/// bounds), for so many heads, decoded rows and bytes of shared memory.
fn decode_kernel(
    heads: usize,
    rows: usize,
    shared: usize,
) -> (Kernel<AttentionParams>, usize, usize) {
    if heads > TILE_HEADS && rows >= MANY_ROWS && shared_bytes(4, SHORT_CHUNK) <= shared {
        (FLASH_DECODE_64, 4, 1)
    } else {
        (FLASH_DECODE_16, 1, 2)
    }
}

/// Shared memory of a block: what `Shared` in kernels/attention.cuh takes.
fn shared_bytes(tiles: usize, chunk: usize) -> usize {
    match (tiles, chunk) {
        (1, SHORT_CHUNK) => ATTEND_SHARED_16X32,
        (4, SHORT_CHUNK) => ATTEND_SHARED_64X32,
        _ => ATTEND_SHARED_64X64,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_generation_gets_the_largest_kernel_that_fits() {
        let kernel = |heads, kib: usize| prefill_kernel(heads, kib << 10).0.name;
        assert_eq!(kernel(64, 227), "attend_prefill_64x64");
        assert_eq!(kernel(64, 163), "attend_prefill_64x32");
        assert_eq!(kernel(64, 99), "attend_prefill_16x32");
        assert_eq!(kernel(8, 227), "attend_prefill_16x32");
        assert!(shared_bytes(1, SHORT_CHUNK) <= 99 << 10);
    }
}
