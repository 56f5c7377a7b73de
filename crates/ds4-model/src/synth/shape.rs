//! Shapes of synthetic models.

use crate::config::{Config, LayerConfig, LayerKind, Yarn};

/// The first `layers` layers of V4 Flash, all widths real; it has 43.
pub fn flash(layers: usize) -> Config {
    Config {
        layers: (0..layers).map(|l| layer(scheduled(l), l < 3)).collect(),
        vocab: 129_280,
        context_length: 1 << 20,
        hidden: 4096,
        heads: 64,
        q_rank: 1024,
        output_groups: 8,
        output_rank: 1024,
        experts: 256,
        experts_used: 6,
        expert_width: 2048,
        index_heads: 64,
        index_top_k: 512,
        sinkhorn_iterations: 20,
        hc_epsilon: 1e-6,
        rms_epsilon: 1e-6,
        routed_scale: 1.5,
        rope_base: 10_000.0,
        compress_rope_base: 160_000.0,
        yarn: Yarn { factor: 16.0, original_context: 65_536, beta_fast: 32.0, beta_slow: 1.0 },
    }
}

/// A model of a few megabytes with every kind of layer.
pub fn tiny() -> Config {
    let kinds = [LayerKind::Swa, LayerKind::Csa, LayerKind::Hca, LayerKind::Csa];
    Config {
        layers: kinds.into_iter().enumerate().map(|(l, kind)| layer(kind, l < 1)).collect(),
        vocab: 512,
        hidden: 256,
        heads: 4,
        q_rank: 128,
        output_groups: 2,
        output_rank: 64,
        experts: 8,
        expert_width: 256,
        index_heads: 16,
        index_top_k: 16,
        ..flash(0)
    }
}

/// The released schedule: two layers with the window alone, then CSA and HCA in turn.
fn scheduled(layer: usize) -> LayerKind {
    match layer {
        0 | 1 => LayerKind::Swa,
        even if even.is_multiple_of(2) => LayerKind::Csa,
        _ => LayerKind::Hca,
    }
}

fn layer(kind: LayerKind, hash_routed: bool) -> LayerConfig {
    LayerConfig { kind, hash_routed, swiglu_limit: 10.0, shared_swiglu_limit: 10.0 }
}
