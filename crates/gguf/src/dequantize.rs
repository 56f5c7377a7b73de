//! Block formats to f32, one row at a time (docs/gguf.md, "Block formats").
//!
//! These are the definition of each format: kernels are checked against them.
//! Blocks are packed, so nothing in a block is assumed to be aligned.

use half::{bf16, f16};

use crate::{Error, IQ2_SIGNS, IQ2_XXS_GRID, TensorType};

/// Converts one row: `bytes` of type `ty` to the elements of `out`.
///
/// # Errors
/// [`Error::Unreadable`] if the type cannot be dequantised, [`Error::RowSize`]
/// if `bytes` are not those of a row of `out.len()` elements.
pub fn dequantize_row(ty: TensorType, bytes: &[u8], out: &mut [f32]) -> Result<(), Error> {
    if !ty.is_readable() {
        return Err(Error::Unreadable { ty });
    }
    if ty.row_bytes(out.len()) != Some(bytes.len()) {
        return Err(Error::RowSize { ty, cols: out.len(), found: bytes.len() });
    }
    match ty {
        TensorType::F32 => each_block(bytes, out, |block, [y]| *y = f32::from_le_bytes(*block)),
        TensorType::F16 => each_block(bytes, out, |block, [y]| *y = f16_at::<2>(block, 0)),
        TensorType::BF16 => {
            each_block(bytes, out, |block, [y]| *y = bf16::from_le_bytes(*block).to_f32());
        }
        TensorType::Q8_0 => each_block(bytes, out, q8_0),
        TensorType::Q2_K => each_block(bytes, out, q2_k),
        TensorType::Q4_K => each_block(bytes, out, q4_k),
        TensorType::IQ2_XXS => each_block(bytes, out, iq2_xxs),
        TensorType::MXFP4 => each_block(bytes, out, mxfp4),
        _ => return Err(Error::Unreadable { ty }),
    }
    Ok(())
}

/// Calls `convert` for each block of `B` bytes and its `N` elements.
fn each_block<const B: usize, const N: usize>(
    bytes: &[u8],
    out: &mut [f32],
    convert: impl Fn(&[u8; B], &mut [f32; N]),
) {
    for (block, y) in bytes.as_chunks().0.iter().zip(out.as_chunks_mut().0) {
        convert(block, y);
    }
}

fn f16_at<const B: usize>(block: &[u8; B], offset: usize) -> f32 {
    f16::from_le_bytes([block[offset], block[offset + 1]]).to_f32()
}

/// f16 scale; 32 signed bytes. y = d·q.
fn q8_0(block: &[u8; 34], y: &mut [f32; 32]) {
    let d = f16_at(block, 0);
    for (y, &q) in y.iter_mut().zip(&block[2..]) {
        *y = d * f32::from(q as i8);
    }
}

/// 16 bytes of 4-bit scale and minimum, one per 16 elements; 64 bytes of 2-bit
/// levels; f16 d and dmin. y = (d·scale)·q − dmin·min.
fn q2_k(block: &[u8; 84], y: &mut [f32; 256]) {
    let (scales, levels) = (&block[..16], &block[16..80]);
    let (d, dmin) = (f16_at(block, 80), f16_at(block, 82));
    for (group, y) in y.chunks_exact_mut(16).enumerate() {
        let scale = d * f32::from(scales[group] & 15);
        let min = dmin * f32::from(scales[group] >> 4);
        // 128 elements share 32 bytes: each run of 32 has two bits of every byte.
        let (half, run, start) = (group / 8, group / 2 % 4, group % 2 * 16);
        for (y, &byte) in y.iter_mut().zip(&levels[32 * half + start..]) {
            *y = scale * f32::from(byte >> (2 * run) & 3) - min;
        }
    }
}

/// f16 d and dmin; 12 bytes of 6-bit scale and minimum, one per 32 elements;
/// 128 bytes of 4-bit levels. y = (d·scale)·q − dmin·min.
fn q4_k(block: &[u8; 144], y: &mut [f32; 256]) {
    let (d, dmin) = (f16_at(block, 0), f16_at(block, 2));
    let (packed, levels) = (&block[4..16], &block[16..]);
    for (group, y) in y.chunks_exact_mut(32).enumerate() {
        let (scale, min) = q4_k_scale_min(packed, group);
        let (scale, min) = (d * f32::from(scale), dmin * f32::from(min));
        // Two groups share 32 bytes: the even one has the low nibbles.
        let (start, shift) = (group / 2 * 32, group % 2 * 4);
        for (y, &byte) in y.iter_mut().zip(&levels[start..]) {
            *y = scale * f32::from(byte >> shift & 15) - min;
        }
    }
}

/// The 6-bit scale and minimum of group `j` of eight. The first four groups
/// have theirs in the low bits of bytes 0–3 and 4–7; the last four have low
/// nibbles in bytes 8–11 and the top bits of the others.
fn q4_k_scale_min(packed: &[u8], j: usize) -> (u8, u8) {
    if j < 4 {
        return (packed[j] & 63, packed[j + 4] & 63);
    }
    let scale = packed[j + 4] & 15 | packed[j - 4] >> 6 << 4;
    let min = packed[j + 4] >> 4 | packed[j] >> 6 << 4;
    (scale, min)
}

/// f16 d; for each 32 elements four grid indices (one per 8 elements), four
/// 7-bit sign codes and a 4-bit scale. y = d·(½ + scale)/4·grid·sign.
fn iq2_xxs(block: &[u8; 66], y: &mut [f32; 256]) {
    let d = f16_at(block, 0);
    for (group, y) in block[2..].as_chunks::<8>().0.iter().zip(y.chunks_exact_mut(32)) {
        let [i0, i1, i2, i3, codes @ ..] = *group;
        let codes = u32::from_le_bytes(codes);
        let scale = d * (0.5 + (codes >> 28) as f32) * 0.25;
        for (l, (index, y)) in [i0, i1, i2, i3].into_iter().zip(y.chunks_exact_mut(8)).enumerate() {
            let grid = IQ2_XXS_GRID[usize::from(index)].to_le_bytes();
            let signs = IQ2_SIGNS[(codes >> (7 * l) & 127) as usize];
            for (i, (y, magnitude)) in y.iter_mut().zip(grid).enumerate() {
                let value = scale * f32::from(magnitude);
                *y = if signs >> i & 1 == 1 { -value } else { value };
            }
        }
    }
}

/// Exponent byte; 16 bytes of 4-bit values, elements 0–15 in the low nibbles.
/// y = value·2^(exponent − 128).
fn mxfp4(block: &[u8; 17], y: &mut [f32; 32]) {
    let [exponent, nibbles @ ..] = block;
    let scale = mxfp4_scale(*exponent);
    let (low, high) = y.split_at_mut(16);
    for ((low, high), &byte) in low.iter_mut().zip(high).zip(nibbles) {
        *low = MXFP4_VALUES[usize::from(byte & 15)] * scale;
        *high = MXFP4_VALUES[usize::from(byte >> 4)] * scale;
    }
}

/// Twice the values of E2M1, so that all are whole.
const MXFP4_VALUES: [f32; 16] =
    [0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, -0.0, -1.0, -2.0, -3.0, -4.0, -6.0, -8.0, -12.0];

/// 2^(exponent − 128). The two smallest are subnormal in f32.
fn mxfp4_scale(exponent: u8) -> f32 {
    let exponent = u32::from(exponent);
    f32::from_bits(if exponent < 2 { 0x0020_0000 << exponent } else { (exponent - 1) << 23 })
}
