//! What can go wrong while a model file is made, as one clear line each.

use std::{fmt, io, path::Path};

use gguf::TensorType;

/// Why a conversion was refused or failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A GGUF file cannot be read or laid out.
    #[error(transparent)]
    Gguf(#[from] gguf::Error),
    /// A GGUF file is not a model, or the metadata describes none.
    #[error(transparent)]
    Model(#[from] ds4_model::Error),
    /// A file cannot be read or written.
    #[error("{file}: {source}")]
    Io {
        /// The file.
        file: String,
        /// What the system says.
        source: io::Error,
    },
    /// Inputs that make up no checkpoint.
    #[error("{file}: {problem}")]
    Input {
        /// The file or directory.
        file: String,
        /// What is wrong, and what to do.
        problem: String,
    },
    /// The header of a safetensors file is damaged.
    #[error("{file}: not a safetensors file: {}", one_line(source))]
    Safetensors {
        /// The file.
        file: String,
        /// What the reader says.
        source: safetensors::SafeTensorError,
    },
    /// A JSON file cannot be read.
    #[error("{file}: {}", one_line(source))]
    Json {
        /// The file.
        file: String,
        /// What the reader says.
        source: serde_json::Error,
    },
    /// A value that cannot be right.
    #[error("{file}: {key}: found {found}, expected {expected}")]
    Value {
        /// The file.
        file: String,
        /// What the value is of.
        key: String,
        /// What was found.
        found: String,
        /// What would be right.
        expected: String,
    },
    /// A tensor that the model needs is absent.
    #[error("{file}: missing tensor {tensor}")]
    MissingTensor {
        /// The checkpoint.
        file: String,
        /// The tensor's name there.
        tensor: String,
    },
    /// A tensor of another shape than the configuration gives it.
    #[error("{file}: tensor {tensor}: shape {found:?}, expected {expected:?}")]
    TensorShape {
        /// The file.
        file: String,
        /// Its name.
        tensor: String,
        /// Its shape, rows first.
        found: Vec<usize>,
        /// What it would have to be.
        expected: Vec<usize>,
    },
    /// A tensor stored in a way that cannot be converted.
    #[error("{file}: tensor {tensor}: type {found}, expected {expected}")]
    TensorType {
        /// The file.
        file: String,
        /// Its name.
        tensor: String,
        /// Its type.
        found: String,
        /// What it may be.
        expected: &'static str,
    },
    /// Values that cannot be converted.
    #[error("tensor {tensor}, row {row}: {source}")]
    Row {
        /// Name of the tensor in the output.
        tensor: String,
        /// Row of it, the rows of all experts counted.
        row: usize,
        /// What the converter says.
        source: Box<gguf::Error>,
    },
    /// A table of experts by token names one that does not exist.
    #[error("tensor {tensor}: token {token} names expert {expert}, expected 0 to {last}")]
    ExpertId {
        /// Name of the tensor in the output.
        tensor: String,
        /// The token.
        token: usize,
        /// What the table says.
        expert: i64,
        /// The last expert.
        last: usize,
    },
    /// A pattern of an override that no tensor has.
    #[error("--tensor {pattern}: matches no tensor of this model")]
    UnusedOverride {
        /// The pattern.
        pattern: String,
    },
    /// An override that its tensor does not allow.
    #[error("tensor {tensor}: cannot be {ty}: {reason}")]
    BadOverride {
        /// The tensor.
        tensor: String,
        /// The type asked for.
        ty: TensorType,
        /// Why not.
        reason: String,
    },
    /// Values of an importance matrix that don't fit the model or are no importance.
    #[error("{file}: {entry}: found {found}, expected {expected}")]
    Importance {
        /// The file.
        file: String,
        /// The entry.
        entry: String,
        /// What was found.
        found: String,
        /// What would be right.
        expected: String,
    },
    /// Another process writes the same file.
    #[error("{file}: is being written by another process")]
    Busy {
        /// The unfinished file.
        file: String,
    },
    /// The conversion was stopped and can be resumed.
    #[error("stopped after {done} of {total} tensors; the same command resumes it")]
    Stopped {
        /// Finished tensors.
        done: usize,
        /// All tensors.
        total: usize,
    },
}

/// `Result` with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// Puts the name of the file to an error of the system.
pub(crate) fn io_error(path: &Path) -> impl FnOnce(io::Error) -> Error {
    let file = path.display().to_string();
    move |source| Error::Io { file, source }
}

/// Text from a file as part of a message: control characters escaped, long text cut.
pub(crate) fn shown(text: &str) -> String {
    const LIMIT: usize = 100;
    let mut shown: String = text.chars().take(LIMIT).flat_map(char::escape_debug).collect();
    if text.chars().nth(LIMIT).is_some() {
        shown.push('…');
    }
    shown
}

/// What another library says, which may repeat any text of a file: control characters escaped,
/// long text cut.
fn one_line(error: &impl fmt::Display) -> String {
    const LIMIT: usize = 1000;
    let text = error.to_string();
    let mut line = String::new();
    for c in text.chars().take(LIMIT) {
        match c.is_control() {
            true => line.extend(c.escape_default()),
            false => line.push(c),
        }
    }
    if text.chars().nth(LIMIT).is_some() {
        line.push('…');
    }
    line
}
