//! One answer, and how long it took.

use std::time::{Duration, Instant};

use ds4_runtime::AnswerToken;
use ds4_text::detokenize::OutputDelta;
use serde::Serialize;

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Finish {
    /// The model ended it.
    Stop,
    /// It has as many tokens as allowed.
    Length,
    /// Prompt and answer have as many tokens as allowed.
    ContextFull,
    /// Ctrl-C.
    Interrupted,
}

/// Tokens and the time they took.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Speed {
    /// Tokens computed.
    pub tokens: usize,
    /// In this time.
    pub time: Duration,
}

impl Speed {
    /// Tokens per second; 0 for no tokens.
    pub fn per_second(self) -> f64 {
        let seconds = self.time.as_secs_f64();
        if self.tokens == 0 || seconds == 0.0 { 0.0 } else { self.tokens as f64 / seconds }
    }
}

/// One answer.
pub struct Turn {
    /// Tokens of the prompt.
    pub prompt: usize,
    /// Tokens of the prompt that were computed for an earlier turn.
    pub cached: usize,
    /// Tokens of the prompt that are still to be computed.
    pub left: usize,
    /// Sampled tokens.
    pub tokens: Vec<AnswerToken>,
    /// Their text.
    pub output: OutputDelta,
    /// Why it ended.
    pub finish: Finish,
    started: Option<Instant>,
    first_token: Option<Instant>,
    ended: Option<Instant>,
}

impl Turn {
    /// A turn that has not begun.
    pub fn new(prompt: usize) -> Self {
        Turn {
            prompt,
            cached: 0,
            left: prompt,
            tokens: Vec::new(),
            output: OutputDelta::default(),
            finish: Finish::Interrupted,
            started: None,
            first_token: None,
            ended: None,
        }
    }

    /// The prompt begins, with `cached` tokens that are known.
    pub fn started(&mut self, cached: usize) {
        (self.cached, self.left) = (cached, self.prompt.saturating_sub(cached));
        self.started = Some(Instant::now());
    }

    /// So many tokens of the prompt are still to be computed.
    pub fn read(&mut self, left: usize) {
        self.left = left.min(self.left);
    }

    /// The answer has another token.
    pub fn token(&mut self, token: AnswerToken) {
        self.first_token.get_or_insert_with(Instant::now);
        self.tokens.push(token);
    }

    /// The output has more text.
    pub fn add(&mut self, delta: &OutputDelta) {
        self.output.reasoning.push_str(&delta.reasoning);
        self.output.answer.push_str(&delta.answer);
    }

    /// No more events come.
    pub fn end(&mut self) {
        self.ended = Some(Instant::now());
    }

    /// Speed of the prompt's new tokens, until the first token was drawn.
    pub fn prefill(&self) -> Speed {
        let until = self.first_token.or(self.ended);
        let tokens = self.prompt.saturating_sub(self.cached + self.left);
        Speed { tokens, time: between(self.started, until) }
    }

    /// Speed of the answer's tokens that the model took in to go on.
    pub fn decode(&self) -> Speed {
        Speed { tokens: self.taken_in(), time: between(self.first_token, self.ended) }
    }

    /// Tokens of prompt and answer that the model has taken in.
    pub fn context(&self) -> usize {
        self.prompt - self.left + self.taken_in()
    }

    /// Nothing was computed after the last token, unless the model ended the answer there.
    fn taken_in(&self) -> usize {
        match self.finish {
            Finish::Stop => self.tokens.len(),
            _ => self.tokens.len().saturating_sub(1),
        }
    }
}

fn between(from: Option<Instant>, until: Option<Instant>) -> Duration {
    from.zip(until).map_or(Duration::ZERO, |(from, until)| until.saturating_duration_since(from))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn turn(finish: Finish, tokens: u32) -> Turn {
        let mut turn = Turn::new(10);
        turn.started(4);
        turn.read(0);
        (0..tokens).for_each(|token| turn.token(AnswerToken { token, logprobs: None }));
        turn.finish = finish;
        turn.end();
        turn
    }

    #[test]
    fn the_last_token_is_computed_only_if_the_model_ends_there() {
        let counts = |turn: Turn| (turn.prefill().tokens, turn.decode().tokens, turn.context());
        assert_eq!(counts(turn(Finish::Stop, 3)), (6, 3, 13));
        assert_eq!(counts(turn(Finish::Length, 3)), (6, 2, 12));
        assert_eq!(counts(turn(Finish::Stop, 0)), (6, 0, 10));
    }

    #[test]
    fn an_interrupted_prompt_counts_as_far_as_it_was_read() {
        let mut turn = Turn::new(10);
        turn.started(4);
        turn.read(3);
        turn.end();
        assert_eq!((turn.prefill().tokens, turn.decode().tokens, turn.context()), (3, 0, 7));
        assert_eq!(Turn::new(10).context(), 0, "it has not begun");
    }

    #[test]
    fn nothing_takes_no_time() {
        assert_eq!(Speed::default().per_second(), 0.0);
        let speed = Speed { tokens: 3, time: Duration::from_millis(500) };
        assert_eq!(speed.per_second(), 6.0);
    }
}
