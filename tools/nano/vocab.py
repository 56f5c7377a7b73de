"""Cut a small vocabulary from the real tokenizer.

    python vocab.py TOKENIZER.json CORPUS.json OUT.json --size 4096

Keeps the bytes, the chat markers and the tokens that the training data uses most, closed
under merges: every kept token can be built from kept tokens by merges in their old order,
so that text splits as with the full tokenizer wherever the pieces exist. Three-digit
tokens are left out, so that numbers are written in one or two digits.
"""

import argparse
import collections
import json
import random

from tokenizers import Tokenizer

from data import exchanges, lookup, tools, words

SPECIAL = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"]
MARKERS = [
    "<｜fim▁hole｜>", "<｜fim▁begin｜>", "<｜fim▁end｜>", "<｜User｜>", "<｜Assistant｜>", "<|EOT|>", "<think>", "</think>",
    "｜DSML｜", "<｜latest_reminder｜>", "<｜action｜>", "<｜query｜>", "<｜authority｜>", "<｜domain｜>", "<｜task｜>",
    "<｜title｜>", "<｜answer｜>", "<｜search｜>", "<｜search▁begin｜>", "<｜search▁end｜>",
]  # fmt: skip


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("tokenizer")
    p.add_argument("corpus")
    p.add_argument("out")
    p.add_argument("--size", type=int, default=4096)
    a = p.parse_args()
    full = json.load(open(a.tokenizer, encoding="utf-8"))
    corpus = json.load(open(a.corpus, encoding="utf-8"))
    counts = token_counts(plain_tokenizer(full), corpus)
    cut = cut_vocabulary(full, counts, a.size)
    with open(a.out, "w", encoding="utf-8") as f:
        json.dump(cut, f, ensure_ascii=False)
    print(f"{len(cut['model']['vocab'])} tokens, {len(cut['model']['merges'])} merges, {len(cut['added_tokens'])} added")


def plain_tokenizer(spec):
    """The same tokenizer without added tokens: markers in text stay text."""
    return Tokenizer.from_str(json.dumps({**spec, "added_tokens": [], "post_processor": None}))


def token_counts(tokenizer, corpus):
    words.use(corpus["facts"], corpus["rare"])
    rng, counts = random.Random(0), collections.Counter()

    def add(text, weight):
        for i in tokenizer.encode(text).ids:
            counts[i] += weight

    for name, sentences in corpus["text"].items():
        for s in rng.sample(sentences, min(len(sentences), 20000)):
            add(" " + s, 1)
    for fact in corpus["facts"]:
        add(" " + fact["word"], 20)
        add(" " + fact["is"], 8)
    for word in words.FIRST_NAMES + words.CITIES + words.COLOURS + words.JOBS + words.ANIMALS + words.FRUITS + list(words.LETTERS):
        add(" " + word, 60)
        add(word, 60)
    makers = [tools.tools, lambda r: lookup.lookup(r), exchanges.several, lambda r: exchanges.single(r, "lists")]
    for _ in range(6000):
        for kind, text, *_ in (i for i in rng.choice(makers)(rng).items if i[0] == "text"):
            add(text, 2)
    return counts


def cut_vocabulary(full, counts, size):
    vocab = full["model"]["vocab"]
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in full["model"]["merges"]]
    rank = {m: i for i, m in enumerate(merges)}
    text_of = {i: t for t, i in vocab.items()}
    alphabet = {t for t in vocab if len(t) == 1}
    pairs = {str(n).zfill(k) for k in (1, 2) for n in range(10**k)}
    room = size - len(SPECIAL) - len(MARKERS)
    kept = set(alphabet)
    wanted = sorted(counts, key=lambda i: (-counts[i], i))
    for token in [t for t in pairs if t in vocab] + [text_of[i] for i in wanted]:
        parts = {t for t in tree(token, rank) if t not in kept}
        if any(t.isdigit() and len(t) > 2 for t in parts | {token}) or len(kept) + len(parts) > room:
            continue
        kept |= parts
    kept_merges = [m for m in merges if m[0] in kept and m[1] in kept and m[0] + m[1] in kept]
    ids = {t: i for i, t in enumerate(SPECIAL)}
    for t in sorted(kept, key=vocab.get):
        ids[t] = len(ids)
    by_text = {t["content"]: t for t in full["added_tokens"]}
    added = [{**by_text[t], "id": i} for i, t in enumerate(SPECIAL)]
    added += [{**by_text[t], "id": len(ids) + i} for i, t in enumerate(MARKERS)]
    model = {**full["model"], "vocab": ids, "merges": [list(m) for m in kept_merges]}
    return {**full, "model": model, "added_tokens": added, "post_processor": None}


def tree(token, rank):
    """All tokens that byte-pair encoding passes through on the way to `token`, itself included."""
    pieces, seen = list(token), {token}
    while len(pieces) > 1:
        best = min(range(len(pieces) - 1), key=lambda i: rank.get((pieces[i], pieces[i + 1]), len(rank)))
        pieces[best : best + 2] = [pieces[best] + pieces[best + 1]]
        seen.add(pieces[best])
    return seen


if __name__ == "__main__":
    main()
