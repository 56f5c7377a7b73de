//! How much of a prompt to compute between two tokens of the running answers.
//!
//! A step takes as long as its rows, so every prompt token that shares a step with running
//! answers delays their next token. The share is chosen from measured times such that a step
//! with prompt tokens takes at most [`STRETCH`] times as long as one without.

use std::time::Duration;

use ds4_engine::backend::PREFILL_MIN;

/// A step that shares its time with a prompt may take so many times as long.
///
/// Two measured steps differ by some tenths; 2.2 leaves room below the promised factor of 3.
const STRETCH: f64 = 2.2;

/// After so many shared steps, one without prompt tokens measures the usual time again.
const REMEASURE: usize = 32;

/// Weight of the newest measurement in a running average, if it allows for fewer prompt tokens.
const FEWER: f64 = 0.5;

/// And if it allows for more: a busy machine makes steps longer that are none of the model's.
const MORE: f64 = 0.1;

/// The share grows by so much at most from one shared step to the next, since a first measurement
/// of few tokens says little.
const GROWTH: usize = 2;

/// Measured times, and what follows from them.
#[derive(Debug, Default)]
pub(super) struct Pace {
    /// Prompt tokens computed together at most.
    chunk: usize,
    /// Seconds of a step of running answers alone, and how many they were.
    decode: Option<f64>,
    /// Seconds that a prompt token adds to a step of answers; alone it costs less.
    prompt_token: Option<f64>,
    /// Prompt tokens in the last shared step.
    last_share: usize,
    shared_steps: usize,
}

impl Pace {
    /// Nothing is measured yet; `chunk` is what prompts get when no answer is running.
    pub(super) fn new(chunk: usize) -> Self {
        Pace { chunk: chunk.max(PREFILL_MIN), ..Pace::default() }
    }

    /// From here on prompts get half as much at once; false if that is too little.
    pub(super) fn halve(&mut self) -> bool {
        let halved = (self.chunk / 2).max(PREFILL_MIN);
        std::mem::replace(&mut self.chunk, halved) > halved
    }

    /// Prompt tokens to add to the next step, with `running` answers in it.
    pub(super) fn prompt_tokens(&self, running: usize) -> usize {
        if running == 0 {
            return self.chunk;
        }
        match (self.decode, self.prompt_token) {
            (None, _) => 0,
            _ if self.shared_steps >= REMEASURE => 0,
            (Some(_), None) => PREFILL_MIN,
            (Some(decode), Some(token)) => {
                let tokens = (STRETCH - 1.0) * decode / token.max(1e-9);
                // Even one by one, if a machine needs so long for a few: a stream that stalls is
                // worse than a prompt that takes its time.
                (tokens as usize).min(GROWTH * self.last_share).clamp(1, self.chunk)
            }
        }
    }

    /// Learns from a step of `running` answers and `prompt_tokens` tokens of prompts.
    pub(super) fn measured(&mut self, running: usize, prompt_tokens: usize, time: Duration) {
        let time = time.as_secs_f64();
        match (running, prompt_tokens) {
            (0, _) => {}
            (_, 0) => {
                average(&mut self.decode, time, (FEWER, MORE));
                self.shared_steps = 0;
            }
            (_, tokens) => {
                let added = (time - self.decode.unwrap_or(0.0)).max(0.05 * time);
                average(&mut self.prompt_token, added / tokens as f64, (MORE, FEWER));
                self.shared_steps += 1;
                self.last_share = tokens;
            }
        }
    }
}

/// Moves an average by the weight of shorter or of longer times.
fn average(mean: &mut Option<f64>, value: f64, (shorter, longer): (f64, f64)) {
    *mean = Some(mean.map_or(value, |mean| {
        let weight = if value > mean { longer } else { shorter };
        mean + weight * (value - mean)
    }));
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);
    const CHUNK: usize = 512;

    #[test]
    fn a_prompt_alone_gets_whole_chunks() {
        assert_eq!(Pace::new(CHUNK).prompt_tokens(0), CHUNK);
    }

    #[test]
    fn shared_steps_stay_within_the_stretch() {
        let mut pace = Pace::new(CHUNK);
        assert_eq!(pace.prompt_tokens(1), 0, "the usual time comes first");
        pace.measured(1, 0, 10 * MS);
        assert_eq!(pace.prompt_tokens(1), PREFILL_MIN);
        pace.measured(1, 8, 18 * MS);
        assert_eq!(pace.prompt_tokens(1), 12, "1.2 × 10 ms at 1 ms a token");
    }

    #[test]
    fn a_prompt_is_computed_by_the_token_where_a_few_take_too_long() {
        let mut pace = Pace::new(CHUNK);
        pace.measured(1, 0, 4 * MS);
        pace.measured(1, PREFILL_MIN, 20 * MS);
        assert_eq!(pace.prompt_tokens(1), 2, "1.2 × 4 ms at 2 ms a token");
        pace.measured(1, 2, 24 * MS);
        assert_eq!(pace.prompt_tokens(1), 1);
    }

    #[test]
    fn the_share_grows_step_by_step() {
        let mut pace = Pace::new(CHUNK);
        pace.measured(1, 0, 100 * MS);
        pace.measured(1, PREFILL_MIN, 100 * MS + PREFILL_MIN as u32 * MS / 10);
        assert_eq!(pace.prompt_tokens(1), GROWTH * PREFILL_MIN, "not 1200 at once");
    }

    #[test]
    fn the_usual_time_is_measured_again() {
        let mut pace = Pace::new(CHUNK);
        pace.measured(1, 0, 10 * MS);
        (0..REMEASURE).for_each(|_| pace.measured(1, 8, 18 * MS));
        assert_eq!(pace.prompt_tokens(1), 0);
        pace.measured(1, 0, 10 * MS);
        assert!(pace.prompt_tokens(1) > 0);
    }
}
