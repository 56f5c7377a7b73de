//! NEON with the dot product instructions, on little-endian machines.

mod formats;

use std::arch::{aarch64::*, asm};

use super::{
    kernels::define_kernels,
    vector::{Rows, operations},
};

/// 128-bit registers.
pub(super) struct Neon;

define_kernels! {
    vector: Neon,
    features: is_aarch64_feature_detected["neon" "dotprod"],
    panel: [1 2 3 4 5 6 7 8],
    float_block: [4, 4],
    score_block: [4, 4],
    value_columns: 4,
    index_block: [4, 4],
}

impl Vector for Neon {
    type Float = float32x4_t;
    type Int = int32x4_t;
    type Groups = [float32x4_t; 2];
    type Block = [int32x4_t; 16];

    const LANES: usize = 4;

    operations! {
        fn splat(x: f32) -> float32x4_t = vdupq_n_f32(x);
        fn load(p: *const f32) -> float32x4_t = vld1q_f32(p);
        fn store(p: *mut f32, v: float32x4_t) = vst1q_f32(p, v);
        fn load_f16(p: *const u8) -> float32x4_t =
            vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p)));
        fn load_bf16(p: *const u8) -> float32x4_t =
            vreinterpretq_f32_u32(vshll_n_u16::<16>(vreinterpret_u16_u8(vld1_u8(p))));
        fn add(a: float32x4_t, b: float32x4_t) -> float32x4_t = vaddq_f32(a, b);
        fn mul(a: float32x4_t, b: float32x4_t) -> float32x4_t = vmulq_f32(a, b);
        fn div(a: float32x4_t, b: float32x4_t) -> float32x4_t = vdivq_f32(a, b);
        fn min(a: float32x4_t, b: float32x4_t) -> float32x4_t = vminq_f32(a, b);
        fn max(a: float32x4_t, b: float32x4_t) -> float32x4_t = vmaxq_f32(a, b);
        fn abs(a: float32x4_t) -> float32x4_t = vabsq_f32(a);
        fn fma(a: float32x4_t, b: float32x4_t, c: float32x4_t) -> float32x4_t =
            vfmaq_f32(c, a, b);
        fn sum(v: float32x4_t) -> f32 = vaddvq_f32(v);
        fn largest(v: float32x4_t) -> f32 = vmaxvq_f32(v);
        fn round(v: float32x4_t) -> int32x4_t = vcvtnq_s32_f32(v);
        fn to_float(v: int32x4_t) -> float32x4_t = vcvtq_f32_s32(v);
        fn scale_by_power(v: float32x4_t, n: int32x4_t) -> float32x4_t =
            vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(v), vshlq_n_s32::<23>(n)));

        fn splat_int(x: i32) -> int32x4_t = vdupq_n_s32(x);
        fn add_int(a: int32x4_t, b: int32x4_t) -> int32x4_t = vaddq_s32(a, b);
        fn mul_int(a: int32x4_t, b: int32x4_t) -> int32x4_t = vmulq_s32(a, b);
        fn sum_int(v: int32x4_t) -> i32 = vaddvq_s32(v);
        fn load_bytes(p: *const u8) -> int32x4_t = vreinterpretq_s32_u8(vld1q_u8(p));
        fn store_bytes(p: *mut u8, v: int32x4_t) = vst1q_u8(p, vreinterpretq_u8_s32(v));
        fn splat_bytes(p: *const u32) -> int32x4_t = vreinterpretq_s32_u32(vld1q_dup_u32(p));
        fn store_narrow(p: *mut i8, v: int32x4_t) = {
            let words = vmovn_s32(v);
            let bytes = vmovn_s16(vcombine_s16(words, words));
            p.cast::<u32>().write_unaligned(vget_lane_u32::<0>(vreinterpret_u32_s8(bytes)))
        };
        fn dot(
            _wide: bool,
            sums: int32x4_t,
            weights: int32x4_t,
            activations: int32x4_t
        ) -> int32x4_t = {
            let mut sums = sums;
            // The intrinsic is not stable yet.
            asm!(
                "sdot {sums:v}.4s, {weights:v}.16b, {activations:v}.16b",
                sums = inout(vreg) sums,
                weights = in(vreg) weights,
                activations = in(vreg) activations,
                options(pure, nomem, nostack, preserves_flags),
            );
            sums
        };
        fn transpose(rows: &Rows, offset: usize, targets: &[*mut u32]) = {
            let row = |i: usize| vreinterpretq_u32_u8(vld1q_u8(rows[i].add(offset)));
            let low = vzip1q_u32(row(0), row(2));
            let high = vzip2q_u32(row(0), row(2));
            let low2 = vzip1q_u32(row(1), row(3));
            let high2 = vzip2q_u32(row(1), row(3));
            vst1q_u32(targets[0], vzip1q_u32(low, low2));
            vst1q_u32(targets[1], vzip2q_u32(low, low2));
            vst1q_u32(targets[2], vzip1q_u32(high, high2));
            vst1q_u32(targets[3], vzip2q_u32(high, high2))
        };

        fn load_groups(p: *const f32) -> [float32x4_t; 2] = [vld1q_f32(p), vld1q_f32(p.add(4))];
        fn store_groups(p: *mut f32, v: [float32x4_t; 2]) = {
            vst1q_f32(p, v[0]);
            vst1q_f32(p.add(4), v[1])
        };
        fn mul_groups(a: [float32x4_t; 2], b: [float32x4_t; 2]) -> [float32x4_t; 2] =
            [vmulq_f32(a[0], b[0]), vmulq_f32(a[1], b[1])];
        fn fma_groups(
            a: [float32x4_t; 2],
            b: [float32x4_t; 2],
            c: [float32x4_t; 2]
        ) -> [float32x4_t; 2] = [vfmaq_f32(c[0], a[0], b[0]), vfmaq_f32(c[1], a[1], b[1])];
        fn sum_groups(v: [float32x4_t; 2]) -> f32 = vaddvq_f32(vaddq_f32(v[0], v[1]));
        fn expand(groups: [float32x4_t; 2], index: usize) -> float32x4_t = {
            // Two registers hold a group.
            let values = groups[index / 8];
            match index / 2 % 4 {
                0 => vdupq_laneq_f32::<0>(values),
                1 => vdupq_laneq_f32::<1>(values),
                2 => vdupq_laneq_f32::<2>(values),
                _ => vdupq_laneq_f32::<3>(values),
            }
        };

        fn prefetch(p: *const u8) = asm!(
            "prfm pldl1keep, [{p}]",
            p = in(reg) p,
            options(readonly, nostack, preserves_flags),
        );
    }
}
