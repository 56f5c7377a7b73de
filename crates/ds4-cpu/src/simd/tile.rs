//! The form in which prefill multiplies quantised rows: [`Vector::LANES`] of
//! them side by side, one per lane, four elements of each at a time.

use super::vector::Vector;

/// Quant words of a group, of each row.
pub(super) const WORDS: usize = 8;

/// Unpacked rows: one stream of registers, group after group. A group is eight
/// registers of quants, one of scales, and one for each of the format's mins.
#[derive(Default)]
pub(super) struct Tile {
    lines: Vec<Line>,
}

/// A cache line, for its alignment.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u32; 16]);

impl Tile {
    /// Ensures room for `words`. The contents stay as they are.
    pub fn reserve(&mut self, words: usize) -> *mut u32 {
        let lines = words.div_ceil(16);
        if self.lines.len() < lines {
            self.lines.resize(lines, Line([0; 16]));
        }
        self.lines.as_mut_ptr().cast()
    }

    pub fn as_ptr(&self) -> *const u32 {
        self.lines.as_ptr().cast()
    }
}

/// Registers of a tile's group.
pub(super) const fn registers(mins: usize) -> usize {
    WORDS + 1 + mins
}

/// Hints that superblock `row` of the tile `ahead` bytes further on is read
/// soon. A few at a time: many at once hold up the loads of this tile.
///
/// # Safety
/// Needs the instruction set of `V`.
#[inline(always)]
pub(super) unsafe fn prefetch<V: Vector>(row: *const u8, ahead: usize, bytes: usize) {
    for line in (0..bytes).step_by(64) {
        // SAFETY: the caller has the instruction set.
        unsafe { V::prefetch(row.wrapping_add(ahead + line)) };
    }
}
