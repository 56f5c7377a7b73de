//! Columns of a row-major buffer.

use crate::{device::Buffer, kernel::Pointer};

/// Columns of a buffer `[n, stride]`, from some column on.
#[derive(Clone, Copy)]
pub struct Columns<'a> {
    /// The buffer.
    pub buffer: &'a Buffer<f32>,
    /// The first row's first column.
    pub first: usize,
    /// Elements from one row to the next, a multiple of 4.
    pub stride: usize,
}

impl<'a> Columns<'a> {
    /// All columns.
    pub fn all(buffer: &'a Buffer<f32>, stride: usize) -> Self {
        Columns { buffer, first: 0, stride }
    }

    /// Address of the first of `width` columns of `rows` rows.
    ///
    /// # Panics
    /// If the buffer has fewer.
    pub(crate) fn of(&self, rows: usize, width: usize) -> Pointer {
        let len = rows.checked_sub(1).map_or(0, |others| others * self.stride + width);
        self.buffer.range(self.first, len)
    }
}
