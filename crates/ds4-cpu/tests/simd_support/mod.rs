//! Random inputs, and the plain computations that kernels are compared with.

#![allow(dead_code, reason = "each test file uses a part")]

use ds4_cpu::simd::Isa;
use ds4_model::weights::MatrixView;
use gguf::TensorType;

/// The types that kernels multiply with.
pub const TYPES: [TensorType; 8] = [
    TensorType::F32,
    TensorType::F16,
    TensorType::BF16,
    TensorType::Q8_0,
    TensorType::Q2_K,
    TensorType::Q4_K,
    TensorType::IQ2_XXS,
    TensorType::MXFP4,
];

/// Every instruction set here; there is at least one wherever CI runs.
pub fn every_isa() -> Vec<Isa> {
    let found = Isa::available();
    assert!(!found.is_empty(), "this machine has none of the instruction sets with kernels");
    found
}

/// A small generator of random numbers (SplitMix64).
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// Uniform in 0..1.
    pub fn uniform(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 24) as f32
    }

    /// About normal, with deviation 1.
    pub fn normal(&mut self) -> f32 {
        (0..12).map(|_| self.uniform()).sum::<f32>() - 6.0
    }

    pub fn normals(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.normal()).collect()
    }
}

/// A matrix that owns its bytes.
pub struct Matrix {
    pub ty: TensorType,
    pub rows: usize,
    pub cols: usize,
    pub bytes: Vec<u8>,
}

impl Matrix {
    /// Random bits everywhere, with scales of sensible size.
    pub fn random(ty: TensorType, rows: usize, cols: usize, random: &mut Random) -> Matrix {
        let mut bytes = vec![0; ty.row_bytes(cols).unwrap() * rows];
        bytes.fill_with(|| random.next() as u8);
        for block in bytes.chunks_exact_mut(ty.block_bytes()) {
            match ty {
                TensorType::F32 => block.copy_from_slice(&random.normal().to_le_bytes()),
                TensorType::F16 => put_f16(block, random.normal()),
                TensorType::BF16 => {
                    block.copy_from_slice(&half::bf16::from_f32(random.normal()).to_le_bytes())
                }
                TensorType::Q8_0 | TensorType::IQ2_XXS => put_f16(&mut block[..2], scale(random)),
                TensorType::Q2_K => {
                    put_f16(&mut block[80..82], scale(random));
                    put_f16(&mut block[82..], scale(random));
                }
                TensorType::Q4_K => {
                    put_f16(&mut block[..2], scale(random));
                    put_f16(&mut block[2..4], scale(random));
                }
                TensorType::MXFP4 => block[0] = 122 + block[0] % 8,
                ty => panic!("{ty} has no kernels"),
            }
        }
        Matrix { ty, rows, cols, bytes }
    }

    pub fn view(&self) -> MatrixView<'_> {
        MatrixView { ty: self.ty, rows: self.rows, cols: self.cols, bytes: &self.bytes }
    }

    /// The values, row by row.
    pub fn values(&self) -> Vec<f32> {
        let mut values = vec![0.0; self.rows * self.cols];
        for (r, values) in values.chunks_exact_mut(self.cols).enumerate() {
            gguf::dequantize_row(self.ty, self.view().row(r), values).unwrap();
        }
        values
    }
}

fn scale(random: &mut Random) -> f32 {
    0.01 + 0.03 * random.uniform()
}

fn put_f16(block: &mut [u8], value: f32) {
    block.copy_from_slice(&half::f16::from_f32(value).to_le_bytes());
}

/// What kernels see of activations when weights are of type `ty`: rounded to
/// i8 in groups of 32 if the weights are quantised, else as they are.
pub fn as_seen(ty: TensorType, x: &[f32], cols: usize) -> Vec<f32> {
    if ty.block_len() == 1 {
        return x.to_vec();
    }
    let mut seen = Vec::with_capacity(x.len());
    for group in x.chunks_exact(cols).flat_map(|row| row.chunks(32)) {
        let d = group.iter().fold(0f32, |max, x| max.max(x.abs())) / 127.0;
        let inverse = if d == 0.0 { 0.0 } else { 1.0 / d };
        seen.extend(group.iter().map(|x| (x * inverse).round_ties_even() * d));
    }
    seen
}

/// W·x in f64 of every token, and beside each product the sum of the magnitudes
/// of its terms, by which rounding is judged.
pub fn products(w: &[f32], x: &[f32], cols: usize) -> Vec<(f64, f64)> {
    let dot = |w: &[f32], x: &[f32]| {
        w.iter().zip(x).fold((0.0, 0.0), |(sum, size), (&w, &x)| {
            let term = f64::from(w) * f64::from(x);
            (sum + term, size + term.abs())
        })
    };
    let tokens = x.chunks_exact(cols);
    tokens.flat_map(|x| w.chunks_exact(cols).map(move |w| dot(w, x))).collect()
}
