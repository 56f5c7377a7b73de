//! SwiGLU experts (docs/model.md, "Experts").

use ds4_model::weights::MatrixView;

use super::{products::matmul, sigmoid};
use crate::simd::{Experts, Seen};

/// y[t] += Σ_j weights[t][j] · expert ids[t][j] (x[t]); experts in ascending order.
///
/// `x` and `y` are `[n, hidden]`, `ids` and `weights` are `[n, used]`. Each expert's number,
/// tokens and inputs of its down projection are shown to `seen`.
pub(crate) fn experts(
    experts: &Experts<'_>,
    ids: &[u32],
    weights: &[f32],
    x: &[f32],
    y: &mut [f32],
    mut seen: Option<Seen<'_>>,
) {
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
        let activations = activate(experts, e, &weights, &rows);
        if let Some(seen) = &mut seen {
            let tokens: Vec<usize> = hits.iter().map(|i| i / used).collect();
            seen(e, &tokens, &activations);
        }
        let mut out = vec![0.0; rows.len()];
        matmul(expert(experts.down, experts, e), &activations, &mut out);
        for (i, out) in hits.iter().zip(out.chunks_exact(hidden)) {
            y[i / used * hidden..][..hidden].iter_mut().zip(out).for_each(|(y, o)| *y += o);
        }
    }
}

/// Hidden activations of expert `e` for `n` rows: a · silu(min(gate·x, limit)) · clamp(up·x, ±limit).
fn activate(experts: &Experts<'_>, e: usize, weights: &[f32], x: &[f32]) -> Vec<f32> {
    let (gate, up) = (expert(experts.gate, experts, e), expert(experts.up, experts, e));
    let mut activations = vec![0.0; weights.len() * gate.rows];
    let mut factors = activations.clone();
    matmul(gate, x, &mut activations);
    matmul(up, x, &mut factors);
    let rows = activations.chunks_exact_mut(gate.rows).zip(factors.chunks_exact(gate.rows));
    for ((activations, factors), a) in rows.zip(weights) {
        for (g, u) in activations.iter_mut().zip(factors) {
            *g = a * silu(g.min(experts.limit)) * u.clamp(-experts.limit, experts.limit);
        }
    }
    activations
}

/// The matrix of expert `e` in a stack.
fn expert<'a>(stack: MatrixView<'a>, experts: &Experts<'_>, e: usize) -> MatrixView<'a> {
    let rows = stack.rows / experts.count;
    stack.slice_rows(e * rows..(e + 1) * rows)
}

fn silu(x: f32) -> f32 {
    x * sigmoid(x)
}
