//! Metadata of a synthetic model: its shape, and a tokenizer of bytes.

use gguf::{Array, Value};

use super::Recipe;
use crate::{
    config::{
        ARCHITECTURE, Config, GATING_SQRT_SOFTPLUS, HEAD_DIM, INDEX_DIM, ROPE_DIM, STREAMS, WINDOW,
    },
    error::{Error, Result},
};

/// All keys, in the order in which they are written.
pub(super) fn of(config: &Config, recipe: Recipe) -> Result<Vec<(String, Value)>> {
    let mut keys = shape(config, hash_layers(config)?);
    keys.push(("general.file_type".into(), recipe.file_type().into()));
    keys.extend(tokenizer(config.vocab)?);
    Ok(keys)
}

/// Layers that choose experts by token id: a file can only say how many come first.
fn hash_layers(config: &Config) -> Result<usize> {
    let first = config.layers.iter().take_while(|layer| layer.hash_routed).count();
    match config.layers[first..].iter().position(|layer| layer.hash_routed) {
        Some(offset) => {
            let layer = first + offset;
            let what = format!("layer {layer} routed by token id after layers routed by score");
            Err(Error::Unmakeable { what })
        }
        None => Ok(first),
    }
}

fn shape(c: &Config, hash_layers: usize) -> Vec<(String, Value)> {
    let mut keys = vec![
        ("general.architecture".to_owned(), Value::from(ARCHITECTURE)),
        ("general.name".to_owned(), "synthetic".into()),
        ("general.quantization_version".to_owned(), 2u32.into()),
    ];
    let mut add = |name: &str, value: Value| keys.push((format!("{ARCHITECTURE}.{name}"), value));
    let count = |n: usize| Value::from(n as u32);
    add("vocab_size", count(c.vocab));
    add("context_length", count(c.context_length));
    add("embedding_length", count(c.hidden));
    add("block_count", count(c.layers.len()));
    add("attention.head_count", count(c.heads));
    add("attention.head_count_kv", count(1));
    add("attention.key_length", count(HEAD_DIM));
    add("attention.value_length", count(HEAD_DIM));
    add("attention.layer_norm_rms_epsilon", c.rms_epsilon.into());
    add("attention.q_lora_rank", count(c.q_rank));
    add("attention.output_lora_rank", count(c.output_rank));
    add("attention.output_group_count", count(c.output_groups));
    add("attention.sliding_window", count(WINDOW));
    add("attention.indexer.head_count", count(c.index_heads));
    add("attention.indexer.key_length", count(INDEX_DIM));
    add("attention.indexer.top_k", count(c.index_top_k));
    let ratios: Vec<u32> = c.layers.iter().map(|l| l.kind.ratio() as u32).collect();
    add("attention.compress_ratios", Value::Array(Array::U32(ratios)));
    add("attention.compress_rope_freq_base", c.compress_rope_base.into());
    add("rope.dimension_count", count(ROPE_DIM));
    add("rope.freq_base", c.rope_base.into());
    add("rope.scaling.type", "yarn".into());
    add("rope.scaling.factor", c.yarn.factor.into());
    add("rope.scaling.original_context_length", count(c.yarn.original_context));
    add("rope.scaling.yarn_beta_fast", c.yarn.beta_fast.into());
    add("rope.scaling.yarn_beta_slow", c.yarn.beta_slow.into());
    add("expert_count", count(c.experts));
    add("expert_used_count", count(c.experts_used));
    add("expert_shared_count", count(1));
    add("expert_feed_forward_length", count(c.expert_width));
    add("expert_gating_func", count(GATING_SQRT_SOFTPLUS));
    add("expert_weights_scale", c.routed_scale.into());
    add("expert_weights_norm", true.into());
    add("hash_layer_count", count(hash_layers));
    let clamps = |clamp: fn(&crate::config::LayerConfig) -> f32| {
        Value::Array(Array::F32(c.layers.iter().map(clamp).collect()))
    };
    add("swiglu_clamp_exp", clamps(|l| l.swiglu_limit));
    add("swiglu_clamp_shexp", clamps(|l| l.shared_swiglu_limit));
    add("hyper_connection.count", count(STREAMS));
    add("hyper_connection.sinkhorn_iterations", count(c.sinkhorn_iterations));
    add("hyper_connection.epsilon", c.hc_epsilon.into());
    keys
}

/// The chat format's markers, by the id they get: the first three as in the released
/// vocabulary, the others at its end.
const FIRST: [&str; 3] = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"];
const LAST: [&str; 6] =
    ["<｜User｜>", "<｜Assistant｜>", "<think>", "</think>", "｜DSML｜", "<｜latest_reminder｜>"];
/// The bytes of the byte-level alphabet.
const BYTES: usize = 256;

const NORMAL: i32 = 1;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;

/// A tokenizer of single bytes and one merge, filled up with tokens that no text gives.
fn tokenizer(vocab: usize) -> Result<Vec<(String, Value)>> {
    let smallest = FIRST.len() + BYTES + 1 + LAST.len();
    let Some(unused) = vocab.checked_sub(smallest) else {
        let what = format!("a vocabulary of {vocab}, expected at least {smallest}");
        return Err(Error::Unmakeable { what });
    };
    let mut tokens: Vec<(String, i32)> = Vec::with_capacity(vocab);
    tokens.extend(FIRST.map(|text| (text.to_owned(), CONTROL)));
    tokens.extend((0..=255).map(|byte| (byte_level(byte).to_string(), NORMAL)));
    tokens.push(("Ġt".to_owned(), NORMAL));
    tokens.extend((0..unused).map(|i| (format!("<｜place▁holder▁no▁{i}｜>"), CONTROL)));
    tokens.extend(LAST.map(|text| (text.to_owned(), USER_DEFINED)));
    let (texts, types) = tokens.into_iter().unzip();

    let key = |name: &str| format!("tokenizer.ggml.{name}");
    Ok(vec![
        (key("model"), "gpt2".into()),
        (key("pre"), "joyai-llm".into()),
        (key("tokens"), Value::Array(Array::String(texts))),
        (key("token_type"), Value::Array(Array::I32(types))),
        (key("merges"), Value::Array(Array::String(vec!["Ġ t".to_owned()]))),
        (key("bos_token_id"), 0u32.into()),
        (key("eos_token_id"), 1u32.into()),
        (key("padding_token_id"), 2u32.into()),
    ])
}

/// The character that stands for a byte in byte-level vocabularies: itself where it is printable,
/// else one from U+0100 on, in order.
fn byte_level(byte: u8) -> char {
    let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    if printable(byte) {
        return char::from(byte);
    }
    let before = (0..byte).filter(|b| !printable(*b)).count() as u32;
    char::from_u32(0x100 + before).unwrap_or(char::REPLACEMENT_CHARACTER)
}
