//! Dense matrix products: several matrices in one launch.

#![allow(unsafe_code, reason = "launches kernels")]

use std::sync::Arc;

use bytemuck::Zeroable;
use ds4_engine::backend::StageResult;

use crate::{
    constants::{
        BATCH_STAGE_BYTES, BATCH_STAGES, DECODE_WARPS, MOST_EXPERTS, MOST_PRODUCTS, PREFILL_ROWS,
        PREFILL_STAGES, PREFILL_THREADS, TILE, WARP,
    },
    device::{Buffer, Device, Grid},
    formats::WeightType,
    kernel::Pointer,
    memory::Memory,
    params::{
        self, DECODE_PRODUCTS_8, DECODE_PRODUCTS_16, DECODE_PRODUCTS_32, DECODE_PRODUCTS_64,
        DECODE_PRODUCTS_ANY, DecodeProductsParams, PREFILL_PRODUCTS, PREFILL_PRODUCTS_ANY,
        PackedMatrix, PrefillProductsParams, Preparation,
    },
    weights::DeviceMatrix,
};

/// Bytes of shared memory for a block's results, per eight activation rows.
const DECODE_SHARED: usize = DECODE_WARPS * 128 * size_of::<f32>();
/// Most rows of a launch that decodes, in eights.
const MOST_EIGHTS: usize = 8;
/// Types that attention and other dense matrices are stored in (`DENSE_TYPES` in kernels/).
const DENSE_TYPES: [i32; 2] = [WeightType::Q8_0 as i32, WeightType::F16 as i32];
/// Bytes of shared memory of a block of prefill: stages of 64 columns in halves.
const PREFILL_SHARED: usize = PREFILL_STAGES * PREFILL_ROWS * 64 * size_of::<u16>();

/// Activations in halves, `[n, stride]`.
#[derive(Clone, Copy)]
pub(crate) struct Input<'a> {
    x: &'a Buffer<u16>,
    /// What rounding to halves left over, if the product wants it.
    low: Option<&'a Buffer<u16>>,
    stride: usize,
}

impl<'a> Input<'a> {
    /// Rows of `x`, rounded to halves.
    pub fn rounded(x: &'a Buffer<u16>, stride: usize) -> Self {
        Input { x, low: None, stride }
    }

    /// Rows of `x + low`.
    pub fn exact(x: &'a Buffer<u16>, low: &'a Buffer<u16>, stride: usize) -> Self {
        Input { x, low: Some(low), stride }
    }
}

/// Where results go: element `at` of a buffer is that of the first row, `stride` apart from row to
/// row.
#[derive(Clone, Copy)]
enum Output<'a> {
    Floats(&'a Buffer<f32>, usize, usize),
    Halves(&'a Buffer<u16>, usize, usize),
}

/// A matrix, what it is multiplied with and where results go.
#[derive(Clone, Copy)]
pub(crate) struct Product<'a> {
    matrix: &'a DeviceMatrix,
    /// The second matrix of a SwiGLU pair, and its limit.
    up: Option<(&'a DeviceMatrix, f32)>,
    /// The block of a block-diagonal matrix, and how many there are.
    group: (usize, usize),
    input: Input<'a>,
    output: Output<'a>,
    needed: Option<(&'a Buffer<u32>, usize)>,
}

impl<'a> Product<'a> {
    /// All rows of `matrix`, in f32.
    pub fn floats(matrix: &'a DeviceMatrix, input: Input<'a>, out: &'a Buffer<f32>) -> Self {
        Self::floats_at(matrix, input, out, 0, matrix.rows)
    }

    /// The same from element `at` on, `stride` apart from row to row.
    pub fn floats_at(
        matrix: &'a DeviceMatrix,
        input: Input<'a>,
        out: &'a Buffer<f32>,
        at: usize,
        stride: usize,
    ) -> Self {
        Self::new(matrix, input, Output::Floats(out, at, stride))
    }

    /// All rows of `matrix`, in halves.
    pub fn halves(matrix: &'a DeviceMatrix, input: Input<'a>, out: &'a Buffer<u16>) -> Self {
        Self::new(matrix, input, Output::Halves(out, 0, matrix.rows))
    }

    /// Block `i` of the `groups` of a block-diagonal matrix; results of all are side by side, in
    /// halves.
    pub fn group(
        matrix: &'a DeviceMatrix,
        input: Input<'a>,
        i: usize,
        groups: usize,
        out: &'a Buffer<u16>,
    ) -> Self {
        let at = i * (matrix.rows / groups);
        let output = Output::Halves(out, at, matrix.rows);
        Product { group: (i, groups), ..Self::new(matrix, input, output) }
    }

    /// SwiGLU of the products with `gate` and `up`, in halves.
    pub fn swiglu(
        gate: &'a DeviceMatrix,
        up: &'a DeviceMatrix,
        input: Input<'a>,
        limit: f32,
        out: &'a Buffer<u16>,
    ) -> Self {
        Product { up: Some((up, limit)), ..Self::halves(gate, input, out) }
    }

    /// Left out when element `at` of `flags` is 0.
    pub fn needed(self, flags: &'a Buffer<u32>, at: usize) -> Self {
        Product { needed: Some((flags, at)), ..self }
    }

    fn new(matrix: &'a DeviceMatrix, input: Input<'a>, output: Output<'a>) -> Self {
        Product { matrix, up: None, group: (0, 1), input, output, needed: None }
    }

    /// The number of rows for which the buffers have room.
    fn most_rows(&self) -> usize {
        let Product { matrix: m, input, group: (i, groups), .. } = self;
        let input_rows = |b: &Buffer<u16>| rows_within(b.len(), i * m.cols, m.cols, input.stride);
        let rows = m.rows / groups;
        let output_rows = match self.output {
            Output::Floats(b, at, stride) => rows_within(b.len(), at, rows, stride),
            Output::Halves(b, at, stride) => rows_within(b.len(), at, rows, stride),
        };
        let low_rows = input.low.map_or(usize::MAX, input_rows);
        input_rows(input.x).min(low_rows).min(output_rows)
    }

    fn params(&self) -> params::Product {
        let Product { matrix: m, input, group: (i, groups), .. } = *self;
        let rows = m.rows / groups;
        let (out, out_half, out_stride) = match self.output {
            Output::Floats(b, at, stride) => (b.at(at), Pointer::NULL, stride),
            Output::Halves(b, at, stride) => (Pointer::NULL, b.at(at), stride),
        };
        let (up, limit) = self.up.map_or((PackedMatrix::NONE, 0.0), |(m, l)| (m.packed(), l));
        params::Product {
            weights: m.packed(),
            up,
            x: input.x.at(i * m.cols),
            x_low: input.low.map_or(Pointer::NULL, |low| low.at(i * m.cols)),
            out,
            out_half,
            needed: self.needed.map_or(Pointer::NULL, |(flags, at)| flags.range(at, 1)),
            ty: m.ty as i32,
            rows: rows as i32,
            columns: m.cols as i32,
            first_block: 0,
            x_stride: input.stride as i32,
            out_stride: out_stride as i32,
            first_tile: (i * rows / TILE) as i32,
            split: split_k(m) as i32,
            limit,
            padding: 0,
        }
    }

    /// What the addresses are in.
    fn memory(&self) -> Vec<Arc<Memory>> {
        let mut all = vec![self.matrix.memory(), self.input.x.memory()];
        all.extend(self.up.map(|(up, _)| up.memory()));
        all.extend(self.input.low.map(Buffer::memory));
        all.extend(self.needed.map(|(flags, _)| flags.memory()));
        all.push(match self.output {
            Output::Floats(b, ..) => b.memory(),
            Output::Halves(b, ..) => b.memory(),
        });
        all
    }
}

/// Rows of `width` elements that a buffer of `len` has from `at` on, `stride` apart.
fn rows_within(len: usize, at: usize, width: usize, stride: usize) -> usize {
    len.checked_sub(at + width).map_or(0, |rest| rest / stride.max(1) + 1)
}

/// Warps that share a tile when few activation rows are multiplied, each with a part of the columns
/// (split-K): as many as it takes to keep the memory busy with this matrix alone.
fn split_k(m: &DeviceMatrix) -> usize {
    const WARPS: usize = 2048;
    (WARPS / m.rows.div_ceil(TILE)).clamp(1, DECODE_WARPS).next_power_of_two().min(DECODE_WARPS)
}

impl params::Product {
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
        self.up != PackedMatrix::NONE
    }
}

impl Preparation {
    /// Blocks that make integers of `rows` rows, one warp for each unit.
    fn blocks(&self, rows: usize) -> usize {
        (rows * self.quantised.units as usize).div_ceil(DECODE_WARPS)
    }

    /// Bytes of shared memory that routing needs: scores of each warp's row.
    fn shared_bytes(&self) -> usize {
        let routes = self.routing.logits != Pointer::NULL;
        if routes { DECODE_WARPS * MOST_EXPERTS * size_of::<f32>() } else { 0 }
    }
}

/// The memory where the blocks of split-K products meet, for any of some products.
pub(crate) struct Workspace {
    sums: Buffer<f32>,
    /// Zero between launches.
    arrivals: Buffer<u32>,
}

impl Workspace {
    /// For launches of up to `blocks` blocks (`Products::most_blocks`).
    pub fn new(device: &Device, blocks: usize) -> StageResult<Workspace> {
        Ok(Workspace {
            sums: device.alloc(blocks * Self::BLOCK_SUMS)?,
            arrivals: device.alloc_zeroed(blocks)?,
        })
    }

    /// Sums of a block.
    const BLOCK_SUMS: usize = MOST_EIGHTS * DECODE_SHARED / size_of::<f32>();

    fn params(&self, blocks: usize) -> params::Workspace {
        params::Workspace {
            sums: self.sums.first(blocks * Self::BLOCK_SUMS),
            arrivals: self.arrivals.first(blocks),
        }
    }
}

/// What products of a step share.
#[derive(Clone, Copy)]
pub(crate) struct Context<'a> {
    pub device: &'a Device,
    /// The grid of IQ2_XXS.
    pub grid: &'a Buffer<[u16; 8]>,
    pub workspace: &'a Workspace,
}

/// Products of one launch, each with its first block, and how many blocks they take.
struct Placed {
    products: Vec<params::Product>,
    blocks: usize,
}

impl Placed {
    fn new(products: &[params::Product], blocks_of: fn(&params::Product) -> usize) -> Placed {
        let mut blocks = 0;
        let placed = products.iter().map(|p| {
            let first_block = blocks as i32;
            blocks += blocks_of(p);
            params::Product { first_block, ..*p }
        });
        Placed { products: placed.collect(), blocks }
    }

    /// All of them, for `rows` rows.
    fn params(&self, rows: usize, preparation: &Preparation) -> DecodeProductsParams {
        let mut products = [params::Product::zeroed(); MOST_PRODUCTS];
        products[..self.products.len()].copy_from_slice(&self.products);
        DecodeProductsParams {
            products,
            preparation: *preparation,
            workspace: params::Workspace::NONE,
            iq2_grid: Pointer::NULL,
            count: self.products.len() as i32,
            blocks: self.blocks as i32,
            first: 0,
            rows: rows as i32,
        }
    }
}

/// Products that are launched together. Their buffers live as long as they do.
pub(crate) struct Products {
    /// Launches of a few products each: for up to eight rows, and for more.
    few: Vec<Placed>,
    batch: Vec<Placed>,
    prefill: Buffer<params::Product>,
    count: usize,
    prefill_blocks: usize,
    /// Rows for which there is room in all buffers.
    most_rows: usize,
    /// Whether the kernels for dense types do.
    dense: bool,
    pairs: bool,
    exact: bool,
    _memory: Vec<Arc<Memory>>,
}

impl Products {
    pub fn new(device: &Device, products: &[Product<'_>]) -> StageResult<Products> {
        let most_rows = products.iter().map(Product::most_rows).min().unwrap_or(0);
        let memory = products.iter().flat_map(Product::memory).collect();
        let products: Vec<_> = products.iter().map(Product::params).collect();
        let launches = |blocks_of| {
            let some = products.chunks(MOST_PRODUCTS);
            some.map(|some| Placed::new(some, blocks_of)).collect()
        };
        let prefill = Placed::new(&products, params::Product::prefill_blocks);
        Ok(Products {
            few: launches(params::Product::few_blocks),
            batch: launches(params::Product::batch_blocks),
            prefill: device.buffer(&prefill.products)?,
            count: products.len(),
            prefill_blocks: prefill.blocks,
            most_rows,
            dense: products.iter().all(|p| DENSE_TYPES.contains(&p.ty)),
            pairs: products.iter().any(params::Product::is_pair),
            exact: products.iter().any(|p| p.x_low != Pointer::NULL),
            _memory: memory,
        })
    }

    /// Blocks of the largest launch for which a workspace has to have room.
    pub fn most_blocks(&self) -> usize {
        self.batch.iter().map(|launch| launch.blocks).max().unwrap_or(0)
    }

    /// The only product for `rows` rows, and the blocks that it takes for every eight rows that are
    /// decoded.
    ///
    /// # Panics
    /// If its buffers have no room for so many.
    pub fn only(&self, rows: usize) -> (params::Product, usize) {
        self.check(rows);
        (self.few[0].products[0], self.few[0].blocks)
    }

    /// Multiplies rows 0 to `decode` one way and the rows from there to `rows` the other.
    ///
    /// # Panics
    /// If the buffers have no room for so many.
    pub fn run(&self, context: &Context<'_>, decode: usize, rows: usize) -> StageResult {
        // SAFETY: there is nothing to prepare.
        unsafe { self.run_and_prepare(context, decode, rows, &Preparation::NONE) }
    }

    /// The same, with what is to be done for experts beside it.
    ///
    /// # Safety
    /// The addresses in `preparation` belong to live buffers with `decode` rows.
    pub unsafe fn run_and_prepare(
        &self,
        context: &Context<'_>,
        decode: usize,
        rows: usize,
        preparation: &Preparation,
    ) -> StageResult {
        self.check(rows);
        if decode > 8 && self.dense {
            // SAFETY: as the caller says.
            unsafe { self.decode_batch(context, decode, preparation) }?;
        } else if decode > 0 {
            // SAFETY: as the caller says.
            unsafe { self.decode_few(context, decode, preparation) }?;
        }
        if rows > decode {
            self.run_prefill(context.device, context.grid, decode, rows)?;
        }
        Ok(())
    }

    /// Up to eight rows a block.
    ///
    /// # Safety
    /// As [`run_and_prepare`](Self::run_and_prepare).
    unsafe fn decode_few(
        &self,
        context: &Context<'_>,
        rows: usize,
        preparation: &Preparation,
    ) -> StageResult {
        let kernel = if self.dense { DECODE_PRODUCTS_8 } else { DECODE_PRODUCTS_ANY };
        let results = DECODE_SHARED * (1 + usize::from(self.pairs));
        let shared = results.max(preparation.shared_bytes());
        for launch in &self.few {
            let blocks = launch.blocks + preparation.blocks(rows.min(8));
            let grid = Grid {
                blocks: [blocks, rows.div_ceil(8), 1],
                threads: DECODE_WARPS * WARP,
                shared,
            };
            let params = DecodeProductsParams {
                iq2_grid: context.grid.pointer(),
                ..launch.params(rows, preparation)
            };
            // SAFETY: the products' buffers are kept and have that many rows; the caller answers
            // for the others.
            unsafe { context.device.launch(kernel, grid, &params) }?;
        }
        Ok(())
    }

    /// More rows, whose activations the warps of a block share.
    ///
    /// # Safety
    /// As [`run_and_prepare`](Self::run_and_prepare).
    unsafe fn decode_batch(
        &self,
        context: &Context<'_>,
        rows: usize,
        preparation: &Preparation,
    ) -> StageResult {
        let (kernel, eights) = match rows {
            0..=16 => (DECODE_PRODUCTS_16, 2),
            17..=32 => (DECODE_PRODUCTS_32, 4),
            _ => (DECODE_PRODUCTS_64, MOST_EIGHTS),
        };
        let stages = BATCH_STAGES * BATCH_STAGE_BYTES * eights * (1 + usize::from(self.exact));
        let shared = stages.max(preparation.shared_bytes());
        for launch in &self.batch {
            for first in (0..rows).step_by(8 * eights) {
                let some = (rows - first).min(8 * eights);
                let blocks = launch.blocks + preparation.blocks(some);
                let grid = Grid { blocks: [blocks, 1, 1], threads: DECODE_WARPS * WARP, shared };
                let params = DecodeProductsParams {
                    first: first as i32,
                    workspace: context.workspace.params(launch.blocks),
                    ..launch.params(rows, preparation)
                };
                // SAFETY: the products' buffers are kept and have that many rows; the workspace has
                // room for the blocks; the caller answers for the others.
                unsafe { context.device.launch(kernel, grid, &params) }?;
            }
        }
        Ok(())
    }

    /// Multiplies rows `first` to `end` the way that suits many.
    ///
    /// # Panics
    /// If the buffers have no room for so many.
    pub fn run_prefill(
        &self,
        device: &Device,
        iq2_grid: &Buffer<[u16; 8]>,
        first: usize,
        end: usize,
    ) -> StageResult {
        self.check(end);
        let kernel = if self.dense { PREFILL_PRODUCTS } else { PREFILL_PRODUCTS_ANY };
        let blocks = [(end - first).div_ceil(PREFILL_ROWS), self.prefill_blocks, 1];
        let grid = Grid { blocks, threads: PREFILL_THREADS, shared: PREFILL_SHARED };
        let params = PrefillProductsParams {
            products: self.prefill.first(self.count),
            iq2_grid: iq2_grid.pointer(),
            count: self.count as i32,
            first_row: first as i32,
            end_row: end as i32,
        };
        // SAFETY: the products' buffers are kept and have that many rows.
        unsafe { device.launch(kernel, grid, &params) }
    }

    fn check(&self, rows: usize) {
        assert!(rows <= self.most_rows, "products of {rows} rows, room for {}", self.most_rows);
    }
}
