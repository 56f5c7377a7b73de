#!/usr/bin/env python3
"""Compares the logits of `ds4 logits` with golden vectors, through the command line.

    tools/golden.py [--cuda] FOLDER

FOLDER has compare.py, models/*.gguf and vectors/*.safetensors. Each model is judged on the
reference path (sequence by sequence, with compare.py's own tolerances), on the SIMD path (all
positions together, because one flipped choice of experts decides a short sequence), and with
rounded caches where there are vectors for that. Exit status 1 if anything is out of tolerance.
Needs numpy and a release build.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def logits(model, tokens, flags, folder):
    """Runs `ds4 logits`; returns what compare.py reads back."""
    ids, out = Path(folder, "ids"), Path(folder, "logits.f32")
    ids.write_text(" ".join(map(str, tokens)))
    binary = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "release/ds4"
    command = [binary, "logits", "-m", model, "--token-ids", ids, *flags, "-o", out]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    return compare.load_candidate(str(out), None)


def judge(model, vectors, flags):
    """Statistics of every sequence, shortest first."""
    golden = compare.load_safetensors(vectors)
    names = sorted((k[: -len(".tokens")] for k in golden if k.endswith(".tokens")), key=lambda n: int(n[1:]))
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            tokens = golden[name + ".tokens"]
            _, positions, rows = logits(model, tokens, flags, folder)
            yield name, compare.judge(golden, name, rows, positions)


def check(title, stats, limits):
    bad = [k for k, limit in limits.items() if (stats[k] < limit if k == "top1" else stats[k] > limit)]
    shown = ", ".join(f"{k} {stats[k]:.3g}" for k in limits)
    print(f"{'FAILED' if bad else 'ok':6} {title}: {shown}", flush=True)
    return not bad


def together(results):
    """Mean over all positions of all sequences, maxima over all."""
    n = sum(s["positions"] for s in results)
    mean = lambda k: sum(s["positions"] * s[k] for s in results) / n
    return {"kl_mean": mean("kl_mean"), "top1": mean("top1"), "max_abs": max(s["max_abs"] for s in results)}


def vectors(model, kind=""):
    return FOLDER / "vectors" / f"{model.stem}{kind}.safetensors"


def judge_cpu(model):
    cpu = ["--backend", "cpu", "--cache-rounding"]
    ok = True
    for name, stats in judge(model, vectors(model), ["--reference", *cpu, "off"]):
        ok &= check(f"{model.stem} {name} reference", stats, EXACT)
    stats = together([s for _, s in judge(model, vectors(model), [*cpu, "off"])])
    ok &= check(f"{model.stem} SIMD", stats, F16 if "f16" in model.stem else QUANTISED)
    if vectors(model, "-qat").exists():
        for name, stats in judge(model, vectors(model, "-qat"), ["--reference", *cpu, "on"]):
            ok &= check(f"{model.stem} {name} rounded cache", stats, ROUNDED)
    return ok


def judge_cuda(model):
    cuda = ["--backend", "cuda", "--cache-rounding"]
    stats = together([s for _, s in judge(model, vectors(model), [*cuda, "off"])])
    ok = check(f"{model.stem} CUDA", stats, CUDA_F16 if "f16" in model.stem else CUDA_QUANTISED)
    if vectors(model, "-qat").exists():
        stats = together([s for _, s in judge(model, vectors(model, "-qat"), [*cuda, "on"])])
        ok &= check(f"{model.stem} CUDA, rounded cache", stats, CUDA_ROUNDED)
    return ok


def main(judge_model):
    return 0 if all([judge_model(model) for model in sorted(FOLDER.glob("models/*.gguf"))]) else 1


EXACT = {"max_abs": 5e-3, "kl_mean": 1e-6, "kl_max": 1e-5, "top1": 1.0}
ROUNDED = {"max_abs": 5.0, "kl_mean": 1e-2, "kl_max": 1.0, "top1": 0.95}
F16 = {"kl_mean": 1e-4, "top1": 0.995}
# What quantised activations cost another engine on these random weights.
QUANTISED = {"kl_mean": 2e-2, "top1": 0.85}
# What activations in halves cost.
CUDA_F16 = {"kl_mean": 1e-3, "top1": 0.98}
CUDA_QUANTISED = {"kl_mean": 2e-3, "top1": 0.97}
CUDA_ROUNDED = {"kl_mean": 1e-2, "top1": 0.85}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cuda", action="store_true", help="judge the CUDA backend, not the CPU's two paths")
    args = parser.parse_args()
    FOLDER = args.folder.resolve()
    sys.path.insert(0, str(FOLDER))
    import compare

    sys.exit(main(judge_cuda if args.cuda else judge_cpu))
