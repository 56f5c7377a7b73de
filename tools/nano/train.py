"""Train nano.

    python train.py --data DIR --out DIR --seconds 500 --mixture full [--sparse --rounding --mtp] ...

A long run may be split into calls: `--begin` and `--end` say which part of the learning-rate
schedule this call covers. State is kept in --out: `state.pt` (everything, to continue on the
same machine) and `weights-*.safetensors` (bf16, in parts, to carry). The first step
compiles and is not counted in --seconds.
"""

import argparse
import json
import multiprocessing
import os
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import checkpoint
import start
from data import mixture
from evaluate import exact_matches
from model import Block, Config, Mode, Model
from optimizer import Optimizer

PEAK_LR, LAST_LR = 2e-3, 5e-5
WARM_UP, DECAY_FROM = 0.015, 0.68  # parts of the schedule
INDEX_LOSS, BALANCE_LOSS, BIAS_STEP = 0.3, 1e-3, 1e-3
LOG_STEPS = 25
QUICK = ["recall 4", "recall 24", "lookup 4", "lookup 16", "needle 500 x1", "needle 500 x4", "needle 2000 x4", "copy", "sort", "add", "tools", "knowledge"]


def main():
    train(arguments(argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)), Trainer)


def train(a, kind):
    """Trains with a trainer of the given kind and saves what came of it."""
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.recompile_limit = 32
    out = Path(a.out)
    out.mkdir(parents=True, exist_ok=True)
    loader = Loader(a.data, a.mixture, a.workers, a.seed)
    tests = Tests(a.data, QUICK, a.workers)
    cfg = Config.load(a.config)
    model = Model(cfg, dtype=torch.bfloat16 if a.device == "cuda" else torch.float32)
    start.initialise(model, a.seed)
    model.to(a.device)
    optimizer = Optimizer(model, kind.frozen(model))
    history = checkpoint.load(model, optimizer, a.init) if a.init else []
    trainer = kind(model, optimizer, a, history)
    log(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters, {len(history)} log lines so far")
    trainer.run(loader, tests)
    trainer.finish()
    checkpoint.save(model, optimizer, trainer.history, out)
    with open(out / "history.json", "w", encoding="utf-8") as f:
        json.dump(trainer.history, f)
    loader.stop()


def arguments(p):
    """The options of training, added to those of `p`."""
    p.add_argument("--data", required=True)
    p.add_argument("--out", required=True)
    p.add_argument("--config", default=str(Path(__file__).parent / "config.json"))
    p.add_argument("--init", help="folder of an earlier --out")
    p.add_argument("--mixture", default="full", choices=sorted(mixture.MIXTURES))
    p.add_argument("--seconds", type=float, required=True)
    p.add_argument("--count-compiling", action="store_true", help="let --seconds include the first step")
    p.add_argument("--begin", type=float, default=0.0)
    p.add_argument("--end", type=float, default=1.0)
    p.add_argument("--sparse", action="store_true", help="attend to the indexer's choice instead of all rows")
    p.add_argument("--rounding", action="store_true", help="round cached rows as inference does")
    p.add_argument("--mtp", action="store_true", help="train the MTP block too")
    p.add_argument("--workers", type=int, default=12)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--test-every", type=float, default=30.0, help="seconds")
    p.add_argument("--device", default="cuda")
    p.add_argument("--compiler", default="inductor", help="backend of torch.compile, or none")
    return p.parse_args()


class Trainer:
    def __init__(self, model, optimizer, a, history):
        self.model, self.optimizer, self.a, self.history = model, optimizer, a, history
        self.mode = Mode(sparse=a.sparse, rounding=a.rounding)
        self.block, self.head = Block.forward, head_loss
        if a.compiler != "none":
            self.block = torch.compile(Block.forward, dynamic=False, backend=a.compiler)
            self.head = torch.compile(head_loss, dynamic=False, backend=a.compiler)
        self.tokens_before = history[-1]["tokens"] if history else 0

    def run(self, loader, tests):
        began = time.time()
        self.step(loader.get(), 1e-5)
        self.sync()
        log(f"first step after {time.time() - began:.0f} s")
        if self.a.count_compiling:
            self.a.seconds -= time.time() - began
        began, step, sums, last_test, last_log = time.time(), 0, [], 0.0, 0.0
        while (elapsed := time.time() - began) < self.a.seconds:
            part = elapsed / self.a.seconds
            lr = self.rate(part)
            if self.a.init:  # momentum may be missing: rise again over the first half second
                lr *= min(1.0, (step + 1) / 20)
            sums.append(self.step(loader.get(), lr))
            step += 1
            if step % LOG_STEPS == 0:
                losses = torch.stack(sums).mean(0).tolist()
                sums.clear()
                elapsed = time.time() - began
                self.note(step, elapsed, lr, losses)
                if elapsed - last_log >= 10:
                    last_log = elapsed
                    log(self.line())
                if elapsed - last_test > self.a.test_every:
                    last_test = elapsed
                    self.test(tests)
        if step >= LOG_STEPS:
            log(self.line())
            self.test(tests)

    def step(self, batch, lr):
        b = self.to_device(batch)
        x, aux = self.model.streams(b["tokens"], b["doc"], b["pos"], b["picks"], self.mode, self.block)
        loss = self.loss(x, b)
        index = sum(a[0] for a in aux)
        balance = sum(a[2] for a in aux)
        total = loss + INDEX_LOSS * index + BALANCE_LOSS * balance
        loads = [a[1] for a in aux]
        mtp_loss = torch.zeros_like(loss)
        if self.a.mtp:
            mtp_loss, mtp_aux = self.mtp_loss(x, b)
            total = total + mtp_loss + BALANCE_LOSS * mtp_aux[2]
            loads.append(mtp_aux[1])
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.optimizer.parameters, 1.0)
        self.optimizer.step(lr)
        self.optimizer.zero_grad(self.model)
        self.balance(loads)
        return torch.stack([loss.detach(), index.detach(), mtp_loss.detach(), norm, torch.stack(loads[2:]).max().detach()])

    def loss(self, x, b):
        return self.head(self.model, x, b["tokens"], b["weight"])

    @staticmethod
    def frozen(model):
        """Names of the parameters that are not trained."""
        return set()

    def rate(self, part):
        """Learning rate after this part of the call."""
        return learning_rate(self.a.begin + (self.a.end - self.a.begin) * part)

    def finish(self):
        """Called before saving."""

    def mtp_loss(self, x, b):
        """Loss of the token after the next; trains nothing but the MTP block."""
        following = b["tokens"].roll(-1, 1)
        logits, aux = self.model.mtp_logits(x.detach(), following, b["doc"], b["pos"], self.mode, self.block)
        weight = b["weight"].roll(-1, 1).clone()
        weight[:, -2:] = 0
        return weighted_loss(logits, b["tokens"].roll(-2, 1), weight), aux

    @torch.no_grad()
    def balance(self, loads):
        blocks = [*self.model.layers, self.model.mtp.block]
        for layer, load in zip(blocks, loads):
            if not layer.ffn.hashed:
                layer.ffn.bias += BIAS_STEP * torch.sign(load.mean() - load)

    def test(self, tests):
        began, scores = time.time(), {}
        for group, batches in tests.ready():
            scores |= exact_matches(self.logits, group, batches)
        if scores:
            self.history[-1]["scores"] = {k: v[0] / v[1] for k, v in scores.items()}
            log(f"  {time.time() - began:.1f} s: " + "  ".join(f"{k} {r / n:.2f}" for k, (r, n) in scores.items()))

    def logits(self, batch):
        b = self.to_device(batch)
        x, _ = self.model.streams(b["tokens"], b["doc"], b["pos"], b["picks"], self.mode, self.block)
        return self.model.logits(x.detach())

    def to_device(self, batch):
        b = {k: torch.from_numpy(v).to(self.a.device, non_blocking=True) for k, v in batch.items()}
        return b | {"tokens": b["tokens"].long(), "weight": b["weight"].float()}

    def note(self, step, elapsed, lr, losses):
        tokens = self.tokens_before + step * mixture.ROWS * mixture.LENGTH
        names = ("loss", "index", "mtp", "norm", "load")
        self.history.append({"tokens": tokens, "seconds": round(elapsed, 2), "lr": lr, **{n: round(v, 4) for n, v in zip(names, losses)}})

    def line(self):
        h = self.history[-1]
        rate = (h["tokens"] - self.tokens_before) / max(h["seconds"], 1e-3)
        return f"{h['seconds']:6.1f} s {h['tokens'] / 1e6:7.2f}M tokens {rate / 1e3:4.0f}k/s lr {h['lr']:.1e} loss {h['loss']:.3f} index {h['index']:.3f} mtp {h['mtp']:.3f} norm {h['norm']:.2f} load {h['load']:.2f}"

    def sync(self):
        if self.a.device == "cuda":
            torch.cuda.synchronize()


def head_loss(model, x, tokens, weight):
    return next_token_loss(head_logits(model, x), tokens, weight)


def head_logits(model, x):
    h = model.norm(model.hc_head(x)).to(x.dtype)
    return h @ model.head.weight.to(x.dtype).T


def next_token_loss(logits, tokens, weight):
    """Mean weighted cross-entropy of the next tokens; `weight` is that of the token to predict."""
    weight = weight.clone()
    weight[:, -1] = 0
    return weighted_loss(logits, tokens.roll(-1, 1), weight)


def weighted_loss(logits, targets, weight):
    ce = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
    w = weight.flatten()
    return (ce * w).sum() / w.sum().clamp(min=1)


def learning_rate(progress):
    if progress < WARM_UP:
        return PEAK_LR * (0.02 + progress / WARM_UP)
    if progress < DECAY_FROM:
        return PEAK_LR
    left = (1 - progress) / (1 - DECAY_FROM)
    return LAST_LR + (PEAK_LR - LAST_LR) * left


def log(text):
    print(text, flush=True)


# --------------------------------------------------------------- data processes


class Loader:
    """Worker processes that make batches ahead of need."""

    def __init__(self, folder, name, workers, seed):
        context = multiprocessing.get_context("fork")
        self.queue = context.Queue(maxsize=8 * workers)
        self.processes = [context.Process(target=produce, args=(folder, name, f"{seed}-{i}", self.queue), daemon=True) for i in range(workers)]
        for p in self.processes:
            p.start()

    def get(self):
        return self.queue.get()

    def stop(self):
        for p in self.processes:
            p.kill()


def produce(folder, name, seed, queue):
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    for batch in mixture.train_batches(mixture.Source(folder), name, seed):
        queue.put(batch)


class Tests:
    """Held-out batches of some groups, made in the background."""

    def __init__(self, folder, groups, workers):
        self.pool = multiprocessing.get_context("fork").Pool(min(4, workers))
        self.results = [(g, self.pool.apply_async(held_out, (folder, g, 1))) for g in groups]

    def ready(self):
        return [(g, r.get()) for g, r in self.results if r.ready()]


def held_out(folder, group, batches):
    return mixture.eval_batches(mixture.Source(folder), group, batches)


if __name__ == "__main__":
    main()
