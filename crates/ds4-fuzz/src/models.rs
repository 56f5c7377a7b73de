//! Models small enough to be loaded by a fuzzer.

use std::sync::Arc;

use ds4_cpu::{CpuBackend, Kernels};
use ds4_engine::{Engine, rows::CacheRounding};
use ds4_model::{
    Model,
    config::Config,
    synth::{self, Recipe},
};

/// One layer, as narrow as the kernels allow.
pub fn smallest() -> Config {
    let mut config = narrow();
    config.layers.truncate(1);
    config
}

/// A layer of each kind, as narrow as the kernels allow.
pub fn narrow() -> Config {
    Config {
        vocab: 270,
        hidden: 32,
        heads: 1,
        q_rank: 32,
        output_groups: 1,
        output_rank: 32,
        experts: 1,
        experts_used: 1,
        expert_width: 32,
        ..synth::tiny()
    }
}

/// `config` as a GGUF file.
///
/// # Errors
/// If it cannot be written.
pub fn file(config: &Config) -> Result<Vec<u8>, ds4_model::Error> {
    synth::write(config, Recipe::Q8, 1, Vec::new(), |_| {})
}

/// An engine with [`narrow`] in it, whose snapshots are fuzzed.
///
/// # Panics
/// Never: the model is always the same.
pub fn engine() -> Engine {
    let model = Model::dummy("narrow", &narrow(), Recipe::Q8, 1).expect("a model that suits");
    Engine::new(CpuBackend::new(Arc::new(model), Kernels::Reference, CacheRounding::On))
}
