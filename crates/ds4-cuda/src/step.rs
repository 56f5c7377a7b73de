//! The rows of a step, as kernels see them.

use ds4_engine::backend::{Batch, StageResult};

use crate::{
    device::{Buffer, Device, Pinned},
    params,
};

/// Arrays that describe the rows: token, position, session, and position and row of the first token
/// of the row's span.
const ARRAYS: usize = 5;

/// The rows of a step on the device: arrays of `rows` entries each, one after the other.
#[derive(Clone, Copy)]
pub(crate) struct StepRows<'a> {
    pub table: &'a Buffer<u32>,
    pub rows: usize,
}

impl StepRows<'_> {
    /// What kernels read of rows up to `end`.
    ///
    /// # Panics
    /// If there are fewer.
    pub fn params(&self, end: usize) -> params::Step {
        assert!(end <= self.rows, "rows up to {end} of a step of {}", self.rows);
        let array = |i: usize| self.table.range(i * self.rows, self.rows);
        params::Step {
            token: array(0),
            position: array(1),
            session: array(2),
            span_position: array(3),
            span_row: array(4),
        }
    }
}

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

    /// The rows.
    pub fn rows(&self) -> StepRows<'_> {
        StepRows { table: &self.device, rows: self.rows }
    }

    /// A flag, an element of a buffer: whether some row of the step sees more compressed rows than
    /// the indexer keeps.
    pub fn crowded(&self) -> (&Buffer<u32>, usize) {
        (&self.device, ARRAYS * self.rows)
    }

    /// Fills the table.
    pub fn fill(&mut self, batch: &Batch, crowded: bool) -> StageResult {
        let rows = self.rows;
        let table = self.host.as_mut_slice()?;
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
        Ok(())
    }

    /// Brings the table to the device.
    pub fn upload(&mut self, device: &Device) -> StageResult {
        let len = ARRAYS * self.rows + 1;
        device.upload_pinned(&mut self.device, 0, &mut self.host, len)
    }
}
