//! Choosing the next token from logits.
//!
//! Order: temperature, softmax, min-p, top-k, top-p, draw. Each filter works on the
//! probabilities left by the one before it, and ties go to the lower token id throughout.

use std::cmp::Ordering;

use crate::TokenId;

/// How to sample.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SamplingParams {
    /// Divides the logits; 0 or less takes the most likely token.
    pub temperature: f32,
    /// Keeps this many of the most likely tokens; 0 keeps all.
    pub top_k: usize,
    /// Keeps the most likely tokens until their share reaches this; 1 keeps all.
    pub top_p: f32,
    /// Drops tokens less likely than this share of the most likely one; 0 keeps all.
    pub min_p: f32,
}

impl Default for SamplingParams {
    /// The model's recommended settings, with a light tail filter.
    fn default() -> Self {
        SamplingParams { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.05 }
    }
}

impl SamplingParams {
    /// Always the most likely token.
    pub fn greedy() -> Self {
        SamplingParams { temperature: 0.0, ..Self::default() }
    }
}

/// A token and the logarithm of its probability at temperature 1.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TokenLogprob {
    /// The token.
    pub token: TokenId,
    /// Natural logarithm of its probability.
    pub logprob: f32,
}

/// The logits hold a NaN or no finite value, so there is no distribution to sample.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("the model produced no usable logits (NaN or all infinite)")]
pub struct UnusableLogits;

/// Logits looked at together, so that the compiler can use vectors.
const LANES: usize = 16;

/// Exponentials of less are 0 in f64.
const SMALLEST_EXPONENT: f64 = -746.0;

/// Room for rounding the floor to f32; what lies between is weighed exactly.
const FLOOR_SLACK: f64 = 0.01;

/// Draws tokens; the same seed and logits give the same tokens.
pub struct Sampler {
    params: SamplingParams,
    rng: fastrand::Rng,
}

impl Sampler {
    /// A sampler whose draws follow from `seed`.
    pub fn new(params: SamplingParams, seed: u64) -> Self {
        Sampler { params, rng: fastrand::Rng::with_seed(seed) }
    }

    /// The next token.
    pub fn sample(&mut self, logits: &[f32]) -> Result<TokenId, UnusableLogits> {
        let best = argmax(logits)?;
        if self.params.temperature <= 0.0 {
            return Ok(best);
        }
        let mut left = self.candidates(logits, logits[best as usize]);
        self.keep_top_k(&mut left);
        self.keep_top_p(&mut left);
        let total: f64 = left.iter().map(|c| c.weight).sum();
        let mut point = self.rng.f64() * total;
        for c in &left {
            point -= c.weight;
            if point < 0.0 {
                return Ok(c.token);
            }
        }
        Ok(left.last().map_or(best, |c| c.token))
    }

    /// Tokens that pass min-p, weighted relative to the most likely one.
    fn candidates(&self, logits: &[f32], largest: f32) -> Vec<Candidate> {
        let (temperature, min_p) = (self.params.temperature as f64, self.params.min_p as f64);
        let inverse = 1.0 / temperature;
        // Exponentials are taken of those alone that can pass: they would be most of the time.
        let least = if min_p > 0.0 { min_p.ln() } else { SMALLEST_EXPONENT };
        let floor = (largest as f64 + (least - FLOOR_SLACK) * temperature) as f32;
        let mut left = Vec::new();
        for (block, logits) in logits.chunks(LANES).enumerate() {
            if !logits.iter().fold(false, |any, x| any | (*x >= floor)) {
                continue;
            }
            for (lane, x) in logits.iter().enumerate() {
                let weight = ((*x as f64 - largest as f64) * inverse).exp();
                if weight >= min_p && weight > 0.0 {
                    left.push(Candidate { token: (block * LANES + lane) as TokenId, weight });
                }
            }
        }
        left
    }

    fn keep_top_k(&self, left: &mut Vec<Candidate>) {
        let k = self.params.top_k;
        if k > 0 && k < left.len() {
            left.select_nth_unstable_by(k - 1, Candidate::likelier_first);
            left.truncate(k);
            left.sort_unstable_by_key(|c| c.token);
        }
    }

    fn keep_top_p(&self, left: &mut Vec<Candidate>) {
        if self.params.top_p >= 1.0 {
            return;
        }
        left.sort_unstable_by(Candidate::likelier_first);
        let goal = self.params.top_p as f64 * left.iter().map(|c| c.weight).sum::<f64>();
        let mut sum = 0.0;
        let kept = left.iter().take_while(|c| {
            let before = sum;
            sum += c.weight;
            before < goal
        });
        let kept = kept.count().max(1);
        left.truncate(kept);
    }
}

struct Candidate {
    token: TokenId,
    weight: f64,
}

impl Candidate {
    fn likelier_first(a: &Candidate, b: &Candidate) -> Ordering {
        b.weight.total_cmp(&a.weight).then(a.token.cmp(&b.token))
    }
}

/// The most likely token; the lowest id among equals.
pub fn argmax(logits: &[f32]) -> Result<TokenId, UnusableLogits> {
    let largest = largest(logits).filter(|largest| largest.is_finite()).ok_or(UnusableLogits)?;
    let best = logits.iter().position(|x| *x == largest);
    best.map(|i| i as TokenId).ok_or(UnusableLogits)
}

/// The largest logit; none if there is a NaN.
fn largest(logits: &[f32]) -> Option<f32> {
    let (blocks, rest) = logits.as_chunks::<LANES>();
    let (mut best, mut nans) = ([f32::NEG_INFINITY; LANES], [0u32; LANES]);
    for block in blocks {
        for lane in 0..LANES {
            let x = block[lane];
            best[lane] = if x > best[lane] { x } else { best[lane] };
            nans[lane] |= u32::from(x.is_nan());
        }
    }
    let has_nan = nans.iter().any(|nan| *nan != 0) || rest.iter().any(|x| x.is_nan());
    (!has_nan).then(|| best.iter().chain(rest).copied().fold(f32::NEG_INFINITY, f32::max))
}

/// Logarithm of the sum of exponentials, in f64.
pub fn log_sum_exp(logits: &[f32]) -> f64 {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max) as f64;
    largest + logits.iter().map(|x| (*x as f64 - largest).exp()).sum::<f64>().ln()
}

/// Log-probability of `token` at temperature 1.
///
/// # Panics
/// If `token` is not below the number of logits.
pub fn logprob(logits: &[f32], token: TokenId) -> f32 {
    (logits[token as usize] as f64 - log_sum_exp(logits)) as f32
}

/// The `n` most likely tokens, most likely first.
pub fn top_logprobs(logits: &[f32], n: usize) -> Vec<TokenLogprob> {
    let n = n.min(logits.len());
    if n == 0 {
        return Vec::new();
    }
    let likelier = |a: &TokenId, b: &TokenId| {
        logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b))
    };
    let mut tokens: Vec<TokenId> = (0..logits.len() as TokenId).collect();
    tokens.select_nth_unstable_by(n - 1, likelier);
    tokens.truncate(n);
    tokens.sort_unstable_by(likelier);
    let total = log_sum_exp(logits);
    let logprob = |t: TokenId| (logits[t as usize] as f64 - total) as f32;
    tokens.into_iter().map(|token| TokenLogprob { token, logprob: logprob(token) }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LOGITS: [f32; 5] = [1.0, 3.0, 2.0, 3.0, -50.0];

    fn drawn(params: SamplingParams) -> Vec<TokenId> {
        let mut sampler = Sampler::new(params, 7);
        let mut seen: Vec<_> = (0..2000).map(|_| sampler.sample(&LOGITS).unwrap()).collect();
        seen.sort_unstable();
        seen.dedup();
        seen
    }

    fn wide() -> SamplingParams {
        SamplingParams { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0 }
    }

    #[test]
    fn greedy_takes_the_lowest_of_equal_tokens() {
        assert_eq!(drawn(SamplingParams::greedy()), [1]);
    }

    #[test]
    fn each_filter_drops_its_tail() {
        assert_eq!(drawn(wide()), [0, 1, 2, 3]);
        assert_eq!(drawn(SamplingParams { top_k: 1, ..wide() }), [1]);
        assert_eq!(drawn(SamplingParams { top_k: 3, ..wide() }), [1, 2, 3]);
        assert_eq!(drawn(SamplingParams { min_p: 0.3, ..wide() }), [1, 2, 3]);
        assert_eq!(drawn(SamplingParams { min_p: 0.5, ..wide() }), [1, 3]);
        assert_eq!(drawn(SamplingParams { top_p: 0.39, ..wide() }), [1]);
        assert_eq!(drawn(SamplingParams { top_p: 0.5, ..wide() }), [1, 3]);
        assert_eq!(drawn(SamplingParams { top_p: 0.0, ..wide() }), [1]);
    }

    #[test]
    fn frequencies_follow_the_temperature() {
        for temperature in [0.5f32, 1.0, 2.0] {
            let mut sampler = Sampler::new(SamplingParams { temperature, ..wide() }, 1);
            let n = 200_000;
            let mut count = [0; 5];
            (0..n).for_each(|_| count[sampler.sample(&LOGITS).unwrap() as usize] += 1);
            let weight = LOGITS.map(|x| (x / temperature).exp());
            let total: f32 = weight.iter().sum();
            for (c, w) in count.iter().zip(weight) {
                assert!((*c as f32 / n as f32 - w / total).abs() < 0.005);
            }
        }
    }

    #[test]
    fn the_seed_decides() {
        let draw = |seed| {
            let mut s = Sampler::new(wide(), seed);
            (0..50).map(|_| s.sample(&LOGITS).unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(draw(3), draw(3));
        assert_ne!(draw(3), draw(4));
    }

    #[test]
    fn unusable_logits_are_refused() {
        let mut sampler = Sampler::new(wide(), 0);
        for logits in [&[0.0, f32::NAN][..], &[f32::NEG_INFINITY; 2], &[f32::INFINITY, 0.0], &[]] {
            assert_eq!(sampler.sample(logits), Err(UnusableLogits));
        }
    }

    #[test]
    fn log_probabilities() {
        let top = top_logprobs(&LOGITS, 3);
        assert_eq!(top.iter().map(|t| t.token).collect::<Vec<_>>(), [1, 3, 2]);
        assert_eq!(top[0].logprob, logprob(&LOGITS, 1));
        let total: f32 = (0..5).map(|t| logprob(&LOGITS, t).exp()).sum();
        assert!((total - 1.0).abs() < 1e-6);
        assert_eq!(top_logprobs(&LOGITS, 99).len(), 5);
        assert!(top_logprobs(&LOGITS, 0).is_empty());
    }

    proptest! {
        #[test]
        fn a_drawn_token_exists(
            logits in prop::collection::vec(-100f32..100.0, 1..50),
            temperature in -1f32..3.0, top_k in 0usize..60, top_p in 0f32..1.2, min_p in 0f32..1.2,
            seed: u64,
        ) {
            let params = SamplingParams { temperature, top_k, top_p, min_p };
            let token = Sampler::new(params, seed).sample(&logits).unwrap();
            prop_assert!((token as usize) < logits.len());
        }
    }
}
