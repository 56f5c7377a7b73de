//! Tiles of the formats that pack weights most densely. Codes are transposed
//! before they are unpacked, a quarter as much as the quants.

use std::arch::x86_64::*;

use super::{
    Avx512,
    levels::{level_codes, sign_bytes, signed_levels},
    transpose_four,
};
use crate::simd::{
    q8::GROUPS,
    tile::{WORDS, prefetch, registers},
    vector::Rows,
};

/// Rows of a tile.
const LANES: usize = 16;

/// Unpacks a block of `IQ2_XXS` of each row.
///
/// # Safety
/// As [`crate::simd::formats::Format::unpack_tile`].
#[inline(always)]
pub(super) unsafe fn unpack_iq2_xxs(rows: &Rows, ahead: usize, tile: *mut u32) {
    // SAFETY: as the caller promises.
    unsafe {
        let d = _mm512_mul_ps(halves(rows, 0), _mm512_set1_ps(1.0 / 8.0));
        let mut words = [_mm512_setzero_si512(); 4];
        for g in 0..GROUPS {
            for row in &rows[2 * g..2 * g + 2] {
                prefetch::<Avx512>(*row, ahead, 66);
            }
            if g % 2 == 0 {
                words = transpose_four(rows, 2 + 8 * g);
            }
            let (indices, codes) = (words[g % 2 * 2], words[g % 2 * 2 + 1]);
            let target = tile.add(g * registers(0) * LANES);

            // Of each row two octets' level codes, the other two's, all signs.
            let levels = [
                level_codes(_mm512_shuffle_epi8(indices, words_from_bytes([0, 1]))),
                level_codes(_mm512_shuffle_epi8(indices, words_from_bytes([2, 3]))),
            ];
            let signs = sign_bytes(_mm512_multishift_epi64_epi8(fields(0, 7), codes));
            for (i, levels) in [levels[0], levels[0], levels[1], levels[1]].into_iter().enumerate()
            {
                for half in 0..2 {
                    let bit = i as i64 % 2 * 16 + half * 8;
                    let quants = signed_levels(
                        _mm512_multishift_epi64_epi8(fields(bit, 2), levels),
                        _mm512_multishift_epi64_epi8(fields(i as i64 * 8 + half * 4 - 2, 1), signs),
                    );
                    store(target, 2 * i + half as usize, quants);
                }
            }

            let factors = _mm512_slli_epi32::<1>(_mm512_srli_epi32::<28>(codes));
            let factors = _mm512_cvtepi32_ps(_mm512_add_epi32(factors, _mm512_set1_epi32(1)));
            store(target, WORDS, _mm512_castps_si512(_mm512_mul_ps(factors, d)));
        }
    }
}

/// Unpacks a block of `Q2_K` of each row.
///
/// # Safety
/// As [`crate::simd::formats::Format::unpack_tile`].
#[inline(always)]
pub(super) unsafe fn unpack_q2_k(rows: &Rows, ahead: usize, tile: *mut u32) {
    // SAFETY: as the caller promises.
    unsafe {
        let d = _mm512_castps_si512(halves(rows, 80));
        let dmin = halves(rows, 82);
        let nibble = _mm512_set1_epi16(15);
        let scales_and_mins = transpose_four(rows, 0);
        // The two halves of each of the block's halves.
        for part in 0..4 {
            let (n, half) = (part / 2, part % 2);
            for row in &rows[4 * part..4 * part + 4] {
                prefetch::<Avx512>(*row, ahead, 84);
            }
            let words = transpose_four(rows, 16 + 16 * part);
            for plane in 0..4 {
                let g = 4 * n + plane;
                let target = tile.add(g * registers(2) * LANES);
                let byte = 2 * g + half;
                let factors = _mm512_shuffle_epi8(
                    scales_and_mins[byte / 4],
                    words_from_bytes([byte as i32 % 4; 2]),
                );
                let scale = _mm512_and_si512(factors, nibble);
                for (i, &word) in words.iter().enumerate() {
                    let count = _mm_cvtsi32_si128(2 * plane as i32);
                    let quants =
                        _mm512_and_si512(_mm512_srl_epi32(word, count), _mm512_set1_epi8(3));
                    // At most 3 · 15: products stay in their bytes.
                    store(target, 4 * half + i, _mm512_mullo_epi16(quants, scale));
                }
                let min = _mm512_cvtepi32_ps(_mm512_srli_epi32::<20>(factors));
                store(target, WORDS + 1 + half, _mm512_castps_si512(_mm512_mul_ps(min, dmin)));
                if half == 0 {
                    store(target, WORDS, d);
                }
            }
        }
    }
}

/// The `f16` at `offset` of each row.
#[inline(always)]
unsafe fn halves(rows: &Rows, offset: usize) -> __m512 {
    let mut halves = [0; LANES];
    // SAFETY: the caller has AVX-512 and valid rows.
    unsafe {
        for (half, row) in halves.iter_mut().zip(rows) {
            *half = row.add(offset).cast::<u16>().read_unaligned();
        }
        _mm512_cvtph_ps(_mm256_loadu_si256(halves.as_ptr().cast()))
    }
}

/// Stores register `i` of a tile's group.
#[inline(always)]
unsafe fn store(group: *mut u32, i: usize, v: __m512i) {
    // SAFETY: the caller has AVX-512 and room in the tile.
    unsafe { _mm512_storeu_si512(group.add(i * LANES).cast(), v) }
}

/// Index of a byte shuffle that widens two bytes of every 32-bit word to 16 bits.
#[inline(always)]
unsafe fn words_from_bytes([low, high]: [i32; 2]) -> __m512i {
    let first = (0x8000 | high) << 16 | 0x8000 | low;
    // SAFETY: the caller has AVX-512.
    unsafe {
        _mm512_broadcast_i32x4(_mm_setr_epi32(
            first,
            first + 0x0004_0004,
            first + 0x0008_0008,
            first + 0x000c_000c,
        ))
    }
}

/// Offsets of four bit fields in every 32-bit word, the first at `start`, each
/// `step` after the other. They may reach into the neighbouring word.
#[inline(always)]
unsafe fn fields(start: i64, step: i64) -> __m512i {
    let offset = |i: i64| (start + i % 4 * step + i / 4 * 32) & 63;
    // SAFETY: the caller has AVX-512.
    unsafe { _mm512_set1_epi64((0..8).rev().fold(0, |word, i| word << 8 | offset(i))) }
}
