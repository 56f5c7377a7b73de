"""Sinkhorn normalisation of the 4x4 stream-mixing matrices, one small matrix per token.

Twenty alternating normalisations of a tiny matrix are hundreds of separate GPU
operations when written with tensors; here they are one Triton kernel forward and
one backward.  On the CPU the plain definition below runs instead: it is also what
the kernels are tested against.
"""

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU-only installations: the plain definition is enough
    triton = None

STREAMS = 4
ITERATIONS = 20
EPS = 1e-6


def sinkhorn_plain(logits):
    """[n, 16] logits -> [n, 16] nearly doubly stochastic matrices (rows = source stream)."""
    c = logits.view(-1, STREAMS, STREAMS).softmax(-1) + EPS
    c = c / (c.sum(-2, keepdim=True) + EPS)
    for _ in range(ITERATIONS - 1):
        c = c / (c.sum(-1, keepdim=True) + EPS)
        c = c / (c.sum(-2, keepdim=True) + EPS)
    return c.view_as(logits)


if triton is not None:

    @triton.jit
    def _tile(n, BLOCK: tl.constexpr):
        token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[:, None, None]
        row = tl.arange(0, 4)[None, :, None]
        column = tl.arange(0, 4)[None, None, :]
        return token * 16 + row * 4 + column, token < n

    @triton.jit
    def _forward_kernel(logits, out, n, EPS: tl.constexpr, ITERS: tl.constexpr, BLOCK: tl.constexpr):
        at, ok = _tile(n, BLOCK)
        x = tl.load(logits + at, mask=ok, other=0.0)
        e = tl.exp(x - tl.max(x, axis=2)[:, :, None])
        c = e / tl.sum(e, axis=2)[:, :, None] + EPS
        c = c / (tl.sum(c, axis=1)[:, None, :] + EPS)
        for _ in range(ITERS - 1):
            c = c / (tl.sum(c, axis=2)[:, :, None] + EPS)
            c = c / (tl.sum(c, axis=1)[:, None, :] + EPS)
        tl.store(out + at, c, mask=ok)

    @triton.jit
    def _backward_kernel(logits, grad, steps, out, n, EPS: tl.constexpr, ITERS: tl.constexpr, BLOCK: tl.constexpr):
        # Forward again, keeping what each division divided; then back through them.
        at, ok = _tile(n, BLOCK)
        x = tl.load(logits + at, mask=ok, other=0.0)
        e = tl.exp(x - tl.max(x, axis=2)[:, :, None])
        soft = e / tl.sum(e, axis=2)[:, :, None]
        c = soft + EPS
        tl.store(steps + at, c, mask=ok)
        c = c / (tl.sum(c, axis=1)[:, None, :] + EPS)
        for i in range(ITERS - 1):
            tl.store(steps + (2 * i + 1) * n * 16 + at, c, mask=ok)
            c = c / (tl.sum(c, axis=2)[:, :, None] + EPS)
            tl.store(steps + (2 * i + 2) * n * 16 + at, c, mask=ok)
            c = c / (tl.sum(c, axis=1)[:, None, :] + EPS)
        g = tl.load(grad + at, mask=ok, other=0.0)
        for i in range(ITERS - 1):
            k = ITERS - 2 - i
            x = tl.load(steps + (2 * k + 2) * n * 16 + at, mask=ok, other=1.0)
            s = tl.sum(x, axis=1)[:, None, :] + EPS
            g = (g - tl.sum(g * x / s, axis=1)[:, None, :]) / s
            x = tl.load(steps + (2 * k + 1) * n * 16 + at, mask=ok, other=1.0)
            s = tl.sum(x, axis=2)[:, :, None] + EPS
            g = (g - tl.sum(g * x / s, axis=2)[:, :, None]) / s
        x = tl.load(steps + at, mask=ok, other=1.0)
        s = tl.sum(x, axis=1)[:, None, :] + EPS
        g = (g - tl.sum(g * x / s, axis=1)[:, None, :]) / s
        g = soft * (g - tl.sum(g * soft, axis=2)[:, :, None])
        tl.store(out + at, g, mask=ok)


def _blocks(n, block):
    return ((n + block - 1) // block,)


def sinkhorn_grad_triton(logits, grad):
    out, n = torch.empty_like(logits), logits.shape[0]
    steps = torch.empty(2 * ITERATIONS - 1, n, 16, device=logits.device)
    _backward_kernel[_blocks(n, 128)](logits, grad, steps, out, n, EPS, ITERATIONS, 128)
    return out


@torch.library.custom_op("nano::sinkhorn", mutates_args=(), device_types="cuda")
def _sinkhorn_op(logits: torch.Tensor) -> torch.Tensor:
    logits = logits.contiguous()
    out, n = torch.empty_like(logits), logits.shape[0]
    _forward_kernel[_blocks(n, 128)](logits, out, n, EPS, ITERATIONS, 128)
    return out


@torch.library.custom_op("nano::sinkhorn_grad", mutates_args=(), device_types="cuda")
def _sinkhorn_grad_op(logits: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    return sinkhorn_grad_triton(logits.contiguous(), grad.contiguous())


@_sinkhorn_op.register_fake
def _(logits):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@_sinkhorn_grad_op.register_fake
def _(logits, grad):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(inputs[0])


def _backward(ctx, grad):
    return _sinkhorn_grad_op(ctx.saved_tensors[0], grad)


_sinkhorn_op.register_autograd(_backward, setup_context=_setup)


def sinkhorn(logits):
    """[n, 16] f32 -> [n, 16] f32; see `sinkhorn_plain` for the definition."""
    return _sinkhorn_op(logits) if logits.is_cuda else sinkhorn_plain(logits)
