//! Reading and writing the residual streams (docs/model.md, "Hyper-connections").

#![allow(unsafe_code, reason = "launches kernels")]

use std::ops::Range;

use ds4_engine::backend::StageResult;
use ds4_model::config::Config;

use crate::{
    constants::{BLOCK_ROWS, MIX_THREADS, SLICE, SLICE_ROWS, SLICE_SUMS, STREAMS, WARP},
    device::{Buffer, Device, Grid},
    kernel::{Kernel, Pointer},
    params::{
        COLLAPSE_ROWS, MIX_SLICES, MixConstants, MixFunction, READ_BY_ROWS, READ_BY_SLICES,
        ReadStreamsParams,
    },
    weights::HyperConnection,
};

/// Blocks among which the slices of all rows are shared, and most rows whose blocks have one of
/// them.
const SLICE_BLOCKS: usize = 256;
const FEW_ROWS: usize = 8;

/// Dot products kept for one row.
pub fn sums_len(hidden: usize) -> usize {
    hidden / SLICE * SLICE_SUMS
}

/// The residual streams, and what belongs to them.
#[derive(Clone, Copy)]
pub struct Streams<'a> {
    /// `[n, 4, hidden]`.
    pub streams: &'a Buffer<f32>,
    /// The sublayer before, if its output is not in the streams yet.
    pub pending: Option<Pending<'a>>,
    /// Weights of a sublayer's output `[n, 4]`.
    pub post: &'a Buffer<f32>,
    /// Mixing of the streams `[n, 4, 4]`.
    pub comb: &'a Buffer<f32>,
    /// Room for dot products, [`sums_len`] for each row.
    pub sums: &'a Buffer<f32>,
    /// Counters of blocks, one for each row, zero before and after.
    pub arrivals: &'a Buffer<u32>,
}

/// A sublayer's output.
#[derive(Clone, Copy)]
pub struct Pending<'a> {
    /// `[n, slots, hidden]`.
    pub y: &'a Buffer<f32>,
    /// Parts that are to be added up.
    pub slots: usize,
}

/// What reads the streams.
#[derive(Clone, Copy)]
pub struct Reader<'a> {
    /// Mixing weights.
    pub hc: &'a HyperConnection,
    /// Norm of what is read.
    pub norm: &'a Buffer<f32>,
    /// The next sublayer's input `[n, hidden]` in halves.
    pub x: &'a Buffer<u16>,
    /// What the halves leave over.
    pub x_low: &'a Buffer<u16>,
}

/// Finishes the pending sublayer and reads the streams of `rows` rows. Those beyond `decode_rows`
/// take a way of their own, however few they are: so a row's results do not depend on the rows
/// beside it.
///
/// # Panics
/// If a buffer has no room for the rows.
pub fn read(
    device: &Device,
    config: &Config,
    streams: &Streams<'_>,
    decode_rows: usize,
    rows: usize,
    reader: &Reader<'_>,
) -> StageResult {
    read_by_slices(device, config, streams, decode_rows, reader, None)?;
    read_by_rows(device, config, streams, decode_rows..rows, reader)
}

/// The same for the output head: only the rows whose numbers, all below `rows`, are the first
/// `wanted` of `numbers`. The others stay unfinished.
///
/// # Panics
/// If a buffer has no room for the rows.
pub fn read_head(
    device: &Device,
    config: &Config,
    streams: &Streams<'_>,
    rows: usize,
    wanted: usize,
    numbers: &Buffer<u32>,
    reader: &Reader<'_>,
) -> StageResult {
    read_by_slices(device, config, streams, wanted, reader, Some((numbers, rows)))
}

/// Decoding: blocks share a row. Reads the first `n` rows, or the first `n` of `wanted`, whose
/// numbers are below the one given.
fn read_by_slices(
    device: &Device,
    config: &Config,
    streams: &Streams<'_>,
    n: usize,
    reader: &Reader<'_>,
    wanted: Option<(&Buffer<u32>, usize)>,
) -> StageResult {
    let hidden = config.hidden;
    let params = ReadStreamsParams {
        sums: streams.sums.first(n * sums_len(hidden)),
        arrivals: streams.arrivals.first(n),
        wanted: wanted.map_or(Pointer::NULL, |(numbers, _)| numbers.first(n)),
        end_row: n as i32,
        ..params(config, streams, wanted.map_or(n, |(_, rows)| rows), n, reader)
    };
    let (slices, row) = (hidden / SLICE, hidden * size_of::<f32>());
    let sharing = |groups: usize| (SLICE_BLOCKS / groups.max(1)).clamp(1, slices);
    // A warp more than mix makes the weights for when the sublayer is done.
    let (mixing, both) = (MIX_THREADS, MIX_THREADS + WARP);
    let launch = |kernel: Kernel<ReadStreamsParams>, blocks, threads, shared| {
        // SAFETY: the buffers have so many rows.
        unsafe { device.launch(kernel, Grid { blocks, threads, shared }, &params) }
    };
    if n <= FEW_ROWS {
        return launch(READ_BY_SLICES, [sharing(n), n, 1], both, row);
    }
    let groups = n.div_ceil(SLICE_ROWS);
    launch(MIX_SLICES, [sharing(groups), groups, 1], mixing, 0)?;
    launch(COLLAPSE_ROWS, [n, 1, 1], both, row)
}

/// Prefill: a block does everything for its rows.
fn read_by_rows(
    device: &Device,
    config: &Config,
    streams: &Streams<'_>,
    rows: Range<usize>,
    reader: &Reader<'_>,
) -> StageResult {
    let params = ReadStreamsParams {
        first_row: rows.start as i32,
        end_row: rows.end as i32,
        ..params(config, streams, rows.end, rows.end, reader)
    };
    let grid = Grid {
        blocks: [rows.len().div_ceil(BLOCK_ROWS), 1, 1],
        threads: MIX_THREADS,
        shared: config.hidden * size_of::<f32>(),
    };
    // SAFETY: the buffers have so many rows.
    unsafe { device.launch(READ_BY_ROWS, grid, &params) }
}

/// What all kernels read and write: `rows` rows of streams, `results` rows of results.
fn params(
    config: &Config,
    s: &Streams<'_>,
    rows: usize,
    results: usize,
    reader: &Reader<'_>,
) -> ReadStreamsParams {
    let (hidden, hc) = (config.hidden, reader.hc);
    let weight = if hc.function.halves { size_of::<u16>() } else { size_of::<f32>() };
    let outputs = hc.function.outputs;
    ReadStreamsParams {
        streams: s.streams.first(rows * STREAMS * hidden),
        y: s.pending.map_or(Pointer::NULL, |p| p.y.first(rows * p.slots * hidden)),
        post: s.post.first(rows * STREAMS),
        comb: s.comb.first(rows * STREAMS * STREAMS),
        function: MixFunction {
            weights: hc.function.weights.first(outputs * STREAMS * hidden * weight),
            halves: i32::from(hc.function.halves),
            outputs: outputs as i32,
        },
        constants: MixConstants {
            base: hc.base.first(outputs),
            scale: hc.scale.first(outputs.div_ceil(STREAMS).min(3)),
            hc_epsilon: config.hc_epsilon,
            rms_epsilon: config.rms_epsilon,
            sinkhorn_iterations: config.sinkhorn_iterations as i32,
        },
        norm: reader.norm.first(hidden),
        sums: Pointer::NULL,
        arrivals: Pointer::NULL,
        x: reader.x.first(results * hidden),
        x_low: reader.x_low.first(results * hidden),
        wanted: Pointer::NULL,
        slots: s.pending.map_or(0, |p| p.slots) as i32,
        hidden: hidden as i32,
        first_row: 0,
        end_row: 0,
    }
}

#[cfg(test)]
mod tests;
