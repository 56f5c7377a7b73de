//! AVX-512 as Ice Lake and Zen 4 have it: with VNNI, VBMI and GFNI.

mod formats;
mod levels;
mod tiles;

use std::arch::x86_64::*;

use super::{
    avx2::Avx2,
    kernels::define_kernels,
    vector::{Rows, operations},
};

/// 512-bit registers.
pub(super) struct Avx512;

define_kernels! {
    vector: Avx512,
    features: is_x86_feature_detected[
        "avx512f" "avx512bw" "avx512vl" "avx512dq" "avx512vnni" "avx512vbmi" "gfni"
    ],
    panel: [1 2 3 4 5 6 7 8 9 10 11 12],
    float_block: [4, 6],
    score_block: [4, 6],
    value_columns: 4,
    index_block: [4, 6],
}

impl Vector for Avx512 {
    type Float = __m512;
    type Int = __m512i;
    type Groups = __m256;
    type Block = [__m512i; 4];

    const LANES: usize = 16;

    operations! {
        fn splat(x: f32) -> __m512 = _mm512_set1_ps(x);
        fn load(p: *const f32) -> __m512 = _mm512_loadu_ps(p);
        fn store(p: *mut f32, v: __m512) = _mm512_storeu_ps(p, v);
        fn load_f16(p: *const u8) -> __m512 = _mm512_cvtph_ps(_mm256_loadu_si256(p.cast()));
        fn load_bf16(p: *const u8) -> __m512 = {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
        };
        fn add(a: __m512, b: __m512) -> __m512 = _mm512_add_ps(a, b);
        fn mul(a: __m512, b: __m512) -> __m512 = _mm512_mul_ps(a, b);
        fn div(a: __m512, b: __m512) -> __m512 = _mm512_div_ps(a, b);
        fn min(a: __m512, b: __m512) -> __m512 = _mm512_min_ps(a, b);
        fn max(a: __m512, b: __m512) -> __m512 = _mm512_max_ps(a, b);
        fn abs(a: __m512) -> __m512 = _mm512_abs_ps(a);
        fn fma(a: __m512, b: __m512, c: __m512) -> __m512 = _mm512_fmadd_ps(a, b, c);
        fn sum(v: __m512) -> f32 =
            Avx2::sum(_mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v)));
        fn largest(v: __m512) -> f32 =
            Avx2::largest(_mm256_max_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v)));
        fn round(v: __m512) -> __m512i = _mm512_cvtps_epi32(v);
        fn to_float(v: __m512i) -> __m512 = _mm512_cvtepi32_ps(v);
        fn scale_by_power(v: __m512, n: __m512i) -> __m512 = {
            let bits = _mm512_add_epi32(_mm512_castps_si512(v), _mm512_slli_epi32::<23>(n));
            _mm512_castsi512_ps(bits)
        };

        fn splat_int(x: i32) -> __m512i = _mm512_set1_epi32(x);
        fn add_int(a: __m512i, b: __m512i) -> __m512i = _mm512_add_epi32(a, b);
        fn mul_int(a: __m512i, b: __m512i) -> __m512i = _mm512_mullo_epi32(a, b);
        fn sum_int(v: __m512i) -> i32 = {
            let (low, high) = (_mm512_castsi512_si256(v), _mm512_extracti32x8_epi32::<1>(v));
            Avx2::sum_int(_mm256_add_epi32(low, high))
        };
        fn load_bytes(p: *const u8) -> __m512i = _mm512_loadu_si512(p.cast());
        fn store_bytes(p: *mut u8, v: __m512i) = _mm512_storeu_si512(p.cast(), v);
        fn splat_bytes(p: *const u32) -> __m512i = _mm512_set1_epi32(*p as i32);
        fn store_narrow(p: *mut i8, v: __m512i) =
            _mm_storeu_si128(p.cast(), _mm512_cvtepi32_epi8(v));
        fn dot(_wide: bool, sums: __m512i, weights: __m512i, activations: __m512i) -> __m512i =
            _mm512_dpbusd_epi32(sums, weights, activations);
        fn transpose(rows: &Rows, offset: usize, targets: &[*mut u32]) =
            transpose(rows, offset, targets);

        fn load_groups(p: *const f32) -> __m256 = _mm256_loadu_ps(p);
        fn store_groups(p: *mut f32, v: __m256) = _mm256_storeu_ps(p, v);
        fn mul_groups(a: __m256, b: __m256) -> __m256 = _mm256_mul_ps(a, b);
        fn fma_groups(a: __m256, b: __m256, c: __m256) -> __m256 = _mm256_fmadd_ps(a, b, c);
        fn sum_groups(v: __m256) -> f32 = Avx2::sum(v);
        fn expand(groups: __m256, index: usize) -> __m512 = {
            let first = 2 * index as i32;
            let (low, high) = (_mm256_set1_epi32(first), _mm256_set1_epi32(first + 1));
            _mm512_permutexvar_ps(join(low, high), _mm512_castps256_ps512(groups))
        };

        fn prefetch(p: *const u8) = _mm_prefetch::<_MM_HINT_T0>(p.cast());
    }
}

/// Two halves of a register.
#[inline(always)]
unsafe fn join(low: __m256i, high: __m256i) -> __m512i {
    // SAFETY: the caller has AVX-512.
    unsafe { _mm512_inserti64x4::<1>(_mm512_castsi256_si512(low), high) }
}

/// [`Vector::transpose`] of 16 × 16 words.
#[inline(always)]
unsafe fn transpose(rows: &Rows, offset: usize, targets: &[*mut u32]) {
    let targets = &targets[..16];
    // SAFETY: the caller has AVX-512 and valid pointers.
    unsafe {
        for (c, targets) in targets.chunks_exact(4).enumerate() {
            let columns = transpose_four(rows, offset + 16 * c);
            for (&target, column) in targets.iter().zip(columns) {
                _mm512_storeu_si512(target.cast(), column);
            }
        }
    }
}

/// Transposes 16 rows of four words at `offset`.
#[inline(always)]
unsafe fn transpose_four(rows: &Rows, offset: usize) -> [__m512i; 4] {
    // SAFETY: the caller has AVX-512 and valid pointers.
    unsafe {
        // The words of rows r, 4 + r, 8 + r and 12 + r; transposing four of
        // these by quarters leaves rows in order.
        let mut quads = [_mm512_setzero_si512(); 4];
        for (r, quad) in quads.iter_mut().enumerate() {
            let piece =
                |row: usize| _mm512_broadcast_i32x4(_mm_loadu_si128(rows[row].add(offset).cast()));
            let low = _mm512_mask_blend_epi32(0x00f0, piece(r), piece(4 + r));
            let high = _mm512_mask_blend_epi32(0xf000, piece(8 + r), piece(12 + r));
            *quad = _mm512_mask_blend_epi32(0xff00, low, high);
        }
        let low =
            [_mm512_unpacklo_epi32(quads[0], quads[1]), _mm512_unpacklo_epi32(quads[2], quads[3])];
        let high =
            [_mm512_unpackhi_epi32(quads[0], quads[1]), _mm512_unpackhi_epi32(quads[2], quads[3])];
        [
            _mm512_unpacklo_epi64(low[0], low[1]),
            _mm512_unpackhi_epi64(low[0], low[1]),
            _mm512_unpacklo_epi64(high[0], high[1]),
            _mm512_unpackhi_epi64(high[0], high[1]),
        ]
    }
}
