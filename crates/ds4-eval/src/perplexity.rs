//! How surprised a model is by a text: the mean negative log-probability of its tokens.
//!
//! The text is cut into windows that the model reads one by one, each from an empty context. The
//! first tokens of a window have little to go by and are not scored.

use std::ops::ControlFlow;

use ds4_engine::{
    Engine, Phase, TokenId, Wanted, Work,
    sampling::{UnusableLogits, log_sum_exp},
};

use crate::{Error, Result};

/// Tokens at the beginning of a window that are only context.
pub const CONTEXT_TOKENS: usize = 32;

/// Logits that are held at once, in numbers.
const MAX_LOGITS: usize = 8 << 20;
/// Tokens that are computed together.
const CHUNK: usize = 512;

/// A text, cut into windows.
pub struct Text {
    /// Tokens of each window, with the marker before it if there is one.
    windows: Vec<Vec<TokenId>>,
    /// Tokens at the beginning of a window that are only context, the marker included.
    skipped: usize,
}

/// How a text is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reading {
    /// In chunks, all positions of a chunk at once.
    Prefill,
    /// Token by token, as an answer is generated.
    Decode,
}

/// What was measured.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Perplexity {
    /// Scored tokens.
    pub scored: usize,
    /// Sum of their negative log-probabilities.
    pub nll: f64,
    /// Sum of the squares of these.
    squares: f64,
}

impl Text {
    /// Cuts `tokens` into windows of `length`, of which each begins with `bos` if there is one. A
    /// last window without a scored token is dropped.
    ///
    /// # Errors
    /// If that leaves none.
    pub fn new(tokens: &[TokenId], bos: Option<TokenId>, length: usize) -> Result<Text> {
        let scorable = |window: &&[TokenId]| window.len() > CONTEXT_TOKENS;
        let windows: Vec<Vec<TokenId>> = tokens
            .chunks(length.max(1))
            .filter(scorable)
            .map(|window| bos.into_iter().chain(window.iter().copied()).collect())
            .collect();
        if windows.is_empty() {
            return Err(Error::ShortText {
                found: tokens.len().min(length),
                least: CONTEXT_TOKENS,
            });
        }
        Ok(Text { windows, skipped: CONTEXT_TOKENS + usize::from(bos.is_some()) })
    }

    /// Tokens that will be scored.
    pub fn scored(&self) -> usize {
        self.windows.iter().map(|window| window.len() - self.skipped).sum()
    }

    /// Tokens that will be computed.
    pub fn computed(&self) -> usize {
        self.windows.iter().map(|window| window.len() - 1).sum()
    }

    /// A hash of the tokens and of which are scored.
    pub fn hash(&self) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&(self.skipped as u64).to_le_bytes());
        for window in &self.windows {
            hasher.update(&(window.len() as u64).to_le_bytes());
            window.iter().for_each(|token| {
                hasher.update(&token.to_le_bytes());
            });
        }
        *hasher.finalize().as_bytes()
    }
}

impl Perplexity {
    /// Adds a token's negative log-probability.
    pub fn add(&mut self, nll: f64) {
        self.scored += 1;
        self.nll += nll;
        self.squares += nll * nll;
    }

    /// Mean negative log-probability, in nats.
    pub fn mean(&self) -> f64 {
        self.nll / self.scored as f64
    }

    /// Standard error of the mean, as if tokens were independent.
    pub fn standard_error(&self) -> f64 {
        let n = self.scored as f64;
        let variance = (self.squares / n - self.mean() * self.mean()).max(0.0);
        (variance / (n - 1.0).max(1.0)).sqrt()
    }

    /// The exponential of the mean.
    pub fn perplexity(&self) -> f64 {
        self.mean().exp()
    }
}

/// Log-probability of `token`, in f64.
///
/// # Errors
/// If the logits hold no usable numbers.
pub fn log_probability(logits: &[f32], token: TokenId) -> Result<f64> {
    let value = logits.get(token as usize).ok_or(UnusableLogits)?;
    let logprob = f64::from(*value) - log_sum_exp(logits);
    if logprob.is_finite() { Ok(logprob) } else { Err(UnusableLogits.into()) }
}

/// Reads `text`; gives each scored token and the logits that predict it to `score`, in order, and
/// the number of computed tokens to `progress`, which stops the reading by breaking.
///
/// # Errors
/// [`Error::Stopped`] if it was stopped, or if the engine or `score` fails.
pub fn read(
    engine: &Engine,
    text: &Text,
    reading: Reading,
    mut score: impl FnMut(TokenId, &[f32]) -> Result<()>,
    mut progress: impl FnMut(usize) -> ControlFlow<()>,
) -> Result<()> {
    let (chunk, phase) = match reading {
        Reading::Prefill => (CHUNK.min(MAX_LOGITS / engine.config().vocab).max(1), Phase::Prefill),
        Reading::Decode => (1, Phase::Decode),
    };
    let wanted = vec![Wanted::Logits; chunk];
    let mut computed = 0;
    for window in &text.windows {
        let mut session = engine.new_session()?;
        // The last token predicts nothing that is there.
        let inputs = &window[..window.len() - 1];
        for (i, tokens) in inputs.chunks(chunk).enumerate() {
            let start = i * chunk;
            let end = start + tokens.len();
            // The logits after a position predict the next token.
            let scored = end >= text.skipped;
            let wanted = if scored { &wanted[..tokens.len()] } else { &[] };
            let work = Work { session: &mut session, tokens, phase, wanted };
            let output = engine.step(&mut [work])?.remove(0);
            for (position, logits) in (start..end).zip(output.logits()) {
                if position + 1 >= text.skipped {
                    score(window[position + 1], logits)?;
                }
            }
            computed += tokens.len();
            if progress(computed).is_break() {
                return Err(Error::Stopped);
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_are_cut_and_counted() {
        let tokens: Vec<TokenId> = (0..100).collect();
        let text = Text::new(&tokens, Some(7), 40).unwrap();
        assert_eq!(text.windows.len(), 2, "the last 20 have nothing to score");
        assert_eq!((text.windows[1][0], text.windows[1][1]), (7, 40));
        assert_eq!((text.scored(), text.computed()), (16, 80));
        let without = Text::new(&tokens, None, 40).unwrap();
        assert_eq!((without.scored(), without.computed()), (16, 78));
        assert_ne!(text.hash(), without.hash());
        let error = Text::new(&tokens[..32], None, 40).err().unwrap();
        assert_eq!(error.to_string(), "the text has 32 tokens, expected more than 32");
    }

    #[test]
    fn equal_logits_have_the_perplexity_of_their_number() {
        for vocab in [2, 4096, 129_280] {
            let mut perplexity = Perplexity::default();
            for token in 0..2 {
                perplexity.add(-log_probability(&vec![-3.5; vocab], token).unwrap());
            }
            let expected = (vocab as f64).ln();
            assert!((perplexity.mean() - expected).abs() < 1e-9, "{vocab}");
            assert!((perplexity.perplexity() - vocab as f64).abs() < 1e-6 * vocab as f64);
            assert_eq!(perplexity.standard_error(), 0.0);
        }
    }

    #[test]
    fn logits_that_are_no_numbers_are_refused() {
        assert!(log_probability(&[f32::NAN, 0.0], 1).is_err());
        assert!(log_probability(&[f32::NEG_INFINITY, 0.0], 0).is_err());
        assert!(log_probability(&[0.0, 0.0], 2).is_err());
    }
}
