//! Unpacking of quantised blocks with AVX-512.

use std::arch::x86_64::*;

use super::{
    Avx512, join,
    levels::{level_codes, sign_bytes, signed_levels},
    tiles,
};
use crate::simd::{
    avx2::{
        Avx2,
        formats::{IQ2_BIAS, MXFP4_BIAS},
    },
    formats::{
        Format, Iq2Xxs, MXFP4_QUANTS, Mxfp4, Q2K, Q4K, Q8_0, Unpacked, half_exponent,
        q4_k_scales_and_mins,
    },
    q8::Q8Block,
    vector::Rows,
};

impl Format<Avx512> for Q8_0 {
    const BYTES: usize = 8 * 34;
    const BIAS: i32 = 128;
    const WIDE: bool = true;
    const MINS: usize = 0;

    #[inline(always)]
    unsafe fn unpack(p: *const u8) -> Unpacked<Avx512> {
        // SAFETY: eight blocks of 34 bytes are readable.
        unsafe {
            let mut quants = [_mm512_setzero_si512(); 4];
            let mut scales = [0; 8];
            for (g, scale) in scales.iter_mut().enumerate() {
                *scale = p.add(34 * g).cast::<u16>().read_unaligned();
            }
            for (i, quants) in quants.iter_mut().enumerate() {
                let block = p.add(68 * i + 2);
                let pair = join(
                    _mm256_loadu_si256(block.cast()),
                    _mm256_loadu_si256(block.add(34).cast()),
                );
                *quants = _mm512_xor_si512(pair, _mm512_set1_epi8(i8::MIN));
            }
            let scales = _mm256_cvtph_ps(_mm_loadu_si128(scales.as_ptr().cast()));
            Unpacked { quants, scales, mins: [scales; 2] }
        }
    }
}

impl Format<Avx512> for Q2K {
    const BYTES: usize = 84;
    const BIAS: i32 = 0;
    const WIDE: bool = false;
    const MINS: usize = 2;

    #[inline(always)]
    unsafe fn unpack(p: *const u8) -> Unpacked<Avx512> {
        // SAFETY: a block of 84 bytes is readable.
        unsafe {
            let scales_and_mins = _mm_loadu_si128(p.cast());
            let nibble = _mm_set1_epi8(15);
            let scales = _mm512_broadcast_i32x4(_mm_and_si128(scales_and_mins, nibble));
            let mins = _mm_and_si128(_mm_srli_epi16::<4>(scales_and_mins), nibble);

            // Quants of at most 3 times their half group's scale of at most 15
            // still fit in a byte: multiplied in pairs of bytes.
            let half = |half: i64| {
                let words = |g| words_from_bytes([2 * g + half; 4]);
                _mm512_shuffle_epi8(scales, by_group(words))
            };
            let scales = [half(0), half(1)];
            let q = _mm512_loadu_si512(p.add(16).cast());
            let octets = [
                _mm512_permutex_epi64::<0b00_00_00_00>(q),
                _mm512_permutex_epi64::<0b01_01_01_01>(q),
                _mm512_permutex_epi64::<0b10_10_10_10>(q),
                _mm512_permutex_epi64::<0b11_11_11_11>(q),
            ];
            let planes = by_group(|g| 2 * (g % 4));
            let mut quants = [_mm512_setzero_si512(); 4];
            for (i, octets) in octets.into_iter().enumerate() {
                let plane = _mm512_srlv_epi64(octets, planes);
                let plane = _mm512_and_si512(plane, _mm512_set1_epi8(3));
                quants[i] = _mm512_mullo_epi16(plane, scales[i / 2]);
            }

            let d = Avx2::load_f16_pair(p.add(80));
            let mins = Avx2::split_bytes(mins, d[1]);
            Unpacked { quants, scales: _mm256_set1_ps(d[0]), mins }
        }
    }

    #[inline(always)]
    unsafe fn unpack_tile(rows: &Rows, ahead: usize, tile: *mut u32) {
        // SAFETY: as the caller promises.
        unsafe { tiles::unpack_q2_k(rows, ahead, tile) }
    }

    #[inline(always)]
    fn place(i: usize) -> usize {
        place_by_octets(i)
    }

    #[inline(always)]
    unsafe fn add_dots(w: &[__m512i; 4], x: &Q8Block, scales: __m256, sums: __m512) -> __m512 {
        // SAFETY: as the caller promises.
        unsafe { add_dots_by_octets(w, x, scales, sums) }
    }
}

impl Format<Avx512> for Q4K {
    const BYTES: usize = 144;
    const BIAS: i32 = 0;
    const WIDE: bool = false;
    const MINS: usize = 1;

    #[inline(always)]
    unsafe fn unpack(p: *const u8) -> Unpacked<Avx512> {
        // SAFETY: a block of 144 bytes is readable.
        unsafe {
            let low = _mm512_loadu_si512(p.add(16).cast());
            let high = _mm512_loadu_si512(p.add(80).cast());
            let mut quants = [_mm512_setzero_si512(); 4];
            for (i, quants) in quants.iter_mut().enumerate() {
                // Two groups share bytes, by nibbles.
                let octets = by_group(|g| g / 2 * 4 + i as i64);
                let octets = _mm512_permutex2var_epi64(low, octets, high);
                let nibbles = _mm512_srlv_epi64(octets, by_group(|g| g % 2 * 4));
                *quants = _mm512_and_si512(nibbles, _mm512_set1_epi8(15));
            }
            let d = Avx2::load_f16_pair(p);
            let (scales, mins) = q4_k_scales_and_mins(p.add(4));
            let scales = _mm256_mul_ps(Avx2::widen_bytes(scales), _mm256_set1_ps(d[0]));
            let mins = _mm256_mul_ps(Avx2::widen_bytes(mins), _mm256_set1_ps(d[1]));
            Unpacked { quants, scales, mins: [mins; 2] }
        }
    }

    #[inline(always)]
    fn place(i: usize) -> usize {
        place_by_octets(i)
    }

    #[inline(always)]
    unsafe fn add_dots(w: &[__m512i; 4], x: &Q8Block, scales: __m256, sums: __m512) -> __m512 {
        // SAFETY: as the caller promises.
        unsafe { add_dots_by_octets(w, x, scales, sums) }
    }
}

impl Format<Avx512> for Iq2Xxs {
    const BYTES: usize = 66;
    const BIAS: i32 = IQ2_BIAS;
    const WIDE: bool = false;
    const MINS: usize = 0;

    #[inline(always)]
    unsafe fn unpack(p: *const u8) -> Unpacked<Avx512> {
        // SAFETY: a block of 66 bytes is readable.
        unsafe {
            let pairs = _mm512_loadu_si512(p.add(2).cast());

            // Level codes of the 32 octets, four in each 64-bit word, and their
            // signs in its four lower bytes.
            let order = by_group(|g| words_from_bytes([0, 1, 2, 3].map(|l| g % 2 * 8 + l)));
            let codes = level_codes(_mm512_shuffle_epi8(pairs, order));
            // The seven-bit codes are in bits 32 to 59.
            let signs = sign_bytes(_mm512_multishift_epi64_epi8(fields(32, 7), pairs));
            let mut quants = [_mm512_setzero_si512(); 4];
            for (i, quants) in quants.iter_mut().enumerate() {
                let i = i as i64;
                *quants = signed_levels(
                    _mm512_multishift_epi64_epi8(fields(16 * i, 2), codes),
                    _mm512_multishift_epi64_epi8(fields(8 * i - 2, 1), signs),
                );
            }

            let factors = _mm512_cvtepi64_epi32(_mm512_srli_epi64::<60>(pairs));
            let factors = _mm256_add_epi32(_mm256_slli_epi32::<1>(factors), _mm256_set1_epi32(1));
            let d = Avx2::load_f16_pair(p)[0] / 8.0;
            let scales = _mm256_mul_ps(_mm256_cvtepi32_ps(factors), _mm256_set1_ps(d));
            Unpacked { quants, scales, mins: [scales; 2] }
        }
    }

    #[inline(always)]
    unsafe fn unpack_tile(rows: &Rows, ahead: usize, tile: *mut u32) {
        // SAFETY: as the caller promises.
        unsafe { tiles::unpack_iq2_xxs(rows, ahead, tile) }
    }

    #[inline(always)]
    fn place(i: usize) -> usize {
        place_by_octets(i)
    }

    #[inline(always)]
    unsafe fn add_dots(w: &[__m512i; 4], x: &Q8Block, scales: __m256, sums: __m512) -> __m512 {
        // SAFETY: as the caller promises.
        unsafe { add_dots_by_octets(w, x, scales, sums) }
    }
}

/// Offsets of eight bit fields, the first at `start`, each `step` after the
/// other, for every 64-bit word. They wrap around the word.
#[inline(always)]
unsafe fn fields(start: i64, step: i64) -> __m512i {
    // SAFETY: the caller has AVX-512.
    unsafe {
        _mm512_set1_epi64((0..8).rev().fold(0, |word, i| word << 8 | (start + step * i) & 63))
    }
}

impl Format<Avx512> for Mxfp4 {
    const BYTES: usize = 8 * 17;
    const BIAS: i32 = MXFP4_BIAS;
    const WIDE: bool = false;
    const MINS: usize = 0;

    #[inline(always)]
    unsafe fn unpack(p: *const u8) -> Unpacked<Avx512> {
        // SAFETY: eight blocks of 17 bytes are readable.
        unsafe {
            let table = _mm_loadu_si128(MXFP4_QUANTS.as_ptr().cast());
            let table = _mm_add_epi8(table, _mm_set1_epi8(MXFP4_BIAS as i8));
            let table = _mm512_broadcast_i32x4(table);
            // High nibbles follow the low ones.
            let shifts = _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4);
            let shifts = join(shifts, shifts);
            let mut quants = [_mm512_setzero_si512(); 4];
            let mut scales = [0.0; 8];
            for (g, scale) in scales.iter_mut().enumerate() {
                *scale = half_exponent(*p.add(17 * g));
            }
            for (i, quants) in quants.iter_mut().enumerate() {
                let half = |g: usize| {
                    _mm256_broadcastsi128_si256(_mm_loadu_si128(p.add(17 * g + 1).cast()))
                };
                let nibbles = _mm512_srlv_epi32(join(half(2 * i), half(2 * i + 1)), shifts);
                let nibbles = _mm512_and_si512(nibbles, _mm512_set1_epi8(15));
                *quants = _mm512_shuffle_epi8(table, nibbles);
            }
            let scales = _mm256_loadu_ps(scales.as_ptr());
            Unpacked { quants, scales, mins: [scales; 2] }
        }
    }
}

/// [`Format::place`] of quants whose 64-bit word `g` of register `i` is octet `i`
/// of group `g`.
#[inline(always)]
fn place_by_octets(i: usize) -> usize {
    let (octet, group, half) = (i / 16, i / 2 % 8, i % 2);
    8 * group + 2 * octet + half
}

/// [`Format::add_dots`] of such quants: a group keeps to its lanes, so that its
/// integers are summed before they are scaled.
#[inline(always)]
unsafe fn add_dots_by_octets(
    quants: &[__m512i; 4],
    x: &Q8Block,
    scales: __m256,
    sums: __m512,
) -> __m512 {
    // SAFETY: the caller has AVX-512.
    unsafe {
        let mut dots = _mm512_setzero_si512();
        for (&quants, x) in quants.iter().zip(&x.octets) {
            dots = _mm512_dpbusd_epi32(dots, quants, _mm512_loadu_si512(x.as_ptr().cast()));
        }
        let lanes = by_group(|g| g * 0x0000_0001_0000_0001);
        let scales = _mm512_permutexvar_ps(lanes, _mm512_castps256_ps512(scales));
        _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots), scales, sums)
    }
}

/// Index of a byte shuffle that widens these four bytes to 16 bits each.
#[inline(always)]
fn words_from_bytes(bytes: [i64; 4]) -> i64 {
    bytes.into_iter().rev().fold(0, |word, byte| word << 16 | 0x8000 | byte)
}

/// One 64-bit word for each group.
#[inline(always)]
unsafe fn by_group(word: impl Fn(i64) -> i64) -> __m512i {
    // SAFETY: the caller has AVX-512.
    unsafe {
        _mm512_setr_epi64(word(0), word(1), word(2), word(3), word(4), word(5), word(6), word(7))
    }
}
