//! Unpacking of quantised blocks with NEON. The dot product takes signed
//! quants, so none has a bias.

use std::arch::aarch64::*;

use gguf::IQ2_XXS_GRID;

use super::Neon;
use crate::simd::{
    formats::{
        Format, IQ2_SIGN_BYTES, Iq2Xxs, MXFP4_QUANTS, Mxfp4, Q2K, Q4K, Q8_0, Unpacked,
        half_exponent, q4_k_scales_and_mins,
    },
    q8::GROUPS,
    vector::{Vector, operations},
};

impl Format<Neon> for Q8_0 {
    const BYTES: usize = 8 * 34;
    const BIAS: i32 = 0;
    const WIDE: bool = true;
    const MINS: usize = 0;

    #[inline(always)]
    unsafe fn unpack(p: *const u8) -> Unpacked<Neon> {
        // SAFETY: eight blocks of 34 bytes are readable.
        unsafe {
            let mut quants = [vdupq_n_s32(0); 16];
            let mut scales = [0; 8];
            for g in 0..GROUPS {
                let block = p.add(34 * g);
                scales[g] = block.cast::<u16>().read_unaligned();
                quants[2 * g] = Neon::load_bytes(block.add(2));
                quants[2 * g + 1] = Neon::load_bytes(block.add(18));
            }
            let halves = scales.as_ptr().cast::<u8>();
            let scales = [Neon::load_f16(halves), Neon::load_f16(halves.add(8))];
            Unpacked { quants, scales, mins: [scales; 2] }
        }
    }
}

impl Format<Neon> for Q2K {
    const BYTES: usize = 84;
    const BIAS: i32 = 0;
    const WIDE: bool = false;
    const MINS: usize = 2;

    #[inline(always)]
    unsafe fn unpack(p: *const u8) -> Unpacked<Neon> {
        // SAFETY: a block of 84 bytes is readable.
        unsafe {
            // Quants of at most 3 times their half group's scale of at most 15
            // still fit in a byte.
            let mut quants = [vdupq_n_s32(0); 16];
            for (i, quants) in quants.iter_mut().enumerate() {
                // Half groups of the two bytes' planes alternate.
                let (n, j, half) = (i / 8, i / 2 % 4, i % 2);
                let q = vld1q_u8(p.add(16 + 32 * n + 16 * half));
                let plane = vandq_u8(vshlq_u8(q, vdupq_n_s8(-2 * j as i8)), vdupq_n_u8(3));
                let scale = vdupq_n_u8(*p.add(i) & 15);
                *quants = vreinterpretq_s32_u8(vmulq_u8(plane, scale));
            }
            let [d, dmin] = Neon::load_f16_pair(p.add(80));
            let mins = vshrq_n_u8::<4>(vld1q_u8(p));
            let mins = [vuzp1q_u8(mins, mins), vuzp2q_u8(mins, mins)];
            let mins = mins.map(|mins| Neon::scaled_bytes(vget_low_u8(mins), dmin));
            Unpacked { quants, scales: [vdupq_n_f32(d); 2], mins }
        }
    }
}

impl Format<Neon> for Q4K {
    const BYTES: usize = 144;
    const BIAS: i32 = 0;
    const WIDE: bool = false;
    const MINS: usize = 1;

    #[inline(always)]
    unsafe fn unpack(p: *const u8) -> Unpacked<Neon> {
        // SAFETY: a block of 144 bytes is readable.
        unsafe {
            let mut quants = [vdupq_n_s32(0); 16];
            for i in 0..4 {
                for half in 0..2 {
                    let q = vld1q_u8(p.add(16 + 32 * i + 16 * half));
                    let low = vandq_u8(q, vdupq_n_u8(15));
                    quants[4 * i + half] = vreinterpretq_s32_u8(low);
                    quants[4 * i + 2 + half] = vreinterpretq_s32_u8(vshrq_n_u8::<4>(q));
                }
            }
            let [d, dmin] = Neon::load_f16_pair(p);
            let (scales, mins) = q4_k_scales_and_mins(p.add(4));
            let scales = Neon::scaled_bytes(vcreate_u8(scales), d);
            let mins = Neon::scaled_bytes(vcreate_u8(mins), dmin);
            Unpacked { quants, scales, mins: [mins; 2] }
        }
    }
}

impl Format<Neon> for Iq2Xxs {
    const BYTES: usize = 66;
    const BIAS: i32 = 0;
    const WIDE: bool = false;
    const MINS: usize = 0;

    #[inline(always)]
    unsafe fn unpack(p: *const u8) -> Unpacked<Neon> {
        // SAFETY: a block of 66 bytes is readable; grid indices have eight
        // bits and sign codes seven.
        unsafe {
            let mut quants = [vdupq_n_s32(0); 16];
            let mut factors = [0.0; 8];
            for g in 0..GROUPS {
                let pair = p.add(2 + 8 * g);
                let codes = pair.add(4).cast::<u32>().read_unaligned();
                let grid =
                    |l: usize| vcreate_u8(*IQ2_XXS_GRID.get_unchecked(usize::from(*pair.add(l))));
                let sign = |l: usize| {
                    vcreate_u8(*IQ2_SIGN_BYTES.get_unchecked((codes >> (7 * l) & 127) as usize))
                };
                for half in 0..2 {
                    let magnitudes = vcombine_u8(grid(2 * half), grid(2 * half + 1));
                    let signs = vcombine_u8(sign(2 * half), sign(2 * half + 1));
                    quants[2 * g + half] = vreinterpretq_s32_u8(vmulq_u8(magnitudes, signs));
                }
                factors[g] = (2 * (codes >> 28) + 1) as f32;
            }
            let d = vdupq_n_f32(Neon::load_f16_pair(p)[0] / 8.0);
            let scales = Neon::mul_groups(Neon::load_groups(factors.as_ptr()), [d; 2]);
            Unpacked { quants, scales, mins: [scales; 2] }
        }
    }
}

impl Format<Neon> for Mxfp4 {
    const BYTES: usize = 8 * 17;
    const BIAS: i32 = 0;
    const WIDE: bool = false;
    const MINS: usize = 0;

    #[inline(always)]
    unsafe fn unpack(p: *const u8) -> Unpacked<Neon> {
        // SAFETY: eight blocks of 17 bytes are readable.
        unsafe {
            let table = vld1q_s8(MXFP4_QUANTS.as_ptr());
            let mut quants = [vdupq_n_s32(0); 16];
            let mut scales = [0.0; 8];
            for g in 0..GROUPS {
                let block = p.add(17 * g);
                scales[g] = half_exponent(*block);
                let q = vld1q_u8(block.add(1));
                let nibbles = [vandq_u8(q, vdupq_n_u8(15)), vshrq_n_u8::<4>(q)];
                for (half, nibbles) in nibbles.into_iter().enumerate() {
                    quants[2 * g + half] = vreinterpretq_s32_s8(vqtbl1q_s8(table, nibbles));
                }
            }
            let scales = Neon::load_groups(scales.as_ptr());
            Unpacked { quants, scales, mins: [scales; 2] }
        }
    }
}

impl Neon {
    operations! {
        fn load_f16_pair(p: *const u8) -> [f32; 2] = {
            let pair = vdup_n_u32(p.cast::<u32>().read_unaligned());
            let pair = vcvt_f32_f16(vreinterpret_f16_u32(pair));
            [vgetq_lane_f32::<0>(pair), vgetq_lane_f32::<1>(pair)]
        };
        fn scaled_bytes(bytes: uint8x8_t, factor: f32) -> [float32x4_t; 2] = {
            let words = vmovl_u8(bytes);
            let low = vcvtq_f32_u32(vmovl_u16(vget_low_u16(words)));
            let high = vcvtq_f32_u32(vmovl_u16(vget_high_u16(words)));
            [vmulq_n_f32(low, factor), vmulq_n_f32(high, factor)]
        };
    }
}
