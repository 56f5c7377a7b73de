"""Make the data folder that training reads from the corpus and the cut tokenizer.

    python -m data.prepare CORPUS_FOLDER OUT     reads corpus.json and tokenizer.json

Writes tokenizer.json, facts.json and text.npz (the filler sentences, tokenised, with the
place where each begins). A sentence starts with a space, so that sentences can be joined
as tokens with the same result as joining them as text.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

TAKE = {"wordnet": 135000, "gcide": 100000, "python": 39000, "debian": 3800}


def main(folder, out):
    folder, out = Path(folder), Path(out)
    out.mkdir(parents=True, exist_ok=True)
    spec = json.load(open(folder / "tokenizer.json", encoding="utf-8"))
    tokenizer = Tokenizer.from_str(json.dumps({**spec, "added_tokens": []}))
    corpus = json.load(open(folder / "corpus.json", encoding="utf-8"))
    runs = []
    for name, most in TAKE.items():
        runs += [e.ids for e in tokenizer.encode_batch([" " + s for s in corpus["text"][name][:most]])]
    lengths = np.array([len(r) for r in runs])
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    np.savez_compressed(out / "text.npz", tokens=np.concatenate([np.array(r, np.uint16) for r in runs]), starts=starts)
    with open(out / "facts.json", "w", encoding="utf-8") as f:
        json.dump({"facts": corpus["facts"], "rare": corpus["rare"]}, f)
    shutil.copy(folder / "tokenizer.json", out / "tokenizer.json")
    print(f"{starts[-1] / 1e6:.1f}M tokens of text in {len(runs)} sentences")


if __name__ == "__main__":
    main(*sys.argv[1:])
