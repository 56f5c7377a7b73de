"""Starting values that matter: a constant feature, and heads that look one and two tokens back.

A head of this architecture can look at "the token before" only through 64 of its 512
dimensions, and queries have no bias. Left to themselves small models find such heads late,
and everything that copies or looks up waits for them. So all embeddings share eight
constant dimensions, and in the window layers two heads begin as previous-token heads built
on them; training is free to change them.
"""

import torch

from model import HEAD, ROPE

CONSTANT = 8  # embedding dimensions that start at the same value for every token
PAIRS = 6  # fastest rotary pairs, which tell neighbouring positions apart


@torch.no_grad()
def initialise(model, seed=0):
    torch.manual_seed(seed)
    model.embed.weight.normal_(std=0.7)
    model.embed.weight[:, :CONSTANT] = 1.0
    for layer in model.layers:
        attn = layer.attn
        attn.wkv.weight[-ROPE:] *= 2.5
        attn.wq_b.weight.view(-1, HEAD, attn.wq_b.weight.shape[1])[:, -ROPE:] *= 2.5
        if attn.ratio == 0:
            freqs = model.main_freqs[:PAIRS]
            look_back(attn, freqs, heads={0: 1, 1: 2})


def look_back(attn, freqs, heads):
    """heads: {head: how many tokens back}."""
    at = HEAD - ROPE
    feature = 1.3  # value of a constant dimension after the norm
    attn.wkv.weight[at:] *= 0.3
    attn.wkv.weight[at : at + 2 * PAIRS : 2, :CONSTANT] = 5.0 / (CONSTANT * feature)
    attn.wq_a.weight[:CONSTANT] = 0.0
    attn.wq_a.weight[range(CONSTANT), range(CONSTANT)] = 1.0
    wq_b = attn.wq_b.weight.view(-1, HEAD, attn.wq_b.weight.shape[1])
    for head, distance in heads.items():
        wq_b[head] *= 0.15
        strength = 6.0 / (CONSTANT * feature)
        wq_b[head, at : at + 2 * PAIRS : 2, :CONSTANT] = strength * torch.cos(distance * freqs)[:, None]
        wq_b[head, at + 1 : at + 2 * PAIRS : 2, :CONSTANT] = -strength * torch.sin(distance * freqs)[:, None]

