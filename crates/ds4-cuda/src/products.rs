//! Dense matrix products: several matrices in one launch.

use bytemuck::Zeroable;
use ds4_engine::backend::StageResult;

use crate::{
    arguments::{Arg, args},
    device::{Buffer, Device, Pointer},
    stages::experts::Preparation,
    weights::{DeviceMatrix, Planes, TILE},
};

/// A matrix, what it is multiplied with and where results go; mirrors `Product` in
/// kernels/products.cuh.
#[derive(Debug, Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub(crate) struct Product {
    weights: Planes,
    up: Planes,
    x: Pointer,
    x_low: Pointer,
    out: Pointer,
    out_half: Pointer,
    ty: i32,
    rows: i32,
    columns: i32,
    first_block: i32,
    x_stride: i32,
    out_stride: i32,
    first_tile: i32,
    split: i32,
    limit: f32,
    padding: i32,
    needed: Pointer,
}

/// Activations in halves, `[n, stride]`.
#[derive(Clone, Copy)]
pub(crate) struct Input {
    pub x: Pointer,
    /// What rounding to halves left over; null if the product does without.
    pub low: Pointer,
    pub stride: usize,
}

impl Input {
    /// Rows of `x`, rounded to halves.
    pub fn rounded(x: &Buffer<u16>, stride: usize) -> Input {
        Input { x: x.pointer(), low: Pointer::NULL, stride }
    }

    /// Rows of `x + low`.
    pub fn exact(x: &Buffer<u16>, low: &Buffer<u16>, stride: usize) -> Input {
        Input { x: x.pointer(), low: low.pointer(), stride }
    }
}

impl Product {
    /// All rows of `m`.
    pub fn new(m: &DeviceMatrix, input: Input) -> Product {
        Product {
            weights: m.planes,
            up: Planes::NONE,
            x: input.x,
            x_low: input.low,
            out: Pointer::NULL,
            out_half: Pointer::NULL,
            ty: m.ty as i32,
            rows: m.rows as i32,
            columns: m.cols as i32,
            first_block: 0,
            x_stride: input.stride as i32,
            out_stride: m.rows as i32,
            first_tile: 0,
            split: split(m) as i32,
            limit: 0.0,
            padding: 0,
            needed: Pointer::NULL,
        }
    }

    /// Rows of the i-th of `groups` blocks of a block-diagonal matrix.
    pub fn group(m: &DeviceMatrix, input: Input, i: usize, groups: usize) -> Product {
        let rows = m.rows / groups;
        let x = input.x.offset(i * m.cols * size_of::<u16>());
        Product {
            rows: rows as i32,
            first_tile: (i * rows / TILE) as i32,
            ..Product::new(m, Input { x, ..input })
        }
    }

    /// SwiGLU of `gate` and `up` products.
    pub fn swiglu(gate: &DeviceMatrix, up: &DeviceMatrix, input: Input, limit: f32) -> Product {
        Product { up: up.planes, limit, ..Product::new(gate, input) }
    }

    /// Results in f32, `stride` apart from row to row.
    pub fn to(self, out: Pointer, stride: usize) -> Product {
        Product { out, out_stride: stride as i32, ..self }
    }

    /// Results in halves.
    pub fn to_halves(self, out: Pointer, stride: usize) -> Product {
        Product { out_half: out, out_stride: stride as i32, ..self }
    }

    /// Left out when the flag at `needed` is 0.
    pub fn needed(self, needed: Pointer) -> Product {
        Product { needed, ..self }
    }

    /// Blocks that all tiles take with up to eight activation rows.
    fn few_blocks(&self) -> usize {
        self.tiles().div_ceil(DECODE_WARPS / self.split as usize)
    }

    /// The same with more rows, as `run_batch_product` in kernels/batch_products.cuh expects them.
    fn batch_blocks(&self) -> usize {
        let block_tiles = if self.is_pair() { DECODE_WARPS / 2 } else { DECODE_WARPS };
        self.tiles().div_ceil(block_tiles) * self.split as usize
    }

    /// Blocks that all rows take when many activation rows are multiplied.
    fn prefill_blocks(&self) -> usize {
        let rows = if self.is_pair() { PREFILL_ROWS / 2 } else { PREFILL_ROWS };
        (self.rows as usize).div_ceil(rows)
    }

    fn tiles(&self) -> usize {
        (self.rows as usize).div_ceil(TILE)
    }

    fn is_pair(&self) -> bool {
        self.up != Planes::NONE
    }
}

/// Warps that share a tile when few activation rows are multiplied: as many as it takes to keep the
/// memory busy with this matrix alone.
fn split(m: &DeviceMatrix) -> usize {
    const WARPS: usize = 2048;
    (WARPS / m.rows.div_ceil(TILE)).clamp(1, DECODE_WARPS).next_power_of_two().min(DECODE_WARPS)
}

/// Weight rows of a block when many activation rows are multiplied.
const PREFILL_ROWS: usize = 128;
/// Warps of a block that decodes.
pub(crate) const DECODE_WARPS: usize = 8;
/// Bytes of shared memory for a block's results, per eight activation rows.
const DECODE_SHARED: usize = DECODE_WARPS * 128 * size_of::<f32>();
/// Products that fit a launch's arguments; mirrors `ProductList` in kernels/decode_products.cu.
const MOST_PRODUCTS: usize = 12;

/// Bytes of shared memory for activations on their way, per eight rows; twice as many if any product
/// wants what rounding left over. See `StagedRows` in kernels/batch_products.cuh.
const BATCH_SHARED: usize = 4 * 2048;
/// Most rows of a launch that decodes, in eights.
const MOST_EIGHTS: usize = 8;

/// Where blocks that share a product's tiles meet; mirrors `Workspace` in kernels/batch_products.cuh.
#[derive(Debug, Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct WorkspacePointers {
    sums: Pointer,
    arrivals: Pointer,
}

/// The memory behind it, for any of some products.
pub(crate) struct Workspace {
    sums: Buffer<f32>,
    /// Zero between launches.
    arrivals: Buffer<u32>,
}

impl Workspace {
    /// For launches of up to `blocks` blocks (`Products::most_blocks`).
    pub fn new(device: &Device, blocks: usize) -> StageResult<Workspace> {
        let sums = blocks * MOST_EIGHTS * DECODE_SHARED / size_of::<f32>();
        Ok(Workspace { sums: device.alloc(sums)?, arrivals: device.alloc_zeroed(blocks)? })
    }

    fn pointers(&self) -> WorkspacePointers {
        WorkspacePointers { sums: self.sums.pointer(), arrivals: self.arrivals.pointer() }
    }
}

/// What products of a step share.
#[derive(Clone, Copy)]
pub(crate) struct Context<'a> {
    pub device: &'a Device,
    pub grid: Pointer,
    pub workspace: &'a Workspace,
}

/// Products of one launch, each with its first block, and how many blocks they take.
struct Placed {
    products: Vec<Product>,
    blocks: usize,
}

impl Placed {
    fn new(products: &[Product], blocks_of: fn(&Product) -> usize) -> Placed {
        let mut blocks = 0;
        let placed = products.iter().map(|p| {
            let first_block = blocks as i32;
            blocks += blocks_of(p);
            Product { first_block, ..*p }
        });
        Placed { products: placed.collect(), blocks }
    }

    fn list(&self) -> [Product; MOST_PRODUCTS] {
        let mut list = [Product::zeroed(); MOST_PRODUCTS];
        list[..self.products.len()].copy_from_slice(&self.products);
        list
    }
}

/// Products that are launched together.
pub(crate) struct Products {
    /// Launches of a few products each: for up to eight rows, and for more.
    few: Vec<Placed>,
    batch: Vec<Placed>,
    prefill: Buffer<Product>,
    count: usize,
    prefill_blocks: usize,
    /// Whether the kernels for dense types do.
    dense: bool,
    pairs: bool,
    exact: bool,
}

impl Products {
    pub fn new(device: &Device, products: Vec<Product>) -> StageResult<Products> {
        let launches = |blocks_of| {
            let some = products.chunks(MOST_PRODUCTS);
            some.map(|some| Placed::new(some, blocks_of)).collect()
        };
        let prefill = Placed::new(&products, Product::prefill_blocks);
        Ok(Products {
            few: launches(Product::few_blocks),
            batch: launches(Product::batch_blocks),
            prefill: device.buffer(&prefill.products)?,
            count: products.len(),
            prefill_blocks: prefill.blocks,
            dense: products.iter().all(|p| p.ty == 0 || p.ty == 1),
            pairs: products.iter().any(Product::is_pair),
            exact: products.iter().any(|p| p.x_low != Pointer::NULL),
        })
    }

    /// Blocks of the largest launch for which a workspace has to have room.
    pub fn most_blocks(&self) -> usize {
        self.batch.iter().map(|launch| launch.blocks).max().unwrap_or(0)
    }

    /// The only product, and the blocks that it takes for every eight rows that are decoded.
    pub fn only(&self) -> (Product, usize) {
        (self.few[0].products[0], self.few[0].blocks)
    }

    /// Multiplies rows 0 to `decode` one way and those up to `rows` the other.
    pub fn run(&self, context: &Context<'_>, decode: usize, rows: usize) -> StageResult {
        self.run_and_prepare(context, decode, rows, &Preparation::zeroed())
    }

    /// The same, with what is to be done for experts beside it.
    pub fn run_and_prepare(
        &self,
        context: &Context<'_>,
        decode: usize,
        rows: usize,
        to_do: &Preparation,
    ) -> StageResult {
        if decode > 8 && self.dense {
            self.decode_batch(context, decode, to_do)?;
        } else if decode > 0 {
            self.decode_few(context, decode, to_do)?;
        }
        if rows > decode {
            self.run_prefill(context.device, context.grid, decode, rows)?;
        }
        Ok(())
    }

    /// Up to eight rows a block.
    fn decode_few(&self, context: &Context<'_>, rows: usize, to_do: &Preparation) -> StageResult {
        let kernel = if self.dense { "decode_products_8" } else { "decode_products_any" };
        let shared = (DECODE_SHARED * (1 + usize::from(self.pairs))).max(to_do.shared_bytes());
        for launch in &self.few {
            context.device.launch(
                kernel,
                [launch.blocks + to_do.blocks(rows.min(8)), rows.div_ceil(8), 1],
                32 * DECODE_WARPS,
                shared,
                args![
                    Arg::value(launch.list()),
                    launch.products.len(),
                    launch.blocks,
                    rows,
                    Arg::value(*to_do),
                    context.grid
                ],
            )?;
        }
        Ok(())
    }

    /// More rows, whose activations the warps of a block share.
    fn decode_batch(&self, context: &Context<'_>, rows: usize, to_do: &Preparation) -> StageResult {
        let (kernel, eights) = match rows {
            0..=16 => ("decode_products_16", 2),
            17..=32 => ("decode_products_32", 4),
            _ => ("decode_products_64", MOST_EIGHTS),
        };
        let shared = BATCH_SHARED * eights * (1 + usize::from(self.exact));
        let shared = shared.max(to_do.shared_bytes());
        for launch in &self.batch {
            for first in (0..rows).step_by(8 * eights) {
                let some = (rows - first).min(8 * eights);
                context.device.launch(
                    kernel,
                    [launch.blocks + to_do.blocks(some), 1, 1],
                    32 * DECODE_WARPS,
                    shared,
                    args![
                        Arg::value(launch.list()),
                        launch.products.len(),
                        launch.blocks,
                        first,
                        rows,
                        Arg::value(*to_do),
                        Arg::value(context.workspace.pointers())
                    ],
                )?;
            }
        }
        Ok(())
    }

    /// Multiplies rows `first` to `end` the way that suits many.
    pub fn run_prefill(
        &self,
        device: &Device,
        grid: Pointer,
        first: usize,
        end: usize,
    ) -> StageResult {
        let kernel = if self.dense { "prefill_products" } else { "prefill_products_any" };
        device.launch(
            kernel,
            [(end - first).div_ceil(PREFILL_ROWS), self.prefill_blocks, 1],
            128,
            64 << 10,
            args![self.prefill.pointer(), self.count, first, end, grid],
        )
    }
}
