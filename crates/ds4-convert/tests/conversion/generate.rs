//! Checkpoints with the official names and ways of storage, and random values.
//!
//! Shared by the tests and by the example that writes a large one. Data is made when it is
//! written, so that a checkpoint of any size takes no memory.

use std::{borrow::Cow, fs, path::Path};

use ds4_convert::ModelMetadata;
use ds4_model::{
    binding::{ExpectedTensor, expected_tensors},
    config::Config,
};
use safetensors::{Dtype, View};
use serde_json::{Value, json};

/// Markers of the chat format, the last tokens of every vocabulary.
const MARKERS: [&str; 7] = [
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<｜User｜>",
    "<｜Assistant｜>",
    "<think>",
    "</think>",
    "｜DSML｜",
];

/// A tensor of a checkpoint.
#[derive(Clone)]
pub struct Tensor {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub content: Content,
}

/// What is in it.
#[derive(Clone)]
pub enum Content {
    /// Values that suit the type, from this seed; ids are below `experts`.
    Random {
        seed: u64,
        experts: usize,
    },
    Bytes(Vec<u8>),
}

/// Writes `config.json` and `tokenizer.json` and returns what they say.
pub fn describe(directory: &Path, config: &Value) -> ModelMetadata {
    let paths = (directory.join("config.json"), directory.join("tokenizer.json"));
    fs::write(&paths.0, config.to_string()).unwrap();
    let vocab = config["vocab_size"].as_u64().unwrap() as usize;
    fs::write(&paths.1, tokenizer(vocab).to_string()).unwrap();
    ModelMetadata::from_checkpoint(&paths.0, &paths.1).unwrap()
}

/// A configuration in which every kind of layer occurs.
pub fn small_config() -> Value {
    config(&[0, 4, 128, 4], 1, 256, 8)
}

/// Flash's widths and counts, but for those given.
pub fn config(ratios: &[u32], hash_layers: u32, hidden: u32, experts: u32) -> Value {
    let full = hidden >= 4096;
    let pick = |flash: u32, small: u32| if full { flash } else { small };
    json!({
        "vocab_size": pick(129_280, 1024), "hidden_size": hidden, "num_hidden_layers": ratios.len(),
        "max_position_embeddings": 1_048_576, "num_attention_heads": pick(64, 4),
        "num_key_value_heads": 1, "head_dim": 512, "qk_rope_head_dim": 64,
        "q_lora_rank": pick(1024, 128), "o_groups": pick(8, 2), "o_lora_rank": pick(1024, 64),
        "sliding_window": 128, "compress_ratios": ratios, "index_n_heads": pick(64, 16),
        "index_head_dim": 128, "index_topk": pick(512, 16), "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0, "compress_rope_theta": 160_000.0,
        "rope_scaling": { "type": "yarn", "factor": 16.0, "beta_fast": 32.0, "beta_slow": 1.0,
            "original_max_position_embeddings": 65536 },
        "n_routed_experts": experts, "n_shared_experts": 1, "num_experts_per_tok": 6,
        "moe_intermediate_size": pick(2048, 256), "routed_scaling_factor": 1.5,
        "norm_topk_prob": true, "scoring_func": "sqrtsoftplus", "num_hash_layers": hash_layers,
        "swiglu_limit": 10.0, "hc_mult": 4, "hc_sinkhorn_iters": 20, "hc_eps": 1e-6,
        "bos_token_id": pick(129_280, 1024) - 7, "eos_token_id": pick(129_280, 1024) - 6
    })
}

/// The 256 bytes, then made-up tokens, then the markers.
fn tokenizer(vocab: usize) -> Value {
    let printable = |byte: &u32| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    let (shown, hidden): (Vec<u32>, Vec<u32>) = (0..256).partition(printable);
    let shifted = (0..hidden.len() as u32).map(|i| 256 + i);
    let mut tokens: Vec<String> =
        shown.into_iter().chain(shifted).map(|c| char::from_u32(c).unwrap().to_string()).collect();
    tokens.extend((tokens.len()..vocab - MARKERS.len()).map(|id| format!("{}t{id}", 'a')));
    let ids = tokens.iter().enumerate().map(|(id, token)| (token.clone(), json!(id)));
    let vocabulary: serde_json::Map<String, Value> = ids.collect();
    let markers = MARKERS.iter().enumerate();
    let added: Vec<Value> = markers
        .map(|(i, content)| json!({ "id": tokens.len() + i, "content": content, "special": i < 2 }))
        .collect();
    json!({ "model": { "type": "BPE", "vocab": vocabulary, "merges": [] }, "added_tokens": added })
}

/// All tensors of a checkpoint, stored as the official ones are: FP8 in attention and shared
/// experts, FP4 in routed experts.
pub fn tensors(config: &Config) -> Vec<Tensor> {
    expected_tensors(config).flat_map(|tensor| stored(&tensor, config.experts)).collect()
}

/// The official name of a tensor of a GGUF file, that of one expert for a stack.
pub fn official_name(gguf: &str, expert: usize) -> String {
    let (layer, name) = match gguf.strip_prefix("blk.") {
        Some(rest) => rest.split_once('.').unwrap(),
        None => ("", gguf),
    };
    let (_, official) = NAMES.iter().find(|(name_here, _)| *name_here == name).unwrap();
    let official = official.replace("{e}", &expert.to_string());
    if layer.is_empty() { official } else { format!("layers.{layer}.{official}") }
}

fn stored(tensor: &ExpectedTensor, experts: usize) -> Vec<Tensor> {
    let (cols, rest) = tensor.dims.split_first().unwrap();
    let (cols, name) = (*cols as usize, tensor.name.as_str());
    let random = |name: String, dtype, shape: Vec<usize>| {
        let seed = name.bytes().fold(7u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
        Tensor { name, dtype, shape, content: Content::Random { seed, experts } }
    };
    let pair = |name: String, dtype, shape: Vec<usize>, scales: Vec<usize>| {
        let scale = name.replace(".weight", ".scale");
        [random(name, dtype, shape), random(scale, Dtype::F8_E8M0, scales)]
    };
    let rows = rest.first().map_or(1, |rows| *rows as usize);
    if name.contains("_exps.") {
        let one = |e| {
            let name = official_name(name, e);
            pair(name, Dtype::I8, vec![rows, cols / 2], vec![rows, cols / 32])
        };
        return (0..experts).flat_map(one).collect();
    }
    let official = official_name(name, 0);
    let fp8 = [".wq_a.", ".wq_b.", ".wkv.", ".wo_a.", ".wo_b.", "shared_experts"];
    if fp8.iter().any(|part| official.contains(part)) && !official.contains("compressor") {
        let scales = vec![rows.div_ceil(128), cols.div_ceil(128)];
        return pair(official, Dtype::F8_E4M3, vec![rows, cols], scales).into();
    }
    let dtype = match () {
        () if official.contains("tid2eid") => Dtype::I64,
        () if official.ends_with(".weight") => Dtype::BF16,
        () => Dtype::F32,
    };
    let shape = if rest.is_empty() { vec![cols] } else { vec![rows, cols] };
    vec![random(official, dtype, shape)]
}

impl Tensor {
    pub fn bytes(&self) -> Vec<u8> {
        match &self.content {
            Content::Bytes(bytes) => bytes.clone(),
            Content::Random { seed, experts } => self.random(*seed, *experts),
        }
    }

    fn random(&self, seed: u64, experts: usize) -> Vec<u8> {
        let count: usize = self.shape.iter().product();
        let mut rng = fastrand::Rng::with_seed(seed);
        let spread = if self.shape.len() == 2 { (self.shape[1] as f32).powf(-0.5) } else { 1.0 };
        let mut real = || (rng.f32() + rng.f32() + rng.f32() - 1.5) * 2.0 * spread;
        match self.dtype {
            Dtype::BF16 => {
                (0..count).flat_map(|_| half::bf16::from_f32(real()).to_le_bytes()).collect()
            }
            Dtype::F32 => (0..count).flat_map(|_| real().to_le_bytes()).collect(),
            // Scales and values around 1, no NaN.
            Dtype::F8_E8M0 => (0..count).map(|_| rng.u8(116..122)).collect(),
            Dtype::F8_E4M3 => (0..count)
                .map(|_| (rng.u8(..), rng.u8(..0x7f)))
                .map(|(a, b)| a & 0x80 | b)
                .collect(),
            Dtype::I64 => {
                let mut ids: Vec<i64> = (0..experts as i64).collect();
                let rows = (0..self.shape[0]).flat_map(|_| {
                    rng.shuffle(&mut ids);
                    ids[..self.shape[1]].to_vec()
                });
                rows.flat_map(i64::to_le_bytes).collect()
            }
            _ => {
                let mut bytes = vec![0; count];
                rng.fill(&mut bytes);
                bytes
            }
        }
    }
}

impl View for &Tensor {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        self.bytes().into()
    }

    fn data_len(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.bitsize() / 8
    }
}

/// Writes tensors to one file.
pub fn write(path: &Path, tensors: &[Tensor]) {
    let named = tensors.iter().map(|tensor| (tensor.name.as_str(), tensor));
    safetensors::serialize_to_file(named, None, path).unwrap();
}

/// Names in a GGUF file, inside a layer, and in official checkpoints.
const NAMES: &[(&str, &str)] = &[
    ("token_embd.weight", "embed.weight"),
    ("output.weight", "head.weight"),
    ("output_norm.weight", "norm.weight"),
    ("output_hc_fn.weight", "hc_head_fn"),
    ("output_hc_base.weight", "hc_head_base"),
    ("output_hc_scale.weight", "hc_head_scale"),
    ("hc_attn_fn.weight", "hc_attn_fn"),
    ("hc_attn_base.weight", "hc_attn_base"),
    ("hc_attn_scale.weight", "hc_attn_scale"),
    ("hc_ffn_fn.weight", "hc_ffn_fn"),
    ("hc_ffn_base.weight", "hc_ffn_base"),
    ("hc_ffn_scale.weight", "hc_ffn_scale"),
    ("attn_norm.weight", "attn_norm.weight"),
    ("ffn_norm.weight", "ffn_norm.weight"),
    ("attn_q_a.weight", "attn.wq_a.weight"),
    ("attn_q_a_norm.weight", "attn.q_norm.weight"),
    ("attn_q_b.weight", "attn.wq_b.weight"),
    ("attn_kv.weight", "attn.wkv.weight"),
    ("attn_kv_a_norm.weight", "attn.kv_norm.weight"),
    ("attn_sinks.weight", "attn.attn_sink"),
    ("attn_output_a.weight", "attn.wo_a.weight"),
    ("attn_output_b.weight", "attn.wo_b.weight"),
    ("attn_compressor_kv.weight", "attn.compressor.wkv.weight"),
    ("attn_compressor_gate.weight", "attn.compressor.wgate.weight"),
    ("attn_compressor_ape.weight", "attn.compressor.ape"),
    ("attn_compressor_norm.weight", "attn.compressor.norm.weight"),
    ("indexer.attn_q_b.weight", "attn.indexer.wq_b.weight"),
    ("indexer.proj.weight", "attn.indexer.weights_proj.weight"),
    ("indexer_compressor_kv.weight", "attn.indexer.compressor.wkv.weight"),
    ("indexer_compressor_gate.weight", "attn.indexer.compressor.wgate.weight"),
    ("indexer_compressor_ape.weight", "attn.indexer.compressor.ape"),
    ("indexer_compressor_norm.weight", "attn.indexer.compressor.norm.weight"),
    ("ffn_gate_inp.weight", "ffn.gate.weight"),
    ("exp_probs_b.bias", "ffn.gate.bias"),
    ("ffn_gate_tid2eid.weight", "ffn.gate.tid2eid"),
    ("ffn_gate_exps.weight", "ffn.experts.{e}.w1.weight"),
    ("ffn_up_exps.weight", "ffn.experts.{e}.w3.weight"),
    ("ffn_down_exps.weight", "ffn.experts.{e}.w2.weight"),
    ("ffn_gate_shexp.weight", "ffn.shared_experts.w1.weight"),
    ("ffn_up_shexp.weight", "ffn.shared_experts.w3.weight"),
    ("ffn_down_shexp.weight", "ffn.shared_experts.w2.weight"),
];
