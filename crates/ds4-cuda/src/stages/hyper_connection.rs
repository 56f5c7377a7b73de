//! Reading and writing the residual streams (docs/model.md, "Hyper-connections").

use ds4_engine::backend::StageResult;
use ds4_model::config::{Config, STREAMS};

use crate::{
    device::{Arg, Buffer, Device, Pointer, args},
    scratch::Scratch,
    weights::HyperConnection,
};

/// Columns of a slice, and dot products kept of each.
const SLICE: usize = 64;
const SUMS: usize = 32;
/// Rows from which on a block handles several, to read the function's weights less often.
const MANY_ROWS: usize = 64;
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

/// Finishes `pending`, and reads the streams of `rows` rows into `scratch.x`.
pub fn read(
    device: &Device,
    config: &Config,
    scratch: &Scratch,
    rows: usize,
    pending: Option<Pending>,
    reader: &Reader<'_>,
) -> StageResult {
    mix(device, config, scratch, rows, pending, reader.hc)?;
    let to = (&scratch.x, &scratch.x_low);
    collapse(device, config, scratch, rows, reader, to, Pointer::NULL)
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
    mix(device, config, scratch, rows, pending, reader.hc)?;
    let head = &scratch.head;
    collapse(device, config, scratch, wanted, reader, (&head.x, &head.x_low), head.rows.pointer())
}

fn mix(
    device: &Device,
    config: &Config,
    scratch: &Scratch,
    rows: usize,
    pending: Option<Pending>,
    hc: &HyperConnection,
) -> StageResult {
    let group = if rows > MANY_ROWS { ROWS_PER_BLOCK } else { 1 };
    let function = MixFunction {
        weights: hc.function.weights.pointer(),
        halves: i32::from(hc.function.halves),
        outputs: hc.function.outputs as i32,
    };
    device.launch(
        "mix_streams",
        [config.hidden / SLICE, rows.div_ceil(group), 1],
        STREAMS * SLICE,
        0,
        args![
            scratch.streams.pointer(),
            pending.map_or(Pointer::NULL, |_| scratch.y.pointer()),
            pending.map_or(0, |p| p.slots),
            scratch.post.pointer(),
            scratch.comb.pointer(),
            Arg::value(function),
            scratch.mix_sums.pointer(),
            config.hidden,
            0usize,
            rows,
            group
        ],
    )
}

fn collapse(
    device: &Device,
    config: &Config,
    scratch: &Scratch,
    rows: usize,
    reader: &Reader<'_>,
    to: (&Buffer<u16>, &Buffer<u16>),
    wanted: Pointer,
) -> StageResult {
    let constants = MixConstants {
        base: reader.hc.base.pointer(),
        scale: reader.hc.scale.pointer(),
        hc_epsilon: config.hc_epsilon,
        rms_epsilon: config.rms_epsilon,
        sinkhorn_iterations: config.sinkhorn_iterations as i32,
        padding: 0,
    };
    device.launch(
        "read_streams",
        [rows, 1, 1],
        config.hidden.clamp(64, 1024),
        config.hidden * size_of::<f32>(),
        args![
            scratch.streams.pointer(),
            scratch.mix_sums.pointer(),
            config.hidden / SLICE,
            reader.hc.function.outputs,
            Arg::value(constants),
            reader.norm.pointer(),
            scratch.post.pointer(),
            scratch.comb.pointer(),
            to.0.pointer(),
            to.1.pointer(),
            config.hidden,
            0usize,
            wanted
        ],
    )
}
