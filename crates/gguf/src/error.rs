//! Everything that can go wrong with a file, as one clear line each:
//! `<file>: <where>: found <x>, expected <y>`.
//!
//! Names that come from the file are escaped and shortened on the way into a
//! message, so a message is always one line of bounded length.

use std::fmt;

use crate::TensorType;

/// What can go wrong when reading or writing a GGUF file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused.
    #[error("{}: {source}", Printable(file))]
    Io {
        /// The file.
        file: String,
        /// Its reason.
        source: std::io::Error,
    },
    /// The file is not a GGUF file at all.
    #[error("{}: not a GGUF file: {reason}", Printable(file))]
    NotGguf {
        /// The file.
        file: String,
        /// What it is instead.
        reason: String,
    },
    /// The file breaks a rule of the format, or a limit.
    #[error("{}: {place}: {problem}", Printable(file))]
    Malformed {
        /// The file.
        file: String,
        /// Where in the file.
        place: Place,
        /// What is wrong there.
        problem: Problem,
    },
    /// A required metadata key is absent.
    #[error("{}: missing key {}", Printable(file), Printable(key))]
    MissingKey {
        /// The file.
        file: String,
        /// The key.
        key: String,
    },
    /// A metadata value has another type than the reader needs.
    #[error("{}: key {}: found {found}, expected {expected}", Printable(file), Printable(key))]
    WrongType {
        /// The file.
        file: String,
        /// The key.
        key: String,
        /// What the file holds.
        found: String,
        /// What was asked for.
        expected: &'static str,
    },
    /// This crate cannot dequantise the type.
    #[error(
        "tensor type {ty} cannot be read here (supported: {})",
        supported(TensorType::is_readable)
    )]
    Unreadable {
        /// The type.
        ty: TensorType,
    },
    /// A row's bytes and elements do not belong together.
    #[error("{ty} row of {cols} elements: found {found} bytes, expected {}", expected_row(*ty, *cols))]
    RowSize {
        /// The type.
        ty: TensorType,
        /// Elements of the row.
        cols: usize,
        /// Bytes given.
        found: usize,
    },
    /// A row that was to be quantised holds an infinity or NaN.
    #[error("column {column}: found {value}, expected a finite number")]
    NonFinite {
        /// Where in the row.
        column: usize,
        /// What is there.
        value: f32,
    },
    /// An importance that is negative, infinite or NaN.
    #[error("importance of column {column}: found {value}, expected a finite number of at least 0")]
    BadImportance {
        /// Which weight.
        column: usize,
        /// What it is.
        value: f32,
    },
    /// Another number of importance weights than elements.
    #[error("importance: found {found} weights, expected {expected}")]
    ImportanceSize {
        /// Weights given.
        found: usize,
        /// Elements of the row.
        expected: usize,
    },
    /// FP4 values, scales and the place for the result do not belong together.
    #[error(
        "FP4 values: found {values} bytes, {scales} scales and room for {out} bytes, expected 16 to 1 to 17"
    )]
    Fp4Size {
        /// Bytes of values.
        values: usize,
        /// Scales.
        scales: usize,
        /// Bytes of the result.
        out: usize,
    },
    /// A scale of FP4 values that is NaN.
    #[error("FP4 scale of block {block}: found NaN, expected a power of two")]
    Fp4Scale {
        /// Which block of 32.
        block: usize,
    },
    /// A tensor was written out of turn, or the file ended before the last.
    #[error("{}: {found} written out of order, expected {expected}", Printable(file))]
    WriteOrder {
        /// The file.
        file: String,
        /// What was given.
        found: Turn,
        /// What comes next.
        expected: Turn,
    },
    /// A tensor was given too few or too many bytes.
    #[error(
        "{}: tensor {}: given {found} bytes, expected {expected}",
        Printable(file),
        Printable(tensor)
    )]
    WriteSize {
        /// The file.
        file: String,
        /// The tensor.
        tensor: String,
        /// Bytes given so far.
        found: u64,
        /// Bytes that its type and shape need.
        expected: u64,
    },
}

/// A place in a GGUF file.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Place {
    /// A field of the header.
    Header(&'static str),
    /// The metadata entry with this number, whose key is not known yet.
    KeyNumber(u64),
    /// A metadata entry.
    Key(String),
    /// The entry of the tensor table with this number, whose name is not known yet.
    TensorNumber(u64),
    /// A tensor.
    Tensor(String),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::Header(field) => f.write_str(field),
            Place::KeyNumber(number) => write!(f, "key number {number}"),
            Place::Key(key) => write!(f, "key {}", Printable(key)),
            Place::TensorNumber(number) => write!(f, "tensor number {number}"),
            Place::Tensor(name) => write!(f, "tensor {}", Printable(name)),
        }
    }
}

/// What can be written next to a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Turn {
    /// The tensor of this name.
    Tensor(String),
    /// The end of the file.
    End,
}

impl fmt::Display for Turn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Turn::Tensor(name) => write!(f, "tensor {}", Printable(name)),
            Turn::End => f.write_str("end of file"),
        }
    }
}

/// A broken rule of the format, or an exceeded limit.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // The fields are what the messages print them as.
#[non_exhaustive]
pub enum Problem {
    /// A version this crate does not read.
    #[error("found {found}, expected 3")]
    Version { found: u32 },
    /// Version and everything else is byte-swapped.
    #[error("big-endian GGUF is not supported")]
    BigEndian,
    /// More entries than the rest of the file has room for.
    #[error("found {found}, more than the file can hold")]
    CountPastEnd { found: u64 },
    /// More entries than this crate accepts.
    #[error("found {found}, expected at most {limit}")]
    CountLimit { found: u64, limit: u64 },
    /// The file ends inside this.
    #[error("the file ends inside it (truncated download?)")]
    Truncated,
    /// A string or array longer than the rest of the file.
    #[error("length {length} runs past the end of the file")]
    LengthPastEnd { length: u64 },
    /// A name longer than this crate accepts.
    #[error("name of {length} bytes, expected at most {limit}")]
    NameLimit { length: u64, limit: u64 },
    /// A string that is not UTF-8.
    #[error("not UTF-8 at byte {position}")]
    NotUtf8 { position: usize },
    /// A name used before.
    #[error("duplicate")]
    Duplicate,
    /// A value type that the format does not define.
    #[error("value type {id} unknown")]
    UnknownValueType { id: u32 },
    /// An array whose elements are arrays.
    #[error("arrays of arrays are not supported")]
    NestedArray,
    /// A bool that is neither 0 nor 1.
    #[error("bool is byte {byte}, expected 0 or 1")]
    BadBool { byte: u8 },
    /// `general.alignment` that cannot be used.
    #[error("found {}, expected a power of two, at least {least}", Printable(found))]
    Alignment { found: String, least: u64 },
    /// A number of dimensions that the format does not allow.
    #[error("found {found} dimensions, expected 1 to 4")]
    DimensionCount { found: u32 },
    /// A dimension of zero.
    #[error("dimension {index} is 0")]
    ZeroDimension { index: usize },
    /// Elements or bytes that cannot be counted.
    #[error("dims overflow: {dims:?}")]
    DimsOverflow { dims: Vec<u64> },
    /// A tensor type that the format does not define.
    #[error("type {id} unknown")]
    UnknownTensorType { id: u32 },
    /// Rows that are not a whole number of blocks.
    #[error("row length {cols} is not a multiple of {} ({ty})", ty.block_len())]
    PartialBlock { cols: u64, ty: TensorType },
    /// Data that does not start on the alignment.
    #[error("offset {offset} is not a multiple of the alignment {alignment}")]
    Misaligned { offset: u64, alignment: u64 },
    /// An offset whose end cannot be represented.
    #[error("offset {offset} overflows")]
    OffsetOverflow { offset: u64 },
    /// Data outside the file.
    #[error("needs bytes {start}..{end}, file has {size} (truncated download?)")]
    PastEnd { start: u64, end: u64, size: u64 },
    /// Data inside another tensor's.
    #[error("overlaps tensor {}", Printable(other))]
    Overlap { other: String },
}

/// Shows text that came from outside: control and invisible formatting
/// characters escaped, long text cut.
struct Printable<'a>(&'a str);

impl fmt::Display for Printable<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const LIMIT: usize = 200;
        for (position, c) in self.0.chars().enumerate() {
            if position == LIMIT {
                return f.write_str("…");
            }
            if c.is_control() || is_invisible(c) {
                write!(f, "{}", c.escape_default())?;
            } else {
                write!(f, "{c}")?;
            }
        }
        Ok(())
    }
}

/// Line separators, zero-width characters and overrides of the text direction.
fn is_invisible(c: char) -> bool {
    matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}')
}

/// The names of the types that pass `filter`, with commas.
fn supported(filter: fn(TensorType) -> bool) -> String {
    let names: Vec<_> =
        TensorType::ALL.iter().filter(|ty| filter(**ty)).map(|ty| ty.name()).collect();
    names.join(", ")
}

fn expected_row(ty: TensorType, cols: usize) -> String {
    match ty.row_bytes(cols) {
        Some(bytes) => bytes.to_string(),
        None => format!("a multiple of {} elements", ty.block_len()),
    }
}
