"""Write a calibration text for the importance matrix: documents of the training mixture.

    python calibration.py --data DIR --out calibration.txt

Markers of the chat format are spelled out; `ds4 imatrix` reads them as markers. The seed is
neither one of training nor of evaluation.
"""

import argparse
import random

from data import mixture

SEED = 5_000_000
TOKENS = 300_000


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", required=True)
    p.add_argument("--out", required=True)
    a = p.parse_args()
    source, rng = mixture.Source(a.data), random.Random(SEED)
    spelling = {i: text for text, i in source.markers.items()}
    kinds, shares = zip(*mixture.MIXTURES["full"].items())
    written = 0
    with open(a.out, "w", encoding="utf-8") as f:
        while written < TOKENS:
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
