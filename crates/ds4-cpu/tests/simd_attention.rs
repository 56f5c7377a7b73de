//! Attention, index scores and small routines against plain computations.

mod simd_support;

use ds4_cpu::simd::{Isa, attend, index_scores, sum_of_squares};
use ds4_model::config::{HEAD_DIM, INDEX_DIM};
use proptest::prelude::*;
use simd_support::{Random, every_isa};

const SCALE: f32 = 0.044_194_174;

/// One head in f64.
fn attend_head(q: &[f32], rows: &[f32], sink: f32) -> Vec<f64> {
    let dot = |row: &[f32]| -> f64 {
        q.iter().zip(row).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
    };
    let scores: Vec<f64> =
        rows.chunks_exact(HEAD_DIM).map(|row| f64::from(SCALE) * dot(row)).collect();
    let largest = scores.iter().copied().fold(f64::from(sink), f64::max);
    let total: f64 =
        scores.iter().map(|s| (s - largest).exp()).sum::<f64>() + (f64::from(sink) - largest).exp();
    let mut out = vec![0.0; HEAD_DIM];
    for (row, score) in rows.chunks_exact(HEAD_DIM).zip(scores) {
        let weight = (score - largest).exp() / total;
        out.iter_mut().zip(row).for_each(|(out, &value)| *out += weight * f64::from(value));
    }
    out
}

struct Case {
    q: Vec<f32>,
    rows: Vec<f32>,
    sinks: Vec<f32>,
}

impl Case {
    /// With `spread` 1, scores have deviation 1.
    fn random(heads: usize, rows: usize, spread: f32, seed: u64) -> Case {
        let mut random = Random(seed);
        let q = random.normals(heads * HEAD_DIM).iter().map(|q| q * spread).collect();
        Case { q, rows: random.normals(rows * HEAD_DIM), sinks: random.normals(heads) }
    }

    fn run(&self, isa: Isa, scratch: &mut Vec<f32>) -> Vec<f32> {
        let mut heads = self.q.clone();
        let (first, second) = self.rows.split_at(self.rows.len() / HEAD_DIM / 3 * HEAD_DIM);
        attend(isa, &mut heads, &[first, second], &self.sinks, SCALE, scratch);
        heads
    }

    fn check(&self, tolerance: f64) {
        let mut scratch = Vec::new();
        for isa in every_isa() {
            let out = self.run(isa, &mut scratch);
            for (h, (out, q)) in
                out.chunks_exact(HEAD_DIM).zip(self.q.chunks_exact(HEAD_DIM)).enumerate()
            {
                let expected = attend_head(q, &self.rows, self.sinks[h]);
                for (out, expected) in out.iter().zip(expected) {
                    let error = (f64::from(*out) - expected).abs();
                    assert!(
                        error < tolerance,
                        "{}: head {h} is off by {error:e}, {out} for {expected}",
                        isa.name(),
                    );
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(25))]

    #[test]
    fn attention_of_any_shape(seed: u64, heads in 1usize..20, rows in 1usize..150, spread in 0.1f32..20.0) {
        Case::random(heads, rows, spread, seed).check(2e-6 * f64::from(spread.max(1.0)));
    }
}

#[test]
fn attention_at_the_widths_of_flash() {
    Case::random(64, 640, 1.0, 3).check(1e-6);
}

#[test]
fn sinks_take_their_share() {
    // All scores equal: each of n rows and the sink weigh 1/(n + 1).
    for isa in every_isa() {
        let mut heads = vec![0.0; 3 * HEAD_DIM];
        let rows = vec![1.0; 7 * HEAD_DIM];
        let sinks = [0.0, 1000.0, -1000.0];
        attend(isa, &mut heads, &[&rows], &sinks, SCALE, &mut Vec::new());
        let expected = [7.0 / 8.0, 0.0, 1.0];
        for (head, expected) in heads.chunks_exact(HEAD_DIM).zip(expected) {
            assert!(head.iter().all(|v| (v - expected).abs() < 1e-6), "{}", isa.name());
        }
    }
}

#[test]
fn heads_may_be_split_and_rows_come_in_parts() {
    let case = Case::random(21, 100, 1.0, 4);
    let mut scratch = vec![f32::NAN; 10_000];
    for isa in every_isa() {
        let whole = case.run(isa, &mut scratch);
        let mut heads = case.q.clone();
        let rows: Vec<_> = case.rows.chunks_exact(HEAD_DIM).collect();
        for (heads, sinks) in heads.chunks_mut(5 * HEAD_DIM).zip(case.sinks.chunks(5)) {
            attend(isa, heads, &rows, sinks, SCALE, &mut scratch);
        }
        assert!(heads == whole, "{}", isa.name());
    }
}

#[test]
fn no_rows_give_zero() {
    for isa in every_isa() {
        let mut heads = vec![1.0; 2 * HEAD_DIM];
        attend(isa, &mut heads, &[&[], &[]], &[0.0; 2], SCALE, &mut Vec::new());
        assert!(heads.iter().all(|&v| v == 0.0));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(25))]

    #[test]
    fn index_scores_of_any_shape(seed: u64, heads in 1usize..80, keys in 0usize..60) {
        let mut random = Random(seed);
        let q = random.normals(heads * INDEX_DIM);
        let k = random.normals(keys * INDEX_DIM);
        let weights = random.normals(heads);
        for isa in every_isa() {
            let mut scores = vec![f32::NAN; keys];
            index_scores(isa, &q, &k, &weights, &mut scores);
            for (score, key) in scores.iter().zip(k.chunks_exact(INDEX_DIM)) {
                let (mut expected, mut size) = (0.0, 0.0);
                for (q, &w) in q.chunks_exact(INDEX_DIM).zip(&weights) {
                    let terms = q.iter().zip(key).map(|(&q, &k)| f64::from(q) * f64::from(k));
                    expected += f64::from(w) * terms.clone().sum::<f64>().max(0.0);
                    size += f64::from(w).abs() * terms.map(f64::abs).sum::<f64>();
                }
                let error = (f64::from(*score) - expected).abs();
                prop_assert!(error <= 1e-6 * size, "{}: {score}, expected {expected}", isa.name());
            }
        }
    }

    #[test]
    fn squares_of_any_length(seed: u64, n in 0usize..200) {
        let x = Random(seed).normals(n);
        let expected: f32 = x.iter().map(|x| x * x).sum();
        for isa in every_isa() {
            let sum = sum_of_squares(isa, &x);
            prop_assert!((sum - expected).abs() <= 1e-5 * expected, "{sum}, expected {expected}");
        }
    }
}
