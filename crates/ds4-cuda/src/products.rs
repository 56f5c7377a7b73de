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

    /// Rows of a block that decodes.
    fn decode_rows(&self) -> usize {
        DECODE_WARPS / self.split as usize * TILE
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

/// Products that are launched together.
pub(crate) struct Products {
    /// Launches of a few products each, and their blocks.
    decode: Vec<(Vec<Product>, usize)>,
    prefill: Buffer<Product>,
    count: usize,
    prefill_blocks: usize,
    /// Whether the kernels for dense types do.
    dense: bool,
    pairs: bool,
}

impl Products {
    pub fn new(device: &Device, products: Vec<Product>) -> StageResult<Products> {
        let dense = products.iter().all(|p| p.ty == 0 || p.ty == 1);
        let pairs = products.iter().any(Product::is_pair);
        let place = |products: &[Product], rows: fn(&Product) -> usize| {
            let mut blocks = 0;
            let placed = products.iter().map(|p| {
                let first_block = blocks as i32;
                blocks += (p.rows as usize).div_ceil(rows(p));
                Product { first_block, ..*p }
            });
            let placed: Vec<_> = placed.collect();
            (placed, blocks)
        };
        let decode = products.chunks(MOST_PRODUCTS);
        let decode = decode.map(|some| place(some, Product::decode_rows)).collect();
        let (prefill, prefill_blocks) =
            place(&products, |p| if p.is_pair() { PREFILL_ROWS / 2 } else { PREFILL_ROWS });
        Ok(Products {
            decode,
            prefill: device.buffer(&prefill)?,
            count: products.len(),
            prefill_blocks,
            dense,
            pairs,
        })
    }

    /// The only product, and the blocks that it takes for every eight rows that are decoded.
    pub fn only(&self) -> (Product, usize) {
        (self.decode[0].0[0], self.decode[0].1)
    }

    /// Multiplies rows 0 to `decode` one way and those up to `rows` the other.
    pub fn run(&self, device: &Device, grid: Pointer, decode: usize, rows: usize) -> StageResult {
        self.run_and_prepare(device, grid, decode, rows, &Preparation::zeroed())
    }

    /// The same, with what is to be done for experts beside it.
    pub fn run_and_prepare(
        &self,
        device: &Device,
        grid: Pointer,
        decode: usize,
        rows: usize,
        to_do: &Preparation,
    ) -> StageResult {
        if decode > 0 {
            self.decode(device, grid, decode, to_do)?;
        }
        if rows > decode {
            self.run_prefill(device, grid, decode, rows)?;
        }
        Ok(())
    }

    fn decode(
        &self,
        device: &Device,
        grid: Pointer,
        rows: usize,
        to_do: &Preparation,
    ) -> StageResult {
        let (kernel, eights) = match rows {
            _ if !self.dense => ("decode_products_any", 1),
            0..=8 => ("decode_products_8", 1),
            9..=16 => ("decode_products_16", 2),
            17..=32 => ("decode_products_32", 4),
            _ => ("decode_products_64", 8),
        };
        let shared = DECODE_SHARED * eights * (1 + usize::from(self.pairs));
        for (products, blocks) in &self.decode {
            let mut list = [Product::zeroed(); MOST_PRODUCTS];
            list[..products.len()].copy_from_slice(products);
            device.launch(
                kernel,
                [*blocks + to_do.blocks(rows.min(8 * eights)), rows.div_ceil(8 * eights), 1],
                32 * DECODE_WARPS,
                shared,
                args![Arg::value(list), products.len(), *blocks, rows, Arg::value(*to_do), grid],
            )?;
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
