"""Write a trained model under the official tensor names (safetensors) and as GGUF.

    python export.py --init DIR --tokenizer DATA/tokenizer.json --out DIR

OUT/nano.safetensors has DeepSeek V4's official names, F32, with the MTP block under
`mtp.0.`; OUT/config.json and OUT/tokenizer.json belong to it. OUT/nano-f16.gguf holds the
main model, matrices in F16, and OUT/nano-mtp-f16.gguf the MTP block alone.
"""

import argparse
import json
import shutil
from pathlib import Path

import gguf
import numpy as np
from safetensors.torch import save_file

import checkpoint
from model import CLAMP, EPS, HEAD, INDEX, ROPE, ROUTED_SCALE, STREAMS, USED, WINDOW, Config
from names import mtp_tensors, tensors

CONTEXT = 1048576
ORIGINAL_CONTEXT = 65536


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--init", required=True)
    p.add_argument("--tokenizer", required=True)
    p.add_argument("--out", required=True)
    p.add_argument("--config", default=str(Path(__file__).parent / "config.json"))
    a = p.parse_args()
    out = Path(a.out)
    out.mkdir(parents=True, exist_ok=True)
    cfg, state = Config.load(a.config), checkpoint.weights(a.init)
    save_file(official(state, tensors(cfg) + mtp_tensors()), out / "nano.safetensors", metadata={"format": "pt"})
    with open(out / "config.json", "w", encoding="utf-8") as f:
        json.dump(official_config(cfg), f, indent=2)
    shutil.copy(a.tokenizer, out / "tokenizer.json")
    tokenizer = json.load(open(a.tokenizer, encoding="utf-8"))
    write_gguf(out / "nano-f16.gguf", cfg, state, tensors(cfg), tokenizer)
    write_gguf(out / "nano-mtp-f16.gguf", cfg, state, mtp_tensors(), None)
    for path in sorted(out.iterdir()):
        print(f"{path.name}: {path.stat().st_size / 1e6:.2f} MB")


def official(state, table):
    out = {}
    for _, name, ours, role in table:
        t = state[ours]
        if role == "experts":
            out |= {name.format(e=e): t[e].contiguous() for e in range(len(t))}
        else:
            out[name] = (t.long() if role == "table" else t).contiguous()
    return out


def official_config(cfg):
    return {
        "architectures": ["DeepseekV4ForCausalLM"], "model_type": "deepseek_v4", "vocab_size": cfg.vocab, "hidden_size": cfg.hidden,
        "moe_intermediate_size": cfg.expert_ffn, "num_hidden_layers": len(cfg.ratios), "num_attention_heads": cfg.n_heads,
        "num_key_value_heads": 1, "head_dim": HEAD, "qk_rope_head_dim": ROPE, "q_lora_rank": cfg.q_lora, "o_groups": cfg.o_groups,
        "o_lora_rank": cfg.o_lora, "n_routed_experts": cfg.n_experts, "num_experts_per_tok": USED, "n_shared_experts": 1,
        "routed_scaling_factor": ROUTED_SCALE, "scoring_func": "sqrtsoftplus", "norm_topk_prob": True, "num_hash_layers": cfg.hash_layers,
        "compress_ratios": cfg.ratios + [0], "compress_rope_theta": 160000.0, "rope_theta": 10000.0,
        "rope_scaling": {"type": "yarn", "factor": 16, "original_max_position_embeddings": ORIGINAL_CONTEXT, "beta_fast": 32, "beta_slow": 1},
        "sliding_window": WINDOW, "index_n_heads": cfg.index_heads, "index_head_dim": INDEX, "index_topk": cfg.index_topk,
        "hc_mult": STREAMS, "hc_sinkhorn_iters": 20, "hc_eps": EPS, "rms_norm_eps": EPS, "swiglu_limit": CLAMP,
        "max_position_embeddings": CONTEXT, "num_nextn_predict_layers": 1, "tie_word_embeddings": False,
        "bos_token_id": 0, "eos_token_id": 1, "torch_dtype": "float32",
    }  # fmt: skip


def write_gguf(path, cfg, state, table, tokenizer):
    w = gguf.GGUFWriter(path, "deepseek4")
    if tokenizer:
        add_metadata(w, cfg)
        add_tokenizer(w, tokenizer)
    for name, _, ours, role in table:
        x = state[ours].numpy()
        w.add_tensor(name, x.astype({"vector": np.float32, "table": np.int32}.get(role, np.float16)))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def add_metadata(w, cfg):
    n = len(cfg.ratios)
    w.add_name(cfg.name)
    w.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    integers = {
        "vocab_size": cfg.vocab, "context_length": CONTEXT, "embedding_length": cfg.hidden, "embedding_length_out": cfg.hidden * STREAMS,
        "block_count": n, "attention.head_count": cfg.n_heads, "attention.head_count_kv": 1, "attention.key_length": HEAD,
        "attention.value_length": HEAD, "attention.q_lora_rank": cfg.q_lora, "attention.output_lora_rank": cfg.o_lora,
        "attention.output_group_count": cfg.o_groups, "attention.sliding_window": WINDOW, "attention.indexer.head_count": cfg.index_heads,
        "attention.indexer.key_length": INDEX, "attention.indexer.top_k": cfg.index_topk, "rope.dimension_count": ROPE,
        "rope.scaling.original_context_length": ORIGINAL_CONTEXT, "expert_count": cfg.n_experts, "expert_used_count": USED,
        "expert_shared_count": 1, "expert_feed_forward_length": cfg.expert_ffn, "expert_gating_func": 4, "hash_layer_count": cfg.hash_layers,
        "hyper_connection.count": STREAMS, "hyper_connection.sinkhorn_iterations": 20,
    }  # fmt: skip
    floats = {
        "attention.layer_norm_rms_epsilon": EPS, "attention.compress_rope_freq_base": 160000.0, "rope.freq_base": 10000.0,
        "rope.scaling.factor": 16.0, "rope.scaling.yarn_beta_fast": 32.0, "rope.scaling.yarn_beta_slow": 1.0,
        "expert_weights_scale": ROUTED_SCALE, "hyper_connection.epsilon": EPS,
    }  # fmt: skip
    for key, value in integers.items():
        w.add_uint32("deepseek4." + key, value)
    for key, value in floats.items():
        w.add_float32("deepseek4." + key, value)
    w.add_string("deepseek4.rope.scaling.type", "yarn")
    w.add_bool("deepseek4.expert_weights_norm", True)
    # One entry more than layers, for the MTP block, as in the real files.
    w.add_array("deepseek4.attention.compress_ratios", cfg.ratios + [0])
    w.add_array("deepseek4.swiglu_clamp_exp", [CLAMP] * n)
    w.add_array("deepseek4.swiglu_clamp_shexp", [CLAMP] * n)


def add_tokenizer(w, spec):
    texts, kinds = dict(spec["model"]["vocab"]), {}
    for t in spec["added_tokens"]:
        texts[t["content"]] = t["id"]
        control = t["special"] or t["content"].startswith(("<｜", "<|"))
        kinds[t["id"]] = gguf.TokenType.CONTROL if control else gguf.TokenType.USER_DEFINED
    ordered = [t for t, _ in sorted(texts.items(), key=lambda kv: kv[1])]
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("joyai-llm")
    w.add_token_list(ordered)
    w.add_token_types([int(kinds.get(i, gguf.TokenType.NORMAL)) for i in range(len(ordered))])
    w.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in spec["model"]["merges"]])
    w.add_bos_token_id(0)
    w.add_eos_token_id(1)
    w.add_pad_token_id(2)
    w.add_add_bos_token(False)
    w.add_add_eos_token(False)


if __name__ == "__main__":
    main()
