//! Which experts a token uses, and how much of each (docs/model.md, "Experts").

use ds4_model::{config::Config, weights::Routing};
use rayon::prelude::*;

/// The official code has no floor under the sum of scores; other engines use this one. Real
/// weights never come near it.
const SMALLEST_SUM: f32 = 6.103_515_6e-5;

/// Turns router products `logits [n, experts]` into `ids` and `weights`, both `[n, experts_used]`.
pub(crate) fn route(
    config: &Config,
    routing: &Routing,
    tokens: &[u32],
    logits: &mut [f32],
    ids: &mut [u32],
    weights: &mut [f32],
) {
    let used = config.experts_used;
    let rows = logits.par_chunks_exact_mut(config.experts).zip(tokens);
    let out = ids.par_chunks_exact_mut(used).zip(weights.par_chunks_exact_mut(used));
    rows.zip(out).for_each(|((scores, token), (ids, weights))| {
        scores.iter_mut().for_each(|s| *s = softplus(*s).sqrt());
        match routing {
            Routing::Hash(table) => {
                ids.copy_from_slice(&table[*token as usize * used..][..used]);
            }
            Routing::Bias(bias) => choose(scores, bias, ids),
        }
        let sum: f32 = ids.iter().map(|e| scores[*e as usize]).sum();
        for (w, e) in weights.iter_mut().zip(ids) {
            *w = config.routed_scale * scores[*e as usize] / sum.max(SMALLEST_SUM);
        }
    });
}

/// The experts with the largest biased scores; among equal ones the lower index.
fn choose(scores: &[f32], bias: &[f32], ids: &mut [u32]) {
    let mut experts: Vec<u32> = (0..scores.len() as u32).collect();
    let biased = |e: u32| scores[e as usize] + bias[e as usize];
    experts.sort_unstable_by(|a, b| biased(*b).total_cmp(&biased(*a)).then(a.cmp(b)));
    ids.copy_from_slice(&experts[..ids.len()]);
    ids.sort_unstable();
}

/// ln(1 + e^x), without overflow.
fn softplus(x: f32) -> f32 {
    if x > 20.0 { x } else { x.exp().ln_1p() }
}
