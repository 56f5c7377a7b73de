//! How far logits are from those they should be.

use ds4_engine::sampling;

/// The distance of rows of logits from expected ones.
#[derive(Debug)]
pub struct Difference {
    /// Mean KL divergence, in nats.
    pub kl: f64,
    /// Share of rows with the expected argmax.
    pub top1: f64,
    /// Largest difference of two logits.
    pub max_abs: f32,
}

impl Difference {
    /// Compares `rows` with `expected`, which has as many.
    pub fn of(rows: &[Vec<f32>], expected: &[Vec<f32>]) -> Difference {
        assert_eq!(rows.len(), expected.len());
        let n = rows.len() as f64;
        let pairs = || rows.iter().zip(expected);
        let apart = |(a, b): (&Vec<f32>, &Vec<f32>)| {
            assert!(a.iter().all(|x| x.is_finite()));
            a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
        };
        let agree = pairs().filter(|(a, b)| sampling::argmax(a) == sampling::argmax(b)).count();
        Difference {
            kl: pairs().map(|(row, expected)| kl(expected, row)).sum::<f64>() / n,
            top1: agree as f64 / n,
            max_abs: pairs().map(apart).fold(0.0, f32::max),
        }
    }
}

/// KL divergence of the distribution of `row` from that of `expected`, both logits, in nats.
pub fn kl(expected: &[f32], row: &[f32]) -> f64 {
    let (total, own) = (sampling::log_sum_exp(expected), sampling::log_sum_exp(row));
    let terms = expected.iter().zip(row).map(|(&e, &x)| {
        let (e, x) = (f64::from(e) - total, f64::from(x) - own);
        e.exp() * (e - x)
    });
    terms.sum()
}
