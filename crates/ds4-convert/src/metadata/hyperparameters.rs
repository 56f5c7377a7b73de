//! A checkpoint's `config.json` as GGUF metadata (docs/gguf.md, "Metadata").

use gguf::Value;
use serde::Deserialize;

use crate::error::{Error, Result, shown};

/// What `config.json` says of the model, under its own names.
#[derive(Deserialize)]
pub(super) struct Hyperparameters {
    #[serde(default)]
    name: Option<String>,
    vocab_size: u32,
    hidden_size: u32,
    num_hidden_layers: u32,
    max_position_embeddings: u32,
    num_attention_heads: u32,
    num_key_value_heads: u32,
    head_dim: u32,
    qk_rope_head_dim: u32,
    q_lora_rank: u32,
    o_groups: u32,
    o_lora_rank: u32,
    sliding_window: u32,
    compress_ratios: Vec<u32>,
    index_n_heads: u32,
    index_head_dim: u32,
    index_topk: u32,
    rms_norm_eps: f32,
    rope_theta: f32,
    compress_rope_theta: f32,
    rope_scaling: RopeScaling,
    n_routed_experts: u32,
    n_shared_experts: u32,
    num_experts_per_tok: u32,
    moe_intermediate_size: u32,
    routed_scaling_factor: f32,
    norm_topk_prob: bool,
    scoring_func: String,
    num_hash_layers: u32,
    swiglu_limit: f32,
    hc_mult: u32,
    hc_sinkhorn_iters: u32,
    hc_eps: f32,
    #[serde(default)]
    num_nextn_predict_layers: u32,
    #[serde(default)]
    bos_token_id: Option<u32>,
    #[serde(default)]
    eos_token_id: Option<u32>,
    #[serde(default)]
    pad_token_id: Option<u32>,
}

#[derive(Deserialize)]
struct RopeScaling {
    #[serde(rename = "type", alias = "rope_type")]
    kind: String,
    factor: f32,
    original_max_position_embeddings: u32,
    beta_fast: f32,
    beta_slow: f32,
}

impl Hyperparameters {
    /// The metadata; `file` is the file's name in messages.
    pub(super) fn entries(&self, file: &str) -> Result<Vec<(String, Value)>> {
        let gating = match self.scoring_func.as_str() {
            "sqrtsoftplus" => 4u32,
            other => {
                return Err(Error::Value {
                    file: file.to_owned(),
                    key: "scoring_func".to_owned(),
                    found: shown(other),
                    expected: "sqrtsoftplus".to_owned(),
                });
            }
        };
        let name = self.name.as_deref().unwrap_or("DeepSeek V4 Flash");
        let mut entries: Vec<(String, Value)> = vec![
            ("general.architecture".to_owned(), "deepseek4".into()),
            ("general.name".to_owned(), name.into()),
        ];
        let keys = self.shape().into_iter().chain(self.attention());
        let keys = keys.chain(self.experts(gating));
        entries.extend(keys.map(|(key, value)| (format!("deepseek4.{key}"), value)));
        Ok(entries)
    }

    /// Ids of the tokens that begin and end texts.
    pub(super) fn token_ids(&self) -> Vec<(String, Value)> {
        let ids = [
            ("bos", self.bos_token_id),
            ("eos", self.eos_token_id),
            ("padding", self.pad_token_id),
        ];
        let entry = |(name, id): (&str, Option<u32>)| {
            Some((format!("tokenizer.ggml.{name}_token_id"), id?.into()))
        };
        ids.into_iter().filter_map(entry).collect()
    }

    fn shape(&self) -> Vec<(&'static str, Value)> {
        let scaling = &self.rope_scaling;
        vec![
            ("block_count", self.num_hidden_layers.into()),
            ("context_length", self.max_position_embeddings.into()),
            ("embedding_length", self.hidden_size.into()),
            ("vocab_size", self.vocab_size.into()),
            ("nextn_predict_layers", self.num_nextn_predict_layers.into()),
            ("rope.dimension_count", self.qk_rope_head_dim.into()),
            ("rope.freq_base", self.rope_theta.into()),
            ("rope.scaling.type", scaling.kind.as_str().into()),
            ("rope.scaling.factor", scaling.factor.into()),
            (
                "rope.scaling.original_context_length",
                scaling.original_max_position_embeddings.into(),
            ),
            ("rope.scaling.yarn_beta_fast", scaling.beta_fast.into()),
            ("rope.scaling.yarn_beta_slow", scaling.beta_slow.into()),
            ("hyper_connection.count", self.hc_mult.into()),
            ("hyper_connection.sinkhorn_iterations", self.hc_sinkhorn_iters.into()),
            ("hyper_connection.epsilon", self.hc_eps.into()),
        ]
    }

    fn attention(&self) -> Vec<(&'static str, Value)> {
        vec![
            ("attention.head_count", self.num_attention_heads.into()),
            ("attention.head_count_kv", self.num_key_value_heads.into()),
            ("attention.key_length", self.head_dim.into()),
            ("attention.value_length", self.head_dim.into()),
            ("attention.layer_norm_rms_epsilon", self.rms_norm_eps.into()),
            ("attention.q_lora_rank", self.q_lora_rank.into()),
            ("attention.output_lora_rank", self.o_lora_rank.into()),
            ("attention.output_group_count", self.o_groups.into()),
            ("attention.sliding_window", self.sliding_window.into()),
            ("attention.compress_ratios", self.compress_ratios.clone().into()),
            ("attention.compress_rope_freq_base", self.compress_rope_theta.into()),
            ("attention.indexer.head_count", self.index_n_heads.into()),
            ("attention.indexer.key_length", self.index_head_dim.into()),
            ("attention.indexer.top_k", self.index_topk.into()),
        ]
    }

    fn experts(&self, gating: u32) -> Vec<(&'static str, Value)> {
        vec![
            ("expert_count", self.n_routed_experts.into()),
            ("expert_used_count", self.num_experts_per_tok.into()),
            ("expert_shared_count", self.n_shared_experts.into()),
            ("expert_feed_forward_length", self.moe_intermediate_size.into()),
            ("expert_weights_scale", self.routed_scaling_factor.into()),
            ("expert_weights_norm", self.norm_topk_prob.into()),
            ("expert_gating_func", gating.into()),
            ("hash_layer_count", self.num_hash_layers.into()),
            ("swiglu_clamp_exp", self.swiglu_limit.into()),
            ("swiglu_clamp_shexp", self.swiglu_limit.into()),
        ]
    }
}
