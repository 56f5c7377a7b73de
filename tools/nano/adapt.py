"""Fit everything else to quantised experts.

    python adapt.py --data DIR --init DIR --experts nano-q2.gguf --out DIR --seconds 200

The routed experts are held at the values that they have in a quantised file, and all other
weights are trained around them, on the tasks and on the logits of the model in --init. What
is saved has the experts of --init: quantised with the same types and the same importance
matrix, they become the values that were trained with.
"""

import argparse
import copy

import torch
import torch.nn.functional as F

import experts
import train
from model import Model

PEAK_LR, LAST_LR, RISE = 1e-3, 2e-5, 0.03
TEACHER_FLOOR = 0.1  # weight that the teacher's logits have where nothing is asked


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--experts", required=True, help="quantised GGUF file")
    a = train.arguments(p)
    a.sparse = a.rounding = a.mtp = True
    train.train(a, Adapter)


class Adapter(train.Trainer):
    def __init__(self, model, optimizer, a, history):
        super().__init__(model, optimizer, a, history)
        # Frozen parameters keep their gradients, so that both models share the compiled layers.
        self.teacher = copy.deepcopy(model)
        self.kept = {n: p.detach().clone() for n, p in model.named_parameters() if n in experts.names(model)}
        experts.use(model, a.experts)
        self.distil = distil
        if a.compiler != "none":
            self.distil = torch.compile(distil, dynamic=False, backend=a.compiler)

    @staticmethod
    def frozen(model: Model):
        return experts.names(model)

    def loss(self, x, b):
        taught = self.teacher.streams(b["tokens"], b["doc"], b["pos"], b["picks"], self.mode, self.block)[0].detach()
        return self.distil(self.model, self.teacher, x, taught, b["tokens"], b["weight"])

    def rate(self, part):
        if part < RISE:
            return PEAK_LR * (0.02 + part / RISE)
        return LAST_LR + (PEAK_LR - LAST_LR) * (1 - part) / (1 - RISE)

    @torch.no_grad()
    def finish(self):
        parameters = dict(self.model.named_parameters())
        for name, value in self.kept.items():
            parameters[name].copy_(value)


def distil(model, teacher, x, taught, tokens, weight):
    """Cross-entropy as in training, and the divergence from the teacher at every position."""
    logits = train.head_logits(model, x)
    loss = train.next_token_loss(logits, tokens, weight)
    with torch.no_grad():
        target = train.head_logits(teacher, taught).float().log_softmax(-1)
    kl = F.kl_div(logits.float().log_softmax(-1), target, reduction="none", log_target=True).sum(-1)
    w = weight + TEACHER_FLOOR
    return loss + (kl * w).sum() / w.sum()


if __name__ == "__main__":
    main()
