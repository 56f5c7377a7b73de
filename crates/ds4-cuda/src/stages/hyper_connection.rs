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
/// Threads that mix and collapse; where blocks share a row they have a warp more.
const THREADS: usize = STREAMS * SLICE;
/// Blocks among which the slices of all rows are shared, most rows whose blocks have one of them, and
/// rows of a block where there are more.
const SLICE_BLOCKS: usize = 256;
const FEW_ROWS: usize = 8;
const SLICE_ROWS: usize = 4;
/// Rows of a block that does everything for its rows.
const BLOCK_ROWS: usize = 8;

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

/// Mirrors `SliceReader` in kernels/hyper_connection.cu.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct SliceReader {
    streams: Pointer,
    y: Pointer,
    post: Pointer,
    comb: Pointer,
    function: MixFunction,
    constants: MixConstants,
    norm: Pointer,
    sums: Pointer,
    x: Pointer,
    x_low: Pointer,
    rows: Pointer,
    slots: i32,
    hidden: i32,
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
    mixing.read_by_slices(device, decode_rows, to, Pointer::NULL)?;
    mixing.read_by_rows(device, decode_rows..rows, to)
}

/// The same for the output head: only `wanted` rows, whose numbers are in `scratch.head.rows`. The
/// others stay unfinished.
pub fn read_head(
    device: &Device,
    config: &Config,
    scratch: &Scratch,
    wanted: usize,
    pending: Option<Pending>,
    reader: &Reader<'_>,
) -> StageResult {
    let mixing = Mixing::new(config, scratch, pending, reader);
    let head = &scratch.head;
    mixing.read_by_slices(device, wanted, (&head.x, &head.x_low), head.rows.pointer())
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
    arrivals: &'a Buffer<u32>,
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
            arrivals: &scratch.arrivals,
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

    /// `rows` rows: the first ones, or those whose numbers are at `wanted`.
    fn read_by_slices(
        &self,
        device: &Device,
        rows: usize,
        to: (&Buffer<u16>, &Buffer<u16>),
        wanted: Pointer,
    ) -> StageResult {
        debug_assert!(rows <= self.arrivals.len());
        let reader = SliceReader {
            streams: self.streams.pointer(),
            y: self.y,
            post: self.post.pointer(),
            comb: self.comb.pointer(),
            function: self.function,
            constants: self.constants,
            norm: self.norm,
            sums: self.sums.pointer(),
            x: to.0.pointer(),
            x_low: to.1.pointer(),
            rows: wanted,
            slots: self.slots as i32,
            hidden: self.hidden as i32,
        };
        let (slices, row) = (self.hidden / SLICE, self.hidden * size_of::<f32>());
        let sharing = |groups: usize| (SLICE_BLOCKS / groups.max(1)).clamp(1, slices);
        if rows <= FEW_ROWS {
            let arguments = args![Arg::value(reader), self.arrivals.pointer()];
            let grid = [sharing(rows), rows, 1];
            return device.launch("read_by_slices", grid, THREADS + 32, row, arguments);
        }
        let groups = rows.div_ceil(SLICE_ROWS);
        let grid = [sharing(groups), groups, 1];
        device.launch("mix_slices", grid, THREADS, 0, args![Arg::value(reader), rows])?;
        let grid = [rows, 1, 1];
        device.launch("collapse_rows", grid, THREADS + 32, row, args![Arg::value(reader)])
    }

    /// Any rows; not for the head.
    fn read_by_rows(
        &self,
        device: &Device,
        rows: Range<usize>,
        to: (&Buffer<u16>, &Buffer<u16>),
    ) -> StageResult {
        device.launch(
            "read_by_rows",
            [rows.len().div_ceil(BLOCK_ROWS), 1, 1],
            THREADS,
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
