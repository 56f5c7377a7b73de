//! Attention over the sliding window and the compressed rows (docs/model.md, "Attention").

use ds4_engine::{backend::Span, rope::Rotation};
use ds4_model::{
    config::{HEAD_DIM, LayerKind, WINDOW},
    weights::Attention,
};
use rayon::prelude::*;

use crate::{
    Kernels,
    cache::{LayerCache, RowStore},
};

/// Heads that one task handles; enough to reuse a row from cache, few enough to share one query
/// between threads.
const HEAD_BLOCK: usize = 8;

/// Attention of one span in one layer.
pub(crate) struct AttendStage<'a> {
    pub kernels: Kernels,
    pub weights: &'a Attention,
    pub kind: LayerKind,
    pub span: &'a Span,
    /// Rotations of the span's rows.
    pub rotations: &'a [Rotation],
    /// Chosen compressed rows of the span's queries.
    pub selected: &'a [Option<Vec<u32>>],
}

impl AttendStage<'_> {
    /// Replaces the span's queries `heads [n, heads, 512]` by their attention, rotated back, and
    /// stores the span's rows `kv [n, 512]` in the window.
    pub fn run(&self, cache: &mut LayerCache, kv: &[f32], heads: &mut [f32]) {
        let start = self.span.start;
        let first = start.saturating_sub(WINDOW - 1);
        let window = self.window_rows(cache, first, kv);
        let shared = self.shared_rows(cache);
        let width = self.weights.sinks.len() * HEAD_DIM;
        heads.par_chunks_exact_mut(width).enumerate().for_each(|(i, heads)| {
            let p = start + i;
            let oldest = p.saturating_sub(WINDOW - 1) - first;
            let window = &window[oldest * HEAD_DIM..(p + 1 - first) * HEAD_DIM];
            let visible = (p + 1).checked_div(self.kind.ratio()).unwrap_or(0);
            let chosen;
            let compressed = match (&self.selected[i], &cache.compressed) {
                (Some(indices), Some(c)) => {
                    chosen = gather(&c.rows, indices);
                    &chosen
                }
                _ => &shared[..visible * HEAD_DIM],
            };
            self.attend(heads, &[window, compressed], &self.rotations[i]);
        });
        cache.window.extend(start, kv);
    }

    fn attend(&self, heads: &mut [f32], parts: &[&[f32]], rotation: &Rotation) {
        let back = rotation.inverse();
        let blocks = heads.par_chunks_mut(HEAD_BLOCK * HEAD_DIM);
        blocks.zip(self.weights.sinks.par_chunks(HEAD_BLOCK)).for_each(|(heads, sinks)| {
            self.kernels.attend(heads, parts, sinks);
            heads.chunks_exact_mut(HEAD_DIM).for_each(|head| back.apply(head));
        });
    }

    /// Window rows of positions `first` to the span's end.
    fn window_rows(&self, cache: &LayerCache, first: usize, kv: &[f32]) -> Vec<f32> {
        let mut rows = vec![0.0; (self.span.start - first) * HEAD_DIM];
        for (p, row) in (first..self.span.start).zip(rows.chunks_exact_mut(HEAD_DIM)) {
            cache.window.codec.decode(cache.window.get(p), row);
        }
        rows.extend_from_slice(kv);
        rows
    }

    /// Compressed rows that queries without a selection see: a prefix of what is decoded here.
    fn shared_rows(&self, cache: &LayerCache) -> Vec<f32> {
        let Some(c) = &cache.compressed else { return Vec::new() };
        let unselected = self.selected.iter().take_while(|s| s.is_none()).count();
        let visible = (self.span.start + unselected) / self.kind.ratio();
        if unselected == 0 {
            return Vec::new();
        }
        gather(&c.rows, &(0..visible as u32).collect::<Vec<_>>())
    }
}

fn gather(rows: &RowStore, chosen: &[u32]) -> Vec<f32> {
    let mut out = vec![0.0; chosen.len() * HEAD_DIM];
    for (i, row) in chosen.iter().zip(out.chunks_exact_mut(HEAD_DIM)) {
        rows.decode(*i as usize, row);
    }
    out
}
