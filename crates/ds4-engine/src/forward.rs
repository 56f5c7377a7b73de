//! The forward pass (docs/model.md tells it in prose).

use ds4_model::config::LayerKind;

use crate::backend::{Backend, Batch, HeadOutput, StageResult, Sublayer};

/// Runs `batch` through the model; returns what is wanted of `batch.logit_rows`.
///
/// `caches[i]` belongs to session `i` of the batch and advances by its span.
pub(crate) fn forward<B: Backend>(
    b: &B,
    batch: &Batch,
    caches: &mut [&mut B::Cache],
) -> StageResult<HeadOutput> {
    let mut x = b.embed(batch)?;
    for (l, layer) in b.config().layers.iter().enumerate() {
        b.hc_pre(l, Sublayer::Attention, batch, &mut x)?;
        b.project_qkv(l, batch, &mut x)?;
        if layer.kind != LayerKind::Swa {
            b.compress(l, batch, &mut x, caches)?;
        }
        if layer.kind == LayerKind::Csa {
            b.select_rows(l, batch, &mut x, caches)?;
        }
        b.attend(l, batch, &mut x, caches)?;
        b.project_output(l, batch, &mut x)?;
        b.hc_post(l, Sublayer::Attention, batch, &mut x)?;

        b.hc_pre(l, Sublayer::Experts, batch, &mut x)?;
        b.route(l, batch, &mut x)?;
        b.run_experts(l, batch, &mut x)?;
        b.hc_post(l, Sublayer::Experts, batch, &mut x)?;
    }
    b.head(batch, x)
}
