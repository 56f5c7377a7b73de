//! Prefill: tiles of quantised rows, each unpacked once and multiplied with all
//! tokens.
//!
//! A tile ([`Tile`]) holds [`Vector::LANES`] rows side by side, one per lane, four
//! elements of each at a time. A panel ([`Panel`]) holds the same four elements
//! of each of its tokens. The kernel broadcasts a token's four elements
//! to all rows, so that every dot product of the tile with the panel grows in a
//! register of its own.

use ds4_model::weights::MatrixView;

use super::{
    formats::Format,
    q8::{GROUPS, Panel, SUPERBLOCK, panel},
    tile::{Tile, WORDS, registers},
    vector::Vector,
};

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
