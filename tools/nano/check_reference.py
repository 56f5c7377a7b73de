"""Compare `model.py` in f32 with golden vectors of a GGUF model made by another implementation.

    python check_reference.py MODEL.gguf VECTORS.safetensors

VECTORS holds, for each sequence S, `S.tokens`, `S.logit_positions` and `S.logits`.
"""

import sys

import gguf
import numpy as np
import torch
from gguf.quants import dequantize
from safetensors import safe_open

from model import Config, Mode, Model
from names import tensors

TOLERANCE = 5e-3  # f32 sums in another order; larger means another function


def main(model_path, vectors_path):
    reader = gguf.GGUFReader(model_path)
    model = load(reader)
    worst = 0.0
    with safe_open(vectors_path, "np") as f, torch.no_grad():
        for name in sorted({k.split(".")[0] for k in f.keys()}, key=lambda s: len(f.get_tensor(s + ".tokens"))):
            tokens = f.get_tensor(name + ".tokens")
            at, want = f.get_tensor(name + ".logit_positions"), f.get_tensor(name + ".logits")
            diff = np.abs(logits(model, tokens)[at] - want).max()
            print(f"{name}: {len(tokens)} tokens, largest difference {diff:.2e}")
            worst = max(worst, diff)
    sys.exit(bool(worst > TOLERANCE))


def logits(model, tokens, mode=Mode()):
    n = len(tokens)
    padded = torch.zeros(1, -(-n // 128) * 128, dtype=torch.long)
    padded[0, :n] = torch.tensor(tokens)
    doc = torch.zeros_like(padded)
    pos = torch.arange(padded.shape[1])[None]
    x, _ = model.streams(padded, doc, pos, torch.zeros(1, 0, dtype=torch.long), mode)
    return model.logits(x[0, :n]).numpy()


def load(reader):
    def get(key):
        return reader.get_field("deepseek4." + key).contents()

    n = get("block_count")
    cfg = Config(
        name="reference",
        vocab=get("vocab_size"),
        hidden=get("embedding_length"),
        ratios=[int(r) for r in get("attention.compress_ratios")][:n],
        hash_layers=get("hash_layer_count"),
        n_heads=get("attention.head_count"),
        q_lora=get("attention.q_lora_rank"),
        o_groups=get("attention.output_group_count"),
        o_lora=get("attention.output_lora_rank"),
        n_experts=get("expert_count"),
        expert_ffn=get("expert_feed_forward_length"),
        index_heads=get("attention.indexer.head_count"),
        index_topk=get("attention.indexer.top_k"),
    )
    model = Model(cfg, dtype=torch.float32, mtp=False)
    stored = {t.name: t for t in reader.tensors}
    state = {}
    for name, _, ours, role in tensors(cfg):
        t = stored[name]
        data = t.data if role == "table" else dequantize(t.data, t.tensor_type)
        state[ours] = torch.tensor(np.asarray(data))
    shapes = {k: v.shape for k, v in model.state_dict().items()}
    model.load_state_dict({k: v.reshape(shapes[k]) for k, v in state.items()}, strict=True)
    return model


if __name__ == "__main__":
    main(*sys.argv[1:])
