//! Reads integers and strings off a byte slice, never past its end.

use crate::error::Problem;

/// A position in a byte slice. Every read checks the bytes that remain first.
pub(crate) struct Cursor<'a> {
    bytes: &'a [u8],
    position: usize,
}

impl<'a> Cursor<'a> {
    pub(crate) fn new(bytes: &'a [u8], position: usize) -> Self {
        Cursor { bytes, position: position.min(bytes.len()) }
    }

    pub(crate) fn position(&self) -> usize {
        self.position
    }

    pub(crate) fn remaining(&self) -> usize {
        self.bytes.len() - self.position
    }

    /// The next `N` bytes.
    pub(crate) fn array<const N: usize>(&mut self) -> Result<[u8; N], Problem> {
        let rest = &self.bytes[self.position..];
        let array = *rest.first_chunk().ok_or(Problem::Truncated)?;
        self.position += N;
        Ok(array)
    }

    pub(crate) fn u32(&mut self) -> Result<u32, Problem> {
        self.array().map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self) -> Result<u64, Problem> {
        self.array().map(u64::from_le_bytes)
    }

    /// A `u64` count of items, if that many of at least `item_bytes` each fit
    /// in what remains. So a count that passes may size an allocation.
    pub(crate) fn count(&mut self, item_bytes: usize) -> Result<usize, Problem> {
        let length = self.u64()?;
        usize::try_from(length)
            .ok()
            .filter(|n| n.checked_mul(item_bytes).is_some_and(|bytes| bytes <= self.remaining()))
            .ok_or(Problem::LengthPastEnd { length })
    }

    /// A string: its length as `u64`, then UTF-8 bytes.
    pub(crate) fn string(&mut self) -> Result<&'a str, Problem> {
        let length = self.count(1)?;
        let bytes = &self.bytes[self.position..self.position + length];
        self.position += length;
        str::from_utf8(bytes).map_err(|error| Problem::NotUtf8 { position: error.valid_up_to() })
    }
}
