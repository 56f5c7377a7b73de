//! Reading and writing the residual streams (docs/model.md, "Hyper-connections").

use std::ops::Range;

use ds4_engine::backend::StageResult;
use ds4_model::config::{Config, STREAMS};

use crate::{
    arguments::{Arg, args},
    device::{Buffer, Device, Pointer},
    scratch::Scratch,
    weights::HyperConnection,
};

#[cfg(test)]
mod tests;

/// Columns of a slice, and dot products kept of each.
const SLICE: usize = 64;
const SUMS: usize = 32;
/// Rows from which on a block handles several, to read the function's weights less often.
const MANY_ROWS: usize = 64;
/// Rows and threads of a block that does everything for its rows.
const FUSED_ROWS: usize = 8;
const FUSED_THREADS: usize = 256;
const ROWS_PER_BLOCK: usize = 16;

/// Mirrors `MixFunction` in kernels/hyper_connection.cu.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct MixFunction {
    weights: Pointer,
    halves: i32,
    outputs: i32,
}

/// Mirrors `MixConstants` in kernels/hyper_connection.cu.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct MixConstants {
    base: Pointer,
    scale: Pointer,
    hc_epsilon: f32,
    rms_epsilon: f32,
    sinkhorn_iterations: i32,
    padding: i32,
}

/// Dot products kept for one row.
pub fn sums_len(hidden: usize) -> usize {
    hidden / SLICE * SUMS
}

/// The sublayer before, whose output is not in the streams yet.
#[derive(Clone, Copy)]
pub struct Pending {
    /// Parts of the output that are to be added up.
    pub slots: usize,
}

/// What reads the streams.
pub struct Reader<'a> {
    /// Mixing weights.
    pub hc: &'a HyperConnection,
    /// Norm of what is read.
    pub norm: &'a Buffer<f32>,
}

/// Finishes `pending`, and reads the streams of `rows` rows into `scratch.x`. Those beyond
/// `decode_rows` take a way of their own, however few they are: so a row's results do not depend
/// on the rows beside it.
pub fn read(
    device: &Device,
    config: &Config,
    scratch: &Scratch,
    decode_rows: usize,
    rows: usize,
    pending: Option<Pending>,
    reader: &Reader<'_>,
) -> StageResult {
    let mixing = Mixing::new(config, scratch, pending, reader);
    let to = (&scratch.x, &scratch.x_low);
    mixing.mix(device, decode_rows)?;
    mixing.collapse(device, decode_rows, to, Pointer::NULL)?;
    mixing.mix_and_collapse(device, decode_rows..rows, to)
}

/// The same for the output head: only `wanted` rows, whose numbers are in `scratch.head.rows`.
pub fn read_head(
    device: &Device,
    config: &Config,
    scratch: &Scratch,
    rows: usize,
    wanted: usize,
    pending: Option<Pending>,
    reader: &Reader<'_>,
) -> StageResult {
    let mixing = Mixing::new(config, scratch, pending, reader);
    let head = &scratch.head;
    mixing.mix(device, rows)?;
    mixing.collapse(device, wanted, (&head.x, &head.x_low), head.rows.pointer())
}

/// What the kernels work with.
struct Mixing<'a> {
    hidden: usize,
    streams: &'a Buffer<f32>,
    /// The pending output `[n, slots, hidden]`, or null.
    y: Pointer,
    slots: usize,
    post: &'a Buffer<f32>,
    comb: &'a Buffer<f32>,
    sums: &'a Buffer<f32>,
    function: MixFunction,
    constants: MixConstants,
    norm: Pointer,
}

impl<'a> Mixing<'a> {
    fn new(
        config: &Config,
        scratch: &'a Scratch,
        pending: Option<Pending>,
        reader: &Reader<'_>,
    ) -> Self {
        let hc = reader.hc;
        Mixing {
            hidden: config.hidden,
            streams: &scratch.streams,
            y: pending.map_or(Pointer::NULL, |_| scratch.y.pointer()),
            slots: pending.map_or(0, |p| p.slots),
            post: &scratch.post,
            comb: &scratch.comb,
            sums: &scratch.mix_sums,
            function: MixFunction {
                weights: hc.function.weights.pointer(),
                halves: i32::from(hc.function.halves),
                outputs: hc.function.outputs as i32,
            },
            constants: MixConstants {
                base: hc.base.pointer(),
                scale: hc.scale.pointer(),
                hc_epsilon: config.hc_epsilon,
                rms_epsilon: config.rms_epsilon,
                sinkhorn_iterations: config.sinkhorn_iterations as i32,
                padding: 0,
            },
            norm: reader.norm.pointer(),
        }
    }

    fn mix(&self, device: &Device, rows: usize) -> StageResult {
        let group = if rows > MANY_ROWS { ROWS_PER_BLOCK } else { 1 };
        device.launch(
            "mix_streams",
            [self.hidden / SLICE, rows.div_ceil(group), 1],
            STREAMS * SLICE,
            0,
            args![
                self.streams.pointer(),
                self.y,
                self.slots,
                self.post.pointer(),
                self.comb.pointer(),
                Arg::value(self.function),
                self.sums.pointer(),
                self.hidden,
                0usize,
                rows,
                group
            ],
        )
    }

    fn collapse(
        &self,
        device: &Device,
        rows: usize,
        to: (&Buffer<u16>, &Buffer<u16>),
        wanted: Pointer,
    ) -> StageResult {
        // The head has no weights for what comes after it.
        let parts = if self.function.outputs as usize == STREAMS { 1 } else { 2 };
        device.launch(
            "read_streams",
            [rows, parts, 1],
            (self.hidden / 4).next_multiple_of(32).clamp(64, 512),
            self.hidden * size_of::<f32>(),
            args![
                self.streams.pointer(),
                self.sums.pointer(),
                self.hidden / SLICE,
                Arg::value(self.constants),
                self.norm,
                self.post.pointer(),
                self.comb.pointer(),
                to.0.pointer(),
                to.1.pointer(),
                self.hidden,
                0usize,
                wanted
            ],
        )
    }

    /// Both for many rows, which must not be the head's.
    fn mix_and_collapse(
        &self,
        device: &Device,
        rows: Range<usize>,
        to: (&Buffer<u16>, &Buffer<u16>),
    ) -> StageResult {
        device.launch(
            "mix_and_read",
            [rows.len().div_ceil(FUSED_ROWS), 1, 1],
            FUSED_THREADS,
            self.hidden * size_of::<f32>(),
            args![
                self.streams.pointer(),
                self.y,
                self.slots,
                self.post.pointer(),
                self.comb.pointer(),
                Arg::value(self.function),
                Arg::value(self.constants),
                self.norm,
                to.0.pointer(),
                to.1.pointer(),
                self.hidden,
                rows.start,
                rows.end
            ],
        )
    }
}
