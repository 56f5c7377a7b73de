//! Levels and signs of `IQ2_XXS` from its codes.

use std::arch::x86_64::*;

use gguf::IQ2_XXS_GRID;

use crate::simd::avx2::formats::IQ2_BIAS;

/// Seven-bit sign codes, one per byte, to sign bytes: bit 7 is the parity of the
/// others.
#[inline(always)]
pub(super) unsafe fn sign_bytes(codes: __m512i) -> __m512i {
    // SAFETY: the caller has AVX-512 with GFNI.
    unsafe { _mm512_gf2p8affine_epi64_epi8::<0>(codes, _mm512_set1_epi64(0x0102_0408_1020_407f)) }
}

/// Biased quants of levels (bits 0–1 of each byte) with signs (bit 2 of each);
/// other bits don't matter.
#[inline(always)]
pub(super) unsafe fn signed_levels(levels: __m512i, signs: __m512i) -> __m512i {
    // SAFETY: the caller has AVX-512 with VBMI.
    unsafe {
        // Bit by bit: where the first is set the second, else the third.
        let index = _mm512_ternarylogic_epi64::<0xca>(_mm512_set1_epi8(4), signs, levels);
        // The permutation looks at six bits.
        _mm512_permutexvar_epi8(index, _mm512_loadu_si512(SIGNED_LEVELS.0.as_ptr().cast()))
    }
}

/// The level codes (eight levels of two bits) of 32 grid indices.
#[inline(always)]
pub(super) unsafe fn level_codes(indices: __m512i) -> __m512i {
    // SAFETY: the caller has AVX-512; the table has eight registers.
    unsafe {
        let table = |i: usize| _mm512_loadu_si512(LEVEL_CODES.0.as_ptr().add(32 * i).cast());
        // A permutation looks up 64 entries by the low six bits.
        let quarter = |i: usize| _mm512_permutex2var_epi16(table(2 * i), indices, table(2 * i + 1));
        let bit6 = _mm512_test_epi16_mask(indices, _mm512_set1_epi16(64));
        let bit7 = _mm512_test_epi16_mask(indices, _mm512_set1_epi16(128));
        let low = _mm512_mask_blend_epi16(bit6, quarter(0), quarter(1));
        let high = _mm512_mask_blend_epi16(bit6, quarter(2), quarter(3));
        _mm512_mask_blend_epi16(bit7, low, high)
    }
}

#[repr(C, align(64))]
struct Aligned<T>(T);

/// Grid entries as eight levels of two bits.
static LEVEL_CODES: Aligned<[u16; 256]> = Aligned({
    let mut codes = [0; 256];
    let mut i = 0;
    while i < 256 {
        let mut element = 0;
        while element < 8 {
            let level = match IQ2_XXS_GRID[i] >> (8 * element) & 255 {
                8 => 0,
                25 => 1,
                _ => 2,
            };
            codes[i] |= level << (2 * element);
            element += 1;
        }
        i += 1;
    }
    codes
});

/// Biased magnitudes by level (bits 0–1) and sign (bit 2).
static SIGNED_LEVELS: Aligned<[u8; 64]> = Aligned({
    let mut table = [0; 64];
    let mut i = 0;
    while i < 64 {
        let magnitude = [8, 25, 43, 0][i & 3];
        let signed = if i & 4 == 0 { magnitude } else { -magnitude };
        table[i] = (IQ2_BIAS + signed) as u8;
        i += 1;
    }
    table
});
