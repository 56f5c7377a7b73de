//! f32 to block formats, one row at a time.
//!
//! Every quantiser minimises the squared error of what `dequantize_row` will
//! give back, weighted by the importance of each column. Formats with few
//! levels search for it; docs/gguf.md, "Quantisers", has the methods and the
//! figures. Results are the same on every machine: sums are made in a fixed
//! order and nothing is fused, whatever vector instructions run it.

mod fit;
mod iq2_xxs;
mod k_quants;
mod plain;
#[cfg(test)]
mod tests;
mod vectors;

use crate::{Error, TensorType};

pub use plain::mxfp4_from_fp4;

/// Converts one row of f32 to type `ty`, into `out`.
///
/// `importance` has one weight per element: how much an error there matters,
/// such as the mean square of the inputs that meet this column. Without it
/// all elements matter equally, as in a block whose weights are all zero.
///
/// Values out of the format's range become its largest.
///
/// # Errors
/// [`Error::Unreadable`] if the type cannot be written, [`Error::RowSize`] if
/// `out` is not the size of a row, [`Error::ImportanceSize`] if there is not
/// one weight per element, [`Error::NonFinite`] or [`Error::BadImportance`]
/// for a value that is not a finite number, or a weight that is negative.
pub fn quantize_row(
    ty: TensorType,
    x: &[f32],
    importance: Option<&[f32]>,
    out: &mut [u8],
) -> Result<(), Error> {
    if !ty.is_readable() {
        return Err(Error::Unreadable { ty });
    }
    if ty.row_bytes(x.len()) != Some(out.len()) {
        return Err(Error::RowSize { ty, cols: x.len(), found: out.len() });
    }
    check_values(x, importance)?;
    match ty {
        TensorType::F32 => each_block(x, importance, out, plain::f32),
        TensorType::F16 => each_block(x, importance, out, plain::f16),
        TensorType::BF16 => each_block(x, importance, out, plain::bf16),
        TensorType::Q8_0 => each_block(x, importance, out, plain::q8_0),
        TensorType::MXFP4 => each_block(x, importance, out, plain::mxfp4),
        TensorType::Q2_K => each_block(x, importance, out, vectors::q2_k),
        TensorType::Q4_K => each_block(x, importance, out, vectors::q4_k),
        TensorType::IQ2_XXS => each_block(x, importance, out, vectors::iq2_xxs),
        _ => return Err(Error::Unreadable { ty }),
    }
    Ok(())
}

fn check_values(x: &[f32], importance: Option<&[f32]>) -> Result<(), Error> {
    if let Some(column) = x.iter().position(|v| !v.is_finite()) {
        return Err(Error::NonFinite { column, value: x[column] });
    }
    let Some(importance) = importance else {
        return Ok(());
    };
    if importance.len() != x.len() {
        return Err(Error::ImportanceSize { found: importance.len(), expected: x.len() });
    }
    match importance.iter().position(|v| !v.is_finite() || *v < 0.0) {
        Some(column) => Err(Error::BadImportance { column, value: importance[column] }),
        None => Ok(()),
    }
}

/// Calls `convert` for each block of `N` elements, their importance (scaled so
/// that the largest is 1) and the block's `B` bytes.
fn each_block<const N: usize, const B: usize>(
    x: &[f32],
    importance: Option<&[f32]>,
    out: &mut [u8],
    convert: impl Fn(&[f32; N], &[f32; N], &mut [u8; B]),
) {
    let blocks = x.as_chunks().0.iter().zip(out.as_chunks_mut().0);
    for (index, (x, out)) in blocks.enumerate() {
        let weights = match importance {
            Some(importance) => block_importance(&importance[index * N..]),
            None => [1.0; N],
        };
        convert(x, &weights, out);
    }
}

/// The first `N` weights over the largest of them; ones if all are zero. None
/// gets so small that it leaves the fit without anything to go by.
fn block_importance<const N: usize>(importance: &[f32]) -> [f32; N] {
    const LEAST: f32 = 1e-6;
    let mut weights = [1.0; N];
    let largest = importance[..N].iter().copied().fold(0.0, f32::max);
    if largest > 0.0 {
        for (weight, &importance) in weights.iter_mut().zip(importance) {
            *weight = (importance / largest).max(LEAST);
        }
    }
    weights
}
