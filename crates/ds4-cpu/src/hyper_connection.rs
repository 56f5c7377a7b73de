//! Manifold-constrained hyper-connections: how sublayers read and write the four residual
//! streams (docs/model.md, "Hyper-connections").

use ds4_model::{
    config::{Config, HC_MIX, STREAMS},
    weights::HyperConnection,
};
use rayon::prelude::*;

use crate::{
    Kernels,
    kernels::Input,
    reference::{dot, sigmoid},
};

/// The streams' mixing weights, before any nonlinearity: `[n, outputs]`.
///
/// `function` sees each row's streams, flattened and RMS-normalised.
fn mixes(
    kernels: Kernels,
    hc: &HyperConnection,
    config: &Config,
    streams: &[f32],
    decode_rows: usize,
) -> Vec<f32> {
    let (width, outputs) = (hc.function.cols, hc.function.rows);
    let mut m = vec![0.0; streams.len() / width * outputs];
    Input::new(kernels, streams, width, decode_rows).matmul_exact(hc.function.view(), &mut m);
    for (m, x) in m.chunks_exact_mut(outputs).zip(streams.chunks_exact(width)) {
        let scale = 1.0 / (dot(x, x) / width as f32 + config.rms_epsilon).sqrt();
        m.iter_mut().for_each(|m| *m *= scale);
    }
    m
}

/// Mixes `streams [n, 4, hidden]` into the sublayer's input `h [n, hidden]`; leaves the weights
/// for [`post`] in `post [n, 4]` and `comb [n, 4, 4]`.
#[allow(clippy::too_many_arguments)]
pub(crate) fn pre(
    kernels: Kernels,
    hc: &HyperConnection,
    config: &Config,
    decode_rows: usize,
    streams: &[f32],
    h: &mut [f32],
    post: &mut [f32],
    comb: &mut [f32],
) {
    let m = mixes(kernels, hc, config, streams, decode_rows);
    let hidden = config.hidden;
    let rows = m.par_chunks_exact(HC_MIX).zip(streams.par_chunks_exact(STREAMS * hidden));
    let out = h
        .par_chunks_exact_mut(hidden)
        .zip(post.par_chunks_exact_mut(STREAMS))
        .zip(comb.par_chunks_exact_mut(STREAMS * STREAMS));
    rows.zip(out).for_each(|((m, streams), ((h, post), comb))| {
        let logit = |part: usize, i: usize| m[i] * hc.scale[part] + hc.base[i];
        for (j, post) in post.iter_mut().enumerate() {
            *post = 2.0 * sigmoid(logit(1, STREAMS + j));
        }
        for (i, comb) in comb.iter_mut().enumerate() {
            *comb = logit(2, 2 * STREAMS + i);
        }
        sinkhorn(comb, config);
        collapse(|j| sigmoid(logit(0, j)) + config.hc_epsilon, streams, h);
    });
}

/// streams[k] = post[k]·y + Σ_j comb[j][k]·streams[j], in place.
pub(crate) fn post(hidden: usize, post: &[f32], comb: &[f32], y: &[f32], streams: &mut [f32]) {
    let weights = post.par_chunks_exact(STREAMS).zip(comb.par_chunks_exact(STREAMS * STREAMS));
    let rows = streams.par_chunks_exact_mut(STREAMS * hidden).zip(y.par_chunks_exact(hidden));
    rows.zip(weights).for_each(|((streams, y), (post, comb))| {
        let [s0, s1, s2, s3] = split(streams, hidden);
        for i in 0..hidden {
            let old = [s0[i], s1[i], s2[i], s3[i]];
            let mixed = |k: usize| {
                post[k] * y[i] + (0..STREAMS).map(|j| comb[STREAMS * j + k] * old[j]).sum::<f32>()
            };
            (s0[i], s1[i], s2[i], s3[i]) = (mixed(0), mixed(1), mixed(2), mixed(3));
        }
    });
}

/// Collapses the streams before the output head: only the `pre` part exists there.
pub(crate) fn head(
    kernels: Kernels,
    hc: &HyperConnection,
    config: &Config,
    decode_rows: usize,
    streams: &[f32],
) -> Vec<f32> {
    let m = mixes(kernels, hc, config, streams, decode_rows);
    let hidden = config.hidden;
    let mut h = vec![0.0; streams.len() / STREAMS];
    let rows = m.chunks_exact(STREAMS).zip(streams.chunks_exact(STREAMS * hidden));
    for ((m, streams), h) in rows.zip(h.chunks_exact_mut(hidden)) {
        let pre = |j: usize| sigmoid(m[j] * hc.scale[0] + hc.base[j]) + config.hc_epsilon;
        collapse(pre, streams, h);
    }
    h
}

/// h = Σ_j pre(j)·streams[j].
fn collapse(pre: impl Fn(usize) -> f32, streams: &[f32], h: &mut [f32]) {
    h.fill(0.0);
    for (j, stream) in streams.chunks_exact(h.len()).enumerate() {
        let weight = pre(j);
        h.iter_mut().zip(stream).for_each(|(h, s)| *h += weight * s);
    }
}

/// Makes `comb` nearly doubly stochastic: a softmax of the rows, then alternating column and row
/// normalisation, columns last.
fn sinkhorn(comb: &mut [f32], config: &Config) {
    let epsilon = config.hc_epsilon;
    for row in comb.chunks_exact_mut(STREAMS) {
        let largest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        row.iter_mut().for_each(|c| *c = (*c - largest).exp());
        let sum: f32 = row.iter().sum();
        row.iter_mut().for_each(|c| *c = *c / sum + epsilon);
    }
    normalise_columns(comb, epsilon);
    for _ in 1..config.sinkhorn_iterations {
        for row in comb.chunks_exact_mut(STREAMS) {
            let sum = row.iter().sum::<f32>() + epsilon;
            row.iter_mut().for_each(|c| *c /= sum);
        }
        normalise_columns(comb, epsilon);
    }
}

fn normalise_columns(comb: &mut [f32], epsilon: f32) {
    for k in 0..STREAMS {
        let sum = (0..STREAMS).map(|j| comb[STREAMS * j + k]).sum::<f32>() + epsilon;
        (0..STREAMS).for_each(|j| comb[STREAMS * j + k] /= sum);
    }
}

fn split(streams: &mut [f32], hidden: usize) -> [&mut [f32]; STREAMS] {
    let (s0, rest) = streams.split_at_mut(hidden);
    let (s1, rest) = rest.split_at_mut(hidden);
    let (s2, s3) = rest.split_at_mut(hidden);
    [s0, s1, s2, s3]
}
