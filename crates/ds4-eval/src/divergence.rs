//! How far a model's predictions are from another one's: Kullback–Leibler divergence.

use ds4_engine::sampling::{argmax, log_sum_exp};

use crate::Result;

/// Distances of all scored positions.
#[derive(Debug, Clone, Default)]
pub struct Divergence {
    /// In nats, in order.
    kl: Vec<f64>,
    /// Positions with the same most likely token.
    same_top: usize,
}

/// The predictions of the other model at one position.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Prediction {
    /// Log-probability of every token.
    pub logprobs: Vec<f32>,
    /// The most likely token.
    pub top: u32,
}

/// What is reported.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct DivergenceSummary {
    /// Compared positions.
    pub positions: usize,
    /// Mean divergence, in nats.
    pub mean: f64,
    /// Median.
    pub median: f64,
    /// 99th percentile.
    pub p99: f64,
    /// Largest.
    pub max: f64,
    /// Share of positions with the same most likely token.
    pub top1: f64,
}

impl Divergence {
    /// Compares the logits of one position with the other model's prediction there.
    ///
    /// # Errors
    /// If the logits hold no usable numbers.
    pub fn add(&mut self, reference: &Prediction, logits: &[f32]) -> Result<()> {
        self.same_top += usize::from(argmax(logits)? == reference.top);
        self.kl.push(divergence(&reference.logprobs, logits));
        Ok(())
    }

    /// The statistics; `None` if nothing was compared.
    pub fn summary(&self) -> Option<DivergenceSummary> {
        let n = self.kl.len();
        let mut sorted = self.kl.clone();
        sorted.sort_by(f64::total_cmp);
        let quantile = |share: f64| sorted[((n as f64 * share) as usize).min(n - 1)];
        (n > 0).then(|| DivergenceSummary {
            positions: n,
            mean: sorted.iter().sum::<f64>() / n as f64,
            median: quantile(0.5),
            p99: quantile(0.99),
            max: sorted[n - 1],
            top1: self.same_top as f64 / n as f64,
        })
    }
}

/// Σ p·(ln p − ln q) with p as the reference has it, brought to a sum of 1, and q from logits.
fn divergence(reference: &[f32], logits: &[f32]) -> f64 {
    let (p_total, q_total) = (log_sum_exp(reference), log_sum_exp(logits));
    let terms = reference.iter().zip(logits).map(|(p, q)| {
        let p = f64::from(*p) - p_total;
        p.exp() * (p - (f64::from(*q) - q_total))
    });
    terms.sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prediction(p: &[f64]) -> Prediction {
        let logprobs: Vec<f32> = p.iter().map(|p| p.ln() as f32).collect();
        Prediction { top: argmax(&logprobs).unwrap(), logprobs }
    }

    #[test]
    fn the_value_is_that_of_the_definition() {
        let mut divergence = Divergence::default();
        let reference = prediction(&[0.5, 0.25, 0.25]);
        divergence.add(&reference, &[1.0, 1.0, 1.0]).unwrap();
        let expected = 0.5 * (1.5f64).ln() + 0.5 * (0.75f64).ln();
        let summary = divergence.summary().unwrap();
        assert!((summary.mean - expected).abs() < 1e-7, "{}", summary.mean);
        assert_eq!(summary.top1, 1.0, "the lowest of equal tokens");
        divergence
            .add(&reference, &[0.5f32.ln() + 9.0, 0.25f32.ln() + 9.0, 0.25f32.ln() + 9.0])
            .unwrap();
        divergence.add(&reference, &[0.0, 5.0, 0.0]).unwrap();
        let summary = divergence.summary().unwrap();
        assert!((summary.median - expected).abs() < 1e-7);
        assert!((summary.top1 - 2.0 / 3.0).abs() < 1e-12);
        assert!(summary.p99 == summary.max && summary.max > 1.0);
    }

    #[test]
    fn nothing_has_no_statistics() {
        assert_eq!(Divergence::default().summary(), None);
        assert!(Divergence::default().add(&prediction(&[1.0]), &[f32::NAN]).is_err());
    }
}
