"""DeepSeek V4 for training: the whole architecture in PyTorch, over packed documents.

Parameter names are the official ones (`layers.0.attn.wq_a.weight`, ...), except that
the experts of a layer are stacked in three tensors; `export.py` splits them.

A batch holds `tokens`, `doc` and `pos`, all [B, S] with S a multiple of 128. Documents
start at multiples of 4, tokens see only their own document, and `pos` grows inside a
document but may jump at a multiple of 4: so a short batch can show long distances.
The one invariant: what a document gets here equals what it would get alone, up to the
phase of the 128-token rows.

Window attention is computed in blocks of 128 queries against 256 keys, compressed rows
as one dense product under a mask, both under one softmax with the sink.
"""

import json
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from rounding import round_index, round_rows
from sinkhorn import sinkhorn

HEAD = 512  # width of a head and of a cached row
ROPE = 64  # trailing rotary dimensions
INDEX = 128  # width of an index key
WINDOW = 128
STREAMS = 4
USED = 6  # experts per token
EPS = 1e-6
ROUTED_SCALE = 1.5
CLAMP = 10.0


@dataclass
class Config:
    name: str
    vocab: int
    hidden: int
    ratios: list
    hash_layers: int
    n_heads: int
    q_lora: int
    o_groups: int
    o_lora: int
    n_experts: int
    expert_ffn: int
    index_heads: int
    index_topk: int

    @classmethod
    def load(cls, path):
        with open(path, encoding="utf-8") as f:
            return cls(**json.load(f))


@dataclass
class Mode:
    """What differs between the parts of a training run."""

    sparse: bool = True  # indexer chooses; otherwise every compressed row is visible
    rounding: bool = False  # cache rows and index vectors rounded as in inference
    newest: bool = False  # control: the newest rows instead of the indexer's choice


class Model(nn.Module):
    def __init__(self, cfg, dtype=torch.bfloat16, mtp=True):
        super().__init__()
        self.cfg, self.dtype = cfg, dtype
        self.embed = Matrix(cfg.vocab, cfg.hidden)
        self.layers = nn.ModuleList(Block(cfg, i, r, dtype) for i, r in enumerate(cfg.ratios))
        self.norm = Norm(cfg.hidden)
        self.head = Matrix(cfg.vocab, cfg.hidden)
        self.hc_head = HeadMix(cfg.hidden)
        self.mtp = Mtp(cfg, dtype) if mtp else None
        self.register_buffer("main_freqs", rope_freqs(10000.0, yarn=False), persistent=False)
        self.register_buffer("long_freqs", rope_freqs(160000.0, yarn=True), persistent=False)

    def streams(self, tokens, doc, pos, picks, mode, block=None):
        """Residual streams [B, S, 4, D] after the last layer, and per layer (index loss, expert load, balance)."""
        block = block or Block.forward
        x = self.embed.weight[tokens].to(self.dtype).unsqueeze(2).expand(-1, -1, STREAMS, -1).contiguous()
        aux = []
        for layer in self.layers:
            freqs = self.long_freqs if layer.attn.ratio else self.main_freqs
            x, *a = block(layer, x, tokens, doc, pos, picks, freqs, mode)
            aux.append(a)
        return x, aux

    def logits(self, x):
        """Streams [..., 4, D] -> logits [..., V] in f32."""
        h = self.norm(self.hc_head(x)).to(self.dtype)
        return (h @ self.head.weight.to(self.dtype).T).float()

    def mtp_logits(self, x, following, doc, pos, mode, block=None):
        """Logits of the token after the next, from streams and the next token's id.

        Embedding and head are shared with the main model and not trained from here.
        """
        m, block = self.mtp, block or Block.forward
        y = m.inputs(x, self.embed.weight.detach()[following].to(self.dtype))
        none = torch.zeros(x.shape[0], 0, dtype=torch.long, device=x.device)
        y, *aux = block(m.block, y, following, doc, pos, none, self.main_freqs, mode)
        h = m.norm(m.hc_head(y)).to(self.dtype)
        return h @ self.head.weight.detach().to(self.dtype).T, aux


class Matrix(nn.Module):
    def __init__(self, rows, columns):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(rows, columns) / math.sqrt(columns))

    def forward(self, x):
        return x @ self.weight.to(x.dtype).T


class Norm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return rms(x) * self.weight


class Block(nn.Module):
    def __init__(self, cfg, index, ratio, dtype):
        super().__init__()
        d = cfg.hidden
        for site in ("attn", "ffn"):
            mix = HyperConnection(d, favourite=index % STREAMS)
            setattr(self, f"hc_{site}", mix)
        self.attn_norm, self.ffn_norm = Norm(d), Norm(d)
        self.attn = Attention(cfg, ratio)
        self.ffn = Moe(cfg, hashed=index < cfg.hash_layers)

    def forward(self, x, tokens, doc, pos, picks, freqs, mode):
        h, post, comb = self.hc_attn(x)
        y, index_loss = self.attn(self.attn_norm(h).to(x.dtype), doc, pos, picks, freqs, mode)
        x = spread(x, y, post, comb)
        h, post, comb = self.hc_ffn(x)
        y, load, balance = self.ffn(self.ffn_norm(h).to(x.dtype), tokens)
        return spread(x, y, post, comb), index_loss, load, balance


# ------------------------------------------------------------ hyper-connections


class HyperConnection(nn.Module):
    """Weights that read, write and mix the four streams around one sublayer."""

    def __init__(self, d, favourite):
        super().__init__()
        self.fn = nn.Parameter(torch.randn(24, STREAMS * d) / math.sqrt(STREAMS * d))
        self.scale = nn.Parameter(torch.full((3,), 0.1))
        # Start: each layer reads mostly one stream, writes to all, and mixes little.
        base = torch.zeros(24)
        base[:4] = -1.0
        base[favourite] = 1.5
        base[8:] = 3.0 * torch.eye(STREAMS).flatten()
        self.base = nn.Parameter(base)

    def forward(self, x):
        m = stream_mix(x, self.fn)
        pre = torch.sigmoid(m[..., :4] * self.scale[0] + self.base[:4]) + EPS
        post = 2 * torch.sigmoid(m[..., 4:8] * self.scale[1] + self.base[4:8])
        comb = sinkhorn((m[..., 8:] * self.scale[2] + self.base[8:]).view(-1, 16))
        h = sum(pre[..., j, None] * x[..., j, :].float() for j in range(STREAMS))
        return h, post, comb.view(*m.shape[:-1], STREAMS, STREAMS)


class HeadMix(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.fn = nn.Parameter(torch.randn(STREAMS, STREAMS * d) / math.sqrt(STREAMS * d))
        self.scale = nn.Parameter(torch.full((1,), 0.1))
        self.base = nn.Parameter(torch.zeros(STREAMS))

    def forward(self, x):
        pre = torch.sigmoid(stream_mix(x, self.fn) * self.scale + self.base) + EPS
        return sum(pre[..., j, None] * x[..., j, :].float() for j in range(STREAMS))


def stream_mix(x, fn):
    flat = x.flatten(-2)
    m = (flat @ fn.to(x.dtype).T).float()
    return m * torch.rsqrt(flat.float().square().mean(-1, keepdim=True) + EPS)


def spread(x, y, post, comb):
    """New stream k = post[k] * y + sum over source streams j of comb[j][k] * x[j]."""
    xs = [x[..., j, :].float() for j in range(STREAMS)]
    out = [
        post[..., k, None] * y.float() + sum(comb[..., j, k, None] * xs[j] for j in range(STREAMS))
        for k in range(STREAMS)
    ]
    return torch.stack(out, -2).to(x.dtype)


# ------------------------------------------------------------------- attention


class Attention(nn.Module):
    def __init__(self, cfg, ratio):
        super().__init__()
        d, self.cfg, self.ratio = cfg.hidden, cfg, ratio
        self.wq_a = Matrix(cfg.q_lora, d)
        self.q_norm = Norm(cfg.q_lora)
        self.wq_b = Matrix(cfg.n_heads * HEAD, cfg.q_lora)
        self.wkv = Matrix(HEAD, d)
        self.kv_norm = Norm(HEAD)
        self.attn_sink = nn.Parameter(torch.zeros(cfg.n_heads))
        self.wo_a = Matrix(cfg.o_groups * cfg.o_lora, cfg.n_heads * HEAD // cfg.o_groups)
        self.wo_b = Matrix(d, cfg.o_groups * cfg.o_lora)
        self.compressor = Compressor(d, HEAD, ratio) if ratio else None
        self.indexer = Indexer(cfg, d) if ratio == 4 else None

    def forward(self, x, doc, pos, picks, freqs, mode):
        B, S, _ = x.shape
        H, dt = self.cfg.n_heads, x.dtype
        qr = self.q_norm(self.wq_a(x)).to(dt)
        q = rotate(rms(self.wq_b(qr).view(B, S, H, HEAD)), pos, freqs)
        q = (q * HEAD**-0.5).to(dt)
        kv = rotate(self.kv_norm(self.wkv(x)), pos, freqs).to(dt)
        if mode.rounding:
            kv = round_rows(kv)

        near, near_keys = window_scores(q, kv, doc, pos)
        rows = scores = allowed = None
        index_loss = torch.zeros((), device=x.device)
        if self.ratio:
            rows = rotate(self.compressor(x, doc), pos[:, :: self.ratio], freqs).to(dt)
            if mode.rounding:
                rows = round_rows(rows)
            allowed = visible_rows(doc, self.ratio)
            if self.indexer is not None:
                chosen, picked_scores = self.indexer(x.detach(), qr.detach(), doc, pos, picks, freqs, allowed, mode)
                allowed = chosen
            scores = (q.flatten(1, 2) @ rows.transpose(1, 2)).view(B, S, H, -1)
            scores = scores.float().masked_fill(~allowed[:, :, None], -torch.inf)

        # One softmax over window, rows and sink; the maximum carries no gradient.
        top = torch.maximum(near.detach().amax(-1), self.attn_sink.detach())
        if rows is not None:
            top = torch.maximum(top, scores.detach().amax(-1))
        p_near = torch.exp(near - top[..., None])
        total = p_near.sum(-1) + torch.exp(self.attn_sink - top)
        o = weighted_window(p_near.to(dt), near_keys)
        if rows is not None:
            p_rows = torch.exp(scores - top[..., None])
            total = total + p_rows.sum(-1)
            o = o + (p_rows.to(dt).flatten(1, 2) @ rows).view(B, S, H, HEAD)
            if self.indexer is not None and picks.shape[1]:
                mass = take(p_rows.detach(), picks).sum(2)
                index_loss = indexer_loss(mass, picked_scores, take(allowed, picks))
        o = rotate(o.float() / total[..., None], pos, freqs, inverse=True).to(dt)

        g = self.cfg.o_groups
        a = self.wo_a.weight.to(dt).view(g, self.cfg.o_lora, -1)
        u = torch.einsum("bsgi,goi->bsgo", o.view(B, S, g, -1), a)
        return self.wo_b(u.flatten(2)), index_loss


def window_scores(q, kv, doc, pos):
    """Scores of each query against its block and the block before: [B, S, H, 256], and those keys."""
    B, S, H, _ = q.shape
    n = S // WINDOW

    def two_blocks(t, fill):
        t = t.view(B, n, WINDOW, *t.shape[2:])
        before = torch.cat([torch.full_like(t[:, :1], fill), t[:, :-1]], 1)
        return torch.cat([before, t], 2)

    keys = two_blocks(kv, 0)
    s = q.view(B, n, WINDOW * H, HEAD) @ keys.transpose(2, 3)
    age = pos.view(B, n, WINDOW, 1) - two_blocks(pos, 0).unsqueeze(2)
    ok = (age >= 0) & (age < WINDOW) & (doc.view(B, n, WINDOW, 1) == two_blocks(doc, -1).unsqueeze(2))
    s = s.view(B, n, WINDOW, H, 2 * WINDOW).float().masked_fill(~ok.unsqueeze(3), -torch.inf)
    return s.view(B, S, H, 2 * WINDOW), keys


def weighted_window(p, keys):
    B, S, H, _ = p.shape
    return (p.view(B, S // WINDOW, WINDOW * H, 2 * WINDOW) @ keys).view(B, S, H, HEAD)


def visible_rows(doc, ratio):
    """[B, S, S/ratio]: rows complete at or before the query, of the query's document."""
    S = doc.shape[1]
    last = torch.arange(ratio - 1, S, ratio, device=doc.device)
    done = last <= torch.arange(S, device=doc.device)[:, None]
    return done & (doc[:, :, None] == doc[:, None, ratio - 1 :: ratio])


class Compressor(nn.Module):
    """Pools `ratio` tokens into one row; with ratio 4 each row also sees the four tokens before."""

    def __init__(self, d, width, ratio):
        super().__init__()
        self.ratio, self.width = ratio, width
        parts = 2 if ratio == 4 else 1
        self.wkv = Matrix(parts * width, d)
        self.wgate = Matrix(parts * width, d)
        # Start: every channel prefers one slot, so that a row keeps its tokens apart.
        ape = 0.02 * torch.randn(ratio, parts * width)
        slots = torch.arange(width) % (parts * ratio)
        for part in range(parts):
            here = slots - part * ratio
            for slot in range(ratio):
                ape[slot, part * width : (part + 1) * width][here == slot] += 2.0
        self.ape = nn.Parameter(ape)
        self.norm = Norm(width)

    def forward(self, x, doc):
        B, S, _ = x.shape
        r = self.ratio
        k = self.wkv(x).float().view(B, S // r, r, -1)
        s = self.wgate(x).float().view(B, S // r, r, -1) + self.ape
        windows = doc.view(B, S // r, r)
        own = windows == windows[:, :, -1:]
        if r == 4:
            w = self.width
            k = torch.cat([previous(k[..., :w]), k[..., w:]], 2)
            s = torch.cat([previous(s[..., :w]), s[..., w:]], 2)
            before = torch.cat([torch.full_like(windows[:, :1], -1), windows[:, :-1]], 1)
            own = torch.cat([before == windows[:, :, -1:], own], 2)
        s = s.masked_fill(~own[..., None], -torch.inf)
        return self.norm((s.softmax(2) * k).sum(2))


def previous(t):
    return torch.cat([torch.zeros_like(t[:, :1]), t[:, :-1]], 1)


class Indexer(nn.Module):
    def __init__(self, cfg, d):
        super().__init__()
        self.heads, self.topk = cfg.index_heads, cfg.index_topk
        self.wq_b = Matrix(self.heads * INDEX, cfg.q_lora)
        self.weights_proj = Matrix(self.heads, d)
        self.compressor = Compressor(d, INDEX, 4)

    def forward(self, x, qr, doc, pos, picks, freqs, allowed, mode):
        """The rows each query may attend to, and differentiable scores of the picked queries."""
        B, S, _ = x.shape
        q = rotate(self.wq_b(qr).view(B, S, self.heads, INDEX).float(), pos, freqs).to(x.dtype)
        keys = rotate(self.compressor(x, doc), pos[:, ::4], freqs).to(x.dtype)
        if mode.rounding:
            q, keys = round_index(q), round_index(keys)
        w = self.weights_proj(x).float() * (INDEX * self.heads) ** -0.5
        picked = index_scores(take(q, picks), keys, take(w, picks)) if picks.shape[1] else None
        if not mode.sparse or keys.shape[1] <= self.topk:
            return allowed, picked
        with torch.no_grad():
            if mode.newest:
                s = torch.arange(keys.shape[1], device=x.device).float().expand(B, S, -1)
            else:
                s = index_scores(q, keys, w)
            best = s.masked_fill(~allowed, -torch.inf).topk(self.topk, -1).indices
            chosen = torch.zeros_like(allowed).scatter_(-1, best, True) & allowed
        return chosen, picked


def index_scores(q, keys, w):
    """[B, Q, heads, 128] x [B, R, 128] -> [B, Q, R]."""
    B, Q, heads, _ = q.shape
    dots = (q.flatten(1, 2) @ keys.transpose(1, 2)).view(B, Q, heads, -1)
    return (dots.relu().float() * w[..., None]).sum(2)


def indexer_loss(mass, scores, allowed):
    """KL from the attention's mass on the rows to the softmax of the indexer's scores."""
    total = mass.sum(-1, keepdim=True)
    target = mass / total.clamp(min=1e-20)
    log_p = scores.masked_fill(~allowed, -1e9).log_softmax(-1)
    kl = (target * (target.clamp(min=1e-20).log() - log_p)).sum(-1)
    some = (allowed.any(-1) & (total[..., 0] > 1e-12)).float()
    return (kl * some).sum() / some.sum().clamp(min=1)


def take(t, picks):
    """Rows `picks` [B, Q] of t [B, S, ...]."""
    index = picks.view(*picks.shape, *[1] * (t.dim() - 2)).expand(-1, -1, *t.shape[2:])
    return t.gather(1, index)


# ------------------------------------------------------------------- experts


class Moe(nn.Module):
    """Routed experts computed densely (6 of 8 are used anyway), with weight 0 where not chosen."""

    def __init__(self, cfg, hashed):
        super().__init__()
        d, f, e = cfg.hidden, cfg.expert_ffn, cfg.n_experts
        self.cfg, self.hashed = cfg, hashed
        self.gate = Matrix(e, d)
        if hashed:
            table = torch.rand(cfg.vocab, e, generator=torch.Generator().manual_seed(1)).argsort(1)[:, :USED]
            self.register_buffer("tid2eid", table.to(torch.int32))
        else:
            self.register_buffer("bias", torch.zeros(e))
        self.w1 = nn.Parameter(torch.randn(e, f, d) / math.sqrt(d))
        self.w3 = nn.Parameter(torch.randn(e, f, d) / math.sqrt(d))
        self.w2 = nn.Parameter(torch.randn(e, d, f) / math.sqrt(f) * 0.5)
        self.shared_experts = SharedExpert(d, f)

    def forward(self, x, tokens):
        e, dt = self.cfg.n_experts, x.dtype
        s = F.softplus(self.gate(x).float()).sqrt()
        if self.hashed:
            chosen = (self.tid2eid[tokens].long()[..., None] == torch.arange(e, device=x.device)).any(-2)
        else:
            chosen = best_experts((s + self.bias).detach(), USED)
        a = s * chosen
        a = ROUTED_SCALE * a / a.sum(-1, keepdim=True)
        h = swiglu(x @ self.w1.to(dt).flatten(0, 1).T, x @ self.w3.to(dt).flatten(0, 1).T)
        h = (h.view(*x.shape[:-1], e, -1) * a[..., None]).to(dt).flatten(-2)
        y = h @ self.w2.to(dt).permute(0, 2, 1).flatten(0, 1) + self.shared_experts(x)
        load = chosen.float().mean((0, 1))
        share = (s / s.sum(-1, keepdim=True)).mean((0, 1))
        return y, load, (load.detach() * share).sum() * e / USED


class SharedExpert(nn.Module):
    def __init__(self, d, f):
        super().__init__()
        self.w1, self.w3, self.w2 = Matrix(f, d), Matrix(f, d), Matrix(d, f)

    def forward(self, x):
        return self.w2(swiglu(self.w1(x), self.w3(x)).to(x.dtype))


def swiglu(gate, up):
    return F.silu(gate.float().clamp(max=CLAMP)) * up.float().clamp(-CLAMP, CLAMP)


def best_experts(v, n):
    """Mask of the n largest of the last dimension; lower index first among equals."""
    i = torch.arange(v.shape[-1], device=v.device)
    a, b = v[..., None], v[..., None, :]
    beaten_by = (b > a) | ((b == a) & (i[None, :] < i[:, None]))
    return beaten_by.sum(-1) < n


# ------------------------------------------------------------------- MTP block


class Mtp(nn.Module):
    """One more block that predicts the token after the next."""

    def __init__(self, cfg, dtype):
        super().__init__()
        d = cfg.hidden
        self.enorm, self.hnorm, self.norm = Norm(d), Norm(d), Norm(d)
        self.e_proj, self.h_proj = Matrix(d, d), Matrix(d, d)
        self.block = Block(cfg, len(cfg.ratios), 0, dtype)
        self.hc_head = HeadMix(d)

    def inputs(self, x, e):
        e = self.e_proj(self.enorm(e).to(x.dtype))
        return e.unsqueeze(2) + self.h_proj(self.hnorm(x).to(x.dtype))


# ------------------------------------------------------------------------ RoPE


def rms(x):
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)


def rope_freqs(base, yarn):
    i = torch.arange(ROPE // 2, dtype=torch.float64)
    f = base ** (-2 * i / ROPE)
    if yarn:
        ramp = ((i - 15) / (25 - 15)).clamp(0, 1)
        f = f * (1 - ramp) + f / 16 * ramp
    return f.float()


def rotate(x, pos, freqs, inverse=False):
    """Turns the last 64 dimensions (adjacent pairs) of x [B, S, ..., width] by its position; f32."""
    x = x.float()
    angle = pos.float()[..., None] * freqs
    angle = angle.view(*angle.shape[:2], *[1] * (x.dim() - 3), ROPE // 2)
    cos, sin = angle.cos(), -angle.sin() if inverse else angle.sin()
    a, b = x[..., -ROPE:].unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
    return torch.cat([x[..., :-ROPE], turned], -1)
