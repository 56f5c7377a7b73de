"""Saving and loading of training state: whole for the same machine, bf16 in parts to carry."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

PART = 15_500_000  # bytes per part


def save(model, optimizer, history, folder):
    folder = Path(folder)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "history": history}, folder / "state.pt")
    part, size, parts = {}, 0, []
    for name, t in model.state_dict().items():
        # Small vectors stay f32: they steer norms, sinks, mixing and routing.
        t = t.detach().cpu().contiguous()
        t = t.bfloat16() if t.is_floating_point() and t.dim() >= 2 and t.numel() > 4096 else t
        if size + t.nbytes > PART:
            parts.append(part)
            part, size = {}, 0
        part[name] = t
        size += t.nbytes
    for i, p in enumerate([*parts, part]):
        save_file(p, folder / f"weights-{i}.safetensors")


def load(model, optimizer, folder):
    """Returns the history; takes the whole state where it exists."""
    folder = Path(folder)
    if (folder / "state.pt").exists():
        state = torch.load(folder / "state.pt", map_location="cpu")
        model.load_state_dict(state["model"])
        if optimizer:
            optimizer.load_state_dict(state["optimizer"])
        return state["history"]
    model.load_state_dict(weights(folder))
    with open(folder / "history.json", encoding="utf-8") as f:
        return json.load(f)


def weights(folder):
    out = {}
    for path in sorted(Path(folder).glob("weights-*.safetensors")):
        out |= load_file(path)
    return {k: v.float() if v.is_floating_point() else v for k, v in out.items()}
