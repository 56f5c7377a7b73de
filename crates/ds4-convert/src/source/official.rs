//! Names of the official checkpoints' tensors.

use ds4_model::binding::{ExpectedTensor, Presence, Slot};

/// The official name of a tensor; of a stack the name of the matrix of expert `expert`.
pub(super) fn name(tensor: &ExpectedTensor, expert: usize) -> String {
    let name = suffix(tensor.binding.slot);
    let name = match name.split_once("{e}") {
        Some((before, after)) => format!("{before}{expert}{after}"),
        None => name.to_owned(),
    };
    match (tensor.binding.presence, tensor.layer) {
        (Presence::Model, _) | (_, None) => name,
        (_, Some(layer)) => format!("layers.{layer}.{name}"),
    }
}

/// Whether the tensor is stored as one matrix per expert.
pub(super) fn is_stack(slot: Slot) -> bool {
    suffix(slot).contains("{e}")
}

/// The name of the scales of a quantised matrix.
pub(super) fn scale_name(weight: &str) -> String {
    format!("{}.scale", weight.strip_suffix(".weight").unwrap_or(weight))
}

fn suffix(slot: Slot) -> &'static str {
    match slot {
        Slot::TokenEmbedding => "embed.weight",
        Slot::OutputHcFunction => "hc_head_fn",
        Slot::OutputHcBase => "hc_head_base",
        Slot::OutputHcScale => "hc_head_scale",
        Slot::OutputNorm => "norm.weight",
        Slot::Output => "head.weight",
        Slot::AttnHcFunction => "hc_attn_fn",
        Slot::AttnHcBase => "hc_attn_base",
        Slot::AttnHcScale => "hc_attn_scale",
        Slot::AttnNorm => "attn_norm.weight",
        Slot::QA => "attn.wq_a.weight",
        Slot::QANorm => "attn.q_norm.weight",
        Slot::QB => "attn.wq_b.weight",
        Slot::Kv => "attn.wkv.weight",
        Slot::KvNorm => "attn.kv_norm.weight",
        Slot::Sinks => "attn.attn_sink",
        Slot::OutputA => "attn.wo_a.weight",
        Slot::OutputB => "attn.wo_b.weight",
        Slot::CompressorKv => "attn.compressor.wkv.weight",
        Slot::CompressorGate => "attn.compressor.wgate.weight",
        Slot::CompressorPositionBias => "attn.compressor.ape",
        Slot::CompressorNorm => "attn.compressor.norm.weight",
        Slot::IndexerQB => "attn.indexer.wq_b.weight",
        Slot::IndexerHeadWeights => "attn.indexer.weights_proj.weight",
        Slot::IndexerKv => "attn.indexer.compressor.wkv.weight",
        Slot::IndexerGate => "attn.indexer.compressor.wgate.weight",
        Slot::IndexerPositionBias => "attn.indexer.compressor.ape",
        Slot::IndexerNorm => "attn.indexer.compressor.norm.weight",
        Slot::FfnHcFunction => "hc_ffn_fn",
        Slot::FfnHcBase => "hc_ffn_base",
        Slot::FfnHcScale => "hc_ffn_scale",
        Slot::FfnNorm => "ffn_norm.weight",
        Slot::Router => "ffn.gate.weight",
        Slot::RouterBias => "ffn.gate.bias",
        Slot::RouterTable => "ffn.gate.tid2eid",
        Slot::ExpertGate => "ffn.experts.{e}.w1.weight",
        Slot::ExpertUp => "ffn.experts.{e}.w3.weight",
        Slot::ExpertDown => "ffn.experts.{e}.w2.weight",
        Slot::SharedGate => "ffn.shared_experts.w1.weight",
        Slot::SharedUp => "ffn.shared_experts.w3.weight",
        Slot::SharedDown => "ffn.shared_experts.w2.weight",
    }
}
