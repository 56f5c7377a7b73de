//! Launches of the kernels in kernels/indexer.cu.

use std::ops::Range;

use ds4_engine::backend::StageResult;
use ds4_model::config::INDEX_DIM;

use super::attention::{AttentionLayer, Products};
use crate::arguments::args;
use crate::device::Buffer;

/// Keys that a warp scores at a time.
const WARP_KEYS: usize = 32;
/// Blocks that scoring aims for: every multiprocessor has room for two small ones.
const SCORE_BLOCKS: usize = 264;
/// Queries up to which blocks are large: preparing a query then takes longer than scoring.
const FEW_QUERIES: usize = 8;
/// Threads of the selecting kernel.
const SELECT_THREADS: usize = 1024;
/// Scores of a query that are kept in shared memory, at most: 128 KiB.
const SHARED_SCORES: usize = 1 << 15;
/// Shared memory that the selecting kernel has besides.
const SELECT_SHARED: usize = 16 << 10;

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
        score(layer, some.clone(), s)?;
        choose(layer, some, s)?;
    }
    Ok(())
}

fn score(layer: &AttentionLayer<'_>, rows: Range<usize>, s: &Select<'_>) -> StageResult {
    let heads = s.heads.next_multiple_of(8);
    let (threads, blocks) =
        if rows.len() <= FEW_QUERIES { (512, SCORE_BLOCKS / 2) } else { (256, SCORE_BLOCKS) };
    let keys = threads / 32 * WARP_KEYS;
    let blocks = blocks.div_ceil(rows.len()).min(s.capacity.div_ceil(keys));
    layer.device.launch(
        "index_scores",
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
            s.scores.pointer(),
            s.capacity
        ],
    )
}

fn choose(layer: &AttentionLayer<'_>, rows: Range<usize>, s: &Select<'_>) -> StageResult {
    let room = layer.device.shared_per_block().saturating_sub(SELECT_SHARED) / size_of::<u32>();
    let cached = s.capacity.min(SHARED_SCORES).min(room);
    layer.device.launch(
        "select_rows",
        [rows.len(), 1, 1],
        SELECT_THREADS,
        cached * size_of::<u32>(),
        args![
            layer.step,
            rows.start,
            s.top_k,
            s.scores.pointer(),
            s.capacity,
            cached,
            s.selected.pointer()
        ],
    )
}
