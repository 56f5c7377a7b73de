//! What can go wrong while a model is measured, as one clear line each.

use std::{io, path::Path};

use ds4_engine::{BackendError, StepError, sampling::UnusableLogits};
use ds4_text::tokenizer::TokenizerError;

/// Why a measurement was refused or failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file cannot be read or written.
    #[error("{file}: {source}")]
    Io {
        /// The file.
        file: String,
        /// What the system says.
        source: io::Error,
    },
    /// A line of a suite or of a file of answers cannot be used.
    #[error("{file}:{line}: {problem}")]
    Line {
        /// The file.
        file: String,
        /// Its number, from 1.
        line: usize,
        /// What is wrong.
        problem: String,
    },
    /// Something in a file is not what it has to be.
    #[error("{file}: {what}: found {found}, expected {expected}")]
    Value {
        /// The file.
        file: String,
        /// What the value is of.
        what: &'static str,
        /// What was found.
        found: String,
        /// What would be right.
        expected: String,
    },
    /// A text with too few tokens to measure anything.
    #[error("the text has {found} tokens, expected more than {least}")]
    ShortText {
        /// Tokens of the text.
        found: usize,
        /// Tokens that are only context.
        least: usize,
    },
    /// A case whose prompt is longer than the model's context.
    #[error("case {case}: {found} tokens with the answer, the model takes {limit}")]
    LongCase {
        /// Its id.
        case: String,
        /// Tokens of prompt and answer.
        found: usize,
        /// What the model takes.
        limit: usize,
    },
    /// A prompt cannot be tokenized.
    #[error("case {case}: {source}")]
    Prompt {
        /// Its id.
        case: String,
        /// What the tokenizer says.
        source: Box<TokenizerError>,
    },
    /// The engine failed.
    #[error(transparent)]
    Step(#[from] StepError),
    /// The device failed.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// The runtime did not take a request.
    #[error(transparent)]
    Refused(#[from] ds4_runtime::Refused),
    /// A request failed.
    #[error(transparent)]
    Request(#[from] ds4_runtime::Failure),
    /// The system has no more threads.
    #[error("cannot start threads: {0}")]
    Threads(io::Error),
    /// The model computed no numbers.
    #[error(transparent)]
    Logits(#[from] UnusableLogits),
    /// The measurement was stopped.
    #[error("stopped")]
    Stopped,
}

/// `Result` with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// Puts the name of the file to an error of the system.
pub(crate) fn io_error(path: &Path) -> impl FnOnce(io::Error) -> Error {
    let file = path.display().to_string();
    move |source| Error::Io { file, source }
}
