//! Choosing the next token from logits.
//!
//! Order: temperature, softmax, min-p, top-k, top-p, draw. Each filter works on the
//! probabilities left by the one before it, and ties go to the lower token id throughout.

mod scan;

use std::cmp::Ordering;

use crate::{StepOutput, TokenId, Wanted};
use scan::{Choices, Scan};

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
#[derive(Debug, Clone, Copy, thiserror::Error, PartialEq, Eq)]
#[error("the model produced no usable logits (NaN or all infinite)")]
pub struct UnusableLogits;

/// Weights of less than e to this are left out: 2^18 of them together are less than what a draw of
/// 53 bits can tell apart.
const NEGLIGIBLE: f64 = -50.0;

/// Room for rounding the floor to f32; what lies between is weighed exactly.
const FLOOR_SLACK: f64 = 0.01;

/// Tokens that top-p sorts first; mostly they are enough.
const FIRST_SORTED: usize = 64;

/// Draws tokens; the same seed and logits give the same tokens.
pub struct Sampler {
    params: SamplingParams,
    rng: fastrand::Rng,
    scan: Scan,
    left: Vec<Candidate>,
}

impl Sampler {
    /// A sampler whose draws follow from `seed`.
    pub fn new(params: SamplingParams, seed: u64) -> Self {
        let rng = fastrand::Rng::with_seed(seed);
        Sampler { params, rng, scan: Scan::default(), left: Vec::new() }
    }

    /// The result that a step must return for [`sample_after`](Self::sample_after).
    pub fn wants(&self) -> Wanted {
        if self.is_greedy() { Wanted::Argmax } else { Wanted::Logits }
    }

    /// The next token, from the last result of a step.
    ///
    /// # Errors
    /// If there is no distribution to draw from.
    pub fn sample_after(&mut self, step: &StepOutput) -> Result<TokenId, UnusableLogits> {
        if self.is_greedy() {
            return step.argmax().unwrap_or(Err(UnusableLogits));
        }
        self.sample(step.last_logits().unwrap_or_default())
    }

    /// The next token.
    ///
    /// # Errors
    /// If there is no distribution to draw from.
    pub fn sample(&mut self, logits: &[f32]) -> Result<TokenId, UnusableLogits> {
        self.choose(Choices { logits, allowed: None })
    }

    /// The next token, of those in `allowed`: bit `t % 32` of word `t / 32` is token `t`'s.
    ///
    /// # Errors
    /// If there is no distribution to draw from.
    pub fn sample_among(
        &mut self,
        logits: &[f32],
        allowed: &[u32],
    ) -> Result<TokenId, UnusableLogits> {
        self.choose(Choices { logits, allowed: Some(allowed) })
    }

    /// The likeliest token of those in `allowed`, whatever the parameters say.
    ///
    /// # Errors
    /// If there is no usable logit among them.
    pub fn likeliest_among(
        &mut self,
        logits: &[f32],
        allowed: &[u32],
    ) -> Result<TokenId, UnusableLogits> {
        let choices = Choices { logits, allowed: Some(allowed) };
        self.scan.look(choices)?;
        self.scan.argmax(choices)
    }

    fn is_greedy(&self) -> bool {
        self.params.temperature <= 0.0
    }

    fn choose(&mut self, choices: Choices<'_>) -> Result<TokenId, UnusableLogits> {
        self.scan.look(choices)?;
        if self.is_greedy() {
            return self.scan.argmax(choices);
        }
        self.find_candidates(choices);
        self.keep_top_k();
        self.keep_top_p();
        let total: f64 = self.left.iter().map(|c| c.weight).sum();
        let mut point = self.rng.f64() * total;
        for c in &self.left {
            point -= c.weight;
            if point < 0.0 {
                return Ok(c.token);
            }
        }
        // Rounding, or nothing passed: a share of more than the most likely token's is asked for.
        self.left.last().map_or_else(|| self.scan.argmax(choices), |c| Ok(c.token))
    }

    /// Tokens that pass min-p, weighted relative to the most likely one.
    fn find_candidates(&mut self, choices: Choices<'_>) {
        let (temperature, min_p) = (self.params.temperature as f64, self.params.min_p as f64);
        let (inverse, largest) = (1.0 / temperature, self.scan.largest() as f64);
        // Exponentials are taken of those alone that can pass: they would be most of the time.
        let least = if min_p > 0.0 { min_p.ln() } else { NEGLIGIBLE };
        let floor = (largest + (least - FLOOR_SLACK) * temperature) as f32;
        let left = &mut self.left;
        left.clear();
        self.scan.at_least(choices, floor, |token, logit| {
            let weight = ((logit as f64 - largest) * inverse).exp();
            if weight >= min_p && weight > 0.0 {
                left.push(Candidate { token, weight });
            }
        });
    }

    fn keep_top_k(&mut self) {
        let (k, left) = (self.params.top_k, &mut self.left);
        if k > 0 && k < left.len() {
            left.select_nth_unstable_by(k - 1, Candidate::likelier_first);
            left.truncate(k);
            left.sort_unstable_by_key(|c| c.token);
        }
    }

    /// Sorts no more than it keeps, or a few times as many.
    fn keep_top_p(&mut self) {
        if self.params.top_p >= 1.0 {
            return;
        }
        let left = &mut self.left;
        let goal = self.params.top_p as f64 * left.iter().map(|c| c.weight).sum::<f64>();
        let (mut sum, mut sorted, mut next) = (0.0, 0, FIRST_SORTED);
        while sorted < left.len() {
            let end = next.min(left.len());
            if end < left.len() {
                left[sorted..].select_nth_unstable_by(end - sorted - 1, Candidate::likelier_first);
            }
            left[sorted..end].sort_unstable_by(Candidate::likelier_first);
            for index in sorted..end {
                sum += left[index].weight;
                if sum >= goal {
                    left.truncate(index + 1);
                    return;
                }
            }
            (sorted, next) = (end, 8 * end);
        }
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
    let (mut scan, choices) = (Scan::default(), Choices { logits, allowed: None });
    scan.look(choices)?;
    scan.argmax(choices)
}

/// Logarithm of the sum of exponentials, in f64.
pub fn log_sum_exp(logits: &[f32]) -> f64 {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max) as f64;
    largest + logits.iter().map(|x| (*x as f64 - largest).exp()).sum::<f64>().ln()
}

/// Log-probability of `token` at temperature 1, and the `n` most likely tokens, most likely first.
///
/// # Errors
/// If there is no distribution.
///
/// # Panics
/// If `token` is not below the number of logits.
pub fn logprobs(
    logits: &[f32],
    token: TokenId,
    n: usize,
) -> Result<(f32, Vec<TokenLogprob>), UnusableLogits> {
    let (mut scan, choices) = (Scan::default(), Choices { logits, allowed: None });
    scan.look(choices)?;
    let total = log_sum_exp(logits);
    let logprob = |logit: f32| (logit as f64 - total) as f32;
    let mut top = Vec::new();
    if n > 0 {
        scan.at_least(choices, scan.floor_of(n), |token, logit| {
            top.push(TokenLogprob { token, logprob: logprob(logit) });
        });
        top.sort_by(|a, b| b.logprob.total_cmp(&a.logprob));
        top.truncate(n);
    }
    Ok((logprob(logits[token as usize]), top))
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
        let top = logprobs(&LOGITS, 1, 3).unwrap();
        assert_eq!(top.1.iter().map(|t| t.token).collect::<Vec<_>>(), [1, 3, 2]);
        assert_eq!(top.1[0].logprob, top.0);
        let total: f32 = (0..5).map(|t| logprobs(&LOGITS, t, 0).unwrap().0.exp()).sum();
        assert!((total - 1.0).abs() < 1e-6);
        assert_eq!(logprobs(&LOGITS, 0, 99).unwrap().1.len(), 5);
        assert!(logprobs(&LOGITS, 0, 0).unwrap().1.is_empty());
        assert_eq!(logprobs(&[f32::NAN], 0, 1), Err(UnusableLogits));
    }

    /// The words of a mask of some tokens.
    fn mask(tokens: impl IntoIterator<Item = TokenId>) -> Vec<u32> {
        let mut words = Vec::new();
        for token in tokens {
            let word = token as usize / 32;
            words.resize(words.len().max(word + 1), 0);
            words[word] |= 1 << (token % 32);
        }
        words
    }

    /// The distribution by the book: everything is weighed and sorted.
    fn plain(logits: &[f32], params: SamplingParams, allowed: &[u32]) -> Vec<(TokenId, f64)> {
        let is_allowed = |t: usize| allowed.get(t / 32).is_some_and(|w| w >> (t % 32) & 1 == 1);
        let of_all = (0..logits.len()).filter(|t| is_allowed(*t));
        let largest = of_all.clone().map(|t| logits[t]).fold(f32::NEG_INFINITY, f32::max) as f64;
        let weight = |t: usize| ((logits[t] as f64 - largest) / params.temperature as f64).exp();
        let mut left: Vec<_> = of_all.map(|t| (t as TokenId, weight(t))).collect();
        left.retain(|(_, weight)| *weight >= params.min_p as f64);
        left.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        if params.top_k > 0 {
            left.truncate(params.top_k);
        }
        let goal = params.top_p as f64 * left.iter().map(|c| c.1).sum::<f64>();
        let mut sum = 0.0;
        let kept = left.iter().take_while(|c| {
            let before = sum;
            sum += c.1;
            before < goal
        });
        let kept = if params.top_p >= 1.0 { left.len() } else { kept.count().max(1) };
        left.truncate(kept);
        left
    }

    /// Over several blocks, with and without a mask.
    #[test]
    fn what_is_left_to_draw_from_is_what_the_plain_rules_leave() {
        let mut rng = fastrand::Rng::with_seed(5);
        let everything = mask(0..1000);
        for case in 0..200 {
            let logits: Vec<f32> = (0..1000).map(|_| rng.f32() * 12.0).collect();
            let some: Vec<_> = (0..1000).filter(|_| rng.usize(..20) == 0).chain([7]).collect();
            let allowed = if case % 2 == 0 { everything.clone() } else { mask(some) };
            let params = SamplingParams {
                temperature: [0.3, 1.0, 4.0][rng.usize(..3)],
                top_k: [0, 5, 400][rng.usize(..3)],
                top_p: [1.0, 0.99, 0.5, 0.0][rng.usize(..4)],
                min_p: [0.0, 0.05, 0.5][rng.usize(..3)],
            };
            let mut sampler = Sampler::new(params, case);
            let token = sampler.sample_among(&logits, &allowed).unwrap();
            let mut left: Vec<_> = sampler.left.iter().map(|c| c.token).collect();
            let mut expected: Vec<_> =
                plain(&logits, params, &allowed).iter().map(|c| c.0).collect();
            left.sort_unstable();
            expected.sort_unstable();
            assert_eq!(left, expected, "{params:?}");
            assert!(left.contains(&token));
            if case % 2 == 0 {
                assert_eq!(Sampler::new(params, case).sample(&logits), Ok(token));
            }
        }
    }

    #[test]
    fn nothing_but_what_is_allowed_is_looked_at() {
        let mut logits = vec![1.0; 70];
        (logits[3], logits[40], logits[66], logits[69]) = (f32::NAN, 9.0, 5.0, 5.0);
        let mut sampler = Sampler::new(SamplingParams::greedy(), 0);
        let allowed = mask([2, 66, 69]);
        assert_eq!(sampler.sample_among(&logits, &allowed), Ok(66));
        assert_eq!(sampler.likeliest_among(&logits, &allowed), Ok(66));
        assert_eq!(sampler.sample_among(&logits, &mask([2])), Ok(2));
        assert_eq!(sampler.sample_among(&logits, &mask([2, 3])), Err(UnusableLogits));
        assert_eq!(sampler.sample_among(&logits, &[]), Err(UnusableLogits));
        assert_eq!(sampler.sample_among(&logits, &[0, 0, 0]), Err(UnusableLogits));
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
