//! Dense matrix products: several matrices in one launch.

use ds4_engine::backend::StageResult;

use crate::{
    device::{Buffer, Device, Pointer, args},
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
    limit: f32,
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
            limit: 0.0,
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

    fn is_pair(&self) -> bool {
        self.up != Planes::NONE
    }
}

/// Weight rows of a block when many activation rows are multiplied.
const PREFILL_ROWS: usize = 128;
/// Threads of a block that decodes.
const DECODE_THREADS: usize = 256;
/// Bytes of shared memory for each warp's results, per eight activation rows.
const DECODE_SHARED: usize = 128 * size_of::<f32>();

/// Products that are launched together.
pub(crate) struct Products {
    decode: Buffer<Product>,
    prefill: Buffer<Product>,
    count: usize,
    decode_blocks: usize,
    prefill_blocks: usize,
    /// Whether the kernels for dense types do.
    dense: bool,
    pairs: bool,
}

impl Products {
    pub fn new(device: &Device, products: Vec<Product>) -> StageResult<Products> {
        let dense = products.iter().all(|p| p.ty == 0 || p.ty == 1);
        let pairs = products.iter().any(Product::is_pair);
        let place = |rows: fn(&Product) -> usize| {
            let mut blocks = 0;
            let placed = products.iter().map(|p| {
                let first_block = blocks as i32;
                blocks += (p.rows as usize).div_ceil(rows(p));
                Product { first_block, ..*p }
            });
            let placed: Vec<_> = placed.collect();
            (placed, blocks)
        };
        let (decode, decode_blocks) = place(|_| TILE);
        let (prefill, prefill_blocks) =
            place(|p| if p.is_pair() { PREFILL_ROWS / 2 } else { PREFILL_ROWS });
        Ok(Products {
            decode: device.buffer(&decode)?,
            prefill: device.buffer(&prefill)?,
            count: products.len(),
            decode_blocks,
            prefill_blocks,
            dense,
            pairs,
        })
    }

    /// The first product as decoding kernels see it.
    pub fn pointer(&self) -> Pointer {
        self.decode.pointer()
    }

    /// Multiplies rows 0 to `decode` one way and those up to `rows` the other.
    pub fn run(&self, device: &Device, grid: Pointer, decode: usize, rows: usize) -> StageResult {
        if decode > 0 {
            self.decode(device, grid, decode)?;
        }
        if rows > decode {
            self.run_prefill(device, grid, decode, rows)?;
        }
        Ok(())
    }

    fn decode(&self, device: &Device, grid: Pointer, rows: usize) -> StageResult {
        let (kernel, eights) = match rows {
            _ if !self.dense => ("decode_products_any", 1),
            0..=8 => ("decode_products_8", 1),
            9..=16 => ("decode_products_16", 2),
            17..=32 => ("decode_products_32", 4),
            _ => ("decode_products_64", 8),
        };
        let shared = DECODE_THREADS / 32 * DECODE_SHARED * eights * (1 + usize::from(self.pairs));
        device.launch(
            kernel,
            [self.decode_blocks, rows.div_ceil(8 * eights), 1],
            DECODE_THREADS,
            shared,
            args![self.decode.pointer(), self.count, rows, grid],
        )
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
