//! Token embeddings, by the kernel in kernels/embed.cu.

#![allow(unsafe_code, reason = "launches kernels")]

use ds4_engine::backend::StageResult;

use crate::{
    constants::{EMBED_THREADS, STREAMS},
    device::{Buffer, Device, Grid},
    params::{EMBED, EmbedParams},
    step::StepRows,
    weights::DeviceMatrix,
};

/// Copies the embeddings of `rows` tokens to their streams `[n, 4, hidden]`.
///
/// # Panics
/// If a buffer has no room for the rows.
pub fn embed(
    device: &Device,
    step: StepRows<'_>,
    rows: usize,
    table: &DeviceMatrix,
    iq2_grid: &Buffer<[u16; 8]>,
    streams: &Buffer<f32>,
) -> StageResult {
    let hidden = table.cols;
    let params = EmbedParams {
        step: step.params(rows),
        table: table.packed(),
        streams: streams.first(rows * STREAMS * hidden),
        iq2_grid: iq2_grid.pointer(),
        ty: table.ty as i32,
        hidden: hidden as i32,
    };
    let grid = Grid { blocks: [rows, 1, 1], threads: EMBED_THREADS, shared: 0 };
    // SAFETY: the buffers have so many rows, and the engine takes no token that the table lacks.
    unsafe { device.launch(EMBED, grid, &params) }
}
