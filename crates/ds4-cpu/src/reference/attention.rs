//! Attention of one query, and the indexer's scores (docs/model.md, "Attention", "Indexer").

use ds4_model::config::{HEAD_DIM, INDEX_DIM};

use super::dot;

/// Replaces the queries `[heads, 512]` by their attention over the rows of all `parts`, each
/// `[rows, 512]`.
///
/// A row is both key and value. The sink is one more score per head, not scaled, without a value.
pub fn attend(heads: &mut [f32], parts: &[&[f32]], sinks: &[f32], scale: f32) {
    let rows: Vec<_> = parts.iter().flat_map(|part| part.chunks_exact(HEAD_DIM)).collect();
    for (q, sink) in heads.chunks_exact_mut(HEAD_DIM).zip(sinks) {
        let scores: Vec<f32> = rows.iter().map(|row| scale * dot(q, row)).collect();
        let largest = scores.iter().copied().fold(*sink, f32::max);
        let weights: Vec<f32> = scores.iter().map(|s| (s - largest).exp()).collect();
        let total = weights.iter().sum::<f32>() + (sink - largest).exp();
        q.fill(0.0);
        for (row, w) in rows.iter().zip(&weights) {
            q.iter_mut().zip(*row).for_each(|(o, v)| *o += w / total * v);
        }
    }
}

/// scores[c] = Σ_h head_weights[h] · max(0, q_h · key_c).
///
/// `q` is `[heads, 128]`, `keys` is `[rows, 128]`.
pub fn index_scores(q: &[f32], keys: &[f32], head_weights: &[f32], scores: &mut [f32]) {
    for (score, key) in scores.iter_mut().zip(keys.chunks_exact(INDEX_DIM)) {
        let heads = q.chunks_exact(INDEX_DIM).zip(head_weights);
        *score = heads.map(|(q, w)| w * dot(q, key).max(0.0)).sum();
    }
}
