//! What computes, and how fast its memory is: the limit that decode is measured against.

use std::{hint::black_box, time::Instant};

use anyhow::Result;
use rayon::prelude::*;
use serde::Serialize;

use crate::backend::AnyBackend;

/// The machine as the program uses it.
#[derive(Serialize)]
pub struct Machine {
    /// As `--backend` names it.
    pub backend: &'static str,
    /// What it is, such as `2 threads, AVX-512 kernels`.
    pub device: String,
    /// Measured: what all threads read, or what a copy on the device reads and writes.
    pub memory_bytes_per_second: f64,
}

impl Machine {
    /// Describes and measures what `backend` runs on.
    pub fn of(backend: &AnyBackend) -> Result<Self> {
        match backend {
            AnyBackend::Cpu(cpu) => {
                let threads = rayon::current_num_threads();
                Ok(Machine {
                    backend: "cpu",
                    device: format!("{threads} threads, {} kernels", cpu.kernels()),
                    memory_bytes_per_second: read_bandwidth(),
                })
            }
            AnyBackend::Cuda(cuda) => Ok(Machine {
                backend: "cuda",
                device: cuda.device_name().to_owned(),
                memory_bytes_per_second: cuda.copy_bandwidth()?,
            }),
        }
    }
}

/// Far more than any cache.
const BYTES: usize = 1 << 30;
/// What a thread reads before it takes the next piece.
const PIECE: usize = 4 << 20;
/// The best of so many passes counts: others on the machine can only slow it down.
const PASSES: usize = 5;

/// Bytes per second that all threads together read.
fn read_bandwidth() -> f64 {
    // Written, not just allocated: untouched memory is one page of zeros, read from the cache.
    let mut memory = vec![0u64; BYTES / size_of::<u64>()];
    memory.par_chunks_mut(PIECE / size_of::<u64>()).for_each(|piece| piece.fill(1));
    let pass = || {
        let start = Instant::now();
        let sum = |piece: &[u64]| piece.iter().fold(0u64, |sum, x| sum.wrapping_add(*x));
        black_box(
            memory.par_chunks(PIECE / size_of::<u64>()).map(sum).reduce(|| 0, u64::wrapping_add),
        );
        BYTES as f64 / start.elapsed().as_secs_f64()
    };
    (0..PASSES).map(|_| pass()).fold(0.0, f64::max)
}
