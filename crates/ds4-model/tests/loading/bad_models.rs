//! One row per way in which a well-formed file is not a model that runs.

use ds4_model::Model;
use gguf::{Array, GgufFile, TensorType, Value};

use crate::draft::Draft;

type Spoil = fn(&mut Draft);

#[test]
fn each_bad_model_is_refused_with_one_clear_line() {
    let mut wrong = Vec::new();
    for (expected, spoil) in METADATA.iter().chain(TENSORS).chain(TOKENIZER) {
        let mut draft = Draft::tiny();
        spoil(&mut draft);
        let error = draft.load().err().unwrap_or_else(|| "no error".to_owned());
        if error != format!("model.gguf: {expected}") {
            wrong.push(format!("expected {expected}\n     got {error}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Every tensor of the table is bound, and to the shape that the table gives it.
#[test]
fn each_tensor_is_needed_and_measured() {
    let whole = Draft::tiny();
    for (spec, _) in &whole.tensors {
        let error = |spoil: &dyn Fn(&mut Draft)| {
            let mut draft = Draft::tiny();
            spoil(&mut draft);
            draft.load().err().unwrap_or_else(|| panic!("{}: no error", spec.name))
        };
        let missing = error(&|draft| draft.remove_tensor(&spec.name));
        assert!(missing.contains(&format!("missing tensor {}", spec.name)), "{missing}");

        let mut dims = spec.dims.clone();
        *dims.last_mut().unwrap() *= 2;
        let doubled = error(&|draft| draft.reshape(&spec.name, &dims, spec.ty));
        let expected =
            format!("model.gguf: tensor {}: shape {dims:?}, expected {:?}", spec.name, spec.dims);
        assert_eq!(doubled, expected);
    }
}

/// Every key is needed, but for those that have a fallback or are only shown to people.
#[test]
fn each_key_is_needed() {
    const OPTIONAL: &[&str] = &[
        "deepseek4.vocab_size",
        "deepseek4.rope.scaling.yarn_beta_fast",
        "deepseek4.rope.scaling.yarn_beta_slow",
        "deepseek4.expert_gating_func",
        "deepseek4.swiglu_clamp_shexp",
    ];
    let whole = Draft::tiny();
    let keys = whole.metadata.iter().map(|(key, _)| key.as_str());
    for key in keys.filter(|key| key.starts_with("deepseek4.")) {
        let mut draft = Draft::tiny();
        draft.remove(key);
        let error = draft.load().err().unwrap_or_default();
        let expected = match OPTIONAL.contains(&key) {
            true => String::new(),
            false => format!("model.gguf: missing key {key}"),
        };
        assert_eq!(error, expected, "{key}");
    }
}

/// Damaged headers give an error or a model, never a panic.
#[test]
fn no_damage_to_the_header_panics() {
    let whole = Draft::tiny().bytes();
    let header = GgufFile::from_vec("whole", whole.clone()).unwrap();
    let header = header.tensors().iter().map(|tensor| tensor.range.start).min().unwrap();
    let mut state = 1u64;
    let mut random = |limit: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 33) as usize % limit
    };
    let mut refused = 0;
    for _ in 0..500 {
        let mut damaged = whole.clone();
        damaged[random(header)] ^= 1 << random(8);
        let file = GgufFile::from_vec("damaged", damaged);
        refused += usize::from(!file.is_ok_and(|file| Model::from_gguf(file).is_ok()));
    }
    // Much of the header is text that may be anything.
    assert!((50..500).contains(&refused), "{refused}");
}

const METADATA: &[(&str, Spoil)] = &[
    ("general.architecture: found llama, expected deepseek4", |d| {
        d.set("general.architecture", "llama");
    }),
    ("general.quantization_version: found 3, expected at most 2", |d| {
        d.set("general.quantization_version", 3u32);
    }),
    ("missing key deepseek4.attention.q_lora_rank", |d| {
        d.remove("deepseek4.attention.q_lora_rank");
    }),
    ("key deepseek4.block_count: found string, expected non-negative integer", |d| {
        d.set("deepseek4.block_count", "four");
    }),
    ("key deepseek4.block_count: found i32 -4, expected non-negative integer", |d| {
        d.set("deepseek4.block_count", -4i32);
    }),
    ("deepseek4.block_count: found 0, expected 1 to 1024", |d| {
        d.set("deepseek4.block_count", 0u32);
    }),
    ("deepseek4.block_count: found 4000000000, expected 1 to 1024", |d| {
        d.set("deepseek4.block_count", 4_000_000_000u32);
    }),
    ("deepseek4.attention.key_length: found 576, expected 512", |d| {
        d.set("deepseek4.attention.key_length", 576u32);
    }),
    ("deepseek4.attention.value_length: found 128, expected 512", |d| {
        d.set("deepseek4.attention.value_length", 128u32);
    }),
    ("deepseek4.attention.head_count_kv: found 8, expected 1", |d| {
        d.set("deepseek4.attention.head_count_kv", 8u32);
    }),
    ("deepseek4.attention.sliding_window: found 256, expected 128", |d| {
        d.set("deepseek4.attention.sliding_window", 256u32);
    }),
    ("deepseek4.rope.dimension_count: found 32, expected 64", |d| {
        d.set("deepseek4.rope.dimension_count", 32u32);
    }),
    ("deepseek4.attention.indexer.key_length: found 64, expected 128", |d| {
        d.set("deepseek4.attention.indexer.key_length", 64u32);
    }),
    ("deepseek4.attention.indexer.top_k: found 0, expected 1 to 16777216", |d| {
        d.set("deepseek4.attention.indexer.top_k", 0u32);
    }),
    ("deepseek4.hyper_connection.count: found 2, expected 4", |d| {
        d.set("deepseek4.hyper_connection.count", 2u32);
    }),
    ("deepseek4.attention.output_group_count: found 3, expected a divisor of 4 heads", |d| {
        d.set("deepseek4.attention.output_group_count", 3u32);
    }),
    ("deepseek4.expert_used_count: found 9, expected 1 to 8", |d| {
        d.set("deepseek4.expert_used_count", 9u32);
    }),
    ("deepseek4.expert_gating_func: found 2, expected 4", |d| {
        d.set("deepseek4.expert_gating_func", 2u32);
    }),
    ("deepseek4.expert_group_count: found 8, expected 0", |d| {
        d.set("deepseek4.expert_group_count", 8u32);
    }),
    ("deepseek4.expert_weights_norm: found false, expected true", |d| {
        d.set("deepseek4.expert_weights_norm", false);
    }),
    ("deepseek4.expert_shared_count: found 2, expected 1", |d| {
        d.set("deepseek4.expert_shared_count", 2u32);
    }),
    ("deepseek4.expert_group_used_count: found 4, expected 0", |d| {
        d.set("deepseek4.expert_group_used_count", 4u32);
    }),
    ("deepseek4.context_length: found 0, expected 1 to 2147483648", |d| {
        d.set("deepseek4.context_length", 0u32);
    }),
    ("deepseek4.hyper_connection.epsilon: found inf, expected a finite number above 0", |d| {
        d.set("deepseek4.hyper_connection.epsilon", f32::INFINITY);
    }),
    (
        "deepseek4.attention.compress_rope_freq_base: found 1, expected a finite number above 1",
        |d| {
            d.set("deepseek4.attention.compress_rope_freq_base", 1f32);
        },
    ),
    ("deepseek4.rope.scaling.type: found linear, expected yarn", |d| {
        d.set("deepseek4.rope.scaling.type", "linear");
    }),
    ("deepseek4.rope.freq_base: found NaN, expected a finite number above 1", |d| {
        d.set("deepseek4.rope.freq_base", f32::NAN);
    }),
    (
        "deepseek4.attention.layer_norm_rms_epsilon: found 0, expected a finite number above 0",
        |d| d.set("deepseek4.attention.layer_norm_rms_epsilon", 0f32),
    ),
    ("deepseek4.attention.compress_ratios[2]: found 64, expected 0, 4 or 128", |d| {
        d.set("deepseek4.attention.compress_ratios", ratios(&[0, 4, 64, 4]));
    }),
    ("deepseek4.attention.compress_ratios: found 3 entries, expected at least 4", |d| {
        d.set("deepseek4.attention.compress_ratios", ratios(&[0, 4, 128]));
    }),
    ("deepseek4.swiglu_clamp_exp[1]: found -1, expected a finite number above 0", |d| {
        let clamps = vec![10.0, -1.0, 10.0, 10.0];
        d.set("deepseek4.swiglu_clamp_exp", Value::Array(Array::F32(clamps)));
    }),
    ("deepseek4.expert_feed_forward_length[2]: found 512, expected 256 as in layer 0", |d| {
        let widths = vec![256, 256, 512, 256];
        d.set("deepseek4.expert_feed_forward_length", Value::Array(Array::U32(widths)));
    }),
    ("deepseek4.hash_layer_count: found 5, expected 0 to 4", |d| {
        d.set("deepseek4.hash_layer_count", 5u32);
    }),
    ("is part 2 of 3 of a split model, expected a name that ends in -00002-of-00003.gguf", |d| {
        d.set("split.no", Value::U16(1));
        d.set("split.count", Value::U16(3));
    }),
    ("split.no: found 3, expected less than 3", |d| {
        d.set("split.no", Value::U16(3));
        d.set("split.count", Value::U16(3));
    }),
];

const TENSORS: &[(&str, Spoil)] = &[
    ("missing tensor output_norm.weight", |d| d.remove_tensor("output_norm.weight")),
    ("missing tensor blk.2.attn_compressor_kv.weight (layer 2 has ratio 128)", |d| {
        d.remove_tensor("blk.2.attn_compressor_kv.weight");
    }),
    ("missing tensor blk.1.indexer.attn_q_b.weight (layer 1 has ratio 4)", |d| {
        d.remove_tensor("blk.1.indexer.attn_q_b.weight");
    }),
    ("missing tensor blk.0.ffn_gate_tid2eid.weight (layer 0 chooses experts by token id)", |d| {
        d.remove_tensor("blk.0.ffn_gate_tid2eid.weight");
    }),
    ("missing tensor blk.3.exp_probs_b.bias (layer 3 chooses experts by score)", |d| {
        d.remove_tensor("blk.3.exp_probs_b.bias");
    }),
    ("tensor blk.1.attn_q_b.weight: shape [128, 2047], expected [128, 2048]", |d| {
        d.reshape("blk.1.attn_q_b.weight", &[128, 2047], TensorType::Q8_0);
    }),
    ("tensor blk.0.ffn_up_exps.weight: shape [256, 256, 7], expected [256, 256, 8]", |d| {
        d.reshape("blk.0.ffn_up_exps.weight", &[256, 256, 7], TensorType::IQ2_XXS);
    }),
    ("tensor blk.0.hc_attn_scale.weight: shape [2], expected [3]", |d| {
        d.reshape("blk.0.hc_attn_scale.weight", &[2], TensorType::F32);
    }),
    (
        "tensor output.weight: type Q5_0 is not supported here (supported: F32, F16, BF16, Q8_0, \
         Q4_K, Q2_K, IQ2_XXS, MXFP4)",
        |d| d.reshape("output.weight", &[256, 512], TensorType::Q5_0),
    ),
    (
        "tensor output_norm.weight: type Q8_0 is not supported here (supported: F32, F16, BF16)",
        |d| d.reshape("output_norm.weight", &[256], TensorType::Q8_0),
    ),
    ("blk.2: ffn_gate_exps is Q4_K but ffn_up_exps is IQ2_XXS, expected the same type", |d| {
        d.reshape("blk.2.ffn_gate_exps.weight", &[256, 256, 8], TensorType::Q4_K)
    }),
    ("blk.0.ffn_gate_tid2eid.weight: token 17 names expert 300, expected less than 8", |d| {
        d.tensor("blk.0.ffn_gate_tid2eid.weight").1[4 * (17 * 6 + 2)..][..4]
            .copy_from_slice(&300i32.to_le_bytes());
    }),
    ("blk.0.ffn_gate_tid2eid.weight: token 0 names expert -1, expected less than 8", |d| {
        d.tensor("blk.0.ffn_gate_tid2eid.weight").1[..4].copy_from_slice(&[255; 4]);
    }),
    ("tensor blk.1.attn_norm.weight: non-finite value at 12", |d| {
        d.tensor("blk.1.attn_norm.weight").1[48..52].copy_from_slice(&f32::NAN.to_le_bytes());
    }),
    ("tensor blk.3.attn_sinks.weight: non-finite value at 3", |d| {
        d.tensor("blk.3.attn_sinks.weight").1[12..16].copy_from_slice(&f32::INFINITY.to_le_bytes());
    }),
    ("holds only a draft (MTP) block: open the main model's file instead", |d| {
        d.tensors.retain(|(spec, _)| spec.name.starts_with("blk.3."));
        for (spec, _) in &mut d.tensors {
            spec.name = spec.name.replace("blk.3.", "mtp.0.");
        }
    }),
    ("holds only a draft (MTP) block: open the main model's file instead", |d| {
        d.tensors.retain(|(spec, _)| !spec.name.starts_with("blk.") || spec.name.contains("blk.3"));
        d.add_tensor("blk.3.nextn.eh_proj.weight", &[512, 256], TensorType::Q8_0);
    }),
];

const TOKENIZER: &[(&str, Spoil)] = &[
    ("tokenizer.ggml.tokens: found 511 entries, expected 512", |d| {
        let tokens = d.metadata.iter_mut().find(|(key, _)| key == "tokenizer.ggml.tokens");
        let Some((_, Value::Array(Array::String(tokens)))) = tokens else { panic!() };
        tokens.pop();
    }),
    ("tensor token_embd.weight: shape [256, 512], expected [256, 500]", |d| {
        d.remove("tokenizer.ggml.tokens");
        d.set("deepseek4.vocab_size", 500u32);
    }),
];

fn ratios(ratios: &[u32]) -> Value {
    Value::Array(Array::U32(ratios.to_vec()))
}
