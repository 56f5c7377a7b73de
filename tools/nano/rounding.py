"""The rounding of cached vectors that inference applies, with straight-through gradients.

Cached rows (window and compressed) keep E4M3 in their unrotated dimensions, one
power-of-two scale per 64; index queries and keys go through an orthonormal
Hadamard transform and keep E2M1, one power-of-two scale per 32.
"""

import torch

ROPE = 64


def round_rows(x):
    """[..., 512] rows: the first 448 dimensions rounded to E4M3."""
    nope = x[..., :-ROPE].float()
    y = nope.unflatten(-1, (-1, 64))
    scale = power_of_two(y.abs().amax(-1, keepdim=True).clamp(min=1e-4) * (1 / 448))
    y = (y / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
    y = nope + (y.flatten(-2) - nope).detach()
    return torch.cat([y.to(x.dtype), x[..., -ROPE:]], -1)


def round_index(x):
    """[..., 128] index queries or keys: Hadamard transform, then E2M1."""
    h = x.float() @ hadamard(x.shape[-1], x.device)
    y = h.unflatten(-1, (-1, 32))
    scale = power_of_two(y.abs().amax(-1, keepdim=True).clamp(min=6 * 2.0**-126) * (1 / 6))
    v = (y / scale).clamp(-6, 6)
    # Spacing of E2M1: 0.5 below 2, 1 below 4, 2 up to 6; torch.round sends ties to even.
    step = torch.where(v.abs() < 2, 0.5, torch.where(v.abs() < 4, 1.0, 2.0))
    y = torch.round(v / step) * step * scale
    return (h + (y.flatten(-2) - h).detach()).to(x.dtype)


def power_of_two(x):
    """The smallest power of two that is at least x (positive, normal), from the bits of the float."""
    bits = x.contiguous().view(torch.int32)
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0).to(torch.int32)
    return (exponent << 23).view(torch.float32)


def hadamard(n, device):
    h = torch.ones(1, 1, device=device)
    while h.shape[0] < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)], 0)
    return h / n**0.5
