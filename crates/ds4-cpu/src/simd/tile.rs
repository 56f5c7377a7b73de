//! Prefill: tiles of quantised rows, each unpacked once and multiplied with all
//! tokens.
//!
//! A tile holds [`Vector::LANES`] rows side by side, one per lane, four elements
//! of each at a time. A panel ([`super::q8::Panel`]) holds the same four
//! elements of each of its tokens. The kernel broadcasts a token's four elements
//! to all rows, so that every dot product of the tile with the panel grows in a
//! register of its own.

use std::mem::MaybeUninit;

use ds4_model::weights::MatrixView;

use super::{
    formats::{Format, GROUPS, SUPERBLOCK},
    q8::{Panel, panel},
    vector::Vector,
};

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
    /// Room for `words`, whose contents are left as they are.
    fn reserve(&mut self, words: usize) -> *mut u32 {
        let lines = words.div_ceil(16);
        if self.lines.len() < lines {
            self.lines.resize(lines, Line([0; 16]));
        }
        self.lines.as_mut_ptr().cast()
    }

    fn as_ptr(&self) -> *const u32 {
        self.lines.as_ptr().cast()
    }
}

/// Registers of a tile's group.
pub(super) const fn registers(mins: usize) -> usize {
    WORDS + 1 + mins
}

/// A superblock of each row of a tile; `LANES` is at most 16.
pub(super) type Rows = [*const u8; 16];

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

/// Unpacks up to [`Vector::LANES`] rows, all of `w`, to `tile`.
///
/// # Safety
/// Needs the instruction set of `V`; `w` is of format `F` with whole rows.
#[inline(always)]
pub(super) unsafe fn unpack<V: Vector, F: Format<V>>(w: MatrixView, tile: &mut Tile) {
    let row_bytes = w.row_bytes();
    let whole = row_bytes / F::BYTES;
    let superblocks = row_bytes.div_ceil(F::BYTES);
    let size = GROUPS * registers(F::MINS) * V::LANES;
    let tile = tile.reserve(superblocks * size);
    // A last superblock that rows only begin, filled up with zeros.
    let mut last;
    for b in 0..superblocks {
        // SAFETY: the caller has the instruction set; every superblock lies in
        // its row or in `last`, and the tile has room for all of them.
        unsafe {
            let mut rows = [w.bytes.as_ptr(); 16];
            for (i, row) in rows.iter_mut().enumerate() {
                // Lanes without a row repeat the last one.
                *row = row.add(i.min(w.rows - 1) * row_bytes + b * F::BYTES);
            }
            if b == whole {
                last = [[0u8; SUPERBLOCK * 2]; 16];
                for (row, last) in rows.iter_mut().zip(&mut last) {
                    let rest = row_bytes - b * F::BYTES;
                    row.copy_to_nonoverlapping(last.as_mut_ptr(), rest);
                    *row = last.as_ptr();
                }
            }
            F::unpack_tile(&rows, V::LANES * row_bytes, tile.add(b * size));
        }
    }
}

/// Unpacks one superblock of each row to `tile`: row by row to a scratch, which
/// is then transposed.
///
/// # Safety
/// Needs the instruction set of `V`; rows have [`Format::BYTES`] readable bytes,
/// the tile room for eight groups.
#[inline(always)]
pub(super) unsafe fn unpack_by_rows<V: Vector, F: Format<V> + ?Sized>(
    rows: &Rows,
    ahead: usize,
    tile: *mut u32,
) {
    let stride = registers(F::MINS) * V::LANES;
    // Left as they are, for zeroing takes as long as a third of the rest; what
    // is read has been written.
    let mut scratch = MaybeUninit::<Scratch>::uninit();
    // SAFETY: as the caller promises; `LANES` rows of the scratch are written
    // and read.
    unsafe {
        let quants = (&raw mut (*scratch.as_mut_ptr()).quants).cast::<[u8; SUPERBLOCK]>();
        let factors = (&raw mut (*scratch.as_mut_ptr()).factors).cast::<[f32; FACTORS]>();
        for lane in 0..V::LANES {
            prefetch::<V>(rows[lane], ahead, F::BYTES);
            let block = F::unpack(rows[lane]);
            for (i, &word) in block.quants.as_ref().iter().enumerate() {
                V::store_bytes(quants.add(lane).cast::<u8>().add(i * 4 * V::LANES), word);
            }
            // Scales and mins, and something to fill the last register.
            let parts = [block.scales, block.mins[0], block.mins[1], block.scales];
            for (i, part) in parts.into_iter().take(2 + F::MINS).enumerate() {
                V::store_groups(factors.add(lane).cast::<f32>().add(i * GROUPS), part);
            }
        }

        let mut targets = [tile; GROUPS * WORDS];
        for (i, target) in targets.iter_mut().enumerate() {
            let i = F::place(i);
            *target = tile.add(i / WORDS * stride + i % WORDS * V::LANES);
        }
        let rows = rows_of(quants.cast(), SUPERBLOCK);
        for (i, targets) in targets.chunks_exact(V::LANES).enumerate() {
            V::transpose(&rows, i * 4 * V::LANES, targets);
        }
        let used = GROUPS * (1 + F::MINS);
        let unused = (&raw mut (*scratch.as_mut_ptr()).unused).cast::<u32>();
        let mut targets = [unused; FACTORS];
        for (i, target) in targets[..used].iter_mut().enumerate() {
            *target = tile.add(i % GROUPS * stride + (WORDS + i / GROUPS) * V::LANES);
        }
        let rows = rows_of(factors.cast(), FACTORS * 4);
        for (i, targets) in targets.chunks_exact(V::LANES).enumerate() {
            if i * V::LANES < used {
                V::transpose(&rows, i * 4 * V::LANES, targets);
            }
        }
    }
}

/// Room for a superblock's scales and mins, in whole registers.
const FACTORS: usize = 4 * GROUPS;

/// Rows of `size` bytes from `start` on.
#[inline(always)]
fn rows_of(start: *const u8, size: usize) -> Rows {
    let mut rows = [start; 16];
    for (i, row) in rows.iter_mut().enumerate() {
        *row = start.wrapping_add(i * size);
    }
    rows
}

/// Where rows meet on their way to a tile.
#[repr(C, align(64))]
struct Scratch {
    quants: [[u8; SUPERBLOCK]; 16],
    factors: [[f32; FACTORS]; 16],
    /// For columns of no use.
    unused: [u32; 16],
}

/// Multiplies a tile with a panel of `T` tokens; the dot products of token `t`
/// with the tile's rows, [`Vector::LANES`] of them, go to `out + t·stride`.
///
/// # Safety
/// Needs the instruction set of `V`; `tile` was unpacked from format `F`,
/// `panel` is as long, and the outputs are writable.
#[inline(always)]
pub(super) unsafe fn multiply<V: Vector, F: Format<V>, const T: usize>(
    tile: &Tile,
    panel: &Panel,
    out: *mut f32,
    stride: usize,
) {
    let groups = panel.words.len() / (T * panel::STRIDE);
    // SAFETY: the caller has the instruction set; tile and panel hold `groups`
    // groups.
    unsafe {
        let mut sums = [V::splat(0.0); T];
        for g in 0..groups {
            let w = tile.as_ptr().add(g * registers(F::MINS) * V::LANES);
            let x = panel.words.as_ptr().add(g * T * panel::STRIDE);
            let part = |part: usize, t: usize| V::splat(*x.add(part * T + t).cast::<f32>());

            let mut dots = [V::splat_int(0); T];
            if F::BIAS != 0 {
                for (t, dot) in dots.iter_mut().enumerate() {
                    let sum = V::splat_bytes(x.add(panel::INTEGER_SUMS * T + t));
                    *dot = V::mul_int(sum, V::splat_int(F::BIAS));
                }
            }
            for i in 0..WORDS {
                let quants = V::load_bytes(w.add(i * V::LANES).cast());
                for (t, dot) in dots.iter_mut().enumerate() {
                    *dot = V::dot(F::WIDE, *dot, quants, V::splat_bytes(x.add(i * T + t)));
                }
            }
            let scale = V::load(w.add(WORDS * V::LANES).cast());
            for t in 0..T {
                let scale = V::mul(scale, part(panel::SCALES, t));
                sums[t] = V::fma(V::to_float(dots[t]), scale, sums[t]);
            }
            for i in 0..F::MINS {
                let min = V::load(w.add((WORDS + 1 + i) * V::LANES).cast());
                let sum = if F::MINS == 1 { panel::SUMS } else { panel::HALF_SUMS[i] };
                for t in 0..T {
                    sums[t] = V::fma(min, part(sum, t), sums[t]);
                }
            }
        }
        for (t, &sum) in sums.iter().enumerate() {
            V::store(out.add(t * stride), sum);
        }
    }
}
