"""Muon for the matrices, Adam for everything else.

Muon replaces a matrix's momentum by the nearest orthogonal matrix (Newton-Schulz steps).
Matrices of one shape are treated as one batch; the experts of a layer count singly.
"""

import torch

ADAM_ONLY = ("embed.", "head.", "hc_", "norm", "attn_sink", "ape", "ffn.gate", "weights_proj")


class Optimizer:
    def __init__(self, model, frozen=(), momentum=0.95, decay=0.01):
        self.momentum, self.decay = momentum, decay
        self.groups, rest, self.parameters = {}, [], []
        for name, p in model.named_parameters():
            if name in frozen:
                continue
            self.parameters.append(p)
            if p.dim() >= 2 and not any(part in name for part in ADAM_ONLY):
                self.groups.setdefault(p.shape[-2:], []).append(p)
            else:
                rest.append(p)
        self.buffers = {shape: [torch.zeros_like(p) for p in ps] for shape, ps in self.groups.items()}
        self.adam = torch.optim.Adam(rest, betas=(0.9, 0.98), eps=1e-10, fused=rest[0].is_cuda)

    @torch.no_grad()
    def step(self, lr):
        for group in self.adam.param_groups:
            group["lr"] = lr
        self.adam.step()
        for shape, params in self.groups.items():
            pairs = [(p, b) for p, b in zip(params, self.buffers[shape]) if p.grad is not None]
            if not pairs:
                continue
            params, buffers = map(list, zip(*pairs))
            grads = [p.grad for p in params]
            torch._foreach_lerp_(buffers, grads, 1 - self.momentum)
            ahead = torch._foreach_lerp(grads, buffers, self.momentum)
            stacked = torch.cat([g.reshape(-1, *shape) for g in ahead])
            update = orthogonal(stacked) * (0.2 * max(shape) ** 0.5)
            torch._foreach_mul_(params, 1 - lr * self.decay)
            counts = [p.numel() // (shape[0] * shape[1]) for p in params]
            torch._foreach_add_(params, [u.view_as(p) for u, p in zip(update.split(counts), params)], alpha=-lr)

    def zero_grad(self, model):
        for p in model.parameters():
            p.grad = None

    def state_dict(self):
        return {"adam": self.adam.state_dict(), "muon": {str(tuple(k)): v for k, v in self.buffers.items()}}

    def load_state_dict(self, state):
        self.adam.load_state_dict(state["adam"])
        for shape, buffers in self.buffers.items():
            for mine, theirs in zip(buffers, state["muon"][str(tuple(shape))]):
                mine.copy_(theirs)


def orthogonal(m, steps=5):
    """[n, rows, columns] f32 -> about the nearest (semi-)orthogonal matrices."""
    x = m.bfloat16() if m.is_cuda else m  # CPUs without bf16 units are faster in f32
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return (x.mT if tall else x).float()
