//! Launches of the kernels in kernels/indexer.cu.

#![allow(unsafe_code, reason = "launches kernels")]

use std::ops::Range;

use super::{attention::AttentionLayer, columns::Columns};
use crate::{
    constants::{HEAD_PARTS, INDEX_DIM, KEY_TILE, SELECT_THREADS, WARP},
    device::{Buffer, Grid},
    params::{SELECT_ROWS, SelectRowsParams},
};
use ds4_engine::backend::StageResult;

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
    pub queries: Columns<'a>,
    /// Raw head weights `[n, heads]`.
    pub head_weights: Columns<'a>,
    /// Room for scores.
    pub scores: &'a Buffer<f32>,
    /// Scores of a row: no row may see more index keys.
    pub capacity: usize,
    /// Counters of blocks, one for each row, zero before and after.
    pub arrivals: &'a Buffer<u32>,
    /// Whether the rows are decoded. They take a way of their own where they see few keys, however
    /// many they are: so a row's results do not depend on the rows beside it.
    pub decoded: bool,
    /// Chosen rows `[n, top_k]`, ascending; rows of queries that see at most `top_k` are not
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
    let heads = s.heads.next_multiple_of(8);
    let (threads, blocks) = if rows.len() <= FEW_QUERIES {
        (SELECT_THREADS, BLOCKS / 2)
    } else {
        (SELECT_THREADS / 2, BLOCKS)
    };
    let parts = if s.decoded { HEAD_PARTS } else { 1 };
    let keys = threads / WARP / parts * KEY_TILE;
    let blocks = blocks.div_ceil(rows.len()).min(s.capacity.div_ceil(keys));
    let params = SelectRowsParams {
        at: layer.params(&rows),
        queries: s.queries.of(rows.end, s.heads * INDEX_DIM),
        head_weights: s.head_weights.of(rows.end, s.heads),
        rotations: layer.rotations(rows.end),
        scores: s.scores.first(rows.len() * s.capacity),
        arrivals: s.arrivals.first(rows.len()),
        selected: s.selected.first(rows.end * s.top_k),
        heads: s.heads as u32,
        top_k: s.top_k as u32,
        query_stride: s.queries.stride as u32,
        weight_stride: s.head_weights.stride as u32,
        parts: parts as u32,
        capacity: s.capacity as u32,
    };
    let grid = Grid {
        blocks: [blocks, rows.len(), 1],
        threads,
        shared: heads * (INDEX_DIM * size_of::<u16>() + size_of::<f32>()),
    };
    // SAFETY: the buffers have so many rows, and no row sees more than `capacity` keys.
    unsafe { layer.device.launch(SELECT_ROWS, grid, &params) }
}
