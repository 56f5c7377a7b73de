"""Write the frozen evaluation cases as JSONL, one case a line.

    python frozen.py --data DIR --out models/nano/eval.jsonl

The format is that of `ds4 eval` (docs/evaluation.md): `id` ("needle-4k-x4/7"), `task`, the fields of a
Chat Completions request, and `grade` with `exact`, `numeric` or `tool_call`.

Every case also asks that the answer ends by itself. Seeds are not those of training.
"""

import argparse
import json
import random

from data import exchanges, lookup, mixture, tools


def groups(source):
    """{group: (cases, kind, function of a random generator that makes one chat)}."""
    s, one = source.sentences, exchanges.single
    out = {
        "copy": (40, "exact", lambda r: one(r, "lists", only="copy")),
        "reverse": (40, "exact", lambda r: one(r, "lists", only="reverse")),
        "sort": (40, "exact", lambda r: one(r, "lists", only="sort")),
        "add": (40, "numeric", lambda r: one(r, "arithmetic", thinking=True, only="+")),
        "subtract": (40, "numeric", lambda r: one(r, "arithmetic", thinking=True, only="-")),
        "multiply": (40, "numeric", lambda r: one(r, "arithmetic", thinking=True, only="*")),
        "definition": (40, "exact", lambda r: one(r, "knowledge")),
        "unknown": (20, "exact", lambda r: one(r, "unknown")),
        "passage": (40, "exact", lambda r: one(r, "passage")),
        "lookup": (40, "exact", lookup.lookup),
        "talk": (20, "exact", lambda r: one(r, "talk")),
        "tool-call": (60, "tool_call", lambda r: tools.tools(r, kind="call")),
        "tool-result": (40, "exact", lambda r: tools.tools(r, kind="both")),
    }
    for name, tokens, cases in (("512", 400, 24), ("2k", 1900, 24), ("4k", 3900, 24), ("16k", 15600, 10)):
        for names in (1, 4):
            make = lambda r, n=tokens, k=names: lookup.needle(r, s, n, k, 1)  # noqa: E731
            out[f"needle-{name}-x{names}"] = (cases, "exact", make)
    return out


def case(group, number, kind, chat):
    last = max(i for i, m in enumerate(chat.messages) if m["role"] == "assistant")
    answer = chat.messages[last]
    out = {"id": f"{group}/{number}", "task": group, "thinking": chat.thinking}
    out["messages"] = [request_message(m) for m in chat.messages[:last]]
    if chat.tools:
        out["tools"] = [{"type": "function", "function": t} for t in chat.tools]
    if kind == "tool_call":
        return out | {"grade": {"type": kind} | answer["tool_calls"][0]}
    expected = answer["content"].strip()
    return out | {"grade": {"type": kind, "answer": float(expected.split()[-1]) if kind == "numeric" else expected}}


def request_message(message):
    """As a Chat Completions request has it. No turn has more than one call."""
    if "tool_calls" in message:
        calls = [{"id": "call", "type": "function", "function": c} for c in message["tool_calls"]]
        return message | {"tool_calls": calls}
    return message | {"tool_call_id": "call"} if message["role"] == "tool" else message


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", required=True)
    p.add_argument("--out", required=True)
    p.add_argument("--seed", default="0")
    a = p.parse_args()
    source = mixture.Source(a.data)
    with open(a.out, "w", encoding="utf-8") as f:
        for group, (cases, kind, make) in groups(source).items():
            for i in range(cases):
                rng = random.Random(f"frozen/{group}/{a.seed}/{i}")
                f.write(json.dumps(case(group, i, kind, make(rng)), ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
