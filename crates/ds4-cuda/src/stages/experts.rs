//! Choosing experts and running them (docs/model.md, "Experts").

use std::ops::Range;

use bytemuck::Zeroable;
use ds4_engine::backend::StageResult;
use ds4_model::config::Config;

use crate::{
    arguments::{Arg, args},
    device::{Buffer, Device, Pointer},
    products::{DECODE_WARPS, Products},
    step::StepPointers,
    weights::{DeviceMatrix, Experts, MOST_EXPERTS, Planes, TILE, WeightType},
};

#[cfg(test)]
mod tests;

/// Pairs of a tile when many rows are computed.
const TILE_PAIRS: usize = 64;
/// Rows, and pairs of rows and experts, that are routed right after the router's product; mirrors
/// `MOST_FEW_ROWS` and `MOST_FEW_PAIRS` in kernels/router.cuh.
const MOST_FEW_ROWS: usize = 64;
const MOST_FEW_PAIRS: usize = 1024;
/// Threads of a block that groups pairs by expert, one for each; and blocks that share the work.
const GROUP_THREADS: usize = 512;
const GROUP_BLOCKS: usize = 128;
/// Warps of a block that routes, one row each.
const ROUTE_WARPS: usize = 8;
/// Blocks that a multiprocessor holds at a time (see the kernels' launch bounds).
const BLOCKS: usize = 2;
/// Columns that share a scale as integers; mirrors kernels/quantised.cuh.
const UNIT_COLUMNS: usize = 256;
/// Rows that a block of kernels/experts_q2.cu has at a time (`MOST_ROWS`), and bytes of what it keeps
/// in shared memory: `GateUpShared`, `DownShared`, `InputUnit` and `HiddenUnit`.
const BLOCK_ROWS: usize = 2;
const GATE_UP_SHARED: usize = 44160;
const DOWN_SHARED: usize = 48256;
const INPUT_UNIT: usize = 528;
const HIDDEN_UNIT: usize = 1104;
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
    groups: [GroupBuffers; 2],
    /// Hidden layers of the routed experts `[n, used, width]`, by pair.
    hidden: Buffer<u16>,
    /// The input as integers: both parts of `[n, hidden]`, and the scales of each unit.
    parts: Buffer<u8>,
    part_scales: Buffer<f32>,
    /// Hidden layer of the shared expert `[n, width]`.
    pub shared_hidden: Buffer<u16>,
}

/// Rows by expert; see `Groups` in kernels/products.cuh.
struct GroupBuffers {
    pairs: Buffer<u32>,
    starts: Buffer<u32>,
    active: Buffer<u32>,
    active_count: Buffer<u32>,
    tiles: Buffer<[u32; 2]>,
    tile_count: Buffer<u32>,
}

#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct Groups {
    pairs: Pointer,
    starts: Pointer,
    active: Pointer,
    active_count: Pointer,
}

/// Mirrors `Routing` in kernels/router.cuh.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct Routing {
    logits: Pointer,
    bias: Pointer,
    table: Pointer,
    tokens: Pointer,
    ids: Pointer,
    weights: Pointer,
    experts: i32,
    used: i32,
    scale: f32,
    padding: i32,
}

/// Mirrors `Quantised` in kernels/quantised.cuh.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct Quantised {
    parts: Pointer,
    scales: Pointer,
    units: i32,
    padding: i32,
}

/// What the launch of the router's product does beside it for the rows that are decoded: routing, and
/// the experts' input as integers. Zeroed for products that have nothing to do with experts. Mirrors
/// `Preparation` in kernels/decode_products.cu.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub struct Preparation {
    routing: Routing,
    groups: Groups,
    arrivals: Pointer,
    quantised: Quantised,
    x: Pointer,
    x_low: Pointer,
}

impl Preparation {
    /// Blocks that make integers of `rows` rows, one warp for each unit.
    pub fn blocks(&self, rows: usize) -> usize {
        (rows * self.quantised.units as usize).div_ceil(DECODE_WARPS)
    }

    /// Bytes of shared memory that routing needs: scores of each warp's row.
    pub fn shared_bytes(&self) -> usize {
        let routes = self.routing.logits != Pointer::NULL;
        if routes { DECODE_WARPS * MOST_EXPERTS * size_of::<f32>() } else { 0 }
    }
}

/// Mirrors `Stack` in kernels/products.cuh.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct Stack {
    weights: Planes,
    ty: i32,
    rows: i32,
    columns: i32,
    padding: i32,
}

impl Scratch {
    pub fn new(device: &Device, config: &Config, n: usize) -> StageResult<Scratch> {
        let (experts, used) = (config.experts, config.experts_used);
        Ok(Scratch {
            logits: device.alloc(n * experts)?,
            ids: device.alloc(n * used)?,
            weights: device.alloc(n * used)?,
            groups: [
                GroupBuffers::new(device, experts, n * used)?,
                GroupBuffers::new(device, experts, n * used)?,
            ],
            hidden: device.alloc(n * used * config.expert_width)?,
            parts: device.alloc(2 * n * config.hidden)?,
            part_scales: device.alloc(n * config.hidden.div_ceil(UNIT_COLUMNS))?,
            shared_hidden: device.alloc(n * config.expert_width)?,
        })
    }
}

impl GroupBuffers {
    fn new(device: &Device, experts: usize, pairs: usize) -> StageResult<Self> {
        Ok(GroupBuffers {
            pairs: device.alloc(pairs)?,
            starts: device.alloc(experts + 1)?,
            active: device.alloc(experts)?,
            active_count: device.alloc(1)?,
            tiles: device.alloc(most_tiles(experts, pairs))?,
            tile_count: device.alloc(1)?,
        })
    }

    fn pointers(&self) -> Groups {
        Groups {
            pairs: self.pairs.pointer(),
            starts: self.starts.pointer(),
            active: self.active.pointer(),
            active_count: self.active_count.pointer(),
        }
    }
}

/// Tiles that `pairs` pairs can fill, however they are spread.
fn most_tiles(experts: usize, pairs: usize) -> usize {
    experts.min(pairs) + pairs / TILE_PAIRS
}

/// The rows of a step, and what experts work with.
pub struct ExpertStage<'a> {
    pub device: &'a Device,
    pub config: &'a Config,
    pub step: StepPointers,
    pub weights: &'a Experts,
    pub scratch: &'a Scratch,
    /// The grid of IQ2_XXS, and the same as selectors.
    pub grid: Pointer,
    pub selectors: Pointer,
    /// Rows that are decoded come first.
    pub decode_rows: usize,
    pub rows: usize,
}

impl ExpertStage<'_> {
    /// What the launch of the router's product, whose input is `x + x_low`, does beside it: routing
    /// if the rows are few enough, and integers if the experts want them. `arrivals` is a counter at
    /// zero.
    pub fn preparation(
        &self,
        x: &Buffer<u16>,
        x_low: &Buffer<u16>,
        arrivals: &Buffer<u32>,
    ) -> Preparation {
        let mut to_do = Preparation::zeroed();
        if self.are_few() {
            to_do.routing = self.routing();
            to_do.groups = self.scratch.groups[0].pointers();
            to_do.arrivals = arrivals.pointer();
        }
        if self.are_integers() {
            to_do.quantised = self.quantised();
            (to_do.x, to_do.x_low) = (x.pointer(), x_low.pointer());
        }
        to_do
    }

    fn quantised(&self) -> Quantised {
        Quantised {
            parts: self.scratch.parts.pointer(),
            scales: self.scratch.part_scales.pointer(),
            units: (self.config.hidden / UNIT_COLUMNS) as i32,
            padding: 0,
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

    /// Turns router products into experts and their weights, and sorts rows by expert: for the rows
    /// that `preparation` left out.
    pub fn route(&self) -> StageResult {
        let first = if self.are_few() { self.decode_rows } else { 0 };
        if first < self.rows {
            self.device.launch(
                "route",
                [(self.rows - first).div_ceil(ROUTE_WARPS), 1, 1],
                32 * ROUTE_WARPS,
                0,
                args![Arg::value(self.routing()), first, self.rows],
            )?;
        }
        let groups = &self.scratch.groups;
        if !self.are_few() {
            self.group(&groups[0], 0, self.decode_rows)?;
        }
        self.group(&groups[1], self.decode_rows, self.rows)
    }

    fn routing(&self) -> Routing {
        let (config, s) = (self.config, self.scratch);
        Routing {
            logits: s.logits.pointer(),
            bias: self.weights.bias.as_ref().map_or(Pointer::NULL, Buffer::pointer),
            table: self.weights.table.as_ref().map_or(Pointer::NULL, Buffer::pointer),
            tokens: self.step.token,
            ids: s.ids.pointer(),
            weights: s.weights.pointer(),
            experts: config.experts as i32,
            used: config.experts_used as i32,
            scale: config.routed_scale,
            padding: 0,
        }
    }

    fn group(&self, groups: &GroupBuffers, first: usize, end: usize) -> StageResult {
        let (experts, used) = (self.config.experts, self.config.experts_used);
        group_pairs(self.device, &self.scratch.ids, first * used..end * used, experts, groups)
    }

    /// Runs the routed experts on `x`, and the shared one's last product: `y [n, used + 1, hidden]`.
    pub fn run(
        &self,
        layer: usize,
        x: &Buffer<u16>,
        y: &Buffer<f32>,
        shared_down: &Products,
    ) -> StageResult {
        let limit = self.config.layers[layer].swiglu_limit;
        if self.decode_rows > 0 {
            self.decode(limit, x, y, shared_down)?;
        }
        if self.rows > self.decode_rows {
            self.prefill(limit, x, y)?;
            shared_down.run_prefill(self.device, self.grid, self.decode_rows, self.rows)?;
        }
        Ok(())
    }

    fn stack(&self, m: &DeviceMatrix) -> Stack {
        let (rows, columns) = ((m.rows / self.config.experts) as i32, m.cols as i32);
        Stack { weights: m.planes, ty: m.ty as i32, rows, columns, padding: 0 }
    }

    fn decode(
        &self,
        limit: f32,
        x: &Buffer<u16>,
        y: &Buffer<f32>,
        shared_down: &Products,
    ) -> StageResult {
        let (config, s, w) = (self.config, self.scratch, self.weights);
        let (rows, used) = (self.decode_rows, config.experts_used);
        let groups = s.groups[0].pointers();
        let most = config.experts.min(rows * used);
        let busy = BLOCKS * self.device.multiprocessors();
        let (gate, up) = (Arg::value(self.stack(&w.gate)), Arg::value(self.stack(&w.up)));
        let down = Arg::value(self.stack(&w.down));
        let (pair_weights, hidden) = (s.weights.pointer(), s.hidden.pointer());
        let blocks = [busy.min(most * config.expert_width / TILE), 1, 1];
        let down_blocks = busy.min(most * config.hidden / TILE);
        let (shared, shared_blocks) = shared_down.only();
        let (shared, y) = (Arg::value(shared), y.pointer());
        let launch = |kernel, blocks, memory, arguments| {
            self.device.launch(kernel, blocks, 32 * DECODE_WARPS, memory, arguments)
        };
        if self.are_integers() {
            let x = Arg::value(self.quantised());
            let (experts, selectors) = (config.experts, self.selectors);
            let arguments = args![
                gate,
                up,
                Arg::value(groups),
                pair_weights,
                x,
                hidden,
                experts,
                used,
                limit,
                selectors,
                ONES,
                rows,
                shared
            ];
            let memory = GATE_UP_SHARED + BLOCK_ROWS * config.hidden / UNIT_COLUMNS * INPUT_UNIT;
            launch("experts_gate_up_q2", blocks, memory, arguments)?;
            let arguments = args![down, Arg::value(groups), hidden, y, experts, used];
            let memory =
                DOWN_SHARED + BLOCK_ROWS * config.expert_width / UNIT_COLUMNS * HIDDEN_UNIT;
            launch("experts_down_q2", [down_blocks, 1, 1], memory, arguments)
        } else {
            let x = x.pointer();
            let arguments = args![
                gate,
                up,
                Arg::value(groups),
                pair_weights,
                x,
                hidden,
                used,
                limit,
                self.grid
            ];
            launch("experts_gate_up_any", blocks, 0, arguments)?;
            let arguments =
                args![down, Arg::value(groups), hidden, y, used, rows, shared, self.grid];
            let blocks = shared_blocks * rows.div_ceil(8) + down_blocks;
            launch("experts_down_any", [blocks, 1, 1], 0, arguments)
        }
    }

    fn prefill(&self, limit: f32, x: &Buffer<u16>, y: &Buffer<f32>) -> StageResult {
        let (config, s, w) = (self.config, self.scratch, self.weights);
        let used = config.experts_used;
        let groups = &s.groups[1];
        let tiles = most_tiles(config.experts, (self.rows - self.decode_rows) * used);
        let shared = 4 * 8 * 1024;
        let fast = w.gate.ty == WeightType::Iq2Xxs;
        self.device.launch(
            if fast { "prefill_gate_up_q2" } else { "prefill_gate_up_any" },
            [config.expert_width.div_ceil(128), tiles, 1],
            128,
            shared,
            args![
                Arg::value(self.stack(&w.gate)),
                Arg::value(self.stack(&w.up)),
                Arg::value(groups.pointers()),
                groups.tiles.pointer(),
                groups.tile_count.pointer(),
                s.weights.pointer(),
                x.pointer(),
                s.hidden.pointer(),
                used,
                limit,
                self.grid
            ],
        )?;
        let fast = w.down.ty == WeightType::Q2K;
        self.device.launch(
            if fast { "prefill_down_q2" } else { "prefill_down_any" },
            [config.hidden.div_ceil(256), tiles, 1],
            128,
            shared,
            args![
                Arg::value(self.stack(&w.down)),
                Arg::value(groups.pointers()),
                groups.tiles.pointer(),
                groups.tile_count.pointer(),
                s.hidden.pointer(),
                y.pointer(),
                used,
                self.grid
            ],
        )
    }
}

/// Sorts `pairs` by the experts `ids` that they chose.
fn group_pairs(
    device: &Device,
    ids: &Buffer<u32>,
    pairs: Range<usize>,
    experts: usize,
    groups: &GroupBuffers,
) -> StageResult {
    if pairs.is_empty() {
        return Ok(());
    }
    device.launch(
        "group_pairs",
        [experts.min(pairs.len()).min(GROUP_BLOCKS), 1, 1],
        GROUP_THREADS,
        0,
        args![
            ids.pointer(),
            pairs.start,
            pairs.end,
            experts,
            TILE_PAIRS,
            groups.pairs.pointer(),
            groups.starts.pointer(),
            groups.active.pointer(),
            groups.active_count.pointer(),
            groups.tiles.pointer(),
            groups.tile_count.pointer()
        ],
    )
}
