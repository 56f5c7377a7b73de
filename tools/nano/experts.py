"""Routed experts as a quantised file has them."""

import gguf
import numpy as np
import torch
from gguf.quants import dequantize

from names import tensors


@torch.no_grad()
def use(model, path):
    """Gives the model's routed experts the values that they have in the GGUF file `path`."""
    stored = {t.name: t for t in gguf.GGUFReader(path).tensors}
    parameters = dict(model.named_parameters())
    for name, _, ours, role in tensors(model.cfg):
        if role == "experts":
            t, p = stored[name], parameters[ours]
            p.copy_(torch.tensor(np.asarray(dequantize(t.data, t.tensor_type))).view_as(p))


def names(model):
    """The parameters that hold them, those of the MTP block not among them."""
    return {ours for _, _, ours, role in tensors(model.cfg) if role == "experts"}
