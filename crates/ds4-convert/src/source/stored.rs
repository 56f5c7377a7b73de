//! One stored matrix, in any of the ways in which checkpoints store them, row by row.

use std::{ops::Range, sync::Arc};

use gguf::{GgufFile, TensorType, dequantize_row, mxfp4_from_fp4};

use super::mapping::SafetensorsFile;

/// Rows and columns that share one scale of an FP8 matrix.
const FP8_BLOCK: usize = 128;
/// Values of a row that share one scale of an FP4 matrix.
const FP4_BLOCK: usize = 32;

/// A piece of a mapped file, kept alive by it.
#[derive(Clone)]
pub(crate) enum Bytes {
    Gguf(Arc<GgufFile>, Range<usize>),
    Safetensors(Arc<SafetensorsFile>, Range<usize>),
}

impl Bytes {
    pub(crate) fn get(&self) -> &[u8] {
        match self {
            Bytes::Gguf(file, range) => &file.bytes()[range.clone()],
            Bytes::Safetensors(file, range) => &file.bytes()[range.clone()],
        }
    }
}

/// How a matrix is stored. Lengths of data and scales were checked when it was found.
#[derive(Clone)]
pub(crate) enum Encoding {
    /// As in a GGUF file.
    Gguf(TensorType),
    /// E4M3, with a scale for each block of 128 rows and 128 columns.
    Fp8(Scales),
    /// E2M1, two to a byte, with a power of two for each 32 of a row.
    Fp4 { scales: Bytes },
    /// 64-bit integers, of tables.
    I64,
}

/// Scales of an FP8 matrix, `[rows/128, cols/128]` rounded up.
#[derive(Clone)]
pub(crate) struct Scales {
    pub(crate) data: Bytes,
    /// Powers of two in a byte each, otherwise f32.
    pub(crate) e8m0: bool,
}

/// A matrix `[rows, cols]`.
#[derive(Clone)]
pub(crate) struct Stored {
    pub(crate) encoding: Encoding,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) data: Bytes,
}

impl Stored {
    /// Bytes of row `r`.
    pub(crate) fn row(&self, r: usize) -> &[u8] {
        let data = self.data.get();
        let size = data.len() / self.rows;
        &data[r * size..(r + 1) * size]
    }

    /// Name of the way of storage.
    pub(crate) fn type_name(&self) -> &'static str {
        match self.encoding {
            Encoding::Gguf(ty) => ty.name(),
            Encoding::Fp8(_) => "FP8",
            Encoding::Fp4 { .. } => "FP4",
            Encoding::I64 => "I64",
        }
    }

    /// Row `r` as f32.
    pub(crate) fn decode_row(&self, r: usize, out: &mut [f32]) -> Result<(), gguf::Error> {
        match &self.encoding {
            Encoding::Gguf(ty) => dequantize_row(*ty, self.row(r), out),
            Encoding::Fp8(scales) => {
                let per_row = self.cols.div_ceil(FP8_BLOCK);
                let blocks = self.row(r).chunks(FP8_BLOCK).zip(out.chunks_mut(FP8_BLOCK));
                for (i, (bytes, out)) in blocks.enumerate() {
                    let scale = scales.get(r / FP8_BLOCK * per_row + i);
                    for (out, &byte) in out.iter_mut().zip(bytes) {
                        *out = scale * e4m3(byte);
                    }
                }
                Ok(())
            }
            Encoding::Fp4 { .. } => {
                let mut block = [0; TensorType::MXFP4.block_bytes()];
                let values = self.row(r).chunks(FP4_BLOCK / 2);
                let blocks = values.zip(self.fp4_scales(r)).zip(out.chunks_mut(FP4_BLOCK));
                for ((values, scale), out) in blocks {
                    mxfp4_from_fp4(values, std::slice::from_ref(scale), &mut block)?;
                    dequantize_row(TensorType::MXFP4, &block, out)?;
                }
                Ok(())
            }
            Encoding::I64 => Err(gguf::Error::Unreadable { ty: TensorType::I64 }),
        }
    }

    /// Row `r` as MXFP4, without loss.
    pub(crate) fn repack_row(&self, r: usize, out: &mut [u8]) -> Result<(), gguf::Error> {
        mxfp4_from_fp4(self.row(r), self.fp4_scales(r), out)
    }

    /// The scales of row `r` of an FP4 matrix.
    fn fp4_scales(&self, r: usize) -> &[u8] {
        let Encoding::Fp4 { scales } = &self.encoding else {
            return &[];
        };
        let per_row = self.cols / FP4_BLOCK;
        &scales.get()[r * per_row..(r + 1) * per_row]
    }
}

impl Scales {
    fn get(&self, index: usize) -> f32 {
        let data = self.data.get();
        match self.e8m0 {
            true => e8m0(data[index]),
            false => {
                let bytes = &data[4 * index..4 * index + 4];
                f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
            }
        }
    }
}

/// Shapes of an FP8 matrix's scales.
pub(super) fn fp8_scale_shape(rows: usize, cols: usize) -> Vec<usize> {
    vec![rows.div_ceil(FP8_BLOCK), cols.div_ceil(FP8_BLOCK)]
}

/// Shape of an FP4 matrix's scales; `None` if its rows are no whole number of blocks.
pub(super) fn fp4_scale_shape(rows: usize, cols: usize) -> Option<Vec<usize>> {
    cols.is_multiple_of(FP4_BLOCK).then(|| vec![rows, cols / FP4_BLOCK])
}

/// 2^(byte − 127); 255 is NaN.
fn e8m0(byte: u8) -> f32 {
    match byte {
        0 => f32::from_bits(0x0040_0000),
        255 => f32::NAN,
        _ => f32::from_bits(u32::from(byte) << 23),
    }
}

/// Sign, four bits of exponent with bias 7, three bits of fraction; no infinities, one NaN.
fn e4m3(byte: u8) -> f32 {
    let (exponent, fraction) = (byte >> 3 & 15, f32::from(byte & 7));
    let magnitude = match exponent {
        0 => fraction / 512.0,
        15 if byte & 7 == 7 => f32::NAN,
        _ => (1.0 + fraction / 8.0) * f32::from_bits((u32::from(exponent) + 120) << 23),
    };
    if byte & 0x80 == 0 { magnitude } else { -magnitude }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn e4m3_has_the_values_of_its_definition() {
        let known = [
            (0x00, 0.0),
            (0x01, 0.001953125),
            (0x07, 0.013671875),
            (0x08, 0.015625),
            (0x38, 1.0),
            (0x3c, 1.5),
            (0x7e, 448.0),
            (0xb8, -1.0),
            (0xfe, -448.0),
        ];
        for (byte, value) in known {
            assert_eq!(e4m3(byte), value, "{byte:#x}");
        }
        assert!(e4m3(0x7f).is_nan() && e4m3(0xff).is_nan());
        assert!((0..0x7e).all(|byte| e4m3(byte) < e4m3(byte + 1)), "not ascending");
    }

    #[test]
    fn e8m0_is_a_power_of_two() {
        assert_eq!(e8m0(127), 1.0);
        assert_eq!(e8m0(130), 8.0);
        assert_eq!(e8m0(1), 2f32.powi(-126));
        assert_eq!(e8m0(0), 2f32.powi(-127));
        assert!(e8m0(255).is_nan());
    }
}
