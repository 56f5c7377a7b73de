//! Compressed rows: a gated pool over a window of tokens (docs/model.md, "Compressor").

use ds4_engine::{
    backend::Batch,
    rope::{Frequencies, rotation},
};
use ds4_model::{config::Config, weights::Compressor};
use rayon::prelude::*;

use crate::{
    Cache,
    cache::{Compressed, InputRing},
    kernels::Input,
    reference::rms_norm,
};

/// A compressor at work in one layer.
pub(crate) struct CompressStage<'a> {
    pub config: &'a Config,
    pub weights: &'a Compressor,
    pub frequencies: &'a Frequencies,
}

impl CompressStage<'_> {
    /// Feeds the batch's inputs `x [n, hidden]` to every session's compressor, which `part` finds
    /// in its cache, and appends the rows that become complete.
    pub fn run(
        &self,
        batch: &Batch,
        x: &Input<'_>,
        caches: &mut [&mut Cache],
        part: impl Fn(&mut Cache) -> Option<&mut Compressed>,
    ) {
        let width = self.weights.kv.rows;
        let mut values = vec![0.0; batch.tokens.len() * width];
        let mut scores = values.clone();
        x.matmul_exact(self.weights.kv.view(), &mut values);
        x.matmul_exact(self.weights.gate.view(), &mut scores);
        for span in &batch.spans {
            let Some(compressed) = part(caches[span.session]) else { continue };
            let range = span.rows.start * width..span.rows.end * width;
            let (values, scores) = (&values[range.clone()], &mut scores[range]);
            self.add_position_bias(span.start, compressed.ratio(), scores);
            let earlier = &compressed.inputs;
            let inputs = SpanInputs { width, start: span.start, values, scores, earlier };
            let complete = self.complete_rows(&inputs, compressed);
            complete.iter().for_each(|row| compressed.rows.push(row));
            compressed.inputs.extend(span.start, values, scores);
        }
    }

    fn add_position_bias(&self, start: usize, ratio: usize, scores: &mut [f32]) {
        let width = self.weights.kv.rows;
        for (i, scores) in scores.chunks_exact_mut(width).enumerate() {
            let bias = &self.weights.position_bias[(start + i) % ratio * width..][..width];
            scores.iter_mut().zip(bias).for_each(|(s, b)| *s += b);
        }
    }

    /// The rows whose windows end inside the span.
    fn complete_rows(&self, inputs: &SpanInputs<'_>, compressed: &Compressed) -> Vec<Vec<f32>> {
        let (ratio, width) = (compressed.ratio(), compressed.rows.width());
        let end = inputs.start + inputs.values.len() / inputs.width;
        (compressed.rows.len()..end / ratio)
            .into_par_iter()
            .map(|c| {
                let mut row = vec![0.0; width];
                inputs.pool(c * ratio, ratio, &mut row);
                rms_norm(&mut row, Some(&self.weights.norm), self.config.rms_epsilon);
                rotation(self.frequencies, c * ratio).apply(&mut row);
                row
            })
            .collect()
    }
}

/// Compressor inputs by position: the span's own, and earlier ones from the ring.
struct SpanInputs<'a> {
    width: usize,
    start: usize,
    values: &'a [f32],
    scores: &'a [f32],
    earlier: &'a InputRing,
}

impl SpanInputs<'_> {
    fn values(&self, position: usize) -> &[f32] {
        match position.checked_sub(self.start) {
            Some(i) => &self.values[i * self.width..][..self.width],
            None => self.earlier.values(position),
        }
    }

    fn scores(&self, position: usize) -> &[f32] {
        match position.checked_sub(self.start) {
            Some(i) => &self.scores[i * self.width..][..self.width],
            None => self.earlier.scores(position),
        }
    }

    /// Pools the window of `ratio` tokens from `first` into `row`: for each element, a softmax
    /// of the scores over the tokens weighs their values.
    ///
    /// Where inputs are twice as wide as the row, windows overlap: the first half of each token's
    /// input is for the window after its own, the second half for its own.
    fn pool(&self, first: usize, ratio: usize, row: &mut [f32]) {
        let width = row.len();
        let overlapping = self.width == 2 * width;
        let own_part = if overlapping { width } else { 0 };
        let previous = if overlapping { first.saturating_sub(ratio)..first } else { first..first };
        let slots: Vec<(&[f32], &[f32])> = previous
            .map(|p| (&self.values(p)[..width], &self.scores(p)[..width]))
            .chain((first..first + ratio).map(|p| {
                (&self.values(p)[own_part..][..width], &self.scores(p)[own_part..][..width])
            }))
            .collect();
        let mut largest = vec![f32::NEG_INFINITY; width];
        for (_, scores) in &slots {
            largest.iter_mut().zip(*scores).for_each(|(m, s)| *m = m.max(*s));
        }
        let mut total = vec![0.0; width];
        for (values, scores) in &slots {
            for i in 0..width {
                let weight = (scores[i] - largest[i]).exp();
                total[i] += weight;
                row[i] += weight * values[i];
            }
        }
        row.iter_mut().zip(&total).for_each(|(x, t)| *x /= t);
    }
}
