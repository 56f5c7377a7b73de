//! The two families of files of this model, and other differences that don't matter.

use ds4_model::{
    Model,
    config::{Config, LayerKind},
    synth::{self, Recipe},
};
use gguf::{Array, TensorType, Value};

use crate::draft::Draft;

fn load(draft: &Draft) -> Model {
    draft.load().unwrap_or_else(|e| panic!("{e}"))
}

/// As upstream's converter writes it: no vocabulary size, other integer types, an output width,
/// draft entries at the end of arrays, other storage types.
#[test]
fn upstream_conversions_load() {
    let mut draft = Draft::new(&synth::tiny(), Recipe::Mxfp4);
    draft.remove("deepseek4.vocab_size");
    draft.set("deepseek4.embedding_length_out", 1024u32);
    draft.set("deepseek4.block_count", 4u64);
    draft.set("deepseek4.attention.head_count", 4i32);
    draft.set("deepseek4.rope.scaling.original_context_length", 65536u64);
    draft.set("deepseek4.rope.freq_base", 10000f64);
    let ratios = Array::I32(vec![0, 4, 128, 4, 0, 0, 0]);
    draft.set("deepseek4.attention.compress_ratios", Value::Array(ratios));
    draft.remove("deepseek4.rope.scaling.yarn_beta_fast");
    draft.remove("deepseek4.rope.scaling.yarn_beta_slow");
    draft.reshape("blk.1.hc_attn_fn.weight", &[1024, 24], TensorType::F32);
    draft.reshape("token_embd.weight", &[256, 512], TensorType::BF16);
    draft.reshape("blk.1.indexer.attn_q_b.weight", &[128, 2048], TensorType::Q8_0);
    draft.reshape("blk.1.attn_compressor_ape.weight", &[1024, 4], TensorType::F32);
    draft.reshape("blk.1.ffn_gate_inp.weight", &[256, 8], TensorType::BF16);
    draft.reshape("blk.1.attn_norm.weight", &[256], TensorType::BF16);
    let model = load(&draft);
    assert_eq!(model.config, synth::tiny());
    assert!(model.warnings.is_empty(), "{:?}", model.warnings);
}

/// As in antirez's files: one clamp for routed and shared experts, and a draft block named in the
/// metadata without being there.
#[test]
fn files_without_a_shared_clamp_take_the_routed_one() {
    let mut draft = Draft::tiny();
    draft.set("deepseek4.swiglu_clamp_exp", Value::Array(Array::F32(vec![7.0; 5])));
    draft.remove("deepseek4.swiglu_clamp_shexp");
    draft.set("deepseek4.nextn_predict_layers", 1u32);
    let layers = load(&draft).config.layers;
    assert!(layers.iter().all(|l| l.swiglu_limit == 7.0 && l.shared_swiglu_limit == 7.0));
}

#[test]
fn scalars_serve_all_layers() {
    let mut draft = Draft::tiny();
    draft.set("deepseek4.swiglu_clamp_exp", 8f32);
    draft.set("deepseek4.swiglu_clamp_shexp", 9f32);
    let layers = load(&draft).config.layers;
    assert!(layers.iter().all(|l| l.swiglu_limit == 8.0 && l.shared_swiglu_limit == 9.0));
}

#[test]
fn other_spellings_load() {
    let mut draft = Draft::tiny();
    for name in ["head_count", "key_length", "top_k"] {
        let usual = format!("deepseek4.attention.indexer.{name}");
        draft.rename(&usual, &format!("deepseek4.indexer.{name}"));
    }
    draft.tensor("blk.0.attn_output_a.weight").0.dims = vec![1024, 64, 2];
    draft.tensor("output_norm.weight").0.dims = vec![256, 1];
    draft.set("general.alignment", 256u32);
    assert_eq!(load(&draft).config, synth::tiny());
}

#[test]
fn what_is_not_used_is_said() {
    let mut draft = Draft::tiny();
    draft.add_tensor("mtp.0.enorm.weight", &[256], TensorType::F32);
    draft.add_tensor("blk.4.attn_norm.weight", &[256], TensorType::F32);
    draft.add_tensor("blk.1.exp_probs_b_vl.bias", &[8], TensorType::F32);
    draft.add_tensor("blk.0.surprise.weight", &[8], TensorType::F32);
    assert_eq!(
        load(&draft).warnings,
        [
            "2 tensors of draft (MTP) blocks are not used",
            "unknown tensor blk.0.surprise.weight is not used",
        ]
    );
}

/// A draft block counted among the blocks is recognised by its tensors.
#[test]
fn a_draft_block_in_the_count_is_not_a_layer() {
    let mut draft = Draft::tiny();
    draft.set("deepseek4.block_count", 5u32);
    draft.add_tensor("blk.4.nextn.eh_proj.weight", &[512, 256], TensorType::Q8_0);
    assert_eq!(load(&draft).config.layers.len(), 4);
}

#[test]
fn experts_may_differ_from_layer_to_layer() {
    let mut draft = Draft::tiny();
    for name in ["gate", "up", "down"] {
        let name = format!("blk.2.ffn_{name}_exps.weight");
        draft.reshape(&name, &[256, 256, 8], TensorType::Q4_K);
    }
    let layers = load(&draft).weights.layers;
    let types: Vec<_> = layers.iter().map(|l| (l.ffn.gate.ty, l.ffn.down.ty)).collect();
    let q2 = (TensorType::IQ2_XXS, TensorType::Q2_K);
    assert_eq!(types, [q2, q2, (TensorType::Q4_K, TensorType::Q4_K), q2]);
}

#[test]
fn other_shapes_load() {
    use LayerKind::*;
    let base = synth::tiny();
    let kinds = [Hca, Csa, Csa, Swa, Hca];
    let layers = kinds.iter().map(|&kind| {
        let mut layer = base.layers[1].clone();
        layer.kind = kind;
        layer
    });
    let config = Config {
        layers: layers.collect(),
        vocab: 700,
        hidden: 192,
        heads: 6,
        q_rank: 96,
        output_groups: 3,
        output_rank: 32,
        experts: 11,
        experts_used: 5,
        expert_width: 96,
        index_heads: 20,
        index_top_k: 7,
        ..base
    };
    assert_eq!(load(&Draft::new(&config, Recipe::Q8)).config, config);
}

#[test]
fn identity_follows_the_content() {
    let identity = |draft: &Draft| load(draft).identity();
    let mut draft = Draft::tiny();
    let first = identity(&draft);
    assert_eq!(identity(&Draft::tiny()), first);
    draft.tensor("blk.2.ffn_down_exps.weight").1[5] ^= 1;
    assert_ne!(identity(&draft), first);
}

/// Loading must not copy weights: the matrices are views into the file.
#[test]
fn matrices_stay_in_the_file() {
    let model = load(&Draft::tiny());
    let file = model.files()[0].bytes().as_ptr_range();
    let inside = |bytes: &[u8]| {
        let range = bytes.as_ptr_range();
        file.start <= range.start && range.end <= file.end
    };
    let weights = &model.weights;
    assert!(inside(weights.output.data.bytes()) && inside(weights.token_embedding.data.bytes()));
    for layer in &weights.layers {
        assert!(inside(layer.ffn.gate.data.bytes()) && inside(layer.attn.q_b.data.bytes()));
        assert_eq!(layer.ffn.up.expert(3).bytes.len() * 8, layer.ffn.up.data.bytes().len());
    }
}
