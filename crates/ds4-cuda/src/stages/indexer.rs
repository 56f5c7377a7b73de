//! Launches of the kernels in kernels/indexer.cu.

use std::ops::Range;

use ds4_engine::backend::StageResult;
use ds4_model::config::INDEX_DIM;

use super::attention::{AttentionLayer, Products};
use crate::arguments::args;
use crate::device::Buffer;

/// Keys that a warp scores at a time.
const WARP_KEYS: usize = 32;
/// Warps that may share a tile of keys in decoding; mirrors HEAD_PARTS in kernels/indexer.cu.
const HEAD_PARTS: usize = 4;
/// Blocks that are aimed for: every multiprocessor has room for two small ones.
const BLOCKS: usize = 264;
/// Queries up to which blocks are large: preparing a query then takes longer than scoring.
const FEW_QUERIES: usize = 8;

/// Operands of the indexer.
pub struct Select<'a> {
    /// Indexer heads.
    pub heads: usize,
    /// Rows to choose.
    pub top_k: usize,
    /// Raw queries `[n, heads · 128]`.
    pub queries: Products,
    /// Raw head weights `[n, heads]`.
    pub head_weights: Products,
    /// Room for scores.
    pub scores: &'a Buffer<f32>,
    /// Scores of a row: no row may see more index keys.
    pub capacity: usize,
    /// Counters of blocks, one for each row, zero before and after.
    pub arrivals: &'a Buffer<u32>,
    /// Whether the rows are decoded. They take a way of their own where they see few keys, however
    /// many they are: so a row's results do not depend on the rows beside it.
    pub decoded: bool,
    /// Chosen rows `[n, top_k]`, ascending; those of queries that see at most `top_k` rows are not
    /// written.
    pub selected: &'a Buffer<u32>,
}

/// Chooses the compressed rows of `rows`, as many queries at a time as `scores` has room for.
///
/// # Panics
/// If there is no room for one query.
pub fn select(layer: &AttentionLayer<'_>, rows: Range<usize>, s: &Select<'_>) -> StageResult {
    let at_a_time = s.scores.len() / s.capacity;
    assert!(at_a_time > 0, "no room for the scores of one query");
    for first in rows.clone().step_by(at_a_time) {
        let some = first..rows.end.min(first + at_a_time);
        select_some(layer, some, s)?;
    }
    Ok(())
}

fn select_some(layer: &AttentionLayer<'_>, rows: Range<usize>, s: &Select<'_>) -> StageResult {
    debug_assert!(rows.len() <= s.arrivals.len());
    let heads = s.heads.next_multiple_of(8);
    let (threads, blocks) =
        if rows.len() <= FEW_QUERIES { (512, BLOCKS / 2) } else { (256, BLOCKS) };
    let parts = if s.decoded { HEAD_PARTS } else { 1 };
    let keys = threads / 32 / parts * WARP_KEYS;
    let blocks = blocks.div_ceil(rows.len()).min(s.capacity.div_ceil(keys));
    layer.device.launch(
        "select_rows",
        [blocks, rows.len(), 1],
        threads,
        heads * (2 * INDEX_DIM + size_of::<f32>()),
        args![
            layer.step,
            rows.start,
            layer.caches,
            layer.layer,
            layer.layers,
            s.heads,
            s.top_k,
            s.queries.pointer,
            s.queries.stride,
            s.head_weights.pointer,
            s.head_weights.stride,
            layer.rotations,
            layer.rounds(),
            parts,
            s.scores.pointer(),
            s.capacity,
            s.arrivals.pointer(),
            s.selected.pointer()
        ],
    )
}
