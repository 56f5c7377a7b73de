//! Matrix products with exactly dequantised weights.

use ds4_model::weights::MatrixView;
use rayon::prelude::*;

use super::dot;

/// y[t][r] = Σ_k W[r][k]·x[t][k]: `x` is `[n, cols]`, `y` is `[n, rows]`.
pub fn matmul(w: MatrixView<'_>, x: &[f32], y: &mut [f32]) {
    let n = x.len() / w.cols;
    let mut by_row = vec![0.0; w.rows * n];
    by_row.par_chunks_mut(n.max(1)).enumerate().for_each_init(
        || vec![0.0; w.cols],
        |weights, (r, out)| {
            dequantize(w, r, weights);
            for (y, x) in out.iter_mut().zip(x.chunks_exact(w.cols)) {
                *y = dot(weights, x);
            }
        },
    );
    for (t, y) in y.chunks_exact_mut(w.rows).enumerate() {
        for (r, y) in y.iter_mut().enumerate() {
            *y = by_row[r * n + t];
        }
    }
}

/// Block-diagonal product: rows `g·rank …` of `w` see only the g-th part of `x`.
///
/// `w` is `[groups·rank, cols]`, `x` is `[n, groups·cols]`, `y` is `[n, groups·rank]`.
pub fn matmul_grouped(w: MatrixView<'_>, groups: usize, x: &[f32], y: &mut [f32]) {
    if groups == 1 {
        return matmul(w, x, y);
    }
    let rank = w.rows / groups;
    for g in 0..groups {
        let part: Vec<f32> = x
            .chunks_exact(groups * w.cols)
            .flat_map(|x| &x[g * w.cols..(g + 1) * w.cols])
            .copied()
            .collect();
        let mut out = vec![0.0; part.len() / w.cols * rank];
        matmul(w.slice_rows(g * rank..(g + 1) * rank), &part, &mut out);
        for (y, out) in y.chunks_exact_mut(groups * rank).zip(out.chunks_exact(rank)) {
            y[g * rank..(g + 1) * rank].copy_from_slice(out);
        }
    }
}

/// Row `r` of `w` in f32.
pub fn dequantize(w: MatrixView<'_>, r: usize, out: &mut [f32]) {
    gguf::dequantize_row(w.ty, w.row(r), out).expect("a bound matrix has a readable type");
}
