//! What can go wrong with a tokenizer or a text.

use ds4_model::shown;

/// Why a tokenizer cannot be made of a file, or a text has no ids.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TokenizerError {
    /// A key is missing or of the wrong type.
    #[error(transparent)]
    Gguf(#[from] gguf::Error),
    /// A metadata value that the tokenizer cannot be.
    #[error("{file}: {key}: found {found}, expected {expected}")]
    Value {
        /// The file.
        file: String,
        /// The key, with an index if it is one element of an array.
        key: String,
        /// What the file holds.
        found: String,
        /// What would be right.
        expected: String,
    },
    /// A marker of the chat format is not among the tokens.
    #[error("{file}: tokenizer.ggml.tokens: no token {marker}, which prompts of this model need")]
    MissingMarker {
        /// The file.
        file: String,
        /// Its spelling.
        marker: &'static str,
    },
    /// No token stands for a byte, so that texts with it would lose it.
    #[error("{file}: tokenizer.ggml.tokens: no token for byte 0x{byte:02X}, expected all 256")]
    MissingByte {
        /// The file.
        file: String,
        /// The byte.
        byte: u8,
    },
    /// The tokenizers crate refused what was found.
    #[error("{file}: tokenizer: {reason}")]
    Build {
        /// The file.
        file: String,
        /// Why.
        reason: String,
    },
    /// A prompt has a marker that this vocabulary lacks.
    #[error("this model has no token {}, which the prompt needs", shown(marker))]
    NoSuchMarker {
        /// Its spelling.
        marker: String,
    },
    /// A text too long to encode in pieces.
    #[error(
        "the text has {bytes} bytes without the end of a word from byte {offset} on, expected at most {limit}"
    )]
    TextTooUniform {
        /// Where that begins.
        offset: usize,
        /// How long it is.
        bytes: usize,
        /// How long it may be.
        limit: usize,
    },
    /// The tokenizers crate refused the text.
    #[error("text cannot be tokenized: {reason}")]
    Encode {
        /// Why.
        reason: String,
    },
}
