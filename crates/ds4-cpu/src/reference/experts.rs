//! SwiGLU experts (docs/model.md, "Experts").

use ds4_model::weights::MatrixView;

use super::{products::matmul, sigmoid};
use crate::simd::Experts;

/// y[t] += Σ_j weights[t][j] · expert ids[t][j] (x[t]); experts in ascending order.
///
/// `x` and `y` are `[n, hidden]`, `ids` and `weights` are `[n, used]`.
pub fn experts(experts: &Experts<'_>, ids: &[u32], weights: &[f32], x: &[f32], y: &mut [f32]) {
    let hidden = experts.gate.cols;
    let used = ids.len() * hidden / x.len();
    for e in 0..experts.count {
        let hits: Vec<usize> = (0..ids.len()).filter(|i| ids[*i] as usize == e).collect();
        if hits.is_empty() {
            continue;
        }
        let rows: Vec<f32> =
            hits.iter().flat_map(|i| &x[i / used * hidden..][..hidden]).copied().collect();
        let weights: Vec<f32> = hits.iter().map(|i| weights[*i]).collect();
        let out = run_expert(experts, e, &weights, &rows);
        for (i, out) in hits.iter().zip(out.chunks_exact(hidden)) {
            y[i / used * hidden..][..hidden].iter_mut().zip(out).for_each(|(y, o)| *y += o);
        }
    }
}

/// Expert `e` on `n` rows: down·(a · silu(min(gate·x, limit)) · clamp(up·x, ±limit)).
fn run_expert(experts: &Experts<'_>, e: usize, weights: &[f32], x: &[f32]) -> Vec<f32> {
    let of = |stack: MatrixView<'_>| {
        let rows = stack.rows / experts.count;
        (rows, e * rows..(e + 1) * rows)
    };
    let (width, hidden_rows) = of(experts.gate);
    let (hidden, output_rows) = of(experts.down);
    let n = weights.len();
    let mut gate = vec![0.0; n * width];
    let mut up = vec![0.0; n * width];
    matmul(experts.gate.slice_rows(hidden_rows.clone()), x, &mut gate);
    matmul(experts.up.slice_rows(hidden_rows), x, &mut up);
    for ((gate, up), a) in gate.chunks_exact_mut(width).zip(up.chunks_exact(width)).zip(weights) {
        for (g, u) in gate.iter_mut().zip(up) {
            *g = a * silu(g.min(experts.limit)) * u.clamp(-experts.limit, experts.limit);
        }
    }
    let mut y = vec![0.0; n * hidden];
    matmul(experts.down.slice_rows(output_rows), &gate, &mut y);
    y
}

fn silu(x: f32) -> f32 {
    x * sigmoid(x)
}
