//! Stand-in until the loader lands.
#![allow(missing_docs)]
use std::{path::Path, sync::Arc};
use gguf::*;
use crate::{config::*, weights::*};
pub struct Model { pub config: Config, pub weights: Weights }
impl Model {
    pub fn identity(&self) -> [u8;32] { [7;32] }
    pub fn open(p: &Path) -> Result<Model, String> {
        let f = Arc::new(GgufFile::open(p).map_err(|e| e.to_string())?);
        let m = f.metadata();
        let k = |s: &str| format!("deepseek4.{s}");
        let u = |s: &str| m.usize(&k(s)).unwrap();
        let n = u("block_count");
        let ratios = m.usize_array(&k("attention.compress_ratios")).unwrap();
        let hash = u("hash_layer_count");
        let layers: Vec<_> = (0..n).map(|l| LayerConfig { kind: match ratios[l] {0=>LayerKind::Swa,4=>LayerKind::Csa,_=>LayerKind::Hca}, hash_routed: l<hash, swiglu_limit: 10.0, shared_swiglu_limit: 10.0}).collect();
        let config = Config { layers: layers.clone(), vocab: u("vocab_size"), context_length: u("context_length"), hidden: u("embedding_length"), heads: u("attention.head_count"), q_rank: u("attention.q_lora_rank"), output_groups: u("attention.output_group_count"), output_rank: u("attention.output_lora_rank"), experts: u("expert_count"), experts_used: u("expert_used_count"), expert_width: u("expert_feed_forward_length"), index_heads: u("attention.indexer.head_count"), index_top_k: u("attention.indexer.top_k"), sinkhorn_iterations: 20, hc_epsilon: 1e-6, rms_epsilon: 1e-6, routed_scale: 1.5, rope_base: 10000.0, compress_rope_base: 160000.0, yarn: Yarn{factor:16.0, original_context:65536, beta_fast:32.0, beta_slow:1.0}};
        let mat = |name: &str| { let t = f.tensor(name).expect(name); Matrix { ty: t.ty, cols: t.dims[0] as usize, rows: t.dims[1..].iter().product::<u64>() as usize, data: TensorData::new(f.clone(), t.range.clone()) } };
        let vec = |name: &str| { let t = f.tensor(name).expect(name); let mut v = vec![0.0; t.dims.iter().product::<u64>() as usize]; dequantize_row(t.ty, f.tensor_bytes(t), &mut v).unwrap(); v };
        let exp = |name: &str| { let t = f.tensor(name).expect(name); ExpertStack { ty: t.ty, cols: t.dims[0] as usize, rows: t.dims[1] as usize, experts: t.dims[2] as usize, data: TensorData::new(f.clone(), t.range.clone()) } };
        let hc = |p: String| HyperConnection { function: mat(&format!("{p}_fn.weight")), base: vec(&format!("{p}_base.weight")), scale: vec(&format!("{p}_scale.weight")) };
        let comp = |p: String| Compressor { kv: mat(&format!("{p}_kv.weight")), gate: mat(&format!("{p}_gate.weight")), position_bias: vec(&format!("{p}_ape.weight")), norm: vec(&format!("{p}_norm.weight")) };
        let lw = layers.iter().enumerate().map(|(l, c)| { let b = |s: &str| format!("blk.{l}.{s}"); let w = |s: &str| b(&format!("{s}.weight"));
            LayerWeights { attn_hc: hc(b("hc_attn")), ffn_hc: hc(b("hc_ffn")),
              attn: Attention { norm: vec(&w("attn_norm")), q_a: mat(&w("attn_q_a")), q_a_norm: vec(&w("attn_q_a_norm")), q_b: mat(&w("attn_q_b")), kv: mat(&w("attn_kv")), kv_norm: vec(&w("attn_kv_a_norm")), sinks: vec(&w("attn_sinks")), output_a: mat(&w("attn_output_a")), output_b: mat(&w("attn_output_b")) },
              compressor: (c.kind != LayerKind::Swa).then(|| comp(b("attn_compressor"))),
              indexer: (c.kind == LayerKind::Csa).then(|| Indexer { q_b: mat(&w("indexer.attn_q_b")), head_weights: mat(&w("indexer.proj")), compressor: comp(b("indexer_compressor")) }),
              ffn: Experts { norm: vec(&w("ffn_norm")), router: mat(&w("ffn_gate_inp")), routing: if c.hash_routed { let t = f.tensor(&w("ffn_gate_tid2eid")).unwrap(); Routing::Hash(f.tensor_bytes(t).chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().unwrap())).collect()) } else { Routing::Bias(vec(&b("exp_probs_b.bias"))) },
                gate: exp(&w("ffn_gate_exps")), up: exp(&w("ffn_up_exps")), down: exp(&w("ffn_down_exps")), shared_gate: mat(&w("ffn_gate_shexp")), shared_up: mat(&w("ffn_up_shexp")), shared_down: mat(&w("ffn_down_shexp")) } } }).collect();
        let weights = Weights { token_embedding: mat("token_embd.weight"), layers: lw, output_hc: hc("output_hc".into()), output_norm: vec("output_norm.weight"), output: mat("output.weight") };
        Ok(Model { config, weights })
    }
}
