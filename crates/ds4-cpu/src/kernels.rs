//! Which implementation of the hot routines runs.

use std::fmt;

use ds4_model::{config::HEAD_DIM, weights::MatrixView};
use gguf::TensorType;

use crate::{
    reference,
    simd::{self, Experts, Isa, Seen},
};

/// An implementation of the hot routines.
#[derive(Clone, Copy)]
pub enum Kernels {
    /// Plain Rust, f32, exact weights.
    Reference,
    /// SIMD of this instruction set, with activations quantised for quantised weights.
    Simd(Isa),
}

impl Kernels {
    /// The fastest that this machine has.
    pub fn detect() -> Self {
        Isa::detect().map_or(Kernels::Reference, Kernels::Simd)
    }

    /// All that this machine has, the reference first.
    pub fn available() -> Vec<Self> {
        let simd = Isa::available().into_iter().map(Kernels::Simd);
        [Kernels::Reference].into_iter().chain(simd).collect()
    }
}

impl fmt::Display for Kernels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Kernels::Reference => f.write_str("reference"),
            Kernels::Simd(isa) => f.write_str(isa.name()),
        }
    }
}

/// Rows about to be multiplied with one or more matrices; the first `decode_rows` of them are
/// computed one by one, the others as a matrix.
pub(crate) enum Input<'a> {
    Reference { x: &'a [f32], groups: usize },
    Simd { x: &'a [f32], input: simd::Input<'a> },
}

impl<'a> Input<'a> {
    /// Rows `x [n, cols]`.
    pub fn new(kernels: Kernels, x: &'a [f32], cols: usize, decode_rows: usize) -> Self {
        Self::grouped(kernels, x, cols, 1, decode_rows)
    }

    /// Rows `x [n, groups·cols]` for a block-diagonal matrix of `groups` blocks.
    pub fn grouped(
        kernels: Kernels,
        x: &'a [f32],
        cols: usize,
        groups: usize,
        decode_rows: usize,
    ) -> Self {
        match kernels {
            Kernels::Reference => Input::Reference { x, groups },
            Kernels::Simd(isa) => {
                Input::Simd { x, input: simd::Input::grouped(isa, x, cols, groups, decode_rows) }
            }
        }
    }

    /// y = W·x for every row; `y` is `[n, W.rows]`.
    pub fn matmul(&self, w: MatrixView<'_>, y: &mut [f32]) {
        match self {
            Input::Reference { x, groups } => {
                reference::products::matmul_grouped(w, *groups, x, y);
            }
            Input::Simd { input, .. } => simd::matmul(w, input, y),
        }
    }

    /// Like [`matmul`](Self::matmul), with activations in f32 whatever the weights are: for what
    /// the model keeps in f32 (hyper-connections, compressors, router).
    pub fn matmul_exact(&self, w: MatrixView<'_>, y: &mut [f32]) {
        match self {
            Input::Simd { x, .. } if !is_float(w.ty) => reference::products::matmul(w, x, y),
            _ => self.matmul(w, y),
        }
    }

    /// y[t] += Σ_j weights[t][j] · expert ids[t][j] (x[t]), and shows what experts are given to
    /// `seen`.
    pub fn experts(
        &self,
        experts: &Experts<'_>,
        ids: &[u32],
        weights: &[f32],
        y: &mut [f32],
        seen: Option<Seen<'_>>,
    ) {
        match self {
            Input::Reference { x, .. } => {
                reference::experts::experts(experts, ids, weights, x, y, seen);
            }
            Input::Simd { input, .. } => {
                simd::experts_seen(experts, ids, weights, input, y, seen);
            }
        }
    }
}

impl Kernels {
    /// Replaces the queries `heads [heads, 512]` by their attention over the rows of all `parts`,
    /// each `[rows, 512]`.
    pub(crate) fn attend(self, heads: &mut [f32], parts: &[&[f32]], sinks: &[f32]) {
        let scale = (HEAD_DIM as f32).sqrt().recip();
        match self {
            Kernels::Reference => reference::attention::attend(heads, parts, sinks, scale),
            Kernels::Simd(isa) => {
                simd::attend(isa, heads, parts, sinks, scale, &mut Vec::new());
            }
        }
    }

    /// The indexer's scores of one query `[heads, 128]` for `keys [n, 128]`.
    pub(crate) fn index_scores(
        self,
        q: &[f32],
        keys: &[f32],
        head_weights: &[f32],
        scores: &mut [f32],
    ) {
        match self {
            Kernels::Reference => reference::attention::index_scores(q, keys, head_weights, scores),
            Kernels::Simd(isa) => simd::index_scores(isa, q, keys, head_weights, scores),
        }
    }
}

fn is_float(ty: TensorType) -> bool {
    matches!(ty, TensorType::F32 | TensorType::F16 | TensorType::BF16)
}
