//! SIMD kernels, and how their work is split over threads.
//!
//! What is here: products of activations with weight matrices in their file
//! formats ([`matmul()`], [`experts()`]), the core of attention ([`attend()`]) and
//! the indexer's scores ([`index_scores()`]). The instruction set is an argument
//! ([`Isa`]), so that each can be checked on any machine that has it.
//!
//! Quantised weights meet activations quantised to i8 in groups of 32 (`q8.rs`)
//! and are multiplied in integers; float weights meet f32. Single tokens go
//! through kernels that read the weights once, in file order (`decode.rs`);
//! chunks of a prompt go through tiles of unpacked rows (`prefill.rs`).
//!
//! The invariant: what is computed for a token doesn't depend on the other
//! tokens of the call, nor on the number of threads. Every sum has one order.
//!
//! Kernels are written once, generic over the operations of `vector.rs`; a
//! folder per instruction set holds those operations and the unpacking of
//! blocks. Parallel work runs on the caller's current rayon pool.
//!
//! Each file uses only files further down:
//!
//! | | |
//! |---|---|
//! | `experts.rs`, then `matmul.rs` | work split over threads |
//! | `isa.rs` | the instruction sets of this machine |
//! | `avx512/`, then `avx2/`; `neon/` | operations and unpacking of one set |
//! | `kernels.rs` | the table of a set's kernels |
//! | `decode.rs`, `prefill.rs`, `attention.rs` | generic kernels |
//! | `float.rs`, `math.rs` | generic kernels that `attention.rs` uses, too |
//! | `formats.rs` | formats of weights |
//! | `q8.rs`, `tile.rs` | activations and unpacked rows |
//! | `vector.rs` | operations of a set |

#![allow(clippy::needless_range_loop, reason = "blocks of registers are indexed together")]

mod attention;
mod decode;
mod experts;
mod float;
mod formats;
mod isa;
mod kernels;
mod math;
mod matmul;
mod prefill;
mod q8;
mod tile;
mod vector;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(all(target_arch = "aarch64", target_endian = "little"))]
mod neon;

use ds4_model::config::{HEAD_DIM, INDEX_DIM};

pub use experts::{Experts, experts};
pub(crate) use experts::{Seen, experts_seen};
pub use isa::Isa;
pub use matmul::{Input, matmul};

use attention::{Context, IndexQuery};

/// Attention of one query over its visible rows, which are keys and values
/// alike: every head becomes the mean of the rows, weighted by
/// e^(scale · head·row) / (e^sink + Σ e^(scale · head·row)).
///
/// `heads` is `[heads, 512]`, each of `parts` `[rows, 512]`, `sinks` one per head.
/// Any range of a query's heads may be computed on its own, with the same bits.
/// `scratch` is resized as needed and may be reused.
///
/// # Panics
/// If lengths disagree.
pub fn attend(
    isa: Isa,
    heads: &mut [f32],
    parts: &[&[f32]],
    sinks: &[f32],
    scale: f32,
    scratch: &mut Vec<f32>,
) {
    assert_eq!(heads.len(), sinks.len() * HEAD_DIM, "one sink per head");
    assert!(parts.iter().all(|part| part.len().is_multiple_of(HEAD_DIM)), "whole rows");
    let rows: Vec<_> =
        parts.iter().flat_map(|part| part.chunks_exact(HEAD_DIM)).map(<[f32]>::as_ptr).collect();
    if rows.is_empty() {
        return heads.fill(0.0);
    }
    let len = attention::scratch_len(sinks.len(), rows.len());
    if scratch.len() < len {
        scratch.resize(len, 0.0);
    }
    let context = Context { rows: &rows, sinks, scale };
    // SAFETY: `isa` exists only where it can run, and lengths were checked.
    unsafe { (isa.kernels.attend)(heads, context, &mut scratch[..len]) }
}

/// The indexer's scores of one query: `out[c] = Σ_h w_h · max(0, q_h·key_c)`.
///
/// `q` is `[heads, 128]`, `keys` 128 numbers for each of `out`.
///
/// # Panics
/// If lengths disagree.
pub fn index_scores(isa: Isa, q: &[f32], keys: &[f32], head_weights: &[f32], out: &mut [f32]) {
    assert_eq!(q.len(), head_weights.len() * INDEX_DIM, "one query vector per head");
    assert_eq!(keys.len(), out.len() * INDEX_DIM, "one key per score");
    let query = IndexQuery::new(q, head_weights, isa.kernels.lanes);
    // SAFETY: `isa` exists only where it can run, and lengths were checked.
    unsafe { (isa.kernels.index_scores)(&query, keys, out) }
}

/// Σx².
pub fn sum_of_squares(isa: Isa, x: &[f32]) -> f32 {
    // SAFETY: `isa` exists only where it can run.
    unsafe { (isa.kernels.sum_of_squares)(x) }
}
