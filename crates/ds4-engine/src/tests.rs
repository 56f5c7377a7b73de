//! A configuration for tests that need one and no weights.

use ds4_model::config::{Config, LayerConfig, LayerKind, Yarn};

/// Three layers, one of each kind.
pub(crate) fn config() -> Config {
    let layer = |kind| LayerConfig {
        kind,
        hash_routed: false,
        swiglu_limit: 10.0,
        shared_swiglu_limit: 10.0,
    };
    Config {
        layers: [LayerKind::Swa, LayerKind::Csa, LayerKind::Hca].map(layer).into(),
        vocab: 300,
        context_length: 1000,
        hidden: 64,
        heads: 2,
        q_rank: 32,
        output_groups: 1,
        output_rank: 32,
        experts: 8,
        experts_used: 2,
        expert_width: 32,
        index_heads: 4,
        index_top_k: 8,
        sinkhorn_iterations: 20,
        hc_epsilon: 1e-6,
        rms_epsilon: 1e-6,
        routed_scale: 1.5,
        rope_base: 10000.0,
        compress_rope_base: 160000.0,
        yarn: Yarn { factor: 16.0, original_context: 65536, beta_fast: 32.0, beta_slow: 1.0 },
    }
}
