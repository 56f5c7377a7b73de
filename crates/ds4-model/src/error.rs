//! What can be wrong with a model file, as one clear line each:
//! `<file>: <what>: found <x>, expected <y>`.

use std::path::PathBuf;

use gguf::TensorType;

/// Why a model cannot be loaded or made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The container cannot be read or written, or a key is missing or of the wrong type.
    #[error(transparent)]
    Gguf(#[from] gguf::Error),
    /// A metadata value that this model family does not have, or that the program cannot run.
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
    /// A file with only the tensors of a draft block.
    #[error("{file}: holds only a draft (MTP) block: open the main model's file instead")]
    DraftOnly {
        /// The file.
        file: String,
    },
    /// A tensor that the configuration asks for is absent.
    #[error("{file}: missing tensor {tensor}{}", in_parentheses(reason))]
    MissingTensor {
        /// The file.
        file: String,
        /// Its name.
        tensor: String,
        /// What makes it necessary, if not every layer has it.
        reason: String,
    },
    /// A tensor of another shape than the configuration gives it.
    #[error("{file}: tensor {tensor}: shape {found:?}, expected {expected:?}")]
    TensorShape {
        /// The file.
        file: String,
        /// Its name.
        tensor: String,
        /// Its dimensions, the fastest first.
        found: Vec<u64>,
        /// What they would have to be.
        expected: Vec<u64>,
    },
    /// A tensor of a type that its role does not allow.
    #[error(
        "{file}: tensor {tensor}: type {found} is not supported here (supported: {})",
        names(expected)
    )]
    TensorType {
        /// The file.
        file: String,
        /// Its name.
        tensor: String,
        /// Its type.
        found: TensorType,
        /// What it may be.
        expected: &'static [TensorType],
    },
    /// Gate and up experts of a layer differ in type.
    #[error(
        "{file}: blk.{layer}: ffn_gate_exps is {gate} but ffn_up_exps is {up}, expected the same type"
    )]
    MixedExperts {
        /// The file.
        file: String,
        /// The layer.
        layer: usize,
        /// Type of the gate experts.
        gate: TensorType,
        /// Type of the up experts.
        up: TensorType,
    },
    /// A table of experts by token names one that does not exist.
    #[error("{file}: {tensor}: token {token} names expert {expert}, expected less than {experts}")]
    ExpertId {
        /// The file.
        file: String,
        /// The table.
        tensor: String,
        /// The token.
        token: usize,
        /// What the table says.
        expert: i32,
        /// Number of experts.
        experts: usize,
    },
    /// A small tensor holds an infinity or NaN.
    #[error("{file}: tensor {tensor}: non-finite value at {index}")]
    NonFinite {
        /// The file.
        file: String,
        /// Its name.
        tensor: String,
        /// Number of the element.
        index: usize,
    },
    /// A part of a split model is not there.
    #[error("part {part} of {parts} is missing: {}", path.display())]
    MissingPart {
        /// Its number, from 1.
        part: usize,
        /// Number of parts.
        parts: usize,
        /// Where it was looked for.
        path: PathBuf,
    },
    /// One part of a split model whose name does not tell where the others are.
    #[error(
        "{file}: is part {part} of {parts} of a split model, expected a name that ends in -{part:05}-of-{parts:05}.gguf"
    )]
    PartName {
        /// The file.
        file: String,
        /// Its number, from 1.
        part: usize,
        /// Number of parts.
        parts: usize,
    },
    /// A tensor that two parts of a split model hold.
    #[error("{second}: tensor {}: found also in {first}, expected in one part only", shown(tensor))]
    TensorTwice {
        /// Its name.
        tensor: String,
        /// The first part that holds it.
        first: String,
        /// The other.
        second: String,
    },
    /// A model of this shape cannot be made.
    #[error("cannot make a model with {what}")]
    Unmakeable {
        /// The combination that does not work.
        what: String,
    },
}

/// `Result` with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// Text from a file as part of a message: control characters escaped, long text cut.
pub fn shown(text: &str) -> String {
    const LIMIT: usize = 100;
    let mut shown: String = text.chars().take(LIMIT).flat_map(char::escape_debug).collect();
    if text.chars().nth(LIMIT).is_some() {
        shown.push('…');
    }
    shown
}

fn in_parentheses(reason: &str) -> String {
    if reason.is_empty() { String::new() } else { format!(" ({reason})") }
}

fn names(types: &[TensorType]) -> String {
    types.iter().map(|ty| ty.name()).collect::<Vec<_>>().join(", ")
}
