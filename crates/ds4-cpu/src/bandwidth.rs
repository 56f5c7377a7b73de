//! The bandwidth of this machine's memory: the limit of decode.

use std::{hint::black_box, time::Instant};

use rayon::prelude::*;

/// Far more than any cache.
const BYTES: usize = 1 << 30;
/// Bytes that a thread reads before it takes the next part.
const PART: usize = 4 << 20;
/// The best of so many passes counts: others on the machine can only slow a pass down.
const PASSES: usize = 5;

/// Bytes per second that all threads together read.
pub(crate) fn read_bandwidth() -> f64 {
    // Written, not just allocated: untouched memory is one page of zeros, read from the cache.
    let mut memory = vec![0u64; BYTES / size_of::<u64>()];
    memory.par_chunks_mut(PART / size_of::<u64>()).for_each(|part| part.fill(1));
    let pass = || {
        let start = Instant::now();
        let sum = |part: &[u64]| part.iter().fold(0u64, |sum, x| sum.wrapping_add(*x));
        black_box(
            memory.par_chunks(PART / size_of::<u64>()).map(sum).reduce(|| 0, u64::wrapping_add),
        );
        BYTES as f64 / start.elapsed().as_secs_f64()
    };
    (0..PASSES).map(|_| pass()).fold(0.0, f64::max)
}
