"""Generate from a trained checkpoint on the CPU, without a cache: slow, and independent of everything else.

    python generate.py --init DIR --tokenizer FILE [--think] "What is a telescope?"
"""

import argparse
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer

import checkpoint
from data.chat import ASSISTANT, BOS, END_THINK, EOS, THINK, USER
from model import Config, Mode, Model


class Writer:
    def __init__(self, folder, tokenizer, config=Path(__file__).parent / "config.json"):
        spec = json.load(open(tokenizer, encoding="utf-8"))
        self.ids = {t["content"]: t["id"] for t in spec["added_tokens"]}
        self.names = {i: t for t, i in self.ids.items()}
        self.plain = Tokenizer.from_str(json.dumps({**spec, "added_tokens": []}))
        self.model = Model(Config.load(config), dtype=torch.float32)
        checkpoint.load(self.model, None, folder)

    def prompt(self, text, think):
        tail = [self.ids[ASSISTANT], self.ids[THINK if think else END_THINK]]
        return [self.ids[BOS], self.ids[USER], *self.plain.encode(text).ids, *tail]

    @torch.no_grad()
    def greedy(self, tokens, most=100, mode=Mode(rounding=True)):
        tokens, start = list(tokens), len(tokens)
        while len(tokens) - start < most:
            n = -(-len(tokens) // 128) * 128
            t = torch.full((1, n), 2)
            t[0, : len(tokens)] = torch.tensor(tokens)
            x, _ = self.model.streams(t, torch.zeros_like(t), torch.arange(n)[None], torch.zeros(1, 0, dtype=torch.long), mode)
            tokens.append(int(self.model.logits(x[0, len(tokens) - 1]).argmax()))
            if tokens[-1] == self.ids[EOS]:
                break
        return tokens[start:]

    def text(self, tokens):
        out, run = "", []
        for t in [*tokens, None]:
            if t is None or t in self.names:
                out += self.plain.decode(run, skip_special_tokens=False) + self.names.get(t, "")
                run = []
            else:
                run.append(t)
        return out


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--init", required=True)
    p.add_argument("--tokenizer", required=True)
    p.add_argument("--think", action="store_true")
    p.add_argument("prompts", nargs="+")
    a = p.parse_args()
    w = Writer(a.init, a.tokenizer)
    for text in a.prompts:
        print(f"> {text}\n{w.text(w.greedy(w.prompt(text, a.think)))}\n", flush=True)


if __name__ == "__main__":
    main()
