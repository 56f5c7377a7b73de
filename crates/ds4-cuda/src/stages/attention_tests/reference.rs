//! The stages restated in plain Rust, for one row at a time, and the bounds of their errors.

use std::cmp::Ordering;

use ds4_cpu::reference::{
    attention::{attend, index_scores},
    rms_norm,
};
use ds4_engine::{
    rope::Rotation,
    rows::{CacheRounding, RowCodec},
};
use ds4_model::config::{HEAD_DIM, INDEX_DIM};
use half::f16;

/// Pools slots of (values, scores): for each element a softmax of the scores weighs the values.
pub fn pool(slots: &[(&[f32], &[f32])], width: usize) -> Vec<f32> {
    (0..width)
        .map(|i| {
            let largest = slots.iter().map(|(_, s)| s[i]).fold(f32::NEG_INFINITY, f32::max);
            let weight = |s: &[f32]| f64::from(s[i] - largest).exp();
            let total: f64 = slots.iter().map(|(_, s)| weight(s)).sum();
            let sum: f64 = slots.iter().map(|(v, s)| weight(s) * f64::from(v[i])).sum();
            (sum / total) as f32
        })
        .collect()
}

/// Norm and rotation of a row.
pub fn finish(mut row: Vec<f32>, norm: &[f32], epsilon: f32, rotation: &Rotation) -> Vec<f32> {
    rms_norm(&mut row, Some(norm), epsilon);
    rotation.apply(&mut row);
    row
}

/// Attention of one query `[heads, 512]` over stored rows, rotated back.
pub fn attention(
    query: &[u16],
    rows: &[&[u8]],
    codec: RowCodec,
    sinks: &[f32],
    epsilon: f32,
    rotation: &Rotation,
) -> Vec<f32> {
    let mut heads: Vec<f32> = query.iter().map(|q| f16::from_bits(*q).to_f32()).collect();
    for head in heads.chunks_exact_mut(HEAD_DIM) {
        rms_norm(head, None, epsilon);
        rotation.apply(head);
    }
    let rows = decode(codec, rows);
    attend(&mut heads, &[&rows], sinks, (HEAD_DIM as f32).sqrt().recip());
    heads.chunks_exact_mut(HEAD_DIM).for_each(|head| rotation.inverse().apply(head));
    heads
}

/// The indexer's scores of one query for stored keys.
pub fn scores(
    query: &[f32],
    weights: &[f32],
    keys: &[&[u8]],
    rounding: CacheRounding,
    rotation: &Rotation,
) -> Vec<f32> {
    let codec = rounding.index_codec();
    let mut query = query.to_vec();
    for head in query.chunks_exact_mut(INDEX_DIM) {
        rotation.apply(head);
        codec.round_trip(head);
    }
    let scale = ((INDEX_DIM * weights.len()) as f32).sqrt().recip();
    let weights: Vec<f32> = weights.iter().map(|w| w * scale).collect();
    let keys = decode(codec, keys);
    let mut scores = vec![0.0; keys.len() / INDEX_DIM];
    index_scores(&query, &keys, &weights, &mut scores);
    scores
}

/// The `k` largest scores' indices, ascending; among equal scores the lower index wins.
pub fn top_k(scores: &[f32], k: usize) -> Vec<u32> {
    let better = |a: &u32, b: &u32| -> Ordering {
        let (a, b) = (*a as usize, *b as usize);
        scores[b].partial_cmp(&scores[a]).expect("no NaN").then(a.cmp(&b))
    };
    let mut rows: Vec<u32> = (0..scores.len() as u32).collect();
    rows.sort_unstable_by(better);
    rows.truncate(k);
    rows.sort_unstable();
    rows
}

pub fn decode(codec: RowCodec, rows: &[&[u8]]) -> Vec<f32> {
    let mut out = vec![0.0; rows.len() * codec.width()];
    for (row, out) in rows.iter().zip(out.chunks_exact_mut(codec.width())) {
        codec.decode(row, out);
    }
    out
}

/// Stored rows against the same rows before rounding, computed elsewhere.
///
/// A value that lies at the edge between two codes may fall to either: a few elements may differ,
/// by one step of their format (two, where a whole block's scale fell the other way).
pub fn check_rows(what: &str, codec: RowCodec, stored: &[u8], expected: &[f32]) {
    let rows: Vec<&[u8]> = stored.chunks_exact(codec.row_bytes()).collect();
    let found = decode(codec, &rows);
    let mut rounded = expected.to_vec();
    rounded.chunks_exact_mut(codec.width()).for_each(|row| codec.round_trip(row));
    assert_eq!(found.len(), rounded.len(), "{what}");
    let step = match codec {
        RowCodec::F32 { .. } => 0.0,
        RowCodec::Fp8Kv => 1.0 / 4.0,
        RowCodec::Fp4Index => 1.0,
    };
    let mut different = 0;
    for (i, (x, y)) in found.iter().zip(&rounded).enumerate() {
        let close = 2e-5 * y.abs().max(1.0);
        let largest = x.abs().max(y.abs()).max(if step > 0.0 { 1.0 } else { 0.0 });
        let error = (x - y).abs();
        assert!(error <= close + step * largest, "{what}: element {i} is {x}, expected {y}");
        different += usize::from(error > close);
    }
    assert!(different * 100 <= found.len(), "{what}: {different} of {} differ", found.len());
}

/// Attention in halves against f32.
///
/// Halves have a unit roundoff of 2^-11. The query's, the weights' and the result's rounding each
/// count once on average over many terms, an f32 row's twice more: measured below 2^-11 of the
/// largest value, and 2^-9 for single elements.
pub fn check_attention(what: &str, found: &[u16], expected: &[f32]) {
    let found: Vec<f32> = found.iter().map(|x| f16::from_bits(*x).to_f32()).collect();
    let largest = expected.iter().fold(0f32, |m, x| m.max(x.abs()));
    let mut squares = 0.0;
    for (i, (x, y)) in found.iter().zip(expected).enumerate() {
        let error = (x - y).abs();
        let (head, element) = (i / HEAD_DIM, i % HEAD_DIM);
        assert!(
            error <= largest / 512.0,
            "{what}: head {head} element {element} is {x}, expected {y}"
        );
        squares += f64::from(error * error);
    }
    let norm: f64 = expected.iter().map(|x| f64::from(x * x)).sum();
    let relative = (squares / norm).sqrt();
    assert!(relative <= 1.0 / 1024.0, "{what}: relative error {relative:e}");
}
