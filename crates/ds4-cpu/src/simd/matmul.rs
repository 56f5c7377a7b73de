//! Products of activations with weight matrices, and their split over threads.

use std::{cell::OnceCell, marker::PhantomData, ops::Range};

use ds4_model::weights::MatrixView;
use gguf::TensorType;
use rayon::prelude::*;

use super::{
    float::FloatRows,
    isa::Isa,
    kernels::Kernels,
    q8::{Panel, Q8Block, Q8Rows},
    tile::Tile,
};

/// Rows that a task computes: enough for its tokens to be worth reading, few
/// enough for their unpacked form to stay in the second-level cache and for the
/// threads to finish together.
pub(super) const TASK_ROWS: usize = 64;

/// Activations that matrices are multiplied with.
///
/// Their quantised forms are made when the first quantised matrix asks and
/// serve all that follow. The first `decoding` rows go through the kernels for
/// single tokens, the others through those for chunks.
pub struct Input<'a> {
    pub(super) isa: Isa,
    pub(super) x: &'a [f32],
    /// Columns of one group.
    pub(super) cols: usize,
    groups: usize,
    pub(super) decoding: usize,
    quantized: OnceCell<Q8Rows>,
    /// Of each group.
    panels: OnceCell<Vec<Vec<Panel>>>,
}

impl<'a> Input<'a> {
    /// Rows of `cols` numbers, of which the first `decoding` are single tokens.
    ///
    /// # Panics
    /// If `x` is not a whole number of rows, or fewer than `decoding`.
    pub fn new(isa: Isa, x: &'a [f32], cols: usize, decoding: usize) -> Self {
        Input::grouped(isa, x, cols, 1, decoding)
    }

    /// Rows of `groups` times `cols` numbers for a block-diagonal matrix: of
    /// its rows each part in `groups` sees its group's `cols` alone.
    ///
    /// # Panics
    /// As [`Input::new`].
    pub fn grouped(isa: Isa, x: &'a [f32], cols: usize, groups: usize, decoding: usize) -> Self {
        assert!(x.len().is_multiple_of(cols * groups), "whole rows of activations");
        assert!(decoding * cols * groups <= x.len(), "no more tokens decoding than there are");
        Input {
            isa,
            x,
            cols,
            groups,
            decoding,
            quantized: OnceCell::new(),
            panels: OnceCell::new(),
        }
    }

    /// Tokens.
    pub fn rows(&self) -> usize {
        self.x.len() / (self.cols * self.groups)
    }

    /// Each group of each token as a row of its own, token by token.
    pub(super) fn quantized(&self) -> &Q8Rows {
        self.quantized.get_or_init(|| self.isa.kernels.quantized(self.x, self.cols))
    }

    fn quantized_row(&self, token: usize, group: usize) -> &[Q8Block] {
        self.quantized().row(token * self.groups + group)
    }

    fn operand(&self, ty: TensorType, group: usize) -> Operand<'_> {
        if is_float(ty) {
            let row = |token| &self.x[(token * self.groups + group) * self.cols..][..self.cols];
            return Operand::Float((0..self.rows()).map(row).collect());
        }
        let panels = self.panels.get_or_init(|| {
            let rows_of = |group| -> Vec<_> {
                (self.decoding..self.rows()).map(|t| self.quantized_row(t, group)).collect()
            };
            let rows: Vec<_> = (0..self.groups).map(rows_of).collect();
            rows.par_iter().map(|rows| Panel::split(rows, self.isa.kernels.panel)).collect()
        });
        Operand::Quantized {
            decoding: (0..self.decoding).map(|t| self.quantized_row(t, group)).collect(),
            panels: &panels[group],
        }
    }
}

/// Products of all tokens with all rows: `y[t·rows + r] = Σ_k W[r][k]·x[t][k]`.
///
/// If the input is grouped, row `r` is multiplied with group
/// `r / (rows / groups)`.
///
/// # Panics
/// If lengths disagree, or the type is none of [`Isa::supports`].
pub fn matmul(w: MatrixView, x: &Input, y: &mut [f32]) {
    check(&w, x.cols);
    assert_eq!(y.len(), x.rows() * w.rows, "one output per token and row");
    assert!(w.rows.is_multiple_of(x.groups), "groups of equally many rows");
    if y.is_empty() {
        return;
    }
    let kernels = x.isa.kernels;
    let rank = w.rows / x.groups;
    let operands: Vec<_> = (0..x.groups).map(|group| x.operand(w.ty, group)).collect();
    let tasks = split_rows(rank, kernels.lanes);
    let out = Out::new(y, w.rows);
    (0..x.groups * tasks.len()).into_par_iter().for_each_init(Scratch::default, |scratch, i| {
        let (group, rows) = (i / tasks.len(), &tasks[i % tasks.len()]);
        let rows = group * rank + rows.start..group * rank + rows.end;
        // SAFETY: tasks have disjoint rows, `y` a place for each and token.
        unsafe {
            let out = out.column(rows.start);
            multiply(kernels, w.slice_rows(rows), &operands[group], scratch, out);
        }
    });
}

/// Panics unless `w` is what the kernels will take it for.
pub(super) fn check(w: &MatrixView, cols: usize) {
    assert_eq!(w.cols, cols, "a matrix as wide as its input");
    let row_bytes = w.ty.row_bytes(cols).expect("whole blocks in a row");
    assert_eq!(w.bytes.len(), row_bytes * w.rows, "a matrix with all its bytes");
}

pub(super) fn is_float(ty: TensorType) -> bool {
    matches!(ty, TensorType::F32 | TensorType::F16 | TensorType::BF16)
}

/// Ranges of rows for the tasks of the current pool: at least four for each
/// thread if there are enough rows, whole tiles of `lanes` rows.
pub(super) fn split_rows(rows: usize, lanes: usize) -> Vec<Range<usize>> {
    let tasks = (4 * rayon::current_num_threads()).max(rows.div_ceil(TASK_ROWS));
    let size = rows.div_ceil(tasks).next_multiple_of(lanes);
    (0..rows).step_by(size).map(|start| start..rows.min(start + size)).collect()
}

/// The tokens that a matrix is multiplied with, in the form its type needs.
pub(super) enum Operand<'a> {
    Quantized {
        decoding: Vec<&'a [Q8Block]>,
        /// The tokens after those.
        panels: &'a [Panel],
    },
    Float(Vec<&'a [f32]>),
}

/// What a task reuses.
#[derive(Default)]
pub(super) struct Scratch {
    tile: Tile,
    products: Vec<f32>,
}

/// Multiplies all rows of `w` with all tokens.
///
/// # Safety
/// `out` has a place for each token and row that nobody else uses.
pub(super) unsafe fn multiply(
    kernels: &Kernels,
    w: MatrixView,
    operand: &Operand,
    scratch: &mut Scratch,
    out: Out,
) {
    match operand {
        // SAFETY: kernels exist only where they can run, `check` has seen the
        // matrix, and outputs are the caller's promise.
        Operand::Float(tokens) => unsafe {
            let rows = FloatRows {
                data: w.bytes.as_ptr(),
                count: w.rows,
                row_bytes: w.row_bytes(),
                cols: w.cols,
            };
            let tokens: Vec<_> = tokens.iter().map(|token| token.as_ptr()).collect();
            (kernels.multiply_floats)(w.ty, rows, &tokens, out.data, out.stride);
        },
        // SAFETY: the same.
        Operand::Quantized { decoding, panels } => unsafe {
            if !decoding.is_empty() {
                (kernels.decode)(w, decoding, out.data, out.stride);
            }
            if !panels.is_empty() {
                multiply_tiles(kernels, w, panels, scratch, out.row(decoding.len()));
            }
        },
    }
}

/// Multiplies all rows of `w` with the tokens of `panels`, tile by tile.
unsafe fn multiply_tiles(
    kernels: &Kernels,
    w: MatrixView,
    panels: &[Panel],
    scratch: &mut Scratch,
    out: Out,
) {
    let Scratch { tile, products } = scratch;
    let lanes = kernels.lanes;
    products.resize(lanes * kernels.panel, 0.0);
    for start in (0..w.rows).step_by(lanes) {
        let rows = start..w.rows.min(start + lanes);
        let count = rows.len();
        // SAFETY: as for `multiply`; where the tile has fewer rows than lanes,
        // its products take the way over `products`.
        unsafe {
            (kernels.unpack_tile)(w.slice_rows(rows), tile);
            let mut out = out.column(start);
            for panel in panels {
                if count == lanes {
                    (kernels.multiply_tile)(w.ty, tile, panel, out.data, out.stride);
                } else {
                    (kernels.multiply_tile)(w.ty, tile, panel, products.as_mut_ptr(), lanes);
                    for (t, products) in products.chunks(lanes).take(panel.tokens).enumerate() {
                        out.slice(t, count).copy_from_slice(&products[..count]);
                    }
                }
                out = Out { data: out.data.wrapping_add(panel.tokens * out.stride), ..out };
            }
        }
    }
}

/// A matrix of outputs, token by token, of which tasks write disjoint columns.
#[derive(Clone, Copy)]
pub(super) struct Out<'a> {
    data: *mut f32,
    stride: usize,
    life: PhantomData<&'a mut [f32]>,
}

// SAFETY: writing through it is unsafe, and the writer promises disjointness.
unsafe impl Send for Out<'_> {}
// SAFETY: the same.
unsafe impl Sync for Out<'_> {}

impl<'a> Out<'a> {
    pub fn new(y: &'a mut [f32], stride: usize) -> Self {
        Out { data: y.as_mut_ptr(), stride, life: PhantomData }
    }

    /// The matrix from column `c` on.
    ///
    /// # Safety
    /// There must be such a column.
    pub unsafe fn column(self, c: usize) -> Self {
        // SAFETY: the caller promises that it is inside.
        Out { data: unsafe { self.data.add(c) }, ..self }
    }

    /// The matrix from row `r` on.
    ///
    /// # Safety
    /// There must be such a row.
    pub unsafe fn row(self, r: usize) -> Self {
        // SAFETY: the caller promises that it is inside.
        Out { data: unsafe { self.data.add(r * self.stride) }, ..self }
    }

    /// The first `len` numbers of row `r`.
    ///
    /// # Safety
    /// They must exist, and nobody else may use them.
    pub unsafe fn slice(self, r: usize, len: usize) -> &'a mut [f32] {
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(r * self.stride), len) }
    }
}
