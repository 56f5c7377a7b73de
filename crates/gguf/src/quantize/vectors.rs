//! Runs the searching quantisers with the widest vector instructions that this
//! machine has. The code is the same and so are its results; only the compiler
//! is allowed to use more.

use super::{iq2_xxs, k_quants};

/// Defines a function that calls an always-inlined one, compiled for AVX2
/// where that is present.
macro_rules! dispatch {
    ($name:ident, $inner:path, $block_bytes:literal) => {
        pub(super) fn $name(x: &[f32; 256], importance: &[f32; 256], out: &mut [u8; $block_bytes]) {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2")]
                fn avx2(x: &[f32; 256], importance: &[f32; 256], out: &mut [u8; $block_bytes]) {
                    $inner(x, importance, out);
                }
                if is_x86_feature_detected!("avx2") {
                    // SAFETY: the processor has AVX2.
                    return unsafe { avx2(x, importance, out) };
                }
            }
            $inner(x, importance, out);
        }
    };
}

dispatch!(q2_k, k_quants::q2_k, 84);
dispatch!(q4_k, k_quants::q4_k, 144);
dispatch!(iq2_xxs, iq2_xxs::quantize, 66);
