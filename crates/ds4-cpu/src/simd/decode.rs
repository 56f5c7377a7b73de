//! Decoding: a quantised matrix, read once in file order, times a few tokens.
//!
//! Lanes run along the row. Up to [`SHARED`] tokens share each unpacked
//! superblock; every token's sum has the same order whatever their number.

use ds4_model::weights::MatrixView;

use super::{
    formats::{Format, Unpacked},
    q8::{GROUPS, Q8Block, SUPERBLOCK},
    vector::Vector,
};

/// Tokens that share an unpacked superblock.
const SHARED: usize = 4;
/// How far ahead of the superblock being read to prefetch, in bytes.
const PREFETCH: usize = 2048;

/// Writes W·x of token `t` to `out + t·stride`, for every token.
///
/// # Safety
/// Needs the instruction set of `V`; `w` is of format `F` with whole rows,
/// tokens have as many superblocks as a row (the last one filled up), and the
/// outputs are writable.
#[inline(always)]
pub(super) unsafe fn multiply<V: Vector, F: Format<V>>(
    w: MatrixView,
    tokens: &[&[Q8Block]],
    out: *mut f32,
    stride: usize,
) {
    for r in 0..w.rows {
        let row = w.row(r);
        for (i, tokens) in tokens.chunks(SHARED).enumerate() {
            // SAFETY: as the caller promises.
            unsafe {
                let out = out.add(i * SHARED * stride + r);
                match tokens {
                    [a] => dots::<V, F, 1>(row, [a], out, stride),
                    [a, b] => dots::<V, F, 2>(row, [a, b], out, stride),
                    [a, b, c] => dots::<V, F, 3>(row, [a, b, c], out, stride),
                    [a, b, c, d] => dots::<V, F, 4>(row, [a, b, c, d], out, stride),
                    _ => unreachable!("chunks of at most {SHARED}"),
                }
            }
        }
    }
}

/// Dot products of one row with `T` tokens.
#[inline(always)]
unsafe fn dots<V: Vector, F: Format<V>, const T: usize>(
    row: &[u8],
    tokens: [&[Q8Block]; T],
    out: *mut f32,
    stride: usize,
) {
    // A last superblock that the row only begins: zeros add nothing.
    let whole = row.len() / F::BYTES;
    let rest = &row[whole * F::BYTES..];
    let mut last = [0; SUPERBLOCK * 2];
    last[..rest.len()].copy_from_slice(rest);

    // SAFETY: the caller has the instruction set, and whole superblocks lie
    // inside `row` or `last`.
    unsafe {
        let mut sums = Sums::<V, T> {
            lanes: [V::splat(0.0); T],
            groups: [V::load_groups([0.0; GROUPS].as_ptr()); T],
        };
        for b in 0..whole {
            let p = row.as_ptr().add(b * F::BYTES);
            for line in (0..F::BYTES).step_by(64) {
                V::prefetch(p.wrapping_add(PREFETCH + line));
            }
            sums.add::<F>(F::unpack(p), tokens.map(|token| token.as_ptr().add(b)));
        }
        if !rest.is_empty() {
            sums.add::<F>(F::unpack(last.as_ptr()), tokens.map(|token| token.as_ptr().add(whole)));
        }
        let factor = if F::BIAS == 0 { 1.0 } else { F::BIAS as f32 };
        for t in 0..T {
            *out.add(t * stride) = V::sum(sums.lanes[t]) + factor * V::sum_groups(sums.groups[t]);
        }
    }
}

/// Running sums of `T` dot products.
struct Sums<V: Vector, const T: usize> {
    lanes: [V::Float; T],
    /// Terms that come one per group: mins, and the removal of the bias.
    groups: [V::Groups; T],
}

impl<V: Vector, const T: usize> Sums<V, T> {
    #[inline(always)]
    unsafe fn add<F: Format<V>>(&mut self, w: Unpacked<V>, tokens: [*const Q8Block; T]) {
        // SAFETY: the caller has the instruction set, and valid blocks.
        unsafe {
            for t in 0..T {
                let x = &*tokens[t];
                let scales = V::mul_groups(w.scales, V::load_groups(x.scales.as_ptr()));
                self.lanes[t] = F::add_dots(&w.quants, x, scales, self.lanes[t]);
                // (weight, −d·Σq) pairs: the mins', or the bias's.
                let terms = match F::MINS {
                    0 if F::BIAS == 0 => continue,
                    0 => [(w.scales, &x.sums); 2],
                    1 => [(w.mins[0], &x.sums); 2],
                    _ => [(w.mins[0], &x.half_sums[0]), (w.mins[1], &x.half_sums[1])],
                };
                for (weight, sums) in terms.into_iter().take(F::MINS.max(1)) {
                    let sums = V::load_groups(sums.as_ptr());
                    self.groups[t] = V::fma_groups(weight, sums, self.groups[t]);
                }
            }
        }
    }
}
