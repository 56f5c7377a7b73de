"""Exact-match scores on held-out documents, without generating.

Greedy decoding gives the expected answer exactly if every token of it, its end included,
is the most likely one after the text before it. So one pass over the whole document with
the answer in place decides the case.

    python evaluate.py --data DIR --init DIR --out scores.json [--batches 8]
"""

import argparse
import json
import multiprocessing
import random

import torch

import checkpoint
import experts
from data import lookup, mixture
from model import Config, Mode, Model


def exact_matches(logits_of, group, batches):
    """{group or "group task": [right, all]} over the spans of the batches."""
    scores = {}
    for batch, spans in batches:
        with torch.enable_grad():  # the graphs compiled for training serve here too
            best = logits_of(batch).detach().argmax(-1).cpu()
        tokens = torch.from_numpy(batch["tokens"]).long()
        right = torch.zeros_like(tokens, dtype=torch.bool)
        right[:, 1:] = best[:, :-1] == tokens[:, 1:]
        tasks = {task for _, _, _, task in spans}
        for row, first, end, task in spans:
            key = group if len(tasks) == 1 or not task.startswith("tools") else f"{group} {task}"
            score = scores.setdefault(key, [0, 0])
            score[0] += bool(right[row, first:end].all())
            score[1] += 1
    return scores


class Judge:
    """Logits of a trained model, not compiled."""

    def __init__(self, model, device, mode):
        self.model, self.device, self.mode = model, device, mode

    @torch.no_grad()
    def __call__(self, batch):
        b = {k: torch.from_numpy(v).to(self.device) for k, v in batch.items() if k in ("tokens", "doc", "pos")}
        none = torch.zeros(len(b["tokens"]), 0, dtype=torch.long, device=self.device)
        with torch.no_grad():
            x, _ = self.model.streams(b["tokens"].long(), b["doc"], b["pos"], none, self.mode)
            return self.model.logits(x)


@torch.no_grad()
def mtp_matches(model, device, batches):
    """[right, all] of the tokens after the next that the MTP block predicts inside answers."""
    right = total = 0
    for batch, spans in batches:
        b = {k: torch.from_numpy(v).to(device) for k, v in batch.items() if k in ("tokens", "doc", "pos")}
        tokens = b["tokens"].long()
        none = torch.zeros(len(tokens), 0, dtype=torch.long, device=device)
        mode = Mode(rounding=True)
        x, _ = model.streams(tokens, b["doc"], b["pos"], none, mode)
        logits, _ = model.mtp_logits(x, tokens.roll(-1, 1), b["doc"], b["pos"], mode)
        hit = (logits.argmax(-1) == tokens.roll(-2, 1)).cpu()
        for row, first, end, _ in spans:
            right += int(hit[row, first - 1 : end - 2].sum())
            total += max(0, end - 1 - first)
    return [right, total]


def long_needles(source, names, count, tokens, length):
    """Needle cases longer than a training row, one per batch."""
    out = []
    for i in range(count):
        rng = random.Random(f"eval/long-{tokens}-{names}/{i}")
        doc = lookup.needle(rng, source.sentences, tokens, names, 1)
        t, _, spans = source.encode(doc)
        t = t[:length]
        batch = {"tokens": torch.full((1, length), 2, dtype=torch.int32).numpy()}
        batch["tokens"][0, : len(t)] = t
        batch["doc"] = torch.zeros(1, length, dtype=torch.int32).numpy()
        batch["pos"] = torch.arange(length, dtype=torch.int32)[None].numpy()
        out.append((batch, [(0, a, b, task) for a, b, task in spans if b <= length]))
    return out


_source = None


def _open(folder):
    global _source
    _source = mixture.Source(folder)


def _make(job):
    kind, *rest = job
    return long_needles(_source, *rest) if kind == "long" else mixture.eval_batches(_source, *rest)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", required=True)
    p.add_argument("--init", required=True)
    p.add_argument("--experts", help="quantised GGUF file to take the routed experts from")
    p.add_argument("--out", required=True)
    p.add_argument("--config", default=str(__file__).replace("evaluate.py", "config.json"))
    p.add_argument("--batches", type=int, default=4, help="packed batches per group, four times as many for long needles")
    p.add_argument("--long", type=int, default=48, help="cases at 16k")
    p.add_argument("--device", default="cuda")
    a = p.parse_args()
    torch.set_float32_matmul_precision("high")
    modes = {"": Mode(rounding=True), "no rounding: ": Mode(), "newest rows: ": Mode(rounding=True, newest=True)}
    groups = list(mixture.eval_groups(mixture.Source(a.data)))
    jobs = {g: ("short", g, a.batches * (4 if "3700" in g or "2000" in g else 2 if "needle" in g else 1), 1) for g in groups}
    jobs |= {f"needle 16000 x{k}": ("long", k, a.long, 15600, 16384) for k in (1, 4)}
    scores = {}
    with multiprocessing.get_context("fork").Pool(8, _open, (a.data,)) as pool:
        # The processes exist before the GPU is touched.
        model = Model(Config.load(a.config), dtype=torch.bfloat16 if a.device == "cuda" else torch.float32)
        checkpoint.load(model, None, a.init)
        if a.experts:
            experts.use(model, a.experts)
        model.to(a.device)
        made = {g: pool.apply_async(_make, (job,)) for g, job in jobs.items()}
        for group, result in made.items():
            batches = result.get()
            for label, mode in modes.items():
                if label and "needle" not in group:
                    continue
                if label:  # a control needs fewer cases
                    batches = batches[: 12 if "16000" in group else a.batches]
                for key, score in exact_matches(Judge(model, a.device, mode), group, batches).items():
                    scores[label + key] = score
                    print(f"{label + key}: {score[0]} of {score[1]} ({score[0] / score[1]:.3f})", flush=True)
        drafts = mtp_matches(model, a.device, made["tools"].get() + made["lookup 16"].get())
        scores["mtp draft"] = drafts
        print(f"mtp draft: {drafts[0]} of {drafts[1]} ({drafts[0] / drafts[1]:.3f})")
    with open(a.out, "w", encoding="utf-8") as f:
        json.dump(scores, f, indent=1)


if __name__ == "__main__":
    main()
