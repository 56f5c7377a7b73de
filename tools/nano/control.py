"""A plain transformer of nano's size on the same data: tells whether a task or the architecture is hard.

    python control.py --data DIR --out FILE.json --seconds 80 --mixture lookup
"""

import argparse
import json
import math
import time

import torch
import torch.nn.functional as F
from torch import nn

from data import mixture
from evaluate import exact_matches
from optimizer import Optimizer
from train import Loader, Tests, learning_rate, log, weighted_loss

WIDTH, LAYERS, HEADS, VOCAB = 384, 10, 6, 4096
GROUPS = ["recall 4", "recall 24", "lookup 4", "lookup 16", "needle 500 x4"]


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.down = nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x, turn):
        B, S, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(B, S, 3, HEADS, -1).unbind(2)
        q, k = (F.rms_norm(t, t.shape[-1:]) for t in (q, k))
        q, k, v = (t.transpose(1, 2) for t in (turned(q, turn), turned(k, turn), v))
        y = F.scaled_dot_product_attention(q, k, v.to(q.dtype), is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(F.relu(self.up(self.norm2(x))).square())


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB, bias=False)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.final_norm = nn.RMSNorm(WIDTH)

    def forward(self, tokens):
        x = self.embed(tokens)
        half = WIDTH // HEADS // 2
        f = 10000.0 ** (-torch.arange(half, device=x.device) / half)
        angle = torch.arange(tokens.shape[1], device=x.device)[:, None] * f
        turn = torch.polar(torch.ones_like(angle), angle)[None, :, None]
        for layer in self.layers:
            x = layer(x, turn)
        return self.head(self.final_norm(x))


def turned(x, turn):
    return torch.view_as_real(torch.view_as_complex(x.float().unflatten(-1, (-1, 2))) * turn).flatten(-2).bfloat16()


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", required=True)
    p.add_argument("--out", required=True)
    p.add_argument("--seconds", type=float, default=80)
    p.add_argument("--mixture", default="lookup")
    p.add_argument("--device", default="cuda")
    a = p.parse_args()
    loader, tests = Loader(a.data, a.mixture, 3, 1), Tests(a.data, GROUPS, 2)
    torch.manual_seed(0)
    model = Plain().to(a.device)
    log(f"control: {sum(x.numel() for x in model.parameters()) / 1e6:.2f}M parameters")
    optimizer = Optimizer(model)

    def logits(batch):
        with torch.autocast(a.device, torch.bfloat16):
            return model(torch.from_numpy(batch["tokens"]).long().to(a.device))

    began, step, history, last = time.time(), 0, [], 0.0
    while (elapsed := time.time() - began) < a.seconds:
        batch = loader.get()
        tokens = torch.from_numpy(batch["tokens"]).long().to(a.device)
        weight = torch.from_numpy(batch["weight"]).float().to(a.device)
        weight[:, -1] = 0
        loss = weighted_loss(logits(batch), tokens.roll(-1, 1), weight)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(learning_rate(elapsed / a.seconds) * math.sqrt(0.25))
        optimizer.zero_grad(model)
        step += 1
        if elapsed - last > 15:
            last = elapsed
            scores = {}
            for group, batches in tests.ready():
                scores |= exact_matches(lambda b: logits(b).detach(), group, batches)
            history.append({"tokens": step * mixture.ROWS * mixture.LENGTH, "loss": loss.item(), "scores": {k: r / n for k, (r, n) in scores.items()}})
            log(f"control {elapsed:.0f} s {history[-1]['tokens'] / 1e6:.1f}M loss {loss.item():.3f} " + "  ".join(f"{k} {v:.2f}" for k, v in history[-1]["scores"].items()))
    with open(a.out, "w", encoding="utf-8") as f:
        json.dump(history, f)
    loader.stop()


if __name__ == "__main__":
    main()
