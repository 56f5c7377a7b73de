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

/// Keys scored together by one task.
const KEY_TILE: usize = 1024;

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
            let keys = decode_all(keys);
            selected[span.rows.clone()].par_iter_mut().enumerate().for_each(|(i, selected)| {
                let visible = (span.start + i + 1) / LayerKind::Csa.ratio();
                if visible > self.config.index_top_k {
                    let row = span.rows.start + i;
                    let q = chunk(&queries, row, self.config.index_heads * INDEX_DIM);
                    let w = chunk(&weights, row, self.config.index_heads);
                    let scores = self.scores(q, w, &keys[..visible * INDEX_DIM]);
                    *selected = Some(top_k(&scores, self.config.index_top_k));
                }
            });
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

    fn scores(&self, q: &[f32], head_weights: &[f32], keys: &[f32]) -> Vec<f32> {
        let mut scores = vec![0.0; keys.len() / INDEX_DIM];
        let tiles = scores.par_chunks_mut(KEY_TILE).zip(keys.par_chunks(KEY_TILE * INDEX_DIM));
        tiles.for_each(|(scores, keys)| self.kernels.index_scores(q, keys, head_weights, scores));
        scores
    }
}

fn decode_all(keys: &RowStore) -> Vec<f32> {
    let mut out = vec![0.0; keys.len() * INDEX_DIM];
    out.par_chunks_exact_mut(INDEX_DIM).enumerate().for_each(|(i, key)| keys.decode(i, key));
    out
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
    use super::top_k;

    #[test]
    fn ties_go_to_the_lower_index() {
        assert_eq!(top_k(&[0.0, 2.0, 1.0, 0.0, 1.0, 0.0], 2), [1, 2]);
        assert_eq!(top_k(&[0.0, 0.0, -1.0, 0.0], 2), [0, 1]);
        assert_eq!(top_k(&[3.0, 2.0, 5.0], 1), [2]);
    }
}
