//! Results of a step: which are wanted, and what each session gets.

use std::{
    ops::{Deref, Range},
    sync::Arc,
};

use crate::{
    TokenId,
    sampling::{UnusableLogits, argmax},
};

/// The result to return for a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    /// Only the likeliest next token: a device may find it faster than it copies half a megabyte
    /// of logits.
    Argmax,
    /// The logits of the next token.
    Logits,
}

/// A row of logits `[vocab]`. The rows of a step share their memory.
#[derive(Debug, Clone)]
pub struct LogitRow {
    step: Arc<Vec<f32>>,
    own: Range<usize>,
}

impl LogitRow {
    pub(crate) fn new(step: &Arc<Vec<f32>>, own: Range<usize>) -> Self {
        LogitRow { step: step.clone(), own }
    }
}

impl Deref for LogitRow {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.step[self.own.clone()]
    }
}

impl PartialEq for LogitRow {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

/// The result for one token.
#[derive(Debug, Clone, PartialEq)]
pub enum RowOutput {
    /// The likeliest next token, chosen as by [`argmax`].
    Argmax(Result<TokenId, UnusableLogits>),
    /// The logits of the next token.
    Logits(LogitRow),
}

impl RowOutput {
    /// The likeliest next token.
    ///
    /// # Errors
    /// If the logits are not numbers.
    pub fn argmax(&self) -> Result<TokenId, UnusableLogits> {
        match self {
            RowOutput::Argmax(token) => *token,
            RowOutput::Logits(row) => argmax(row),
        }
    }

    /// The logits, if they were wanted.
    pub fn logits(&self) -> Option<&[f32]> {
        match self {
            RowOutput::Argmax(_) => None,
            RowOutput::Logits(row) => Some(row),
        }
    }
}

/// The results for one session, one for each entry of [`Work::wanted`](crate::Work::wanted).
#[derive(Debug, Clone, PartialEq, Default)]
pub struct StepOutput {
    /// Oldest token first.
    pub rows: Vec<RowOutput>,
}

impl StepOutput {
    /// Whether nothing was wanted.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// The logits after the last token, if they were wanted.
    pub fn last_logits(&self) -> Option<&[f32]> {
        self.rows.last().and_then(RowOutput::logits)
    }

    /// The likeliest token after the last one, if anything was wanted.
    pub fn argmax(&self) -> Option<Result<TokenId, UnusableLogits>> {
        self.rows.last().map(RowOutput::argmax)
    }

    /// All rows of logits that were wanted, oldest first.
    pub fn logits(&self) -> impl ExactSizeIterator<Item = &[f32]> + use<'_> {
        self.rows.iter().map(|row| row.logits().unwrap_or_default())
    }
}
