//! The rows of a step, as kernels see them.

use ds4_engine::backend::{Batch, StageResult};

use crate::arguments::Arg;
use crate::device::{Buffer, Device, Pinned, Pointer};

/// Addresses of the arrays that describe the rows; mirrors `Step` in kernels/common.cuh.
#[derive(Debug, Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub(crate) struct StepPointers {
    pub token: Pointer,
    pub position: Pointer,
    pub session: Pointer,
    pub span_position: Pointer,
    pub span_row: Pointer,
}

impl From<StepPointers> for Arg {
    fn from(step: StepPointers) -> Arg {
        Arg::value(step)
    }
}

/// Arrays of a [`StepPointers`].
const ARRAYS: usize = 5;

/// The arrays, on both sides.
pub(crate) struct StepTable {
    rows: usize,
    host: Pinned<u32>,
    device: Buffer<u32>,
}

impl StepTable {
    /// A table for at most `rows` rows.
    pub fn new(device: &Device, rows: usize) -> StageResult<Self> {
        Ok(StepTable {
            rows,
            host: device.pinned(ARRAYS * rows + 1)?,
            device: device.alloc(ARRAYS * rows + 1)?,
        })
    }

    pub fn pointers(&self) -> StepPointers {
        let array = |i: usize| self.device.at(i * self.rows);
        StepPointers {
            token: array(0),
            position: array(1),
            session: array(2),
            span_position: array(3),
            span_row: array(4),
        }
    }

    /// A flag: whether some row of the step sees more compressed rows than the indexer keeps.
    pub fn crowded(&self) -> Pointer {
        self.device.at(ARRAYS * self.rows)
    }

    /// Fills the table; no copy of it may be under way.
    pub fn fill(&mut self, batch: &Batch, crowded: bool) {
        let rows = self.rows;
        let table = self.host.as_mut_slice();
        table[ARRAYS * rows] = u32::from(crowded);
        table[..batch.tokens.len()].copy_from_slice(&batch.tokens);
        for span in &batch.spans {
            for (i, row) in span.rows.clone().enumerate() {
                table[rows + row] = (span.start + i) as u32;
                table[2 * rows + row] = span.session as u32;
                table[3 * rows + row] = span.start as u32;
                table[4 * rows + row] = span.rows.start as u32;
            }
        }
    }

    /// Brings the table to the device.
    pub fn upload(&mut self, device: &Device) -> StageResult {
        let len = ARRAYS * self.rows + 1;
        device.upload_pinned(&mut self.device, 0, &self.host, len)
    }
}
