//! Sampled tokens to text, as they come.
//!
//! A token may end inside a UTF-8 character, so text is given out only up to
//! the last complete one. The invariant: however bytes are cut into tokens,
//! the concatenated text is the same.

mod output;

use std::{mem, str, sync::Arc};

use ds4_model::TokenId;

pub use output::{Channel, OutputDelta, OutputSplitter};

use crate::tokenizer::Tokenizer;

/// Decodes UTF-8 piece by piece; invalid sequences become U+FFFD.
#[derive(Debug, Clone, Default)]
pub struct Utf8Decoder {
    /// The beginning of a character: at most three bytes.
    incomplete: Vec<u8>,
}

impl Utf8Decoder {
    /// The text that `bytes` complete.
    pub fn push(&mut self, bytes: &[u8]) -> String {
        let mut joined = mem::take(&mut self.incomplete);
        joined.extend_from_slice(bytes);
        let mut text = String::with_capacity(joined.len());
        let mut rest = &joined[..];
        loop {
            let error = match str::from_utf8(rest) {
                Ok(valid) => {
                    text.push_str(valid);
                    return text;
                }
                Err(error) => error,
            };
            let (valid, invalid) = rest.split_at(error.valid_up_to());
            text.push_str(&String::from_utf8_lossy(valid));
            let Some(length) = error.error_len() else {
                self.incomplete = invalid.to_vec();
                return text;
            };
            text.push(char::REPLACEMENT_CHARACTER);
            rest = &invalid[length..];
        }
    }

    /// Ends the text: U+FFFD if a character was left incomplete.
    pub fn finish(&mut self) -> &'static str {
        if mem::take(&mut self.incomplete).is_empty() { "" } else { "\u{FFFD}" }
    }
}

/// The text of a sequence of tokens, without markers.
pub struct Detokenizer {
    tokenizer: Arc<Tokenizer>,
    utf8: Utf8Decoder,
}

impl Detokenizer {
    /// Begins a text.
    pub fn new(tokenizer: Arc<Tokenizer>) -> Self {
        Detokenizer { tokenizer, utf8: Utf8Decoder::default() }
    }

    /// The text that `id` completes. A marker, or an id without a token, has
    /// none itself, and no character continues after it.
    pub fn push(&mut self, id: TokenId) -> String {
        match self.tokenizer.bytes_of(id) {
            Some(bytes) if !self.tokenizer.is_marker(id) => self.utf8.push(bytes),
            _ => self.utf8.finish().to_owned(),
        }
    }

    /// Ends the text: what was held back of it.
    pub fn finish(mut self) -> &'static str {
        self.utf8.finish()
    }
}
