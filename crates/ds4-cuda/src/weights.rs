//! The model's weights on the device.
//!
//! Matrices are brought there in chunks, through page-locked memory and a staging buffer, and
//! rearranged on the way into the order in which kernels read them (kernels/formats.cuh). Matrices
//! without a file are made in the staging buffer.

#![allow(unsafe_code, reason = "launches kernels")]

use std::{ops::Range, sync::Arc};

use ds4_engine::backend::{BackendError, StageResult};
use ds4_model::{
    Model,
    weights::{self, ExpertStack, Matrix, Routing, TensorData},
};
use gguf::TensorType;
use half::f16;
use rayon::prelude::*;

pub use crate::formats::WeightType;
use crate::{
    Error,
    constants::{BF16_SOURCE, MOST_EXPERTS, REPACK_WARPS, TILE, WARP},
    device::{Buffer, Device, Grid, Pinned},
    generate::generate,
    memory::Memory,
    params::{PackedMatrix, REPACK, RepackParams},
};

/// A matrix on the device.
pub struct DeviceMatrix {
    /// How it is stored.
    pub ty: WeightType,
    /// Outputs (of all experts, for a stack).
    pub rows: usize,
    /// Inputs.
    pub cols: usize,
    /// Its codes, scales and further scales, one after the other.
    memory: Buffer<u8>,
    bytes: [usize; 3],
}

impl DeviceMatrix {
    /// Where its parts are.
    pub(crate) fn packed(&self) -> PackedMatrix {
        let [codes, scales, more_scales] = self.bytes;
        PackedMatrix {
            codes: self.memory.range(0, codes),
            scales: self.memory.range(codes, scales),
            more_scales: self.memory.range(codes + scales, more_scales),
        }
    }

    /// What they are in.
    pub(crate) fn memory(&self) -> Arc<Memory> {
        self.memory.memory()
    }
}

/// The function of a hyper-connection, in f16 or f32 as it is.
pub(crate) struct MixMatrix {
    pub weights: Buffer<u8>,
    pub halves: bool,
    pub outputs: usize,
}

pub(crate) struct HyperConnection {
    pub function: MixMatrix,
    pub base: Buffer<f32>,
    pub scale: Buffer<f32>,
}

pub(crate) struct Attention {
    pub norm: Buffer<f32>,
    pub q_a: DeviceMatrix,
    pub q_a_norm: Buffer<f32>,
    pub q_b: DeviceMatrix,
    pub kv: DeviceMatrix,
    pub kv_norm: Buffer<f32>,
    pub sinks: Buffer<f32>,
    pub output_a: DeviceMatrix,
    pub output_b: DeviceMatrix,
}

pub(crate) struct Compressor {
    pub kv: DeviceMatrix,
    pub gate: DeviceMatrix,
    pub position_bias: Buffer<f32>,
    pub norm: Buffer<f32>,
}

pub(crate) struct Indexer {
    pub q_b: DeviceMatrix,
    pub head_weights: DeviceMatrix,
    pub compressor: Compressor,
}

pub(crate) struct Experts {
    pub norm: Buffer<f32>,
    pub router: DeviceMatrix,
    pub bias: Option<Buffer<f32>>,
    pub table: Option<Buffer<u32>>,
    /// Whether `table` lists an expert twice for some token.
    pub repeats: bool,
    pub gate: DeviceMatrix,
    pub up: DeviceMatrix,
    pub down: DeviceMatrix,
    pub shared_gate: DeviceMatrix,
    pub shared_up: DeviceMatrix,
    pub shared_down: DeviceMatrix,
}

pub(crate) struct Layer {
    pub attn_hc: HyperConnection,
    pub attn: Attention,
    pub compressor: Option<Compressor>,
    pub indexer: Option<Indexer>,
    pub ffn_hc: HyperConnection,
    pub ffn: Experts,
}

/// All weights.
pub(crate) struct Weights {
    pub token_embedding: DeviceMatrix,
    pub layers: Vec<Layer>,
    pub output_hc: HyperConnection,
    pub output_norm: Buffer<f32>,
    pub output: DeviceMatrix,
    /// The grid of IQ2_XXS in halves.
    pub iq2_grid: Buffer<[u16; 8]>,
    /// The same grid as selectors of bytes (kernels/experts_q2.cu).
    pub iq2_selectors: Buffer<u32>,
}

impl Weights {
    /// Bytes that the weights of `model` take on a device.
    ///
    /// # Errors
    /// If a matrix has a shape or type that the kernels don't take.
    pub fn device_bytes(model: &Model) -> Result<u64, Error> {
        if model.config.experts > MOST_EXPERTS {
            return Err(Error::Shape {
                tensor: "experts".to_owned(),
                found: model.config.experts.to_string(),
                expected: format!("at most {MOST_EXPERTS}"),
            });
        }
        let w = &model.weights;
        let mut bytes = matrix_bytes(&w.token_embedding)? + matrix_bytes(&w.output)?;
        for layer in &w.layers {
            same_types(&layer.ffn)?;
            for (_, m) in matrices(layer) {
                bytes += matrix_bytes(m)?;
            }
            for (_, stack) in stacks(layer) {
                bytes += matrix_bytes(&flat(stack))?;
            }
            let hc = [&layer.attn_hc, &layer.ffn_hc];
            bytes += hc.map(|hc| hc.function.data.byte_count() as u64).iter().sum::<u64>();
        }
        Ok(bytes)
    }

    /// Loads the weights of `model`; `progress` hears of the bytes done and of all there are.
    pub fn load(
        device: &Device,
        model: &Model,
        progress: impl FnMut(u64, u64),
    ) -> Result<Weights, Error> {
        let total = Self::device_bytes(model)?;
        let mut loader = Loader::new(device, total, progress)?;
        let w = &model.weights;
        let used = model.config.experts_used;
        let layers = w.layers.iter().map(|layer| loader.layer(layer, used));
        let layers = layers.collect::<Result<_, _>>()?;
        let weights = Weights {
            token_embedding: loader.matrix(&w.token_embedding)?,
            layers,
            output_hc: loader.hyper_connection(&w.output_hc)?,
            output_norm: device.buffer(&w.output_norm)?,
            output: loader.matrix(&w.output)?,
            iq2_grid: device.buffer(&iq2_grid())?,
            iq2_selectors: device.buffer(&iq2_selectors())?,
        };
        device.synchronize()?;
        Ok(weights)
    }
}

/// Pairs are multiplied by one kernel.
fn same_types(ffn: &weights::Experts) -> Result<(), Error> {
    let pairs = [
        ("ffn_gate_exps, ffn_up_exps", ffn.gate.ty, ffn.up.ty),
        ("ffn_gate_shexp, ffn_up_shexp", ffn.shared_gate.ty, ffn.shared_up.ty),
    ];
    match pairs.into_iter().find(|(_, gate, up)| gate != up) {
        None => Ok(()),
        Some((tensor, gate, up)) => Err(Error::Shape {
            tensor: tensor.to_owned(),
            found: format!("{gate:?} and {up:?}"),
            expected: "the same type".to_owned(),
        }),
    }
}

fn matrices(layer: &weights::LayerWeights) -> Vec<(&'static str, &Matrix)> {
    let (a, f) = (&layer.attn, &layer.ffn);
    let mut all = vec![
        ("attn_q_a", &a.q_a),
        ("attn_q_b", &a.q_b),
        ("attn_kv", &a.kv),
        ("attn_output_a", &a.output_a),
        ("attn_output_b", &a.output_b),
        ("ffn_gate_inp", &f.router),
        ("ffn_gate_shexp", &f.shared_gate),
        ("ffn_up_shexp", &f.shared_up),
        ("ffn_down_shexp", &f.shared_down),
    ];
    if let Some(c) = &layer.compressor {
        all.extend([("attn_compressor_kv", &c.kv), ("attn_compressor_gate", &c.gate)]);
    }
    if let Some(i) = &layer.indexer {
        all.extend([
            ("indexer.attn_q_b", &i.q_b),
            ("indexer.proj", &i.head_weights),
            ("indexer_compressor_kv", &i.compressor.kv),
            ("indexer_compressor_gate", &i.compressor.gate),
        ]);
    }
    all
}

fn stacks(layer: &weights::LayerWeights) -> [(&'static str, &ExpertStack); 3] {
    let f = &layer.ffn;
    [("ffn_gate_exps", &f.gate), ("ffn_up_exps", &f.up), ("ffn_down_exps", &f.down)]
}

/// A stack as one matrix: its experts one below the other.
fn flat(stack: &ExpertStack) -> Matrix {
    let rows = stack.experts * stack.rows;
    Matrix { ty: stack.ty, rows, cols: stack.cols, data: stack.data.clone() }
}

fn iq2_grid() -> Vec<[u16; 8]> {
    let halves = |entry: &u64| entry.to_le_bytes().map(|m| f16::from_f32(m.into()).to_bits());
    gguf::IQ2_XXS_GRID.iter().map(halves).collect()
}

/// A nibble for each column: the number of its magnitude among the three that there are. Columns
/// with even numbers come first.
fn iq2_selectors() -> Vec<u32> {
    const ORDER: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];
    let selectors = |entry: &u64| {
        let magnitudes = entry.to_le_bytes();
        let nibbles = ORDER.iter().enumerate().map(|(place, column)| {
            let number = match magnitudes[*column] {
                8 => 0,
                25 => 1,
                _ => 2,
            };
            number << (4 * place)
        });
        nibbles.sum()
    };
    gguf::IQ2_XXS_GRID.iter().map(selectors).collect()
}

fn layout(m: &Matrix) -> Result<(WeightType, [usize; 3]), Error> {
    let refuse = |expected: String| Error::Shape {
        tensor: format!("matrix of {} rows and {} columns", m.rows, m.cols),
        found: format!("{:?}", m.ty),
        expected,
    };
    let Some(ty) = WeightType::of(m.ty) else {
        return Err(refuse("F32, F16, BF16, Q8_0, Q4_K, Q2_K, IQ2_XXS or MXFP4".to_owned()));
    };
    let unit = ty.unit();
    if !m.cols.is_multiple_of(unit.columns) {
        return Err(refuse(format!("columns in multiples of {}", unit.columns)));
    }
    let units = m.rows.div_ceil(TILE) * (m.cols / unit.columns);
    Ok((ty, unit.bytes.map(|bytes| bytes * units)))
}

fn matrix_bytes(m: &Matrix) -> Result<u64, Error> {
    Ok(layout(m)?.1.iter().map(|bytes| *bytes as u64).sum())
}

/// Bytes of a chunk in file layout.
const CHUNK: usize = 64 << 20;

struct Loader<'a, P> {
    device: &'a Device,
    progress: P,
    done: u64,
    total: u64,
    /// Two of each, so that one is filled while the other is on its way.
    slots: [Slot; 2],
    next: usize,
}

/// Whether any two of a few numbers are equal.
fn has_repeats(ids: &[u32]) -> bool {
    ids.iter().enumerate().any(|(i, id)| ids[..i].contains(id))
}

struct Slot {
    host: Pinned<u8>,
    staging: Buffer<u8>,
}

impl<'a, P: FnMut(u64, u64)> Loader<'a, P> {
    fn new(device: &'a Device, total: u64, progress: P) -> StageResult<Self> {
        let slot = || -> StageResult<Slot> {
            Ok(Slot { host: device.pinned(CHUNK)?, staging: device.alloc(CHUNK)? })
        };
        Ok(Loader { device, progress, done: 0, total, slots: [slot()?, slot()?], next: 0 })
    }

    /// A layer whose tokens use `used` experts.
    fn layer(&mut self, w: &weights::LayerWeights, used: usize) -> Result<Layer, Error> {
        let (a, f) = (&w.attn, &w.ffn);
        let device = self.device;
        let (mut bias, mut table, mut repeats) = (None, None, false);
        match &f.routing {
            Routing::Bias(values) => bias = Some(device.buffer(values)?),
            Routing::Hash(experts) => {
                table = Some(device.buffer(experts)?);
                repeats = experts.chunks_exact(used).any(has_repeats);
            }
        }
        Ok(Layer {
            attn_hc: self.hyper_connection(&w.attn_hc)?,
            attn: Attention {
                norm: device.buffer(&a.norm)?,
                q_a: self.matrix(&a.q_a)?,
                q_a_norm: device.buffer(&a.q_a_norm)?,
                q_b: self.matrix(&a.q_b)?,
                kv: self.matrix(&a.kv)?,
                kv_norm: device.buffer(&a.kv_norm)?,
                sinks: device.buffer(&a.sinks)?,
                output_a: self.matrix(&a.output_a)?,
                output_b: self.matrix(&a.output_b)?,
            },
            compressor: w.compressor.as_ref().map(|c| self.compressor(c)).transpose()?,
            indexer: w.indexer.as_ref().map(|i| self.indexer(i)).transpose()?,
            ffn_hc: self.hyper_connection(&w.ffn_hc)?,
            ffn: Experts {
                norm: device.buffer(&f.norm)?,
                router: self.matrix(&f.router)?,
                bias,
                table,
                repeats,
                gate: self.matrix(&flat(&f.gate))?,
                up: self.matrix(&flat(&f.up))?,
                down: self.matrix(&flat(&f.down))?,
                shared_gate: self.matrix(&f.shared_gate)?,
                shared_up: self.matrix(&f.shared_up)?,
                shared_down: self.matrix(&f.shared_down)?,
            },
        })
    }

    fn compressor(&mut self, c: &weights::Compressor) -> Result<Compressor, Error> {
        Ok(Compressor {
            kv: self.matrix(&c.kv)?,
            gate: self.matrix(&c.gate)?,
            position_bias: self.device.buffer(&c.position_bias)?,
            norm: self.device.buffer(&c.norm)?,
        })
    }

    fn indexer(&mut self, i: &weights::Indexer) -> Result<Indexer, Error> {
        Ok(Indexer {
            q_b: self.matrix(&i.q_b)?,
            head_weights: self.matrix(&i.head_weights)?,
            compressor: self.compressor(&i.compressor)?,
        })
    }

    fn hyper_connection(
        &mut self,
        hc: &weights::HyperConnection,
    ) -> Result<HyperConnection, Error> {
        let f = &hc.function;
        let halves = f.ty == TensorType::F16;
        let weights = if halves {
            self.device.buffer(f.data.bytes())?
        } else {
            let mut values = vec![0f32; f.rows * f.cols];
            for (r, row) in values.chunks_exact_mut(f.cols).enumerate() {
                gguf::dequantize_row(f.ty, f.view().row(r), row)
                    .map_err(|e| BackendError::Device(e.to_string()))?;
            }
            self.device.buffer(bytemuck::cast_slice::<f32, u8>(&values))?
        };
        Ok(HyperConnection {
            function: MixMatrix { weights, halves, outputs: f.rows },
            base: self.device.buffer(&hc.base)?,
            scale: self.device.buffer(&hc.scale)?,
        })
    }

    fn matrix(&mut self, m: &Matrix) -> Result<DeviceMatrix, Error> {
        let (ty, bytes) = layout(m)?;
        let memory = self.device.alloc(bytes.iter().sum())?;
        let matrix = DeviceMatrix { ty, rows: m.rows, cols: m.cols, memory, bytes };
        let row_bytes = m.data.byte_count() / m.rows;
        // Whole tiles, and at a boundary that the generator knows.
        let unit = TILE * row_bytes * size_of::<u64>();
        let rows = (CHUNK / unit).max(1) * TILE * size_of::<u64>();
        for first in (0..m.rows).step_by(rows) {
            let count = rows.min(m.rows - first);
            self.bring(&m.data, row_bytes, first, count)?;
            let slot = &self.slots[self.next];
            let source = if m.ty == TensorType::BF16 { BF16_SOURCE } else { ty as usize };
            repack(self.device, &slot.staging, source, row_bytes, first..first + count, &matrix)?;
            self.next = 1 - self.next;
        }
        self.done += bytes.iter().map(|b| *b as u64).sum::<u64>();
        (self.progress)(self.done, self.total);
        Ok(matrix)
    }

    /// Brings rows of a tensor to the staging buffer of the next slot.
    fn bring(
        &mut self,
        data: &TensorData,
        row_bytes: usize,
        first: usize,
        rows: usize,
    ) -> StageResult {
        let slot = &mut self.slots[self.next];
        let (start, bytes) = (first * row_bytes, rows * row_bytes);
        if bytes > slot.staging.len() {
            slot.staging = self.device.alloc(bytes)?;
            slot.host = self.device.pinned(bytes)?;
        }
        if let Some(generator) = data.generator() {
            return generate(self.device, generator, start, bytes, &slot.staging);
        }
        let from = &data.bytes()[start..start + bytes];
        let to = &mut slot.host.as_mut_slice()?[..bytes];
        to.par_chunks_mut(1 << 20).zip(from.par_chunks(1 << 20)).for_each(|(to, from)| {
            to.copy_from_slice(from);
        });
        self.device.upload_pinned(&mut slot.staging, 0, &mut slot.host, bytes)
    }
}

/// Brings rows of a matrix, which `staging` has as in a file of type `source`, to where lanes read
/// them. The first is that of a tile.
fn repack(
    device: &Device,
    staging: &Buffer<u8>,
    source: usize,
    row_bytes: usize,
    rows: Range<usize>,
    to: &DeviceMatrix,
) -> StageResult {
    assert!(rows.end <= to.rows && rows.start.is_multiple_of(TILE), "rows of another matrix");
    let units = rows.len().div_ceil(TILE) * (to.cols / to.ty.unit().columns);
    let params = RepackParams {
        source: staging.first(rows.len() * row_bytes),
        to: to.packed(),
        row_bytes: row_bytes as u64,
        source_type: source as i32,
        rows: rows.len() as i32,
        columns: to.cols as i32,
        first_tile: (rows.start / TILE) as i32,
    };
    let grid = Grid {
        blocks: [units.div_ceil(REPACK_WARPS), 1, 1],
        threads: REPACK_WARPS * WARP,
        shared: 0,
    };
    // SAFETY: the staging buffer has these rows, and the matrix has their tiles.
    unsafe { device.launch(REPACK, grid, &params) }
}
