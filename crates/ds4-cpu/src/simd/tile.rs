//! Prefill: tiles of quantised rows, each unpacked once and multiplied with all
//! tokens.
//!
//! A tile holds [`Vector::LANES`] rows side by side, one per lane, four elements
//! of each at a time. A panel ([`super::q8::Panel`]) holds the same four
//! elements of each of its tokens. The kernel broadcasts a token's four elements
//! to all rows, so that every dot product of the tile with the panel grows in a
//! register of its own.

use ds4_model::weights::MatrixView;

use super::{
    formats::{Format, GROUPS, SUPERBLOCK},
    q8::{Panel, panel},
    vector::Vector,
};

/// Quant words of a group, of each row.
const WORDS: usize = 8;

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
const fn registers(mins: usize) -> usize {
    WORDS + 1 + mins
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
    let stride = registers(F::MINS) * V::LANES;
    let tile = tile.reserve(superblocks * GROUPS * stride);
    // Scratch, row by row, and where columns of no use go; `LANES` is at most 16.
    let mut quants = Aligned([[0; SUPERBLOCK]; 16]);
    let mut factors = Aligned([[0.0; FACTORS]; 16]);
    let mut unused = Aligned([0; 16]);
    let mut last = [0u8; SUPERBLOCK * 2];

    for b in 0..superblocks {
        // SAFETY: the caller has the instruction set; every superblock lies in
        // its row or in `last`, and the tile has room for all of them.
        unsafe {
            for lane in 0..V::LANES {
                // Lanes without a row repeat the last one.
                let p = w.bytes.as_ptr().add(lane.min(w.rows - 1) * row_bytes + b * F::BYTES);
                // The tile that is likely to follow.
                for line in (0..F::BYTES).step_by(64) {
                    V::prefetch(p.wrapping_add(V::LANES * row_bytes + line));
                }
                let block = if b < whole {
                    F::unpack(p)
                } else {
                    p.copy_to_nonoverlapping(last.as_mut_ptr(), row_bytes - b * F::BYTES);
                    F::unpack(last.as_ptr())
                };
                for (i, &word) in block.quants.as_ref().iter().enumerate() {
                    V::store_bytes(quants.0[lane].as_mut_ptr().add(i * 4 * V::LANES), word);
                }
                let factors = factors.0[lane].as_mut_ptr();
                V::store_groups(factors, block.scales);
                for i in 0..F::MINS {
                    V::store_groups(factors.add((1 + i) * GROUPS), block.mins[i]);
                }
            }

            let tile = tile.add(b * GROUPS * stride);
            let mut targets = [tile; GROUPS * WORDS];
            for (i, target) in targets.iter_mut().enumerate() {
                let i = F::place(i);
                *target = tile.add(i / WORDS * stride + i % WORDS * V::LANES);
            }
            for (i, targets) in targets.chunks_exact(V::LANES).enumerate() {
                let source = quants.0.as_ptr().cast::<u8>().add(i * 4 * V::LANES);
                V::transpose(source, SUPERBLOCK, targets);
            }
            let used = GROUPS * (1 + F::MINS);
            let mut targets = [unused.0.as_mut_ptr(); FACTORS];
            for (i, target) in targets[..used].iter_mut().enumerate() {
                *target = tile.add(i % GROUPS * stride + (WORDS + i / GROUPS) * V::LANES);
            }
            for (i, targets) in targets.chunks_exact(V::LANES).enumerate() {
                if i * V::LANES < used {
                    let source = factors.0.as_ptr().cast::<u8>().add(i * 4 * V::LANES);
                    V::transpose(source, FACTORS * 4, targets);
                }
            }
        }
    }
}

/// Room for a superblock's scales and mins, in whole registers.
const FACTORS: usize = 4 * GROUPS;

#[repr(C, align(64))]
struct Aligned<T>(T);

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
