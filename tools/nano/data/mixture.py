"""From task generators to packed batches.

`Source` holds tokenizer, filler text and word lists; `train_batches` yields batches of a
mixture for ever, `eval_batches` packs the documents of one held-out group. Everything is a
function of (split, seed), and the splits' seeds are disjoint.
"""

import json
import random

import numpy as np
from tokenizers import Tokenizer

from . import exchanges, lookup, tools, words
from .chat import BOS, EOS, Doc

ROWS, LENGTH = 8, 4096
PICKS = 256  # queries per row whose index scores are trained
LONGEST = 16384  # distances shown by jumps of the position
TEXT_WEIGHT = 0.3

# Shares of tokens.
MIXTURES = {
    "lookup": {"recall": 0.3, "repeat": 0.15, "lookup": 0.35, "needle-near": 0.2},
    "full": {
        "recall": 0.04, "repeat": 0.03, "lookup": 0.11, "needle-near": 0.06, "needle": 0.22, "tools": 0.19, "lists": 0.09,
        "arithmetic": 0.06, "knowledge": 0.07, "talk": 0.01, "passage": 0.03, "several": 0.05, "text": 0.04,
    },
    # What quantised experts forget most comes more often.
    "adapt": {
        "recall": 0.03, "repeat": 0.02, "lookup": 0.08, "needle-near": 0.05, "needle": 0.15, "tools": 0.19, "lists": 0.15,
        "arithmetic": 0.07, "knowledge": 0.15, "talk": 0.01, "passage": 0.03, "several": 0.04, "text": 0.03,
    },
}  # fmt: skip


class Filler:
    """A run of tokenised sentences inside a message."""

    def __init__(self, source, start, end):
        self.source, self.start, self.end = source, start, end

    @property
    def tokens(self):
        return self.source.text_tokens[self.start : self.end]

    def part(self, first, last=None):
        return Filler(self.source, self.start + first, self.end if last is None else self.start + last)

    def text(self):
        return self.source.tokenizer.decode(self.tokens.tolist(), skip_special_tokens=False)


class Source:
    def __init__(self, folder):
        spec = json.load(open(f"{folder}/tokenizer.json", encoding="utf-8"))
        self.markers = {t["content"]: t["id"] for t in spec["added_tokens"]}
        self.tokenizer = Tokenizer.from_str(json.dumps({**spec, "added_tokens": []}))
        facts = json.load(open(f"{folder}/facts.json", encoding="utf-8"))
        words.use(facts["facts"], facts["rare"])
        text = np.load(f"{folder}/text.npz")
        self.text_tokens, self.starts = text["tokens"], text["starts"]
        self.constant = {}  # encodings of the fixed texts of the tools block

    def sentences(self, rng, tokens):
        """A filler of whole sentences, about so many tokens."""
        i = rng.randrange(len(self.starts) - 1)
        start = int(self.starts[i])
        j = min(int(np.searchsorted(self.starts, start + tokens)), len(self.starts) - 1)
        return Filler(self, start, int(self.starts[max(j, i + 1)]))

    def document(self, rng, kind):
        s = self.sentences
        if kind == "recall":
            return lookup.recall(rng)
        if kind == "repeat":
            return lookup.repeat(rng, s)
        if kind == "lookup":
            return lookup.lookup(rng)
        if kind == "needle-near":
            return lookup.needle(rng, s, rng.randint(60, 600), rng.randint(1, 8), rng.randint(1, 6))
        if kind == "needle":
            names = 1 if rng.random() < 0.25 else rng.randint(2, 8)
            doc = lookup.needle(rng, s, int(400 * 9 ** rng.random()), names, rng.randint(1, 6))
            doc.stretch = rng.random() < 0.6
            return doc
        if kind == "tools":
            return tools.tools(rng)
        if kind == "several":
            return exchanges.several(rng)
        if kind == "text":
            return self.plain_text(rng, rng.randint(40, 400))
        if kind == "knowledge" and rng.random() < 0.1:
            return exchanges.single(rng, "unknown")
        return exchanges.single(rng, kind)

    def plain_text(self, rng, tokens):
        doc = Doc()
        doc.marker(BOS, 0.0)
        doc.text(self.sentences(rng, tokens), TEXT_WEIGHT)
        doc.marker(EOS, 0.1)
        return doc

    # ----------------------------------------------------------- tokenisation

    def encode(self, doc):
        """Document -> tokens u16, weights f16, spans [(first, end, task)]."""
        tokens, weights, spans, run, open_spans = [], [], [], [], []

        def flush():
            start = sum(map(len, tokens))
            if any(i[0] == "text" for i in run):
                t, w, char_spans = self.encode_run(run)
                tokens.append(t)
                weights.append(w)
            else:
                char_spans = [(i[0], 0, i[-1]) for i in run]
            for kind, at, task in char_spans:
                if kind == "begin":
                    open_spans.append((start + at, task))
                else:
                    first, task = open_spans.pop()
                    spans.append((first, start + at, task))
            run.clear()

        for item in doc.items:
            if item[0] in ("begin", "end") or isinstance(item[1], str) and item[0] == "text":
                run.append(item)
                continue
            flush()
            t = item[1].tokens if item[0] == "text" else np.array([self.markers[item[1]]], np.uint16)
            tokens.append(t)
            weights.append(np.full(len(t), item[2], np.float16))
        flush()
        return np.concatenate(tokens), np.concatenate(weights), spans

    def encode_run(self, run):
        """Adjacent texts become one string; a token takes the largest weight among its characters.

        Returns tokens, weights and [("begin" or "end", token, task)].
        """
        texts = [i for i in run if i[0] == "text"]
        text = "".join(t for _, t, _ in texts)
        inside = any(i[0] != "text" for i in run[1:-1])
        if len({w for _, _, w in texts}) == 1 and not inside:
            ids = self.constant.get(text)
            if ids is None:
                ids = np.array(self.tokenizer.encode(text).ids, np.uint16)
                if texts[0][2] == 0.0:
                    self.constant[text] = ids
            spans = [(i[0], 0 if at == 0 else len(ids), i[-1]) for at, i in enumerate(run) if i[0] != "text"]
            return ids, np.full(len(ids), texts[0][2], np.float16), spans
        by_char = np.concatenate([np.full(len(t), w, np.float16) for _, t, w in texts])
        e = self.tokenizer.encode(text)
        weights = np.array([by_char[a : max(b, a + 1)].max() for a, b in e.offsets], np.float16)
        starts, ends = (np.array(x) for x in zip(*e.offsets))
        spans, at = [], 0
        for i in run:
            if i[0] == "text":
                at += len(i[1])
            elif i[0] == "begin":
                spans.append(("begin", int((ends <= at).sum()), i[1]))
            else:
                spans.append(("end", int((starts < at).sum()), None))
        return np.array(e.ids, np.uint16), weights, spans

    # ------------------------------------------------------------------ packing

    def pack(self, rng, documents):
        """Fill one batch from an iterator of documents; what does not fit any more starts the next row.

        Returns arrays [ROWS, LENGTH] (picks: [ROWS, PICKS]) and spans [(row, first, end, task)].
        """
        out = empty_batch()
        spans = []
        for row in range(ROWS):
            at, number = 0, 0
            while LENGTH - at >= 24:
                doc = next(documents)
                if doc is None:
                    break
                tokens, weights, doc_spans = self.encode(doc)
                if len(tokens) > LENGTH - 8 and at == 0:
                    continue
                if at + len(tokens) > LENGTH:
                    doc = self.plain_text(rng, LENGTH) if documents.push(doc) else None
                    tokens, weights, doc_spans = (a[: LENGTH - at] if isinstance(a, np.ndarray) else [] for a in self.encode(doc))
                end = at + len(tokens)
                out["tokens"][row, at:end] = tokens
                out["weight"][row, max(at - 1, 0) : end - 1] = weights[1:] if at == 0 else weights
                if at:
                    out["weight"][row, at - 1] = 0
                spans += [(row, at + a, at + b, task) for a, b, task in doc_spans]
                padded = min(-(-end // 4) * 4, LENGTH)
                out["doc"][row, at:padded] = number
                if getattr(doc, "stretch", False):
                    stretch(rng, out["step"][row], at, end)
                at, number = padded, number + 1
            out["doc"][row, at:] = number
        out["pos"] = np.cumsum(out.pop("step"), 1, dtype=np.int32)
        for row in range(ROWS):
            out["picks"][row] = picks(rng, out["weight"][row])
        return out, spans


class Documents:
    """An iterator with one place to put a document back."""

    def __init__(self, iterator):
        self.iterator, self.kept = iterator, None

    def __next__(self):
        if self.kept is not None:
            doc, self.kept = self.kept, None
            return doc
        return next(self.iterator, None)

    def push(self, doc):
        self.kept = doc
        return True


def empty_batch():
    return {
        "tokens": np.full((ROWS, LENGTH), 2, np.int32),
        "doc": np.zeros((ROWS, LENGTH), np.int32),
        "weight": np.zeros((ROWS, LENGTH), np.float16),
        "step": np.ones((ROWS, LENGTH), np.int32),
        "picks": np.zeros((ROWS, PICKS), np.int64),
    }


def stretch(rng, step, at, end):
    """Let positions jump in a long document, up to LONGEST in all; not near its end, where the questions are."""
    room = LONGEST - (end - at)
    last = end - 300
    if last - at < 300:
        return
    for _ in range(rng.randint(1, 3)):
        jump = int(128 * (room / 128) ** rng.random())
        place = rng.randrange(at + 64, last) // 4 * 4
        step[place] += jump
        room = max(256, room - jump)


def picks(rng, weight):
    heavy = np.flatnonzero(weight >= 2)
    light = np.flatnonzero(weight >= 0.9)
    g = np.random.default_rng(rng.getrandbits(32))
    heavy = g.permutation(heavy)[: PICKS // 2]
    light = g.permutation(light)[: PICKS // 4]
    rest = g.integers(0, len(weight), PICKS - len(heavy) - len(light))
    return np.concatenate([heavy, light, rest])


def train_batches(source, mixture, seed):
    """Batches without end. The kind that lags most behind its share comes next."""
    rng = random.Random(f"train/{seed}")
    shares, given = MIXTURES[mixture], dict.fromkeys(MIXTURES[mixture], 0.0)

    def documents():
        while True:
            total = sum(given.values()) + 1
            kind = max(shares, key=lambda k: shares[k] - given[k] / total)
            doc = source.document(rng, kind)
            given[kind] += sum(len(i[1]) / 4.3 if isinstance(i[1], str) else len(i[1].tokens) for i in doc.items if i[0] == "text")
            yield doc

    stream = Documents(documents())
    while True:
        yield source.pack(rng, stream)[0]


def eval_groups(source):
    """{group: function of a random generator that makes one document}."""
    s, one = source.sentences, exchanges.single
    groups = {
        "recall 4": lambda r: lookup.recall(r, 4),
        "recall 24": lookup.recall,
        "lookup 4": lambda r: lookup.lookup(r, 4),
        "lookup 16": lookup.lookup,
        "copy": lambda r: one(r, "lists", only="copy"),
        "reverse": lambda r: one(r, "lists", only="reverse"),
        "sort": lambda r: one(r, "lists", only="sort"),
        "add": lambda r: one(r, "arithmetic", thinking=True, only="+"),
        "subtract": lambda r: one(r, "arithmetic", thinking=True, only="-"),
        "multiply": lambda r: one(r, "arithmetic", thinking=True, only="*"),
        "passage": lambda r: one(r, "passage"),
        "tools": lambda r: tools.tools(r, kind="both"),
        "knowledge": lambda r: one(r, "knowledge"),
        "talk": lambda r: one(r, "talk"),
    }
    for length in (500, 1000, 2000, 3700):
        for names in (1, 4):
            groups[f"needle {length} x{names}"] = lambda r, n=length, k=names: lookup.needle(r, s, n, k, 1, task="needle")
    return groups


def eval_batches(source, group, batches, seed=0):
    rng = random.Random(f"eval/{group}/{seed}")
    make = eval_groups(source)[group]
    stream = Documents(make(rng) for _ in iter(int, 1))
    return [source.pack(rng, stream) for _ in range(batches)]
