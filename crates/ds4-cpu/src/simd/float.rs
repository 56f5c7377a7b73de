//! Float matrices times f32 activations.
//!
//! Lanes run along the row, in blocks of a few rows and tokens: enough
//! independent sums to keep the multipliers busy, and each element loaded is
//! used by the whole block. Decoding and prefill share this kernel; a sum has
//! the same order in blocks of any size.

use super::{formats::FloatFormat, vector::Vector};

/// Rows of a float matrix.
#[derive(Clone, Copy)]
pub(super) struct FloatRows {
    /// The first row.
    pub data: *const u8,
    /// Rows.
    pub count: usize,
    /// From one row to the next.
    pub row_bytes: usize,
    /// Elements of a row.
    pub cols: usize,
}

/// Writes row `r` times token `t` to `out + t·stride + r`, for all rows and
/// tokens, in blocks of `R` rows and `T` tokens.
///
/// # Safety
/// Needs the instruction set of `V`; rows of format `F` and tokens are readable
/// over `cols`, outputs writable.
#[inline(always)]
pub(super) unsafe fn multiply<V: Vector, F: FloatFormat<V>, const R: usize, const T: usize>(
    w: FloatRows,
    tokens: &[*const f32],
    out: *mut f32,
    stride: usize,
) {
    let (token_blocks, token_rest) = tokens.as_chunks::<T>();
    let (row_blocks, row_rest) = (w.count / R, w.count % R);
    // SAFETY: as the caller promises, for each block.
    unsafe {
        let rows_of =
            |x: &[*const f32]| out.add((x.as_ptr().offset_from(tokens.as_ptr())) as usize * stride);
        for x in token_blocks {
            let out = rows_of(x);
            for r in 0..row_blocks {
                block::<V, F, R, T>(w, r * R, x, out, stride);
            }
            for r in 0..row_rest {
                block::<V, F, 1, T>(w, row_blocks * R + r, x, out, stride);
            }
        }
        for x in token_rest {
            let x = std::array::from_ref(x);
            let out = rows_of(x);
            for r in 0..row_blocks {
                block::<V, F, R, 1>(w, r * R, x, out, stride);
            }
            for r in 0..row_rest {
                block::<V, F, 1, 1>(w, row_blocks * R + r, x, out, stride);
            }
        }
    }
}

/// Rows `first..first + R` times `T` tokens.
#[inline(always)]
unsafe fn block<V: Vector, F: FloatFormat<V>, const R: usize, const T: usize>(
    w: FloatRows,
    first: usize,
    tokens: &[*const f32; T],
    out: *mut f32,
    stride: usize,
) {
    // SAFETY: the caller has the instruction set and valid rows; what is left
    // of a row is copied to where a whole register can be read.
    unsafe {
        let mut rows = [w.data; R];
        for (r, row) in rows.iter_mut().enumerate() {
            *row = w.data.add((first + r) * w.row_bytes);
        }
        let mut sums = [[V::splat(0.0); T]; R];
        let whole = w.cols / V::LANES * V::LANES;
        let mut k = 0;
        while k < whole {
            let mut x = [V::splat(0.0); T];
            for t in 0..T {
                x[t] = V::load(tokens[t].add(k));
            }
            for r in 0..R {
                let row = F::load(rows[r].add(k * F::BYTES));
                for t in 0..T {
                    sums[r][t] = V::fma(row, x[t], sums[r][t]);
                }
            }
            k += V::LANES;
        }
        if whole < w.cols {
            add_rest::<V, F, R, T>(&rows, tokens, whole, w.cols - whole, &mut sums);
        }
        for (r, sums) in sums.iter().enumerate() {
            for (t, &sum) in sums.iter().enumerate() {
                *out.add(t * stride + first + r) = V::sum(sum);
            }
        }
    }
}

/// Adds the products of the last `count` elements, fewer than a register.
#[inline(always)]
unsafe fn add_rest<V: Vector, F: FloatFormat<V>, const R: usize, const T: usize>(
    rows: &[*const u8; R],
    tokens: &[*const f32; T],
    start: usize,
    count: usize,
    sums: &mut [[V::Float; T]; R],
) {
    // SAFETY: as the caller promises; `LANES` is at most 16.
    unsafe {
        for r in 0..R {
            let mut row = [0u8; 64];
            let bytes = rows[r].add(start * F::BYTES);
            bytes.copy_to_nonoverlapping(row.as_mut_ptr(), count * F::BYTES);
            let row = F::load(row.as_ptr());
            for t in 0..T {
                let mut x = [0f32; 16];
                tokens[t].add(start).copy_to_nonoverlapping(x.as_mut_ptr(), count);
                sums[r][t] = V::fma(row, V::load(x.as_ptr()), sums[r][t]);
            }
        }
    }
}
