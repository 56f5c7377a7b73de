//! The instruction sets that there are kernels for.

use gguf::TensorType;

use super::kernels::Kernels;
#[cfg(all(target_arch = "aarch64", target_endian = "little"))]
use super::neon;
#[cfg(target_arch = "x86_64")]
use super::{avx2, avx512};

/// An instruction set that this machine has.
///
/// Values come from [`Isa::detect`] and [`Isa::available`] alone, so having one
/// is the proof that its kernels may run.
#[derive(Clone, Copy)]
pub struct Isa {
    name: &'static str,
    pub(super) kernels: &'static Kernels,
}

impl Isa {
    /// The fastest instruction set of this machine that there are kernels for.
    pub fn detect() -> Option<Isa> {
        Isa::available().into_iter().next()
    }

    /// Every instruction set of this machine that there are kernels for, the
    /// fastest first.
    pub fn available() -> Vec<Isa> {
        let mut found = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            if avx512::is_available() {
                found.push(Isa { name: "AVX-512", kernels: &avx512::KERNELS });
            }
            if avx2::is_available() {
                found.push(Isa { name: "AVX2", kernels: &avx2::KERNELS });
            }
        }
        #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
        if neon::is_available() {
            found.push(Isa { name: "NEON", kernels: &neon::KERNELS });
        }
        found
    }

    /// Its usual name, such as `AVX2`.
    pub fn name(self) -> &'static str {
        self.name
    }

    /// Whether [`matmul`](super::matmul()) and [`experts`](super::experts()) take weights of type `ty`.
    pub fn supports(self, ty: TensorType) -> bool {
        use TensorType::*;
        matches!(ty, F32 | F16 | BF16 | Q8_0 | Q2_K | Q4_K | IQ2_XXS | MXFP4)
    }
}
