//! Storage formats of cached rows.
//!
//! The model was trained with its cache in simulated low precision: key/value rows in FP8
//! (E4M3 per 64 elements) except for their rotary part, index keys in FP4 (E2M1 per 32 elements)
//! after a Hadamard rotation. [`RowCodec`] stores exactly those values, so the packed cache
//! loses nothing against the official numerics; without rounding, rows are plain f32
//! (docs/model.md, "Cache precision").

use ds4_model::config::{HEAD_DIM, INDEX_DIM, NOPE_DIM, ROPE_DIM};

/// Whether cached rows are rounded as in training.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CacheRounding {
    /// FP8 rows and FP4 index keys, as the official code simulates them.
    #[default]
    On,
    /// f32 throughout, as other implementations do; for comparing with them.
    Off,
}

impl CacheRounding {
    /// Format of window and compressed rows (512 elements).
    pub fn kv_codec(self) -> RowCodec {
        match self {
            CacheRounding::On => RowCodec::Fp8Kv,
            CacheRounding::Off => RowCodec::F32 { width: HEAD_DIM },
        }
    }

    /// Format of index keys (128 elements).
    pub fn index_codec(self) -> RowCodec {
        match self {
            CacheRounding::On => RowCodec::Fp4Index,
            CacheRounding::Off => RowCodec::F32 { width: INDEX_DIM },
        }
    }
}

/// Elements that share one FP8 scale.
const FP8_BLOCK: usize = 64;
/// Elements that share one FP4 scale.
const FP4_BLOCK: usize = 32;
/// FP8 scales of a row.
const FP8_SCALES: usize = NOPE_DIM / FP8_BLOCK;
/// 448 E4M3 codes, 64 f32, 7 scales, 1 byte of padding.
const FP8_ROW: usize = NOPE_DIM + 4 * ROPE_DIM + FP8_SCALES + 1;
/// 64 bytes of paired E2M1 codes, 4 scales.
const FP4_ROW: usize = INDEX_DIM / 2 + INDEX_DIM / FP4_BLOCK;

/// How one row is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RowCodec {
    /// Little-endian f32.
    F32 {
        /// Elements.
        width: usize,
    },
    /// A key/value row: E4M3 codes, f32 rotary part, power-of-two scales.
    Fp8Kv,
    /// An index key, rotated: E2M1 codes (element 2i in the low nibble), power-of-two scales.
    Fp4Index,
}

impl RowCodec {
    /// Elements of a row.
    pub fn width(self) -> usize {
        match self {
            RowCodec::F32 { width } => width,
            RowCodec::Fp8Kv => HEAD_DIM,
            RowCodec::Fp4Index => INDEX_DIM,
        }
    }

    /// Bytes of a stored row.
    pub const fn row_bytes(self) -> usize {
        match self {
            RowCodec::F32 { width } => 4 * width,
            RowCodec::Fp8Kv => FP8_ROW,
            RowCodec::Fp4Index => FP4_ROW,
        }
    }

    /// Stores `row` ([`width`](Self::width) elements, after RoPE), rounding it if the format does.
    pub fn encode(self, row: &[f32], out: &mut [u8]) {
        match self {
            RowCodec::F32 { .. } => write_f32(row, out),
            RowCodec::Fp8Kv => encode_fp8(row, out),
            RowCodec::Fp4Index => encode_fp4(row, out),
        }
    }

    /// Reads a stored row back. For [`RowCodec::Fp4Index`] that is the rotated key.
    pub fn decode(self, bytes: &[u8], row: &mut [f32]) {
        match self {
            RowCodec::F32 { .. } => read_f32(bytes, row),
            RowCodec::Fp8Kv => decode_fp8(bytes, row),
            RowCodec::Fp4Index => decode_fp4(bytes, row),
        }
    }

    /// Replaces `row` by what storing it would leave (used for rows and queries not yet stored).
    pub fn round_trip(self, row: &mut [f32]) {
        let mut bytes = [0; FP8_ROW];
        match self {
            RowCodec::F32 { .. } => {}
            RowCodec::Fp8Kv | RowCodec::Fp4Index => {
                let bytes = &mut bytes[..self.row_bytes()];
                self.encode(row, bytes);
                self.decode(bytes, row);
            }
        }
    }
}

fn write_f32(row: &[f32], out: &mut [u8]) {
    for (x, bytes) in row.iter().zip(out.chunks_exact_mut(4)) {
        bytes.copy_from_slice(&x.to_le_bytes());
    }
}

fn read_f32(bytes: &[u8], row: &mut [f32]) {
    for (x, bytes) in row.iter_mut().zip(bytes.chunks_exact(4)) {
        *x = f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    }
}

fn encode_fp8(row: &[f32], out: &mut [u8]) {
    let (codes, rest) = out.split_at_mut(NOPE_DIM);
    let (rotary, scales) = rest.split_at_mut(4 * ROPE_DIM);
    for (b, block) in row[..NOPE_DIM].chunks_exact(FP8_BLOCK).enumerate() {
        let largest = block.iter().fold(1e-4f32, |m, x| m.max(x.abs()));
        let exponent = scale_exponent(largest, 1.0 / 448.0);
        scales[b] = exponent;
        let inverse = power_of_two(254 - exponent);
        for (x, code) in block.iter().zip(&mut codes[b * FP8_BLOCK..]) {
            *code = e4m3(x * inverse);
        }
    }
    scales[FP8_SCALES] = 0;
    write_f32(&row[NOPE_DIM..], rotary);
}

fn decode_fp8(bytes: &[u8], row: &mut [f32]) {
    let (codes, rest) = bytes.split_at(NOPE_DIM);
    let (rotary, scales) = rest.split_at(4 * ROPE_DIM);
    let blocks = codes.chunks_exact(FP8_BLOCK).zip(row.chunks_exact_mut(FP8_BLOCK));
    for ((codes, block), scale) in blocks.zip(scales) {
        let scale = power_of_two(*scale);
        for (x, code) in block.iter_mut().zip(codes) {
            *x = E4M3[*code as usize] * scale;
        }
    }
    read_f32(rotary, &mut row[NOPE_DIM..]);
}

fn encode_fp4(row: &[f32], out: &mut [u8]) {
    let mut rotated = [0.0; INDEX_DIM];
    rotated.copy_from_slice(row);
    hadamard(&mut rotated);
    let (codes, scales) = out.split_at_mut(INDEX_DIM / 2);
    for (b, block) in rotated.chunks_exact(FP4_BLOCK).enumerate() {
        let largest = block.iter().fold(6.0 * f32::MIN_POSITIVE, |m, x| m.max(x.abs()));
        let exponent = scale_exponent(largest, 1.0 / 6.0);
        scales[b] = exponent;
        let scale = power_of_two(exponent);
        for (pair, code) in block.chunks_exact(2).zip(&mut codes[b * FP4_BLOCK / 2..]) {
            *code = e2m1(pair[0] / scale) | e2m1(pair[1] / scale) << 4;
        }
    }
}

fn decode_fp4(bytes: &[u8], row: &mut [f32]) {
    let (codes, scales) = bytes.split_at(INDEX_DIM / 2);
    let blocks = codes.chunks_exact(FP4_BLOCK / 2).zip(row.chunks_exact_mut(FP4_BLOCK));
    for ((codes, block), scale) in blocks.zip(scales) {
        let scale = power_of_two(*scale);
        for (pair, code) in block.as_chunks_mut().0.iter_mut().zip(codes) {
            *pair = E2M1_PAIRS[*code as usize].map(|x| x * scale);
        }
    }
}

/// Orthonormal Walsh–Hadamard transform in Sylvester order.
fn hadamard(x: &mut [f32; INDEX_DIM]) {
    let mut stride = 1;
    while stride < INDEX_DIM {
        for pair in x.chunks_exact_mut(2 * stride) {
            let (a, b) = pair.split_at_mut(stride);
            for (a, b) in a.iter_mut().zip(b) {
                (*a, *b) = (*a + *b, *a - *b);
            }
        }
        stride *= 2;
    }
    let norm = (INDEX_DIM as f32).sqrt().recip();
    x.iter_mut().for_each(|x| *x *= norm);
}

/// Biased exponent of the smallest power of two S with largest ≤ S / `inverse_range`.
///
/// A NaN or infinite row gets the largest scale; it decodes to something finite or NaN without
/// harm to memory, and the engine refuses NaN logits.
fn scale_exponent(largest: f32, inverse_range: f32) -> u8 {
    let bits = (largest * inverse_range).to_bits();
    let exponent = (bits >> 23) & 0xff;
    (exponent + u32::from(bits & 0x7f_ffff != 0)).clamp(1, 253) as u8
}

/// 2^(exponent − 127), for exponents 0 to 254.
fn power_of_two(exponent: u8) -> f32 {
    match exponent {
        0 => f32::from_bits(1 << 22),
        e => f32::from_bits((e as u32) << 23),
    }
}

/// Nearest E4M3 code (ties to even, saturating at ±448).
fn e4m3(x: f32) -> u8 {
    let sign = ((x.to_bits() >> 24) & 0x80) as u8;
    let x = x.abs().min(448.0);
    if x < 1.0 / 64.0 {
        // Subnormal: multiples of 2^-9. Code 8 is the smallest normal number, as it should be.
        return sign | (x * 512.0).round_ties_even() as u8;
    }
    let bits = x.to_bits();
    let rounded = bits + 0x7_ffff + ((bits >> 20) & 1);
    sign | ((rounded >> 20) - ((127 - 7) << 3)) as u8
}

/// Nearest E2M1 code (ties to the even code, saturating at ±6).
fn e2m1(x: f32) -> u8 {
    let magnitude = match x.abs() {
        a if a <= 0.25 => 0,
        a if a < 0.75 => 1,
        a if a <= 1.25 => 2,
        a if a < 1.75 => 3,
        a if a <= 2.5 => 4,
        a if a < 3.5 => 5,
        a if a <= 5.0 => 6,
        _ => 7,
    };
    magnitude | if x < 0.0 { 8 } else { 0 }
}

/// Value of each E2M1 code.
const E2M1: [f32; 16] =
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

/// The two values of each byte of codes, so that one look-up finds both.
static E2M1_PAIRS: [[f32; 2]; 256] = {
    let mut pairs = [[0.0; 2]; 256];
    let mut byte = 0;
    while byte < 256 {
        pairs[byte] = [E2M1[byte & 15], E2M1[byte >> 4]];
        byte += 1;
    }
    pairs
};

/// Value of each E4M3 code. The two NaN codes, never written, read as ±480.
static E4M3: [f32; 256] = {
    let mut values = [0.0; 256];
    let mut code = 0;
    while code < 256 {
        let (exponent, mantissa) = ((code >> 3) & 15, (code & 7) as f32);
        let magnitude = if exponent == 0 {
            mantissa / 512.0
        } else {
            (1.0 + mantissa / 8.0) * f32::from_bits((exponent as u32 + 120) << 23)
        };
        values[code] = if code < 128 { magnitude } else { -magnitude };
        code += 1;
    }
    values
};

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The test vector of docs/model.md, "Cache precision".
    fn sawtooth(n: usize) -> Vec<f32> {
        (0..n).map(|i| (((37 * i) % 64) as f32 - 31.5) * 0.3).collect()
    }

    #[test]
    fn fp8_test_vector() {
        let mut row = sawtooth(64);
        row.resize(HEAD_DIM, 0.0);
        let mut bytes = [0; FP8_ROW];
        RowCodec::Fp8Kv.encode(&row, &mut bytes);
        assert_eq!(power_of_two(bytes[NOPE_DIM + 4 * ROPE_DIM]), 0.03125);
        RowCodec::Fp8Kv.decode(&bytes, &mut row);
        assert_eq!(row[..6], [-9.0, 1.625, -6.5, 4.5, -3.5, 7.5]);
        assert_eq!(row.iter().map(|x| x * x).sum::<f32>(), 1959.1191);
    }

    #[test]
    fn fp4_test_vector() {
        // The vector is given after the rotation, which is its own inverse.
        let mut rotated: [f32; INDEX_DIM] = sawtooth(INDEX_DIM).try_into().unwrap();
        rotated[32..].fill(0.0);
        let mut row = rotated;
        hadamard(&mut row);
        let mut bytes = [0; FP4_ROW];
        RowCodec::Fp4Index.encode(&row, &mut bytes);
        assert_eq!(power_of_two(bytes[INDEX_DIM / 2]), 2.0);
        let mut back = [0.0; INDEX_DIM];
        RowCodec::Fp4Index.decode(&bytes, &mut back);
        assert_eq!(back[..6], [-8.0, 2.0, -6.0, 4.0, -3.0, 8.0]);
        assert_eq!(back[..32].iter().map(|x| x * x).sum::<f32>(), 951.0);
    }

    #[test]
    fn e2m1_ties_go_to_the_even_code() {
        let ties = [
            (0.25, 0.0),
            (0.75, 1.0),
            (1.25, 1.0),
            (1.75, 2.0),
            (2.5, 2.0),
            (3.5, 4.0),
            (5.0, 4.0),
        ];
        for (x, expected) in ties {
            assert_eq!(E2M1[e2m1(x) as usize], expected);
            assert_eq!(E2M1[e2m1(-x) as usize], -expected);
        }
    }

    #[test]
    fn every_e4m3_value_keeps_its_code() {
        for code in (0u8..=255).filter(|c| c & 0x7f != 0x7f) {
            assert_eq!(e4m3(E4M3[code as usize]), code);
        }
    }

    proptest! {
        #[test]
        fn e4m3_is_the_nearest_value(x in -448f32..448.0) {
            let best = E4M3.iter().filter(|v| v.abs() <= 448.0).map(|v| (v - x).abs()).fold(f32::MAX, f32::min);
            prop_assert_eq!((E4M3[e4m3(x) as usize] - x).abs(), best);
        }

        #[test]
        fn storing_twice_changes_nothing(seed in prop::collection::vec(-30f32..30.0, HEAD_DIM)) {
            let mut once = seed;
            RowCodec::Fp8Kv.round_trip(&mut once);
            let mut twice = once.clone();
            RowCodec::Fp8Kv.round_trip(&mut twice);
            prop_assert_eq!(once, twice);
        }

        #[test]
        fn any_bytes_decode_and_any_floats_encode(bits in prop::collection::vec(any::<u32>(), HEAD_DIM)) {
            let mut row: Vec<f32> = bits.iter().map(|b| f32::from_bits(*b)).collect();
            RowCodec::Fp8Kv.round_trip(&mut row);
            let mut key: Vec<f32> = bits[..INDEX_DIM].iter().map(|b| f32::from_bits(*b)).collect();
            RowCodec::Fp4Index.round_trip(&mut key);
            let bytes: Vec<u8> = bits.iter().flat_map(|b| b.to_le_bytes()).take(FP8_ROW).collect();
            RowCodec::Fp8Kv.decode(&bytes, &mut row);
        }
    }
}
