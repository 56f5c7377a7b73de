//! AVX2 with FMA and F16C.

pub(super) mod formats;

use std::arch::x86_64::*;

use super::{
    kernels::define_kernels,
    vector::{Rows, operations},
};

/// 256-bit registers.
pub(super) struct Avx2;

define_kernels! {
    vector: Avx2,
    features: is_x86_feature_detected["avx2" "fma" "f16c"],
    panel: [1 2 3 4],
    // 4 × 3 is faster on f32 but runs out of registers where F16 is widened.
    float_block: [3, 3],
    score_block: [4, 3],
    value_columns: 2,
    index_block: [2, 4],
}

impl Vector for Avx2 {
    type Float = __m256;
    type Int = __m256i;
    type Groups = __m256;
    type Block = [__m256i; 8];

    const LANES: usize = 8;

    operations! {
        fn splat(x: f32) -> __m256 = _mm256_set1_ps(x);
        fn load(p: *const f32) -> __m256 = _mm256_loadu_ps(p);
        fn store(p: *mut f32, v: __m256) = _mm256_storeu_ps(p, v);
        fn load_f16(p: *const u8) -> __m256 = _mm256_cvtph_ps(_mm_loadu_si128(p.cast()));
        fn load_bf16(p: *const u8) -> __m256 = {
            let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
        };
        fn add(a: __m256, b: __m256) -> __m256 = _mm256_add_ps(a, b);
        fn mul(a: __m256, b: __m256) -> __m256 = _mm256_mul_ps(a, b);
        fn div(a: __m256, b: __m256) -> __m256 = _mm256_div_ps(a, b);
        fn min(a: __m256, b: __m256) -> __m256 = _mm256_min_ps(a, b);
        fn max(a: __m256, b: __m256) -> __m256 = _mm256_max_ps(a, b);
        fn abs(a: __m256) -> __m256 = _mm256_andnot_ps(_mm256_set1_ps(-0.0), a);
        fn fma(a: __m256, b: __m256, c: __m256) -> __m256 = _mm256_fmadd_ps(a, b, c);
        fn sum(v: __m256) -> f32 = {
            let v = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let v = _mm_add_ps(v, _mm_movehl_ps(v, v));
            _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)))
        };
        fn largest(v: __m256) -> f32 = {
            let v = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let v = _mm_max_ps(v, _mm_movehl_ps(v, v));
            _mm_cvtss_f32(_mm_max_ss(v, _mm_movehdup_ps(v)))
        };
        fn round(v: __m256) -> __m256i = _mm256_cvtps_epi32(v);
        fn to_float(v: __m256i) -> __m256 = _mm256_cvtepi32_ps(v);
        fn scale_by_power(v: __m256, n: __m256i) -> __m256 = {
            let bits = _mm256_add_epi32(_mm256_castps_si256(v), _mm256_slli_epi32::<23>(n));
            _mm256_castsi256_ps(bits)
        };

        fn splat_int(x: i32) -> __m256i = _mm256_set1_epi32(x);
        fn add_int(a: __m256i, b: __m256i) -> __m256i = _mm256_add_epi32(a, b);
        fn mul_int(a: __m256i, b: __m256i) -> __m256i = _mm256_mullo_epi32(a, b);
        fn sum_int(v: __m256i) -> i32 = {
            let v = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256::<1>(v));
            let v = _mm_add_epi32(v, _mm_shuffle_epi32::<0b01_00_11_10>(v));
            _mm_cvtsi128_si32(_mm_add_epi32(v, _mm_shuffle_epi32::<0b10_11_00_01>(v)))
        };
        fn load_bytes(p: *const u8) -> __m256i = _mm256_loadu_si256(p.cast());
        fn store_bytes(p: *mut u8, v: __m256i) = _mm256_storeu_si256(p.cast(), v);
        fn splat_bytes(p: *const u32) -> __m256i = _mm256_set1_epi32(*p as i32);
        fn store_narrow(p: *mut i8, v: __m256i) = {
            let words = _mm256_packs_epi32(v, v);
            let bytes = _mm256_packs_epi16(words, words);
            let low = _mm_cvtsi128_si32(_mm256_castsi256_si128(bytes));
            let high = _mm_cvtsi128_si32(_mm256_extracti128_si256::<1>(bytes));
            p.cast::<[i32; 2]>().write_unaligned([low, high])
        };
        fn dot(wide: bool, sums: __m256i, weights: __m256i, activations: __m256i) -> __m256i = {
            // Unsigned times signed, added in pairs to 16 bits. Wide weights
            // would overflow with a bias, so their sign goes to the activations.
            let pairs = if wide {
                let signed = _mm256_sign_epi8(activations, weights);
                _mm256_maddubs_epi16(_mm256_abs_epi8(weights), signed)
            } else {
                _mm256_maddubs_epi16(weights, activations)
            };
            _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
        };
        fn transpose(rows: &Rows, offset: usize, targets: &[*mut u32]) =
            transpose(rows, offset, targets);

        fn load_groups(p: *const f32) -> __m256 = _mm256_loadu_ps(p);
        fn store_groups(p: *mut f32, v: __m256) = _mm256_storeu_ps(p, v);
        fn mul_groups(a: __m256, b: __m256) -> __m256 = _mm256_mul_ps(a, b);
        fn fma_groups(a: __m256, b: __m256, c: __m256) -> __m256 = _mm256_fmadd_ps(a, b, c);
        fn sum_groups(v: __m256) -> f32 = Self::sum(v);
        fn expand(groups: __m256, index: usize) -> __m256 =
            _mm256_permutevar8x32_ps(groups, _mm256_set1_epi32(index as i32));

        fn prefetch(p: *const u8) = _mm_prefetch::<_MM_HINT_T0>(p.cast());
    }
}

/// [`Vector::transpose`] of 8 × 8 words.
#[inline(always)]
unsafe fn transpose(rows: &Rows, offset: usize, targets: &[*mut u32]) {
    let targets = &targets[..8];
    // SAFETY: the caller has AVX2 and valid pointers.
    unsafe {
        let sources = rows;
        let mut rows = [_mm256_setzero_si256(); 8];
        for (row, source) in rows.iter_mut().zip(sources) {
            *row = _mm256_loadu_si256(source.add(offset).cast());
        }
        // Pairs of rows, then of pairs, then the two halves: after the first
        // two steps `quads[c]` has words c and c + 4 of rows 0–3 in its
        // halves, and `quads[4 + c]` those of rows 4–7.
        let mut quads = [_mm256_setzero_si256(); 8];
        for i in 0..2 {
            let rows = &rows[4 * i..4 * i + 4];
            let a = _mm256_unpacklo_epi32(rows[0], rows[1]);
            let b = _mm256_unpackhi_epi32(rows[0], rows[1]);
            let c = _mm256_unpacklo_epi32(rows[2], rows[3]);
            let d = _mm256_unpackhi_epi32(rows[2], rows[3]);
            quads[4 * i] = _mm256_unpacklo_epi64(a, c);
            quads[4 * i + 1] = _mm256_unpackhi_epi64(a, c);
            quads[4 * i + 2] = _mm256_unpacklo_epi64(b, d);
            quads[4 * i + 3] = _mm256_unpackhi_epi64(b, d);
        }
        for c in 0..4 {
            let low = _mm256_permute2x128_si256::<0x20>(quads[c], quads[4 + c]);
            let high = _mm256_permute2x128_si256::<0x31>(quads[c], quads[4 + c]);
            _mm256_storeu_si256(targets[c].cast(), low);
            _mm256_storeu_si256(targets[4 + c].cast(), high);
        }
    }
}
