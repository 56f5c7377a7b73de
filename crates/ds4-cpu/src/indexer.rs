//! The indexer: which compressed rows a query attends to (docs/model.md, "Indexer").

use std::cmp::Ordering;

use ds4_engine::{
    backend::Batch,
    rope::Rotation,
    rows::{CacheRounding, RowCodec},
};
use ds4_model::{
    config::{Config, INDEX_DIM, LayerKind},
    weights::Indexer,
};
use rayon::prelude::*;

use crate::{Kernels, cache::RowStore, kernels::Input};

/// Keys that one task decodes and scores: few enough to stay in the second-level cache.
const KEY_TILE: usize = 512;

/// Queries that share what a task decodes. A thread has all scores of so many.
const QUERY_BLOCK: usize = 8;

/// The indexer at work in one layer.
pub(crate) struct SelectStage<'a> {
    pub kernels: Kernels,
    pub config: &'a Config,
    pub weights: &'a Indexer,
    pub rounding: CacheRounding,
    pub rotations: &'a [Rotation],
}

impl SelectStage<'_> {
    /// Chosen rows of every query, ascending; `None` where all visible ones fit.
    ///
    /// `keys(i)` are the index keys of session `i`, the batch's own included.
    pub fn run<'c>(
        &self,
        batch: &Batch,
        x: &Input<'_>,
        q_latent: &Input<'_>,
        keys: impl Fn(usize) -> Option<&'c RowStore>,
    ) -> Vec<Option<Vec<u32>>> {
        let mut selected = vec![None; batch.tokens.len()];
        let crowded = |end: usize| end / LayerKind::Csa.ratio() > self.config.index_top_k;
        if !batch.spans.iter().any(|s| crowded(s.start + s.rows.len())) {
            return selected;
        }
        let (queries, weights) = self.queries(batch.tokens.len(), x, q_latent);
        for span in &batch.spans {
            if !crowded(span.start + span.rows.len()) {
                continue;
            }
            let Some(keys) = keys(span.session) else { continue };
            let queries: Vec<Query<'_>> = (span.start..)
                .zip(span.rows.clone())
                .map(|(position, row)| Query {
                    row,
                    heads: chunk(&queries, row, self.config.index_heads * INDEX_DIM),
                    weights: chunk(&weights, row, self.config.index_heads),
                    visible: (position + 1) / LayerKind::Csa.ratio(),
                })
                .filter(|query| query.visible > self.config.index_top_k)
                .collect();
            let choose = |queries| choose(self.kernels, queries, keys, self.config.index_top_k);
            let chosen: Vec<_> = queries.par_chunks(QUERY_BLOCK).flat_map_iter(choose).collect();
            for (query, rows) in queries.iter().zip(chosen) {
                selected[query.row] = Some(rows);
            }
        }
        selected
    }

    /// Rotated (and rounded) queries `[n, heads, 128]`, and the weights of the heads `[n, heads]`.
    fn queries(&self, n: usize, x: &Input<'_>, q_latent: &Input<'_>) -> (Vec<f32>, Vec<f32>) {
        let heads = self.config.index_heads;
        let mut queries = vec![0.0; n * heads * INDEX_DIM];
        q_latent.matmul(self.weights.q_b.view(), &mut queries);
        let codec = self.rounding.index_codec();
        let rows = queries.par_chunks_exact_mut(heads * INDEX_DIM).zip(self.rotations);
        rows.for_each(|(row, rotation)| {
            for q in row.chunks_exact_mut(INDEX_DIM) {
                rotation.apply(q);
                if codec == RowCodec::Fp4Index {
                    codec.round_trip(q);
                }
            }
        });
        let mut weights = vec![0.0; n * heads];
        x.matmul_exact(self.weights.head_weights.view(), &mut weights);
        let scale = ((INDEX_DIM * heads) as f32).sqrt().recip();
        weights.iter_mut().for_each(|w| *w *= scale);
        (queries, weights)
    }
}

/// A row of the batch that looks for compressed rows.
struct Query<'a> {
    /// Its place in the batch.
    row: usize,
    /// `[heads, 128]`.
    heads: &'a [f32],
    /// One weight per head.
    weights: &'a [f32],
    /// How many of its session's compressed rows come before it.
    visible: usize,
}

/// The `k` rows that each query chooses of those that it sees, ascending.
fn choose(kernels: Kernels, queries: &[Query<'_>], keys: &RowStore, k: usize) -> Vec<Vec<u32>> {
    let visible = queries.iter().map(|query| query.visible).max().unwrap_or(0);
    let tiles: Vec<Vec<Vec<f32>>> = (0..visible.div_ceil(KEY_TILE))
        .into_par_iter()
        .map_init(Vec::new, |decoded, tile| {
            let tile = tile * KEY_TILE..visible.min((tile + 1) * KEY_TILE);
            decoded.resize(tile.len() * INDEX_DIM, 0.0);
            for (i, key) in tile.clone().zip(decoded.chunks_exact_mut(INDEX_DIM)) {
                keys.decode(i, key);
            }
            queries.iter().map(|query| query.scores(kernels, tile.start, decoded)).collect()
        })
        .collect();
    let scores = |i: usize| tiles.iter().flat_map(|tile| &tile[i]).copied().collect::<Vec<f32>>();
    (0..queries.len()).into_par_iter().map(|i| top_k(&scores(i), k)).collect()
}

impl Query<'_> {
    /// Its scores of those of `keys [n, 128]`, the first of which is key `first`, that it sees.
    fn scores(&self, kernels: Kernels, first: usize, keys: &[f32]) -> Vec<f32> {
        let seen = self.visible.saturating_sub(first).min(keys.len() / INDEX_DIM);
        let mut scores = vec![0.0; seen];
        kernels.index_scores(self.heads, &keys[..seen * INDEX_DIM], self.weights, &mut scores);
        scores
    }
}

fn chunk(x: &[f32], i: usize, width: usize) -> &[f32] {
    &x[i * width..(i + 1) * width]
}

/// The `k` largest scores' indices, ascending; among equal scores the lower index wins.
fn top_k(scores: &[f32], k: usize) -> Vec<u32> {
    let better = |a: &u32, b: &u32| -> Ordering {
        scores[*b as usize].total_cmp(&scores[*a as usize]).then(a.cmp(b))
    };
    let mut rows: Vec<u32> = (0..scores.len() as u32).collect();
    rows.select_nth_unstable_by(k - 1, better);
    rows.truncate(k);
    rows.sort_unstable();
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_and_blocks_change_no_choice() {
        let (heads, k) = (3, 5);
        let numbers = |seed: usize, n: usize| -> Vec<f32> {
            (0..n).map(|i| ((seed + i) * 7919 % 1009) as f32 / 500.0 - 1.0).collect()
        };
        let mut keys = RowStore::new(RowCodec::Fp4Index);
        (0..2 * KEY_TILE + 9).for_each(|i| keys.push(&numbers(131 * i, INDEX_DIM)));
        let q: Vec<_> = (0..4).map(|i| numbers(977 * i, heads * INDEX_DIM)).collect();
        let weights = numbers(5, heads);
        let visible = [k, KEY_TILE, KEY_TILE + 1, keys.len()];
        let queries: Vec<_> = (q.iter().zip(visible).enumerate())
            .map(|(row, (heads, visible))| Query { row, heads, weights: &weights, visible })
            .collect();
        for kernels in Kernels::available() {
            let chosen = choose(kernels, &queries, &keys, k);
            for (query, chosen) in queries.iter().zip(chosen) {
                let mut all = vec![0.0; query.visible * INDEX_DIM];
                let rows = all.chunks_exact_mut(INDEX_DIM).enumerate();
                rows.for_each(|(i, key)| keys.decode(i, key));
                assert_eq!(chosen, top_k(&query.scores(kernels, 0, &all), k), "{kernels}");
            }
        }
    }

    #[test]
    fn ties_go_to_the_lower_index() {
        assert_eq!(top_k(&[0.0, 2.0, 1.0, 0.0, 1.0, 0.0], 2), [1, 2]);
        assert_eq!(top_k(&[0.0, 0.0, -1.0, 0.0], 2), [0, 1]);
        assert_eq!(top_k(&[3.0, 2.0, 5.0], 1), [2]);
    }
}
