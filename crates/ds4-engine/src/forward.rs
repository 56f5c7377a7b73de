//! The forward pass (docs/model.md tells it in prose).

use ds4_model::config::{Config, LayerKind};

use crate::backend::{StageResult, Step, Sublayer};

/// Runs the batch of `step` through the model. Nothing else calls the stages.
pub(crate) fn forward(step: &mut dyn Step, config: &Config) -> StageResult {
    step.embed()?;
    for (l, layer) in config.layers.iter().enumerate() {
        step.hc_pre(l, Sublayer::Attention)?;
        step.project_and_compress(l)?;
        if layer.kind == LayerKind::Csa {
            step.select_rows(l)?;
        }
        step.attend(l)?;
        step.project_output(l)?;
        step.hc_post(l, Sublayer::Attention)?;

        step.hc_pre(l, Sublayer::Experts)?;
        step.route(l)?;
        step.run_experts(l)?;
        step.hc_post(l, Sublayer::Experts)?;
    }
    step.head()
}
