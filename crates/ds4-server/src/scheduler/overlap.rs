//! What a session and a prompt have in common.
//!
//! Tokens that a model sampled may split a text differently from the tokenizer's own split of the
//! same text. Where both stand for the same bytes, the session's tokens are as good as the
//! prompt's, so a session can be continued from any place where a token ends on both sides.

use ds4_engine::TokenId;
use ds4_text::tokenizer::Tokenizer;

/// Places up to which a session holds the text that a prompt begins with.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Overlap {
    /// Leading tokens that are equal: every one of these places is shared.
    common: usize,
    /// Shared places beyond, as tokens of the session and of the prompt, ascending.
    beyond: Vec<(usize, usize)>,
}

impl Overlap {
    /// Compares a session's tokens with a prompt.
    pub(super) fn new(tokenizer: &Tokenizer, session: &[TokenId], prompt: &[TokenId]) -> Self {
        let common = session.iter().zip(prompt).take_while(|(a, b)| a == b).count();
        let mut walk = Walk { tokenizer, left: session, right: prompt, at: (common, common) };
        let mut beyond = Vec::new();
        while let Some(place) = walk.next_shared() {
            beyond.push(place);
        }
        Overlap { common, beyond }
    }

    /// The furthest shared place that leaves at least one token of the prompt, of `prompt_len`.
    pub(super) fn furthest(&self, prompt_len: usize) -> (usize, usize) {
        let usable = self.beyond.iter().rev().find(|(_, covered)| *covered < prompt_len);
        let common = self.common.min(prompt_len.saturating_sub(1));
        usable.copied().unwrap_or((common, common))
    }

    /// Tokens of the prompt that the session's first `kept` tokens stand for.
    pub(super) fn covered_by(&self, kept: usize) -> Option<usize> {
        if kept <= self.common {
            return Some(kept);
        }
        let found = self.beyond.binary_search_by_key(&kept, |(kept, _)| *kept);
        found.ok().map(|index| self.beyond[index].1)
    }
}

/// Walks two token sequences of the same text.
struct Walk<'a> {
    tokenizer: &'a Tokenizer,
    left: &'a [TokenId],
    right: &'a [TokenId],
    at: (usize, usize),
}

impl<'a> Walk<'a> {
    /// The next place where a token ends on both sides and the bytes so far are equal.
    fn next_shared(&mut self) -> Option<(usize, usize)> {
        let (a, b) = (*self.left.get(self.at.0)?, *self.right.get(self.at.1)?);
        self.at = (self.at.0 + 1, self.at.1 + 1);
        if a == b {
            return Some(self.at);
        }
        let (mut left, mut right) = (self.text(a)?, self.text(b)?);
        loop {
            let equal = left.len().min(right.len());
            if left[..equal] != right[..equal] {
                return None;
            }
            (left, right) = (&left[equal..], &right[equal..]);
            if left.is_empty() && right.is_empty() {
                return Some(self.at);
            }
            if left.is_empty() {
                left = self.text(*self.left.get(self.at.0)?)?;
                self.at.0 += 1;
            } else {
                right = self.text(*self.right.get(self.at.1)?)?;
                self.at.1 += 1;
            }
        }
    }

    /// Bytes of a token of plain text; a marker equals nothing but itself.
    fn text(&self, token: TokenId) -> Option<&'a [u8]> {
        let bytes = self.tokenizer.bytes_of(token).filter(|bytes| !bytes.is_empty())?;
        (!self.tokenizer.is_marker(token)).then_some(bytes)
    }
}
