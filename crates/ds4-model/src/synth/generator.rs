//! Random tensor data, directly in storage format.
//!
//! The generator is counter-based: word `i` of a tensor follows from the seed,
//! the tensor's name and `i` alone, so any part can be made anywhere, in any order. What a
//! device needs to make the same bytes is public, and simple enough to be written twice:
//! integers, table look-ups, and for floats one rounded product.
//!
//! Matrices have a standard deviation of 1/√columns, so that an input of unit size gives an
//! output of unit size and activations stay finite through any number of layers. Nothing is
//! the same everywhere, not even the scales of blocks, so that a program that takes a number
//! from the wrong place computes something else.

use std::{num::NonZeroUsize, thread};

use gguf::{TensorType, dequantize_row};
use half::{bf16, f16};

use crate::{
    binding::{ExpectedTensor, Role, Slot},
    config::Config,
    error::{Error, Result},
};

/// Makes the data of one tensor.
#[derive(Debug, Clone)]
pub struct Generator {
    key: u64,
    ty: TensorType,
    bytes: usize,
    content: Content,
}

/// What a tensor holds.
#[derive(Debug, Clone)]
pub enum Content {
    /// Numbers in a float type, spread evenly over 2¹⁶ places: number `i` is
    /// (2·(word `i` >> 48) − 65535) · `half_step` + `middle`. Where `middle` is 0 it doesn't matter
    /// whether sum and product are rounded once or twice.
    Floats {
        /// Their mean.
        middle: f32,
        /// Half the distance between neighbours.
        half_step: f32,
    },
    /// Random blocks: byte `i` is byte `i % 8` of word `i / 8`, lowest first, except for the scales.
    Blocks(Scales),
    /// Rows of distinct expert ids.
    ExpertIds {
        /// Number of experts.
        experts: u64,
        /// Length of a row.
        used: usize,
    },
}

/// What blocks get as their scales, so that their numbers have the wanted spread.
#[derive(Debug, Clone)]
pub struct Scales {
    /// Where in a block they stand.
    pub at: usize,
    /// How many bytes of a choice count.
    pub size: usize,
    /// [`CHOICES`] of them; the random byte at `at`, modulo their number, says which a block gets.
    pub choices: Vec<[u8; 4]>,
}

/// Number of [`Scales::choices`], a power of two.
pub const CHOICES: usize = 64;

impl Generator {
    /// A generator for the tensor `expected`, stored as `ty`, of a model of shape `config`.
    ///
    /// # Errors
    /// If rows are not whole blocks of `ty`, or `ty` is neither readable nor that of a table.
    pub fn new(
        config: &Config,
        expected: &ExpectedTensor,
        ty: TensorType,
        seed: u64,
    ) -> Result<Self> {
        let (cols, rows) = (expected.dims[0], expected.dims[1..].iter().product::<u64>());
        let bytes = ty.row_bytes(cols as usize).and_then(|row| row.checked_mul(rows as usize));
        let bytes = bytes.ok_or_else(|| {
            let name = &expected.name;
            Error::Unmakeable { what: format!("{name} of {rows} rows of {cols} as {ty}") }
        })?;
        let (middle, spread) = distribution(expected);
        let content = match ty {
            TensorType::I32 => {
                Content::ExpertIds { experts: config.experts as u64, used: config.experts_used }
            }
            // The standard deviation of evenly spread numbers is their reach over √3.
            TensorType::F32 | TensorType::F16 | TensorType::BF16 => {
                Content::Floats { middle, half_step: spread * 3f32.sqrt() / 65535.0 }
            }
            ty => Content::Blocks(Scales::new(ty, spread)?),
        };
        Ok(Generator { key: seed ^ name_hash(&expected.name), ty, bytes, content })
    }

    /// What tells the tensor's words from those of any other: word `i` is that of [`word`].
    pub fn key(&self) -> u64 {
        self.key
    }

    /// Type of the elements.
    pub fn ty(&self) -> TensorType {
        self.ty
    }

    /// Bytes of the whole tensor.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// What the tensor holds.
    pub fn content(&self) -> &Content {
        &self.content
    }

    /// A number of bytes, at most `limit` but at least one, by which [`fill`](Self::fill) can
    /// start further on: a whole number of blocks and of words.
    pub fn piece_bytes(&self, limit: usize) -> usize {
        let unit = self.ty.block_bytes() * size_of::<u64>();
        (limit / unit).max(1) * unit
    }

    /// The whole tensor.
    ///
    /// Its threads are not those of a pool, whose tasks may wait for this very tensor.
    pub fn generate(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.bytes];
        let threads = thread::available_parallelism().map_or(1, NonZeroUsize::get);
        let share = self.piece_bytes(self.bytes.div_ceil(threads));
        thread::scope(|scope| {
            // What rounding to whole blocks leaves over is one more share.
            for (i, part) in bytes.chunks_mut(share).enumerate() {
                scope.spawn(move || self.fill(i * share, part));
            }
        });
        bytes
    }

    /// Fills `out` with the tensor's bytes from `start` on, a multiple of 8 and of the block size.
    pub fn fill(&self, start: usize, out: &mut [u8]) {
        match &self.content {
            Content::Floats { middle, half_step } => {
                let first = start / self.ty.block_bytes();
                let place = |i| 2 * (self.word(i as u64) >> 48) as i32 - 65535;
                let value = |i| place(i) as f32 * half_step + middle;
                self.write_floats(out, (first..).map(value));
            }
            Content::Blocks(scales) => {
                for (i, bytes) in out.chunks_mut(8).enumerate() {
                    let word = self.word((start / 8 + i) as u64).to_le_bytes();
                    bytes.copy_from_slice(&word[..bytes.len()]);
                }
                for block in out.chunks_exact_mut(self.ty.block_bytes()) {
                    let place = &mut block[scales.at..][..scales.size];
                    let choice = &scales.choices[usize::from(place[0]) % CHOICES];
                    place.copy_from_slice(&choice[..scales.size]);
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

    fn word(&self, i: u64) -> u64 {
        word(self.key, i)
    }
}

/// Random word `i` of `key`: SplitMix64 (Steele, Lea, Flood 2014), whose state is a counter.
pub fn word(key: u64, i: u64) -> u64 {
    let mut z = key.wrapping_add(i.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

impl Scales {
    /// The scales that give random blocks of `ty` the standard deviation `spread`: those of a
    /// sample of blocks, measured, then stretched.
    fn new(ty: TensorType, spread: f32) -> Result<Self> {
        let unit = Scales::stretched(ty, 1.0);
        let sample =
            Generator { key: 0, ty, bytes: 256 * ty.block_bytes(), content: Content::Blocks(unit) };
        let mut bytes = vec![0; sample.bytes];
        sample.fill(0, &mut bytes);
        let mut values = vec![0.0; 256 * ty.block_len()];
        dequantize_row(ty, &bytes, &mut values)?;
        let square = values.iter().map(|v| v * v).sum::<f32>() / values.len() as f32;
        Ok(Scales::stretched(ty, spread / square.sqrt()))
    }

    fn stretched(ty: TensorType, d: f32) -> Self {
        if ty == TensorType::MXFP4 {
            return Scales::powers_of_two(d);
        }
        // With these mins a block's mean is 0.
        let (at, min) = match ty {
            TensorType::Q2_K => (80, Some(1.5)),
            TensorType::Q4_K => (0, Some(7.5)),
            _ => (0, None),
        };
        let half = |x: f32| f16::from_f32(x).to_le_bytes();
        let choice = |i: usize| {
            let d = d * (0.75 + 0.5 * i as f32 / CHOICES as f32);
            let ([a, b], [c, e]) = (half(d), half(d * min.unwrap_or(0.0)));
            [a, b, c, e]
        };
        let size = if min.is_some() { 4 } else { 2 };
        Scales { at, size, choices: (0..CHOICES).map(choice).collect() }
    }

    /// The two powers of two around `d`, as exponents, in the proportion that gives a mean square
    /// of d².
    fn powers_of_two(d: f32) -> Self {
        let lower = d.log2().floor();
        let share = (4f32.powf(d.log2() - lower) - 1.0) / 3.0;
        let choice = |i: usize| {
            let doubled = (i as f32) < share * CHOICES as f32;
            [(lower + 128.0) as u8 + u8::from(doubled), 0, 0, 0]
        };
        Scales { at: 0, size: 1, choices: (0..CHOICES).map(choice).collect() }
    }
}

/// Mean and standard deviation of a tensor's numbers. Matrices keep the scale of their input, and
/// norms nearly do; embeddings and offsets are of the order of 1; logits are spread enough for
/// a clear best token. Router biases only tip the balance, so that experts are chosen nearly
/// evenly, as in the released model: 32 tokens of full width choose 134 of 256 experts.
fn distribution(expected: &ExpectedTensor) -> (f32, f32) {
    use Slot::*;
    let keep = (expected.dims[0] as f32).sqrt().recip();
    match expected.binding.slot {
        OutputNorm | AttnNorm | QANorm | KvNorm | CompressorNorm | IndexerNorm | FfnNorm
        | OutputHcScale | AttnHcScale | FfnHcScale => (1.0, 0.25),
        TokenEmbedding => (0.0, 1.0),
        Output => (0.0, 3.0 * keep),
        RouterBias => (0.0, 0.03),
        _ => match expected.binding.role {
            Role::PositionBias | Role::Vector => (0.0, 0.5),
            _ => (0.0, keep),
        },
    }
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
