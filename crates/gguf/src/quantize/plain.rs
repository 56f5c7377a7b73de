//! Formats without a search, or with next to none: floats, Q8_0, MXFP4.

use super::fit::{argmin, storable};
use crate::Error;

pub(super) fn f32(x: &[f32; 1], _: &[f32; 1], out: &mut [u8; 4]) {
    *out = x[0].to_le_bytes();
}

pub(super) fn f16(x: &[f32; 1], _: &[f32; 1], out: &mut [u8; 2]) {
    *out = storable(x[0]).to_le_bytes();
}

pub(super) fn bf16(x: &[f32; 1], _: &[f32; 1], out: &mut [u8; 2]) {
    let rounded = half::bf16::from_f32(x[0]);
    let largest = half::bf16::MAX.to_f32().copysign(x[0]);
    *out = if rounded.is_finite() { rounded } else { half::bf16::from_f32(largest) }.to_le_bytes();
}

/// The largest element becomes ±127. Elements are divided by the scale as it
/// is stored, so that its rounding does not add to theirs.
pub(super) fn q8_0(x: &[f32; 32], _: &[f32; 32], out: &mut [u8; 34]) {
    let largest = x.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
    let d = storable(largest / 127.0);
    let scale = d.to_f32();
    out[..2].copy_from_slice(&d.to_le_bytes());
    for (out, x) in out[2..].iter_mut().zip(x) {
        let q = if scale > 0.0 { (x / scale).round_ties_even().clamp(-127.0, 127.0) } else { 0.0 };
        *out = (q as i8) as u8;
    }
}

/// Largest exponent whose every value is a finite f32.
const MXFP4_LARGEST: i32 = 252;

/// The nearest values at the exponent that leaves the least weighted error:
/// the one that suits the largest element, or one above or below.
pub(super) fn mxfp4(x: &[f32; 32], importance: &[f32; 32], out: &mut [u8; 17]) {
    let largest = x.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
    // E2M1 reaches 6, so the scale is about a quarter of the largest element.
    let exponent = (largest.to_bits() >> 23) as i32 - 2;
    let candidates = [0, 1, -1].map(|step| (exponent + step).clamp(0, MXFP4_LARGEST) as u8);
    let errors = candidates.map(|exponent| mxfp4_error(x, importance, exponent));
    let exponent = candidates[argmin(&errors)];
    let scale = mxfp4_scale(exponent);
    out[0] = exponent;
    for (i, out) in out[1..].iter_mut().enumerate() {
        *out = nearest_e2m1(x[i], scale) | nearest_e2m1(x[i + 16], scale) << 4;
    }
}

/// Weighted squared error of the nearest values, at one exponent.
fn mxfp4_error(x: &[f32; 32], importance: &[f32; 32], exponent: u8) -> f64 {
    let scale = mxfp4_scale(exponent);
    let squares = x.iter().zip(importance).map(|(&x, &w)| {
        let code = nearest_e2m1(x.abs(), scale);
        let difference = f64::from(x.abs()) - scale * E2M1[usize::from(code)];
        f64::from(w) * difference * difference
    });
    squares.sum()
}

fn mxfp4_scale(exponent: u8) -> f64 {
    2f64.powi(i32::from(exponent) - 127)
}

/// Repacks 32 official FP4 values per scale byte as MXFP4, without loss:
/// `values` holds two per byte, the earlier in the low nibble, and `scales` one
/// E8M0 exponent for each 32 of them.
///
/// # Errors
/// [`Error::Fp4Size`] if the lengths do not belong together,
/// [`Error::Fp4Scale`] for a scale that is not a number.
pub fn mxfp4_from_fp4(values: &[u8], scales: &[u8], out: &mut [u8]) -> Result<(), Error> {
    let (blocks, rest) = values.as_chunks::<16>();
    let (out_blocks, out_rest) = out.as_chunks_mut::<17>();
    let sizes_fit = rest.is_empty() && out_rest.is_empty();
    if !sizes_fit || blocks.len() != scales.len() || blocks.len() != out_blocks.len() {
        let (values, scales, out) = (values.len(), scales.len(), out.len());
        return Err(Error::Fp4Size { values, scales, out });
    }
    if let Some(block) = scales.iter().position(|&scale| scale == 255) {
        return Err(Error::Fp4Scale { block });
    }
    for ((values, &scale), out) in blocks.iter().zip(scales).zip(out_blocks) {
        let nibble = |i: usize| values[i / 2] >> (4 * (i % 2)) & 15;
        out[0] = scale;
        for (i, out) in out[1..].iter_mut().enumerate() {
            *out = nibble(i) | nibble(i + 16) << 4;
        }
    }
    Ok(())
}

/// Magnitudes of E2M1 by their three bits.
const E2M1: [f64; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];

/// The code of the E2M1 value nearest to `x` over `scale`.
fn nearest_e2m1(x: f32, scale: f64) -> u8 {
    const MIDDLES: [f64; 7] = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0];
    let magnitude = f64::from(x.abs()) / scale;
    let code = MIDDLES.iter().filter(|middle| magnitude > **middle).count() as u8;
    if x < 0.0 { code | 8 } else { code }
}
