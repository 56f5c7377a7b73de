//! Text to token ids and back.
//!
//! The tokenizer is byte-level BPE, built from the tokens, merges and token
//! types in a model file's metadata. Its alphabet is the 256 bytes, so every
//! text has ids and every id has bytes; a token may hold a part of a UTF-8
//! character. Text is always encoded as plain text: the markers of the chat
//! format (`<｜User｜>`, `<think>` and so on) become their ids only in
//! [`Tokenizer::encode_with_markers`] and in the ranges that prompt rendering
//! marks as such. Nothing is added at the beginning or end.

mod bytes;
mod error;
mod load;
mod markers;
mod segments;

use std::{fmt::Write, ops::Range};

use aho_corasick::AhoCorasick;
use ds4_model::TokenId;

pub use error::TokenizerError;
pub use markers::SpecialTokens;

use bytes::TokenBytes;

/// The tokenizer of one model.
pub struct Tokenizer {
    bpe: tokenizers::Tokenizer,
    bytes: TokenBytes,
    /// Whether each token is a marker, outside of what text can become.
    is_marker: Vec<bool>,
    /// Finds the spellings of all markers; pattern `i` is token `marker_ids[i]`.
    marker_finder: AhoCorasick,
    marker_ids: Vec<TokenId>,
    special: SpecialTokens,
    warnings: Vec<String>,
}

impl Tokenizer {
    /// Number of tokens.
    pub fn len(&self) -> usize {
        self.is_marker.len()
    }

    /// Whether there are no tokens; there always are.
    pub fn is_empty(&self) -> bool {
        self.is_marker.is_empty()
    }

    /// Ids of the markers that the program itself needs.
    pub fn special(&self) -> &SpecialTokens {
        &self.special
    }

    /// What is odd about the file's tokenizer but can be lived with, a line each.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// The ids of `text`, in which spellings of markers are text like any other.
    ///
    /// Works on the caller's thread alone: the threads that steps of a model share their work
    /// among would be late for the next step while they encode a part of a long text.
    ///
    /// # Errors
    /// [`TokenizerError::TextTooUniform`] for a text that no one writes by
    /// hand: megabytes without the end of a word.
    pub fn encode(&self, text: &str) -> Result<Vec<TokenId>, TokenizerError> {
        self.encode_pausing(text, &mut || ())
    }

    /// Like [`Tokenizer::encode`], and calls `pause` after every kilobyte or so: a thread that
    /// stands back for others can wait there.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_pausing(
        &self,
        text: &str,
        pause: &mut dyn FnMut(),
    ) -> Result<Vec<TokenId>, TokenizerError> {
        let mut ids = Vec::new();
        for segment in segments::split(text)? {
            self.encode_segment(segment, &mut ids)?;
            pause();
        }
        Ok(ids)
    }

    /// The ids of `text`, in which the spelling of a marker is that marker.
    /// Only for text that the user of the program wrote as a whole prompt:
    /// in text from elsewhere it would let content forge turns.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_with_markers(&self, text: &str) -> Result<Vec<TokenId>, TokenizerError> {
        let markers = self.marker_finder.find_iter(text).map(|found| found.range());
        self.encode_marked(text, markers, &mut || ())
    }

    /// The bytes of a token, or `None` if there is no such token.
    pub fn bytes_of(&self, id: TokenId) -> Option<&[u8]> {
        self.bytes.get(id)
    }

    /// Whether a token is a marker: of the chat format, or one that the model never uses.
    pub fn is_marker(&self, id: TokenId) -> bool {
        usize::try_from(id).ok().and_then(|id| self.is_marker.get(id)).copied().unwrap_or(false)
    }

    /// A token for people to read, on one line: its text, with control
    /// characters escaped as in Rust (`\n`) and bytes that are no complete
    /// character as `\xE4`. Not reversible: a backslash stays one.
    pub fn piece(&self, id: TokenId) -> String {
        let Some(bytes) = self.bytes_of(id) else {
            return format!("[no token {id}]");
        };
        let mut piece = String::with_capacity(bytes.len());
        for chunk in bytes.utf8_chunks() {
            for character in chunk.valid().chars() {
                if character.is_control() {
                    piece.extend(character.escape_default());
                } else {
                    piece.push(character);
                }
            }
            for byte in chunk.invalid() {
                // Writing to a string cannot fail.
                let _ = write!(piece, "\\x{byte:02X}");
            }
        }
        piece
    }

    /// The text of `ids`, markers spelled out. Bytes that are no UTF-8 become
    /// U+FFFD, and ids without a token nothing.
    pub fn decode(&self, ids: &[TokenId]) -> String {
        let bytes: Vec<u8> =
            ids.iter().filter_map(|&id| self.bytes_of(id)).flatten().copied().collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The ids of `text`, of which `markers` (ascending, disjoint) are markers
    /// to be looked up and all between them is plain text. For `pause` see
    /// [`Tokenizer::encode_pausing`].
    pub(crate) fn encode_marked(
        &self,
        text: &str,
        markers: impl Iterator<Item = Range<usize>>,
        pause: &mut dyn FnMut(),
    ) -> Result<Vec<TokenId>, TokenizerError> {
        let mut ids = Vec::new();
        let mut plain_from = 0;
        for range in markers {
            ids.extend(self.encode_pausing(&text[plain_from..range.start], pause)?);
            ids.push(self.marker(&text[range.clone()])?);
            plain_from = range.end;
        }
        ids.extend(self.encode_pausing(&text[plain_from..], pause)?);
        Ok(ids)
    }

    /// The id of the marker spelled `spelling`.
    fn marker(&self, spelling: &str) -> Result<TokenId, TokenizerError> {
        let found = self.marker_finder.find(spelling).filter(|found| found.len() == spelling.len());
        let index = found.map(|found| found.pattern().as_usize());
        index
            .map(|index| self.marker_ids[index])
            .ok_or_else(|| TokenizerError::NoSuchMarker { marker: spelling.to_owned() })
    }

    fn encode_segment(&self, segment: &str, ids: &mut Vec<TokenId>) -> Result<(), TokenizerError> {
        let encoding = self
            .bpe
            .encode_fast(segment, false)
            .map_err(|error| TokenizerError::Encode { reason: error.to_string() })?;
        ids.extend_from_slice(encoding.get_ids());
        Ok(())
    }
}
