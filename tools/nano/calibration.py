"""Write documents of the training mixture as text: to calibrate with, or to measure on.

    python calibration.py --data DIR --out calibration.txt

Markers of the chat format are spelled out; `ds4 imatrix` and `ds4 perplexity --markers` read
them as markers. The seeds are neither those of training nor of evaluation.
"""

import argparse
import random

from data import mixture



def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", required=True)
    p.add_argument("--out", required=True)
    p.add_argument("--seed", type=int, default=5_000_000)
    p.add_argument("--tokens", type=int, default=300_000)
    a = p.parse_args()
    source, rng = mixture.Source(a.data), random.Random(a.seed)
    spelling = {i: text for text, i in source.markers.items()}
    kinds, shares = zip(*mixture.MIXTURES["full"].items())
    written = 0
    with open(a.out, "w", encoding="utf-8") as f:
        while written < a.tokens:
            kind = rng.choices(kinds, shares)[0]
            tokens, _, _ = source.encode(source.document(rng, kind))
            f.write(spell(source.tokenizer, spelling, tokens.tolist()))
            written += len(tokens)


def spell(tokenizer, spelling, tokens):
    """The text of `tokens`, markers spelled out."""
    text, run = "", []
    for token in tokens:
        if token in spelling:
            text += tokenizer.decode(run, skip_special_tokens=False) + spelling[token]
            run = []
        else:
            run.append(token)
    return text + tokenizer.decode(run, skip_special_tokens=False)


if __name__ == "__main__":
    main()
