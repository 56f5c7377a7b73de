//! Carries out a plan: rows of the source to rows of the output, on all cores, a few megabytes
//! at a time.

use std::{ops::ControlFlow, path::Path};

use rayon::prelude::*;

use crate::{
    error::{Error, Result},
    journal::Unfinished,
    plan::{Conversion, Plan, PlannedTensor},
    source::Stored,
};

/// Elements that are converted between two writes. Enough to keep many cores busy, and 64 MB of
/// f32 at most.
const BATCH: usize = 16 << 20;

/// How far a conversion is.
#[derive(Debug, Clone, Copy)]
pub struct Progress<'a> {
    /// The tensor at work.
    pub tensor: &'a str,
    /// Bytes of tensors that are in the output, those of an earlier run included.
    pub bytes: u64,
}

/// What a conversion did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outcome {
    /// Tensors that an earlier run had finished.
    pub resumed: usize,
    /// Elements that this run converted.
    pub elements: u64,
}

/// Converts to a file at `output`, which appears when it is complete and replaces one that is
/// there. If an earlier run of the same plan was stopped, this one goes on where that was.
///
/// `progress` is called often and stops the conversion by breaking.
///
/// # Errors
/// [`Error::Stopped`] if it was stopped, [`Error::Busy`] if another process is at it, or if values
/// cannot be converted or the file cannot be written.
pub fn convert(
    plan: &Plan,
    output: &Path,
    mut progress: impl FnMut(Progress<'_>) -> ControlFlow<()>,
) -> Result<Outcome> {
    let total = plan.tensors.len();
    let mut unfinished = Unfinished::open(output, &plan.layout, &plan.fingerprint, total)?;
    let resumed = unfinished.finished;
    let (done, rest) = plan.tensors.split_at(resumed);
    let mut bytes: u64 = done.iter().map(|tensor| tensor.bytes).sum();
    for (index, tensor) in plan.tensors.iter().enumerate().skip(resumed) {
        let mut hasher = blake3::Hasher::new();
        let mut at = plan.layout.tensor_range(index).start;
        let rows = Rows::new(plan, tensor);
        for start in (0..rows.count).step_by(rows.batch()) {
            if progress(Progress { tensor: &tensor.name, bytes }).is_break() {
                return Err(Error::Stopped { done: unfinished.finished, total });
            }
            let piece = rows.convert(start, rows.count.min(start + rows.batch()))?;
            hasher.update(&piece);
            unfinished.write(at, &piece)?;
            at += piece.len() as u64;
            bytes += piece.len() as u64;
        }
        unfinished.finish_tensor(&hasher.finalize())?;
    }
    unfinished.finish()?;
    Ok(Outcome { resumed, elements: rest.iter().map(PlannedTensor::elements).sum() })
}

/// The rows of one tensor, those of all experts in order.
struct Rows<'a> {
    plan: &'a Plan,
    tensor: &'a PlannedTensor,
    count: usize,
    cols: usize,
    /// Rows of one expert.
    per_expert: usize,
}

impl<'a> Rows<'a> {
    fn new(plan: &'a Plan, tensor: &'a PlannedTensor) -> Self {
        let count = tensor.dims[1..].iter().product::<u64>() as usize;
        let experts = tensor.dims.get(2).map_or(1, |&experts| experts as usize);
        Rows { plan, tensor, count, cols: tensor.dims[0] as usize, per_expert: count / experts }
    }

    fn batch(&self) -> usize {
        (BATCH / self.cols).max(1)
    }

    /// Rows `start` to `end` as bytes of the output.
    fn convert(&self, start: usize, end: usize) -> Result<Vec<u8>> {
        let row_bytes = self.tensor.bytes as usize / self.count;
        let mut out = vec![0; (end - start) * row_bytes];
        let rows = out.par_chunks_exact_mut(row_bytes).enumerate();
        rows.try_for_each_init(Vec::new, |values: &mut Vec<f32>, (i, out)| {
            self.convert_row(start + i, values, out)
        })?;
        Ok(out)
    }

    fn convert_row(&self, row: usize, values: &mut Vec<f32>, out: &mut [u8]) -> Result<()> {
        let parts = &self.tensor.input.parts;
        let rows_per_part = self.count / parts.len();
        let (part, r) = (&parts[row / rows_per_part], row % rows_per_part);
        let result = match self.tensor.conversion {
            Conversion::Copy => {
                out.copy_from_slice(part.row(r));
                Ok(())
            }
            Conversion::Repack => part.repack_row(r, out),
            Conversion::Table(experts) => return self.convert_ids(part, r, experts, out),
            Conversion::Quantize => {
                values.resize(self.cols, 0.0);
                part.decode_row(r, values).and_then(|()| {
                    let expert = row / self.per_expert;
                    let importance = self.plan.importance.as_ref();
                    let importance =
                        importance.and_then(|i| i.columns(&self.tensor.name, expert, self.cols));
                    gguf::quantize_row(self.tensor.ty, values, importance, out)
                })
            }
        };
        let tensor = || self.tensor.name.clone();
        result.map_err(|source| Error::Row { tensor: tensor(), row, source: Box::new(source) })
    }

    /// A token's experts, as i64 or i32, to i32.
    fn convert_ids(
        &self,
        part: &Stored,
        token: usize,
        experts: usize,
        out: &mut [u8],
    ) -> Result<()> {
        let bytes = part.row(token);
        let ids = bytes.chunks_exact(bytes.len() / self.cols);
        for (bytes, out) in ids.zip(out.as_chunks_mut::<4>().0) {
            let mut wide = [0; 8];
            wide[..bytes.len()].copy_from_slice(bytes);
            let expert = match bytes.len() {
                4 => i64::from(i32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])),
                _ => i64::from_le_bytes(wide),
            };
            if !(0..experts as i64).contains(&expert) {
                let (tensor, last) = (self.tensor.name.clone(), experts - 1);
                return Err(Error::ExpertId { tensor, token, expert, last });
            }
            *out = (expert as i32).to_le_bytes();
        }
        Ok(())
    }
}
