//! Unpacking of quantised blocks with AVX2.

use std::arch::x86_64::*;

use gguf::IQ2_XXS_GRID;

use super::Avx2;
use crate::simd::{
    formats::{
        Format, IQ2_SIGN_BYTES, Iq2Xxs, MXFP4_QUANTS, Mxfp4, Q2K, Q4K, Q8_0, Unpacked,
        half_exponent, q4_k_scales_and_mins,
    },
    q8::GROUPS,
    vector::operations,
};

/// [`Format::BIAS`] of `IQ2_XXS`, whose quants are within ±43.
pub(in crate::simd) const IQ2_BIAS: i32 = 64;
/// [`Format::BIAS`] of `MXFP4`.
pub(in crate::simd) const MXFP4_BIAS: i32 = 16;

impl Format<Avx2> for Q8_0 {
    const BYTES: usize = 8 * 34;
    const BIAS: i32 = 0;
    const WIDE: bool = true;
    const MINS: usize = 0;

    #[inline(always)]
    unsafe fn unpack(p: *const u8) -> Unpacked<Avx2> {
        // SAFETY: eight blocks of 34 bytes are readable.
        unsafe {
            let mut quants = [_mm256_setzero_si256(); 8];
            let mut scales = [0; 8];
            for g in 0..GROUPS {
                let block = p.add(34 * g);
                scales[g] = block.cast::<u16>().read_unaligned();
                quants[g] = _mm256_loadu_si256(block.add(2).cast());
            }
            let scales = _mm256_cvtph_ps(_mm_loadu_si128(scales.as_ptr().cast()));
            Unpacked { quants, scales, mins: [scales; 2] }
        }
    }
}

impl Format<Avx2> for Q2K {
    const BYTES: usize = 84;
    const BIAS: i32 = 0;
    const WIDE: bool = false;
    const MINS: usize = 2;

    #[inline(always)]
    unsafe fn unpack(p: *const u8) -> Unpacked<Avx2> {
        // SAFETY: a block of 84 bytes is readable.
        unsafe {
            let scales_and_mins = _mm_loadu_si128(p.cast());
            let nibble = _mm_set1_epi8(15);
            let scales = _mm256_broadcastsi128_si256(_mm_and_si128(scales_and_mins, nibble));
            let mins = _mm_and_si128(_mm_srli_epi16::<4>(scales_and_mins), nibble);

            // Quants of at most 3 times their half group's scale of at most 15
            // still fit in a byte: multiplied in pairs of bytes.
            let mut quants = [_mm256_setzero_si256(); 8];
            let two_bits = _mm256_set1_epi8(3);
            for n in 0..2 {
                let q = _mm256_loadu_si256(p.add(16 + 32 * n).cast());
                let planes = [
                    q,
                    _mm256_srli_epi16::<2>(q),
                    _mm256_srli_epi16::<4>(q),
                    _mm256_srli_epi16::<6>(q),
                ];
                for (j, plane) in planes.into_iter().enumerate() {
                    let g = 4 * n + j;
                    let first = !0xff | (2 * g as i16);
                    let halves = _mm256_set_m128i(_mm_set1_epi16(first + 1), _mm_set1_epi16(first));
                    let scales = _mm256_shuffle_epi8(scales, halves);
                    quants[g] = _mm256_mullo_epi16(_mm256_and_si256(plane, two_bits), scales);
                }
            }

            let d = Avx2::load_f16_pair(p.add(80));
            let mins = Avx2::split_bytes(mins, d[1]);
            Unpacked { quants, scales: _mm256_set1_ps(d[0]), mins }
        }
    }
}

impl Format<Avx2> for Q4K {
    const BYTES: usize = 144;
    const BIAS: i32 = 0;
    const WIDE: bool = false;
    const MINS: usize = 1;

    #[inline(always)]
    unsafe fn unpack(p: *const u8) -> Unpacked<Avx2> {
        // SAFETY: a block of 144 bytes is readable.
        unsafe {
            let mut quants = [_mm256_setzero_si256(); 8];
            let nibble = _mm256_set1_epi8(15);
            for i in 0..4 {
                let q = _mm256_loadu_si256(p.add(16 + 32 * i).cast());
                quants[2 * i] = _mm256_and_si256(q, nibble);
                quants[2 * i + 1] = _mm256_and_si256(_mm256_srli_epi16::<4>(q), nibble);
            }
            let d = Avx2::load_f16_pair(p);
            let (scales, mins) = q4_k_scales_and_mins(p.add(4));
            let scales = _mm256_mul_ps(Avx2::widen_bytes(scales), _mm256_set1_ps(d[0]));
            let mins = _mm256_mul_ps(Avx2::widen_bytes(mins), _mm256_set1_ps(d[1]));
            Unpacked { quants, scales, mins: [mins; 2] }
        }
    }
}

impl Format<Avx2> for Iq2Xxs {
    const BYTES: usize = 66;
    const BIAS: i32 = IQ2_BIAS;
    const WIDE: bool = false;
    const MINS: usize = 0;

    #[inline(always)]
    unsafe fn unpack(p: *const u8) -> Unpacked<Avx2> {
        // SAFETY: a block of 66 bytes is readable; grid indices have eight
        // bits and sign codes seven.
        unsafe {
            let mut quants = [_mm256_setzero_si256(); 8];
            for g in 0..GROUPS {
                let pair = p.add(2 + 8 * g);
                let codes = pair.add(4).cast::<u32>().read_unaligned();
                let grid = |l: usize| *IQ2_XXS_GRID.get_unchecked(usize::from(*pair.add(l)));
                let sign =
                    |l: u32| *IQ2_SIGN_BYTES.get_unchecked((codes >> (7 * l) & 127) as usize);
                let quad = |[a, b, c, d]: [u64; 4]| {
                    _mm256_setr_epi64x(a as i64, b as i64, c as i64, d as i64)
                };
                let magnitudes = quad([grid(0), grid(1), grid(2), grid(3)]);
                let signs = quad([sign(0), sign(1), sign(2), sign(3)]);
                let signed = _mm256_sign_epi8(magnitudes, signs);
                quants[g] = _mm256_add_epi8(signed, _mm256_set1_epi8(IQ2_BIAS as i8));
            }
            // The second words of the pairs, back in order.
            let low = _mm256_loadu_ps(p.add(2).cast());
            let high = _mm256_loadu_ps(p.add(34).cast());
            let codes = _mm256_castps_si256(_mm256_shuffle_ps::<0b11_01_11_01>(low, high));
            let codes = _mm256_permute4x64_epi64::<0b11_01_10_00>(codes);
            let factors = _mm256_slli_epi32::<1>(_mm256_srli_epi32::<28>(codes));
            let factors = _mm256_cvtepi32_ps(_mm256_add_epi32(factors, _mm256_set1_epi32(1)));
            let d = Avx2::load_f16_pair(p)[0] / 8.0;
            let scales = _mm256_mul_ps(factors, _mm256_set1_ps(d));
            Unpacked { quants, scales, mins: [scales; 2] }
        }
    }
}

impl Format<Avx2> for Mxfp4 {
    const BYTES: usize = 8 * 17;
    const BIAS: i32 = MXFP4_BIAS;
    const WIDE: bool = false;
    const MINS: usize = 0;

    #[inline(always)]
    unsafe fn unpack(p: *const u8) -> Unpacked<Avx2> {
        // SAFETY: eight blocks of 17 bytes are readable.
        unsafe {
            let table = _mm_loadu_si128(MXFP4_QUANTS.as_ptr().cast());
            let table = _mm_add_epi8(table, _mm_set1_epi8(MXFP4_BIAS as i8));
            let table = _mm256_broadcastsi128_si256(table);
            let mut quants = [_mm256_setzero_si256(); 8];
            let mut scales = [0.0; 8];
            for g in 0..GROUPS {
                let block = p.add(17 * g);
                scales[g] = half_exponent(*block);
                let q = _mm_loadu_si128(block.add(1).cast());
                let nibbles = _mm256_set_m128i(_mm_srli_epi16::<4>(q), q);
                let nibbles = _mm256_and_si256(nibbles, _mm256_set1_epi8(15));
                quants[g] = _mm256_shuffle_epi8(table, nibbles);
            }
            let scales = _mm256_loadu_ps(scales.as_ptr());
            Unpacked { quants, scales, mins: [scales; 2] }
        }
    }
}

/// What the formats of AVX-512 share.
impl Avx2 {
    operations! {
        pub(in crate::simd) fn load_f16_pair(p: *const u8) -> [f32; 2] = {
            let pair = _mm_cvtph_ps(_mm_cvtsi32_si128(p.cast::<i32>().read_unaligned()));
            [_mm_cvtss_f32(pair), _mm_cvtss_f32(_mm_movehdup_ps(pair))]
        };
        pub(in crate::simd) fn widen_bytes(bytes: u64) -> __m256 =
            _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(bytes as i64)));
        pub(in crate::simd) fn split_bytes(bytes: __m128i, factor: f32) -> [__m256; 2] = {
            let even = _mm_and_si128(bytes, _mm_set1_epi16(0xff));
            let odd = _mm_srli_epi16::<8>(bytes);
            let widen = |words| _mm256_cvtepi32_ps(_mm256_cvtepu16_epi32(words));
            let factor = _mm256_set1_ps(factor);
            [_mm256_mul_ps(widen(even), factor), _mm256_mul_ps(widen(odd), factor)]
        };
    }
}
