//! An answer as it grows: which tokens may come next, and which one does.
//!
//! What may come next follows from the tokens so far alone. So it is found out while the engine
//! computes the logits, and once they are there a token need only be drawn. Tokens that are
//! certain are added at once, and the engine computes them together with the one before them.

use ds4_engine::{StepOutput, TokenId, Wanted, sampling::Sampler, sampling::logprobs};
use ds4_text::tokenizer::Tokenizer;

use super::outbox::Outbox;
use crate::{
    grammar::{AnswerGrammar, Next},
    request::{AnswerToken, Event, Finish},
};

/// An answer.
pub(super) struct Answer {
    /// Says what may come next; without one, anything.
    pub(super) grammar: Option<AnswerGrammar>,
    /// What comes next, if that is known already.
    pub(super) ahead: Option<Result<Continuation, String>>,
    pub(super) sampler: Sampler,
    pub(super) top_logprobs: Option<usize>,
    /// Tokens that the answer may still have.
    pub(super) tokens_left: usize,
}

/// What can come next.
pub(super) enum Continuation {
    /// These tokens and no others.
    Certain(Vec<TokenId>),
    /// One of several.
    Choice(Next),
}

/// Where the tokens of an answer go.
pub(super) struct Growth<'a> {
    pub(super) tokenizer: &'a Tokenizer,
    pub(super) output: &'a StepOutput,
    /// Tokens to compute next.
    pub(super) pending: &'a mut Vec<TokenId>,
    /// How many of them the session can take.
    pub(super) most: usize,
    pub(super) outbox: &'a mut Outbox,
}

impl Answer {
    /// What a step must give for [`grow`](Self::grow).
    pub(super) fn wanted(&self) -> Wanted {
        if self.has_rules() || self.top_logprobs.is_some() {
            return Wanted::Logits;
        }
        self.sampler.wants()
    }

    fn has_rules(&self) -> bool {
        self.grammar.as_ref().is_some_and(AnswerGrammar::has_rules)
    }

    /// The tokens that must come next; none if there is a choice.
    fn forced(&mut self) -> Vec<TokenId> {
        self.grammar.as_mut().map_or_else(Vec::new, AnswerGrammar::forced)
    }

    /// Whether [`look_ahead`](Self::look_ahead) would find out what is not known yet.
    pub(super) fn wants_look_ahead(&self) -> bool {
        self.ahead.is_none() && self.has_rules()
    }

    /// Finds out what can come next.
    pub(super) fn look_ahead(&mut self) {
        self.ahead = Some(self.look());
    }

    fn look(&mut self) -> Result<Continuation, String> {
        let Some(grammar) = &mut self.grammar else { return Ok(Continuation::Choice(Next::Any)) };
        let certain = grammar.forced();
        if certain.is_empty() {
            return Ok(Continuation::Choice(grammar.next_mask()?));
        }
        Ok(Continuation::Certain(certain))
    }

    /// Adds the tokens that are certain, or else draws one and adds those that are certain then.
    ///
    /// # Errors
    /// If a grammar gives up, or there is nothing to draw from.
    pub(super) fn grow(&mut self, to: &mut Growth<'_>) -> Result<Option<Finish>, String> {
        let continuation = self.ahead.take().unwrap_or_else(|| self.look())?;
        let next = match continuation {
            Continuation::Certain(tokens) => return self.add_certain(tokens, to),
            Continuation::Choice(next) => next,
        };
        let row = to.output.last_logits().unwrap_or_default();
        let drawn = match next {
            Next::Any => self.sampler.sample_after(to.output),
            Next::Among { mask, greedy: false } => self.sampler.sample_among(row, mask.as_slice()),
            Next::Among { mask, greedy: true } => {
                self.sampler.likeliest_among(row, mask.as_slice())
            }
        };
        let token = drawn.map_err(|error| error.to_string())?;
        if to.tokenizer.special().ends_turn(token) {
            return Ok(Some(Finish::Stop));
        }
        if let Some(finish) = self.add(token, to)? {
            return Ok(Some(finish));
        }
        if self.top_logprobs.is_some() {
            return Ok(None);
        }
        let certain = self.forced();
        self.add_certain(certain, to)
    }

    /// Adds tokens that are certain, and what is certain after them.
    fn add_certain(
        &mut self,
        mut tokens: Vec<TokenId>,
        to: &mut Growth<'_>,
    ) -> Result<Option<Finish>, String> {
        if self.top_logprobs.is_some() {
            // Later ones need the logits of a step of their own.
            tokens.truncate(1);
        }
        while !tokens.is_empty() {
            for token in tokens {
                if let Some(finish) = self.add(token, to)? {
                    return Ok(Some(finish));
                }
            }
            if self.top_logprobs.is_some() {
                break;
            }
            tokens = self.forced();
        }
        Ok(None)
    }

    /// Adds a token; says if that ends the answer.
    fn add(&mut self, token: TokenId, to: &mut Growth<'_>) -> Result<Option<Finish>, String> {
        let top = self.top_logprobs.zip(to.output.last_logits());
        let logprobs = top.map(|(n, row)| logprobs(row, token, n)).transpose();
        let logprobs = logprobs.map_err(|error| error.to_string())?;
        to.outbox.hold(Event::Token(AnswerToken { token, logprobs }));
        self.tokens_left -= 1;
        to.pending.push(token);
        if let Some(grammar) = &mut self.grammar
            && grammar.accept(token)?
        {
            return Ok(Some(Finish::Stop));
        }
        let full = to.pending.len() >= to.most;
        Ok((self.tokens_left == 0 || full).then_some(Finish::Length))
    }
}
