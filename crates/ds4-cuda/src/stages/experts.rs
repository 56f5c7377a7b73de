//! Choosing experts and running them (docs/model.md, "Experts").

#![allow(unsafe_code, reason = "launches kernels")]

use std::ops::Range;

use ds4_engine::backend::StageResult;
use ds4_model::config::Config;

use crate::{
    constants::{
        DECODE_WARPS, DOWN_SHARED, GATE_UP_SHARED, HIDDEN_UNIT, INPUT_UNIT, INTEGER_COLUMNS,
        INTEGER_ROWS, MOST_EXPERTS, MOST_FEW_PAIRS, MOST_FEW_ROWS, PERMUTE_THREADS, PREFILL_STAGES,
        PREFILL_THREADS, ROUTE_WARPS, TILE, TILE_PAIRS, WARP,
    },
    device::{Buffer, Device, Grid},
    formats::WeightType,
    kernel::{Kernel, Params, Pointer},
    params::{
        DownAnyParams, DownQ2Params, EXPERTS_DOWN_ANY, EXPERTS_DOWN_Q2, EXPERTS_GATE_UP_ANY,
        EXPERTS_GATE_UP_Q2, ExpertMatrix, GateUpAnyParams, GateUpQ2Params, PERMUTE_PAIRS,
        PREFILL_DOWN_ANY, PREFILL_DOWN_Q2, PREFILL_GATE_UP_ANY, PREFILL_GATE_UP_Q2, Permutation,
        PermutePairsParams, PrefillDownParams, PrefillGateUpParams, Preparation, Quantised, ROUTE,
        RouteParams, Routing,
    },
    products::{Context, Products},
    step::StepRows,
    weights::{DeviceMatrix, Experts},
};

#[cfg(test)]
mod tests;

/// Blocks that share the work of permuting pairs.
const PERMUTE_BLOCKS: usize = 128;
/// Blocks that a multiprocessor holds at a time (see the kernels' launch bounds).
const BLOCKS: usize = 2;
/// Weight rows of a block of prefill: 32 for each warp of gate and up, 64 for each of down.
const PREFILL_GATE_UP_ROWS: usize = 2 * TILE * PREFILL_WARPS;
const PREFILL_DOWN_ROWS: usize = 4 * TILE * PREFILL_WARPS;
const PREFILL_WARPS: usize = PREFILL_THREADS / WARP;
/// Bytes of shared memory of such a block: stages of 64 columns in halves.
const PREFILL_SHARED: usize = PREFILL_STAGES * TILE_PAIRS * 64 * size_of::<u16>();
/// 1 twice in halves.
const ONES: u32 = 0x3c00_3c00;

/// Buffers of the experts for `n` rows.
pub struct Scratch {
    /// Router products `[n, experts]`.
    pub logits: Buffer<f32>,
    /// Chosen experts and their weights `[n, used]`.
    pub ids: Buffer<u32>,
    pub weights: Buffer<f32>,
    /// One for rows that are decoded, one for the others.
    permutations: [PermutationBuffers; 2],
    /// Hidden layers of the routed experts `[n, used, width]`, by pair.
    hidden: Buffer<u16>,
    /// The input as integers: both parts of `[n, hidden]`, and the scales of each unit.
    parts: Buffer<u8>,
    part_scales: Buffer<f32>,
    /// Hidden layer of the shared expert `[n, width]`.
    pub shared_hidden: Buffer<u16>,
}

/// Pairs of rows and experts, permuted so that the pairs of an expert stand together.
struct PermutationBuffers {
    pairs: Buffer<u32>,
    /// Where each expert's pairs start, and where the last one's end.
    offsets: Buffer<u32>,
    /// Experts that have pairs, and how many.
    active: Buffer<u32>,
    active_count: Buffer<u32>,
    /// The work list of prefill: tiles of an expert's pairs (expert, first pair), and how many.
    tiles: Buffer<[u32; 2]>,
    tile_count: Buffer<u32>,
}

impl Scratch {
    pub fn new(device: &Device, config: &Config, n: usize) -> StageResult<Scratch> {
        let (experts, used) = (config.experts, config.experts_used);
        Ok(Scratch {
            logits: device.alloc(n * experts)?,
            ids: device.alloc(n * used)?,
            weights: device.alloc(n * used)?,
            permutations: [
                PermutationBuffers::new(device, experts, n * used)?,
                PermutationBuffers::new(device, experts, n * used)?,
            ],
            hidden: device.alloc(n * used * config.expert_width)?,
            parts: device.alloc(2 * n * config.hidden)?,
            part_scales: device.alloc(n * config.hidden.div_ceil(INTEGER_COLUMNS))?,
            shared_hidden: device.alloc(n * config.expert_width)?,
        })
    }
}

impl PermutationBuffers {
    fn new(device: &Device, experts: usize, pairs: usize) -> StageResult<Self> {
        Ok(PermutationBuffers {
            pairs: device.alloc(pairs)?,
            offsets: device.alloc(experts + 1)?,
            active: device.alloc(experts)?,
            active_count: device.alloc(1)?,
            tiles: device.alloc(most_tiles(experts, pairs))?,
            tile_count: device.alloc(1)?,
        })
    }

    /// What kernels know of `pairs` pairs.
    fn params(&self, experts: usize, pairs: usize) -> Permutation {
        Permutation {
            pairs: self.pairs.first(pairs),
            offsets: self.offsets.first(experts + 1),
            active: self.active.first(experts),
            active_count: self.active_count.first(1),
        }
    }
}

/// Tiles that `pairs` pairs can fill, however they are spread.
fn most_tiles(experts: usize, pairs: usize) -> usize {
    experts.min(pairs) + pairs / TILE_PAIRS
}

/// The rows of a step, and what experts work with.
pub struct ExpertStage<'a> {
    /// What their products share.
    pub context: Context<'a>,
    pub config: &'a Config,
    pub step: StepRows<'a>,
    pub weights: &'a Experts,
    pub scratch: &'a Scratch,
    /// The grid of IQ2_XXS as selectors.
    pub selectors: &'a Buffer<u32>,
    /// The experts' input `[n, hidden]` in halves, and what they leave over.
    pub x: &'a Buffer<u16>,
    pub x_low: &'a Buffer<u16>,
    /// Results `[n, used + 1, hidden]`.
    pub y: &'a Buffer<f32>,
    /// A counter at zero.
    pub arrivals: &'a Buffer<u32>,
    /// Rows that are decoded come first.
    pub decode_rows: usize,
    pub rows: usize,
}

impl ExpertStage<'_> {
    /// Multiplies the input with the router and the shared expert's first matrices, turns router
    /// products into experts and their weights, and permutes rows by expert.
    ///
    /// # Panics
    /// If a buffer has no room for the rows.
    pub fn route(&self, input: &Products) -> StageResult {
        let (decode_rows, rows) = (self.decode_rows, self.rows);
        // SAFETY: the preparation's buffers have so many rows and are alive.
        unsafe { input.run_and_prepare(&self.context, decode_rows, rows, &self.preparation()) }?;
        let first = if self.are_few() { decode_rows } else { 0 };
        if first < rows {
            let params = RouteParams {
                routing: self.routing(rows),
                first_row: first as i32,
                end_row: rows as i32,
            };
            let blocks = [(rows - first).div_ceil(ROUTE_WARPS), 1, 1];
            let grid = Grid { blocks, threads: WARP * ROUTE_WARPS, shared: 0 };
            // SAFETY: the buffers have so many rows.
            unsafe { self.device().launch(ROUTE, grid, &params) }?;
        }
        let [decoded, others] = &self.scratch.permutations;
        if !self.are_few() {
            self.permute(decoded, 0, decode_rows)?;
        }
        self.permute(others, decode_rows, rows)
    }

    /// Runs the routed experts, and the shared one's last product.
    ///
    /// # Panics
    /// If a buffer has no room for the rows.
    pub fn run(&self, layer: usize, shared_down: &Products) -> StageResult {
        let limit = self.config.layers[layer].swiglu_limit;
        if self.decode_rows > 0 {
            if self.are_integers() {
                self.decode_integers(limit, shared_down)?;
            } else {
                self.decode_any(limit, shared_down)?;
            }
        }
        if self.rows > self.decode_rows {
            self.prefill(limit)?;
            let (first, end) = (self.decode_rows, self.rows);
            shared_down.run_prefill(self.device(), self.context.grid, first, end)?;
        }
        Ok(())
    }

    fn device(&self) -> &Device {
        self.context.device
    }

    /// What the launch of the router's product does beside it for the rows that are decoded:
    /// routing if they are few enough, and integers if the experts want them.
    fn preparation(&self) -> Preparation {
        let (config, rows) = (self.config, self.decode_rows);
        let mut prepared = Preparation::NONE;
        if self.are_few() {
            let pairs = rows * config.experts_used;
            prepared.routing = self.routing(rows);
            prepared.permutation = self.scratch.permutations[0].params(config.experts, pairs);
            prepared.arrivals = self.arrivals.first(1);
        }
        if self.are_integers() {
            prepared.quantised = self.quantised();
            prepared.x = self.x.first(rows * config.hidden);
            prepared.x_low = self.x_low.first(rows * config.hidden);
        }
        prepared
    }

    fn quantised(&self) -> Quantised {
        let (rows, hidden) = (self.decode_rows, self.config.hidden);
        let units = hidden / INTEGER_COLUMNS;
        Quantised {
            parts: self.scratch.parts.first(2 * rows * hidden),
            scales: self.scratch.part_scales.first(rows * units),
            units: units as i32,
        }
    }

    /// Whether decoded rows are multiplied as integers (kernels/experts_q2.cu).
    fn are_integers(&self) -> bool {
        let w = self.weights;
        (w.gate.ty, w.down.ty, w.shared_down.ty)
            == (WeightType::Iq2Xxs, WeightType::Q2K, WeightType::Q8_0)
    }

    /// Whether decoded rows are routed right after the router's product, which keeps a bit for each
    /// row and expert.
    fn are_few(&self) -> bool {
        let rows = self.decode_rows;
        rows <= MOST_FEW_ROWS
            && rows * self.config.experts_used <= MOST_FEW_PAIRS
            && !self.weights.repeats
    }

    fn routing(&self, rows: usize) -> Routing {
        let (config, s, w) = (self.config, self.scratch, self.weights);
        assert!(config.experts <= MOST_EXPERTS, "{} experts", config.experts);
        let pairs = rows * config.experts_used;
        Routing {
            logits: s.logits.first(rows * config.experts),
            bias: w.bias.as_ref().map_or(Pointer::NULL, |bias| bias.first(config.experts)),
            table: w.table.as_ref().map_or(Pointer::NULL, Buffer::pointer),
            tokens: self.step.params(rows).token,
            ids: s.ids.first(pairs),
            weights: s.weights.first(pairs),
            experts: config.experts as i32,
            used: config.experts_used as i32,
            scale: config.routed_scale,
        }
    }

    fn permute(&self, to: &PermutationBuffers, first: usize, end: usize) -> StageResult {
        let (experts, used) = (self.config.experts, self.config.experts_used);
        permute_pairs(self.device(), &self.scratch.ids, first * used..end * used, experts, to)
    }

    fn matrix(&self, m: &DeviceMatrix) -> ExpertMatrix {
        ExpertMatrix {
            weights: m.packed(),
            ty: m.ty as i32,
            rows: (m.rows / self.config.experts) as i32,
            columns: m.cols as i32,
        }
    }

    /// Address of the hidden layers of `pairs` pairs.
    fn hidden(&self, pairs: usize) -> Pointer {
        self.scratch.hidden.first(pairs * self.config.expert_width)
    }

    /// Address of the results of rows up to `end`.
    fn out(&self, end: usize) -> Pointer {
        self.y.first(end * (self.config.experts_used + 1) * self.config.hidden)
    }

    /// Blocks for the decoded pairs of tiles of expert matrices of `rows` rows.
    fn decode_blocks(&self, rows: usize) -> usize {
        let experts = self.config.experts.min(self.decode_rows * self.config.experts_used);
        (BLOCKS * self.device().multiprocessors()).min(experts * rows / TILE)
    }

    fn decode_integers(&self, limit: f32, shared_down: &Products) -> StageResult {
        let (config, s, w) = (self.config, self.scratch, self.weights);
        let (experts, used) = (config.experts, config.experts_used);
        let (rows, pairs) = (self.decode_rows, self.decode_rows * used);
        let permutation = s.permutations[0].params(experts, pairs);
        let gate_up = GateUpQ2Params {
            gate: self.matrix(&w.gate),
            up: self.matrix(&w.up),
            permutation,
            pair_weights: s.weights.first(pairs),
            x: self.quantised(),
            hidden: self.hidden(pairs),
            selectors: self.selectors.pointer(),
            shared: shared_down.only(rows).0,
            experts: experts as i32,
            used: used as i32,
            limit,
            one: ONES,
            rows: rows as i32,
        };
        let units = INTEGER_ROWS * config.hidden / INTEGER_COLUMNS;
        let shared = GATE_UP_SHARED + units * INPUT_UNIT;
        let blocks = self.decode_blocks(config.expert_width);
        // SAFETY: the buffers have so many rows and pairs.
        unsafe { self.launch_decode(EXPERTS_GATE_UP_Q2, blocks, shared, &gate_up) }?;
        let down = DownQ2Params {
            down: self.matrix(&w.down),
            permutation,
            hidden: self.hidden(pairs),
            out: self.out(rows),
            experts: experts as i32,
            used: used as i32,
        };
        let units = INTEGER_ROWS * config.expert_width / INTEGER_COLUMNS;
        let shared = DOWN_SHARED + units * HIDDEN_UNIT;
        // SAFETY: as above.
        unsafe {
            self.launch_decode(EXPERTS_DOWN_Q2, self.decode_blocks(config.hidden), shared, &down)
        }
    }

    fn decode_any(&self, limit: f32, shared_down: &Products) -> StageResult {
        let (config, s, w) = (self.config, self.scratch, self.weights);
        let (experts, used) = (config.experts, config.experts_used);
        let (rows, pairs) = (self.decode_rows, self.decode_rows * used);
        let permutation = s.permutations[0].params(experts, pairs);
        let iq2_grid = self.context.grid.pointer();
        let gate_up = GateUpAnyParams {
            gate: self.matrix(&w.gate),
            up: self.matrix(&w.up),
            permutation,
            pair_weights: s.weights.first(pairs),
            x: self.x.first(rows * config.hidden),
            hidden: self.hidden(pairs),
            iq2_grid,
            used: used as i32,
            limit,
        };
        let blocks = self.decode_blocks(config.expert_width);
        // SAFETY: the buffers have so many rows and pairs.
        unsafe { self.launch_decode(EXPERTS_GATE_UP_ANY, blocks, 0, &gate_up) }?;
        let (shared, shared_blocks) = shared_down.only(rows);
        let down = DownAnyParams {
            down: self.matrix(&w.down),
            permutation,
            hidden: self.hidden(pairs),
            out: self.out(rows),
            iq2_grid,
            shared,
            used: used as i32,
            rows: rows as i32,
        };
        let blocks = shared_blocks * rows.div_ceil(8) + self.decode_blocks(config.hidden);
        // SAFETY: as above.
        unsafe { self.launch_decode(EXPERTS_DOWN_ANY, blocks, 0, &down) }
    }

    /// Launches a kernel of decoding.
    ///
    /// # Safety
    /// As [`Device::launch`].
    unsafe fn launch_decode<P: Params>(
        &self,
        kernel: Kernel<P>,
        blocks: usize,
        shared: usize,
        params: &P,
    ) -> StageResult {
        let grid = Grid { blocks: [blocks, 1, 1], threads: WARP * DECODE_WARPS, shared };
        // SAFETY: as the caller says.
        unsafe { self.device().launch(kernel, grid, params) }
    }

    fn prefill(&self, limit: f32) -> StageResult {
        let (config, s, w) = (self.config, self.scratch, self.weights);
        let (experts, used) = (config.experts, config.experts_used);
        // Pairs are counted from the step's first row on.
        let (rows, pairs) = (self.rows, self.rows * used);
        let own_pairs = (self.rows - self.decode_rows) * used;
        let (buffers, tiles) = (&s.permutations[1], most_tiles(experts, own_pairs));
        let permutation = buffers.params(experts, own_pairs);
        let (tile_list, tile_count) = (buffers.tiles.first(tiles), buffers.tile_count.first(1));
        let iq2_grid = self.context.grid.pointer();
        let grid = |blocks| Grid {
            blocks: [blocks, tiles, 1],
            threads: PREFILL_THREADS,
            shared: PREFILL_SHARED,
        };
        let gate_up = PrefillGateUpParams {
            gate: self.matrix(&w.gate),
            up: self.matrix(&w.up),
            permutation,
            tiles: tile_list,
            tile_count,
            pair_weights: s.weights.first(pairs),
            x: self.x.first(rows * config.hidden),
            hidden: self.hidden(pairs),
            iq2_grid,
            used: used as i32,
            limit,
        };
        let fast = w.gate.ty == WeightType::Iq2Xxs;
        let kernel = if fast { PREFILL_GATE_UP_Q2 } else { PREFILL_GATE_UP_ANY };
        let gate_up_grid = grid(config.expert_width.div_ceil(PREFILL_GATE_UP_ROWS));
        // SAFETY: the buffers have so many rows and pairs, and the list so many tiles.
        unsafe { self.device().launch(kernel, gate_up_grid, &gate_up) }?;
        let down = PrefillDownParams {
            down: self.matrix(&w.down),
            permutation,
            tiles: tile_list,
            tile_count,
            hidden: self.hidden(pairs),
            out: self.out(rows),
            iq2_grid,
            used: used as i32,
        };
        let fast = w.down.ty == WeightType::Q2K;
        let kernel = if fast { PREFILL_DOWN_Q2 } else { PREFILL_DOWN_ANY };
        let down_grid = grid(config.hidden.div_ceil(PREFILL_DOWN_ROWS));
        // SAFETY: as above.
        unsafe { self.device().launch(kernel, down_grid, &down) }
    }
}

/// Permutes `pairs` by the experts `ids` that they chose.
fn permute_pairs(
    device: &Device,
    ids: &Buffer<u32>,
    pairs: Range<usize>,
    experts: usize,
    to: &PermutationBuffers,
) -> StageResult {
    if pairs.is_empty() {
        return Ok(());
    }
    assert!(experts <= PERMUTE_THREADS, "{experts} experts");
    let params = PermutePairsParams {
        ids: ids.first(pairs.end),
        permutation: to.params(experts, pairs.len()),
        tiles: to.tiles.first(most_tiles(experts, pairs.len())),
        tile_count: to.tile_count.first(1),
        first_pair: pairs.start as i32,
        end_pair: pairs.end as i32,
        experts: experts as i32,
    };
    let blocks = [experts.min(pairs.len()).min(PERMUTE_BLOCKS), 1, 1];
    let grid = Grid { blocks, threads: PERMUTE_THREADS, shared: 0 };
    // SAFETY: the buffers have room for so many pairs; the ids are below `experts`, since the
    // router chose them, or were checked when the table was loaded.
    unsafe { device.launch(PERMUTE_PAIRS, grid, &params) }
}
