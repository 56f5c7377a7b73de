//! Routed experts on the processor.

use std::sync::Arc;

use ds4_engine::{
    backend::StageResult,
    experts::{RoutedExperts, RoutedRows},
    observer::{ExpertObserver, Observation},
};
use ds4_model::Model;

use crate::{
    Kernels,
    kernels::Input,
    simd::{Experts, Seen},
};

/// Runs the routed experts of a model, whose weights stay where they are.
pub struct CpuExperts {
    model: Arc<Model>,
    kernels: Kernels,
    observer: Option<Arc<dyn ExpertObserver>>,
}

impl CpuExperts {
    /// The experts of `model`.
    pub fn new(model: Arc<Model>, kernels: Kernels) -> Self {
        CpuExperts { model, kernels, observer: None }
    }

    /// The same, and shows their inputs to `observer`.
    pub fn with_observer(self, observer: Arc<dyn ExpertObserver>) -> Self {
        CpuExperts { observer: Some(observer), ..self }
    }
}

impl RoutedExperts for CpuExperts {
    fn run(&self, rows: &RoutedRows<'_>, y: &mut [f32]) -> StageResult {
        let (config, layer, x) = (&self.model.config, rows.layer, rows.x);
        let ffn = &self.model.weights.layers[layer].ffn;
        let experts = Experts {
            gate: ffn.gate.stacked(),
            up: ffn.up.stacked(),
            down: ffn.down.stacked(),
            count: config.experts,
            limit: config.layers[layer].swiglu_limit,
        };
        let mut show = |expert: usize, rows: &[usize], activations: &[f32]| {
            if let Some(observer) = &self.observer {
                observer.observe(&Observation { layer, expert, rows, input: x, activations });
            }
        };
        let seen: Option<Seen<'_>> = self.observer.is_some().then_some(&mut show);
        let input = Input::new(self.kernels, x, config.hidden, rows.decode_rows);
        input.experts(&experts, rows.ids, rows.weights, y, seen);
        Ok(())
    }
}
