//! Speed at which all threads together read memory: the limit that decode is measured against.

use std::{hint::black_box, time::Instant};

use rayon::prelude::*;

/// Far more than any cache.
const BYTES: usize = 1 << 30;
/// What a thread reads before it takes the next piece.
const PIECE: usize = 4 << 20;
/// The best of so many passes counts: others on the machine can only slow it down.
const PASSES: usize = 5;

/// Bytes per second.
pub fn measure() -> f64 {
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
