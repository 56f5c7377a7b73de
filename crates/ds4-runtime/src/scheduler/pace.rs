//! How much of a prompt to compute between two tokens of the running answers.
//!
//! A step takes as long as its rows, so every prompt token that shares a step with running
//! answers delays their next token. The share is chosen from measured times such that a step
//! with prompt tokens takes less than [`PROMISE`] times as long as one without, even when it takes
//! as much longer than planned as the worst step of late.

use std::{collections::VecDeque, time::Duration};

use super::sequence::PREFILL_GRAIN;

/// A step that shares its time with a prompt takes less than so many times as long.
const PROMISE: f64 = 3.0;

/// And is planned to take so many times as long at most, where steps take as long as planned, and at
/// least, where they never do.
const MOST_STRETCH: f64 = 1.75;
const LEAST_STRETCH: f64 = 1.25;

/// How fast a bad moment is forgotten: half of it in 7000 steps that share their time.
const FORGET: f64 = 0.9999;

/// After so many shared steps, one without prompt tokens measures the usual time again.
const REMEASURE: usize = 32;

/// And after so many already if the number of running answers has changed.
const RECOUNT: usize = 4;

/// The usual time is the shortest of so many: a busy machine makes steps longer, now and then for
/// seconds, and what is too long already must not be stretched.
const RECENT: usize = 16;

/// Weight of the newest measurement of a prompt token in the running average, if it is longer.
const LONGER: f64 = 0.5;

/// And if it is shorter: what counts is what happens in bad moments.
const SHORTER: f64 = 0.1;

/// The share grows by so much at most from one shared step to the next, since a first measurement
/// of few tokens says little.
const GROWTH: usize = 2;

/// Measured times, and what follows from them.
#[derive(Debug, Default)]
pub(super) struct Pace {
    /// Prompt tokens computed together at most.
    chunk: usize,
    /// Seconds of the latest steps of answers alone, at most [`RECENT`], oldest first.
    alone: VecDeque<f64>,
    /// How many answers these had.
    answers: usize,
    /// Seconds that a prompt token adds to a step of answers; alone it costs less.
    prompt_token: Option<f64>,
    /// How many times as long as planned a step has taken at worst, of late.
    overrun: f64,
    /// Prompt tokens that the next step may have.
    share: usize,
    /// Prompt tokens in the last shared step that was measured.
    measured_share: usize,
    shared_steps: usize,
}

impl Pace {
    /// Nothing is measured yet; `chunk` is what prompts get when no answer is running.
    pub(super) fn new(chunk: usize) -> Self {
        Pace { chunk: chunk.max(PREFILL_GRAIN), ..Pace::default() }
    }

    /// From here on prompts get half as much at once; false if that is too little.
    pub(super) fn halve(&mut self) -> bool {
        let halved = (self.chunk / 2).max(PREFILL_GRAIN);
        std::mem::replace(&mut self.chunk, halved) > halved
    }

    /// Prompt tokens to add to the next step, with `running` answers in it.
    pub(super) fn prompt_tokens(&mut self, running: usize) -> usize {
        self.share = if running == 0 { self.chunk } else { self.shared_tokens(running) };
        self.share
    }

    fn shared_tokens(&self, running: usize) -> usize {
        let most_steps = if running == self.answers { REMEASURE } else { RECOUNT };
        match (self.usual(), self.prompt_token) {
            (None, _) => 0,
            _ if self.shared_steps >= most_steps => 0,
            // The time of one is not known yet, and a grain is the least that can be computed.
            (Some(_), None) => PREFILL_GRAIN,
            (Some(usual), Some(token)) => {
                let tokens = (self.stretch() - 1.0) * usual / token.max(1e-9);
                (tokens as usize).min(GROWTH * self.measured_share).clamp(PREFILL_GRAIN, self.chunk)
            }
        }
    }

    /// How many times as long as usual a shared step is planned to take.
    fn stretch(&self) -> f64 {
        (PROMISE / self.overrun.max(1.0)).min(MOST_STRETCH)
    }

    /// Seconds of a step of answers alone, on a quiet machine.
    fn usual(&self) -> Option<f64> {
        self.alone.iter().copied().min_by(f64::total_cmp)
    }

    /// Learns from a step of `running` answers and `prompt_tokens` tokens of prompts.
    pub(super) fn measured(&mut self, running: usize, prompt_tokens: usize, time: Duration) {
        let time = time.as_secs_f64();
        match (running, prompt_tokens) {
            (0, _) => {}
            (_, 0) => {
                if std::mem::replace(&mut self.answers, running) != running {
                    self.alone.clear();
                }
                self.alone.push_back(time);
                if self.alone.len() > RECENT {
                    self.alone.pop_front();
                }
                self.shared_steps = 0;
            }
            (_, tokens) => {
                self.shared_steps += 1;
                // Of a slice that a prompt's end cut short, what any shared step costs would seem
                // to be the price of its few tokens; and so would the time of further answers.
                if running == self.answers && tokens >= self.share.div_ceil(2) {
                    if let (Some(usual), Some(token)) = (self.usual(), self.prompt_token) {
                        let planned = usual + tokens as f64 * token;
                        // One moment, however bad, is not for ever.
                        let overrun = (time / planned).min(PROMISE / LEAST_STRETCH);
                        self.overrun = (self.overrun * FORGET).max(overrun);
                    }
                    let added = (time - self.usual().unwrap_or(0.0)).max(0.05 * time);
                    self.learn(tokens, added / tokens as f64);
                }
            }
        }
    }

    /// Takes in that each of `tokens` prompt tokens in a step added `each` seconds.
    fn learn(&mut self, tokens: usize, each: f64) {
        let grown = tokens >= GROWTH * self.measured_share;
        self.measured_share = tokens;
        self.prompt_token = Some(self.prompt_token.map_or(each, |mean| {
            let weight = match each > mean {
                true => LONGER,
                // Twice as many as before tell more about each.
                false if grown => 1.0,
                false => SHORTER,
            };
            mean + weight * (each - mean)
        }));
    }
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

    /// A little less than a millisecond, so that nothing depends on how a quotient is rounded.
    const TOKEN: Duration = Duration::from_micros(950);

    /// Answers alone take 40 ms, and each prompt token [`TOKEN`] more.
    fn steady() -> Pace {
        let mut pace = Pace::new(CHUNK);
        pace.measured(1, 0, 40 * MS);
        for _ in 0..8 {
            let tokens = pace.prompt_tokens(1);
            pace.measured(1, tokens, with_prompt(tokens));
        }
        pace
    }

    /// The time of a step that shares 40 ms of answers with so many prompt tokens.
    fn with_prompt(tokens: usize) -> Duration {
        40 * MS + tokens as u32 * TOKEN
    }

    /// 0.75 × 40 ms at 0.95 ms a token.
    const STEADY: usize = 31;

    #[test]
    fn shared_steps_stay_within_the_stretch() {
        assert_eq!(Pace::new(CHUNK).prompt_tokens(1), 0, "the usual time comes first");
        assert_eq!(steady().prompt_tokens(1), STEADY);
    }

    #[test]
    fn the_first_shared_step_has_a_single_grain() {
        let mut pace = Pace::new(CHUNK);
        pace.measured(1, 0, 40 * MS);
        assert_eq!(pace.prompt_tokens(1), PREFILL_GRAIN, "more might take any time");
    }

    #[test]
    fn a_prompt_is_computed_grain_by_grain_where_a_few_tokens_take_too_long() {
        let mut pace = Pace::new(CHUNK);
        pace.measured(1, 0, 4 * MS);
        assert_eq!(pace.prompt_tokens(1), PREFILL_GRAIN);
        pace.measured(1, PREFILL_GRAIN, 20 * MS);
        assert_eq!(pace.prompt_tokens(1), PREFILL_GRAIN);
    }

    #[test]
    fn the_share_grows_step_by_step_and_is_soon_large() {
        let mut pace = Pace::new(CHUNK);
        pace.measured(1, 0, 100 * MS);
        for expected in [8, 16, 32, 64] {
            let tokens = pace.prompt_tokens(1);
            assert_eq!(tokens, expected);
            // The fixed cost of a shared step weighs less the more tokens there are.
            pace.measured(1, tokens, 110 * MS + tokens as u32 * MS / 10);
        }
    }

    #[test]
    fn the_usual_time_is_measured_again() {
        let mut pace = steady();
        (8..REMEASURE).for_each(|_| pace.measured(1, STEADY, with_prompt(STEADY)));
        assert_eq!(pace.prompt_tokens(1), 0);
        pace.measured(1, 0, 40 * MS);
        assert_eq!(pace.prompt_tokens(1), STEADY);
    }

    #[test]
    fn a_step_that_was_held_up_is_not_the_usual_one() {
        let mut pace = steady();
        pace.measured(1, 0, 250 * MS);
        assert_eq!(pace.prompt_tokens(1), STEADY);
    }

    #[test]
    fn after_a_bad_moment_there_is_room_for_another() {
        let mut pace = steady();
        // Twice as long as planned.
        pace.measured(1, STEADY, 2 * with_prompt(STEADY));
        for _ in 0..100 {
            let tokens = pace.prompt_tokens(1);
            pace.measured(1, tokens, with_prompt(tokens));
            if tokens == 0 {
                pace.measured(1, 0, 40 * MS);
            }
        }
        assert_eq!(pace.prompt_tokens(1), 21, "3 / 2 - 1 = 0.5 × 40 ms at 0.95 ms a token");
        // It is forgotten in the end.
        pace.overrun *= FORGET.powi(3000);
        assert_eq!(pace.prompt_tokens(1), STEADY);
    }

    #[test]
    fn another_number_of_answers_is_measured_soon() {
        let mut pace = steady();
        pace.measured(1, 0, 40 * MS);
        (0..RECOUNT).for_each(|_| {
            assert!(pace.prompt_tokens(9) > 0);
            pace.measured(9, STEADY, 90 * MS);
        });
        assert_eq!(pace.prompt_tokens(9), 0);
        pace.measured(9, 0, 60 * MS);
        assert_eq!(pace.prompt_tokens(9), 47, "0.75 × 60 ms at 0.95 ms a token");
    }

    #[test]
    fn the_end_of_a_prompt_says_nothing_about_the_price_of_a_token() {
        let mut pace = steady();
        assert_eq!(pace.prompt_tokens(1), STEADY);
        pace.measured(1, 1, 58 * MS);
        assert_eq!(pace.prompt_tokens(1), STEADY);
    }
}
