"""Which tensor is called what: training parameter, official checkpoint, GGUF file.

`tensors(cfg)` lists (gguf name, official name, parameter, role); the official name holds
`{e}` where a GGUF tensor stacks the experts. Roles: "matrix", "experts", "vector" (always
F32) and "table" (I32).
"""

ATTENTION = [
    ("attn_q_a", "attn.wq_a", "matrix"),
    ("attn_q_a_norm", "attn.q_norm", "vector"),
    ("attn_q_b", "attn.wq_b", "matrix"),
    ("attn_kv", "attn.wkv", "matrix"),
    ("attn_kv_a_norm", "attn.kv_norm", "vector"),
    ("attn_output_a", "attn.wo_a", "matrix"),
    ("attn_output_b", "attn.wo_b", "matrix"),
    ("attn_norm", "attn_norm", "vector"),
    ("ffn_norm", "ffn_norm", "vector"),
    ("ffn_gate_inp", "ffn.gate", "matrix"),
    ("ffn_gate_shexp", "ffn.shared_experts.w1", "matrix"),
    ("ffn_up_shexp", "ffn.shared_experts.w3", "matrix"),
    ("ffn_down_shexp", "ffn.shared_experts.w2", "matrix"),
]


def tensors(cfg):
    out = [
        ("token_embd.weight", "embed.weight", "embed.weight", "matrix"),
        ("output.weight", "head.weight", "head.weight", "matrix"),
        ("output_norm.weight", "norm.weight", "norm.weight", "vector"),
        ("output_hc_fn.weight", "hc_head_fn", "hc_head.fn", "matrix"),
        ("output_hc_base.weight", "hc_head_base", "hc_head.base", "vector"),
        ("output_hc_scale.weight", "hc_head_scale", "hc_head.scale", "vector"),
    ]
    for i, ratio in enumerate(cfg.ratios):
        out += block(f"blk.{i}.", f"layers.{i}.", f"layers.{i}.", ratio, i < cfg.hash_layers)
    return out


def mtp_tensors():
    out = block("mtp.0.", "mtp.0.", "mtp.block.", 0, False)
    for name in ("e_proj", "h_proj"):
        out.append((f"mtp.0.{name}.weight", f"mtp.0.{name}.weight", f"mtp.{name}.weight", "matrix"))
    for name in ("enorm", "hnorm", "norm"):
        out.append((f"mtp.0.{name}.weight", f"mtp.0.{name}.weight", f"mtp.{name}.weight", "vector"))
    for part in ("fn", "base", "scale"):
        role = "matrix" if part == "fn" else "vector"
        out.append((f"mtp.0.hc_head_{part}.weight", f"mtp.0.hc_head_{part}", f"mtp.hc_head.{part}", role))
    return out


def block(gguf, official, ours, ratio, hashed):
    out = [(f"{gguf}{g}.weight", f"{official}{o}.weight", f"{ours}{o}.weight", role) for g, o, role in ATTENTION]
    out.append((gguf + "attn_sinks.weight", official + "attn.attn_sink", ours + "attn.attn_sink", "vector"))
    for site in ("attn", "ffn"):
        for part, role in (("fn", "matrix"), ("base", "vector"), ("scale", "vector")):
            out.append((f"{gguf}hc_{site}_{part}.weight", f"{official}hc_{site}_{part}", f"{ours}hc_{site}.{part}", role))
    if hashed:
        out.append((gguf + "ffn_gate_tid2eid.weight", official + "ffn.gate.tid2eid", ours + "ffn.tid2eid", "table"))
    else:
        out.append((gguf + "exp_probs_b.bias", official + "ffn.gate.bias", ours + "ffn.bias", "vector"))
    for g, w in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
        stack = official + "ffn.experts.{e}." + w + ".weight"
        out.append((f"{gguf}ffn_{g}_exps.weight", stack, f"{ours}ffn.{w}", "experts"))
    if ratio:
        out += compressor(gguf + "attn_compressor", official + "attn.compressor.", ours + "attn.compressor.")
    if ratio == 4:
        a = "attn.indexer."
        out.append((gguf + "indexer.attn_q_b.weight", official + a + "wq_b.weight", ours + a + "wq_b.weight", "matrix"))
        proj = a + "weights_proj.weight"
        out.append((gguf + "indexer.proj.weight", official + proj, ours + proj, "matrix"))
        out += compressor(gguf + "indexer_compressor", official + a + "compressor.", ours + a + "compressor.")
    return out


def compressor(gguf, official, ours):
    return [
        (gguf + "_kv.weight", official + "wkv.weight", ours + "wkv.weight", "matrix"),
        (gguf + "_gate.weight", official + "wgate.weight", ours + "wgate.weight", "matrix"),
        (gguf + "_ape.weight", official + "ape", ours + "ape", "matrix"),
        (gguf + "_norm.weight", official + "norm.weight", ours + "norm.weight", "vector"),
    ]
