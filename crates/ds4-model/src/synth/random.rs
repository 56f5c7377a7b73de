//! Random tensor data, directly in storage format.
//!
//! The generator is counter-based: word `i` of a tensor follows from the seed,
//! the tensor's name and `i` alone, so any part can be made anywhere, in any order.

use gguf::{TensorSpec, TensorType, dequantize_row};
use half::{bf16, f16};

use crate::{
    binding::{ExpectedTensor, Role, Slot},
    config::Config,
};

/// Makes the data of one tensor.
pub(super) struct Generator {
    key: u64,
    ty: TensorType,
    bytes: usize,
    content: Content,
}

/// What a tensor holds.
enum Content {
    /// The same number everywhere.
    Constant(f32),
    /// Numbers spread evenly around 0, in a float type.
    Uniform { largest: f32 },
    /// Random blocks with these scales.
    Blocks(Scales),
    /// Rows of distinct expert ids.
    ExpertIds { experts: u64, used: usize },
}

/// Bytes that every block gets at a place of its own, so that its numbers have the wanted spread.
struct Scales {
    at: usize,
    bytes: Vec<u8>,
}

impl Generator {
    pub fn new(config: &Config, expected: &ExpectedTensor, spec: &TensorSpec, seed: u64) -> Self {
        let elements = spec.dims.iter().product::<u64>() as usize;
        let spread = spread(expected);
        let content = match spec.ty {
            TensorType::I32 => {
                Content::ExpertIds { experts: config.experts as u64, used: config.experts_used }
            }
            _ if is_constant(expected) => Content::Constant(1.0),
            // The standard deviation of evenly spread numbers is their largest over √3.
            TensorType::F32 | TensorType::F16 | TensorType::BF16 => {
                Content::Uniform { largest: spread * 3f32.sqrt() }
            }
            ty => Content::Blocks(Scales::new(ty, spread)),
        };
        let bytes = elements / spec.ty.block_len() * spec.ty.block_bytes();
        Generator { key: seed ^ name_hash(&spec.name), ty: spec.ty, bytes, content }
    }

    /// Bytes of the whole tensor.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Fills `out` with the tensor's bytes from `start` on, a multiple of 8 and of the block size.
    pub fn fill(&self, start: usize, out: &mut [u8]) {
        match &self.content {
            Content::Constant(value) => {
                self.write_floats(out, std::iter::repeat(*value));
            }
            Content::Uniform { largest } => {
                let first = start / self.ty.block_bytes();
                let step = 2.0 * largest / 65535.0;
                let value = |i| (self.word(i as u64) >> 48) as f32 * step - largest;
                self.write_floats(out, (first..).map(value));
            }
            Content::Blocks(scales) => {
                for (i, bytes) in out.chunks_mut(8).enumerate() {
                    let word = self.word((start / 8 + i) as u64).to_le_bytes();
                    bytes.copy_from_slice(&word[..bytes.len()]);
                }
                for block in out.chunks_exact_mut(self.ty.block_bytes()) {
                    block[scales.at..][..scales.bytes.len()].copy_from_slice(&scales.bytes);
                }
            }
            Content::ExpertIds { experts, used } => {
                for (i, id) in out.chunks_exact_mut(4).enumerate() {
                    let index = start / 4 + i;
                    let expert = self.expert(index / used, index % used, *experts);
                    id.copy_from_slice(&(expert as u32).to_le_bytes());
                }
            }
        }
    }

    fn write_floats(&self, out: &mut [u8], values: impl Iterator<Item = f32>) {
        let size = self.ty.block_bytes();
        for (bytes, value) in out.chunks_exact_mut(size).zip(values) {
            match self.ty {
                TensorType::F16 => bytes.copy_from_slice(&f16::from_f32(value).to_le_bytes()),
                TensorType::BF16 => bytes.copy_from_slice(&bf16::from_f32(value).to_le_bytes()),
                _ => bytes.copy_from_slice(&value.to_le_bytes()),
            }
        }
    }

    /// Expert `slot` of a token: ids a fixed stride apart are distinct as long as the stride
    /// has no factor in common with their number.
    fn expert(&self, token: usize, slot: usize, experts: u64) -> u64 {
        let word = self.word(token as u64);
        let first = word % experts;
        let stride = (1 + (word >> 32) % experts..).find(|s| gcd(*s, experts) == 1).unwrap_or(1);
        (first + slot as u64 % experts * (stride % experts)) % experts
    }

    /// Random word `i`: SplitMix64 (Steele, Lea, Flood 2014), whose state is a counter.
    fn word(&self, i: u64) -> u64 {
        let mut z = self.key.wrapping_add(i.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

impl Scales {
    /// The scales that give random blocks of `ty` the standard deviation `spread`: those of a
    /// sample of blocks, measured, then stretched.
    fn new(ty: TensorType, spread: f32) -> Self {
        let unit = Scales::stretched(ty, 1.0);
        let sample =
            Generator { key: 0, ty, bytes: 256 * ty.block_bytes(), content: Content::Blocks(unit) };
        let mut bytes = vec![0; sample.bytes];
        sample.fill(0, &mut bytes);
        let mut values = vec![0.0; 256 * ty.block_len()];
        dequantize_row(ty, &bytes, &mut values).expect("recipes name readable types");
        let square = values.iter().map(|v| v * v).sum::<f32>() / values.len() as f32;
        Scales::stretched(ty, spread / square.sqrt())
    }

    fn stretched(ty: TensorType, d: f32) -> Self {
        let half = |x: f32| f16::from_f32(x).to_le_bytes();
        let (at, bytes) = match ty {
            // A power of two, as an exponent.
            TensorType::MXFP4 => (0, vec![(d.log2().round() + 128.0) as u8]),
            // With these mins a block's mean is 0.
            TensorType::Q2_K => (80, [half(d), half(1.5 * d)].concat()),
            TensorType::Q4_K => (0, [half(d), half(7.5 * d)].concat()),
            _ => (0, half(d).to_vec()),
        };
        Scales { at, bytes }
    }
}

/// Standard deviation of a tensor's numbers. Matrices keep the scale of their input; embeddings
/// and offsets are of the order of 1; logits are spread enough for a clear best token.
fn spread(expected: &ExpectedTensor) -> f32 {
    let keep = (expected.dims[0] as f32).sqrt().recip();
    match expected.binding.role {
        Role::Embedding => 1.0,
        Role::Output => 3.0 * keep,
        Role::PositionBias | Role::Vector => 0.5,
        _ => keep,
    }
}

/// Norms and factors are 1.
fn is_constant(expected: &ExpectedTensor) -> bool {
    use Slot::*;
    matches!(
        expected.binding.slot,
        OutputNorm
            | AttnNorm
            | QANorm
            | KvNorm
            | CompressorNorm
            | IndexerNorm
            | FfnNorm
            | OutputHcScale
            | AttnHcScale
            | FfnHcScale
    )
}

/// FNV-1a.
fn name_hash(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
    })
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}
