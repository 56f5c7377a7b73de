"""Write the frozen evaluation cases as JSONL, one case a line.

    python frozen.py --data DIR --out models/nano/eval.jsonl

    id        "needle-4k-x4/7"
    group     "needle-4k-x4"
    thinking  true: the prompt ends with <think>, otherwise with </think>
    messages  role and content; assistant messages may have reasoning and tool_calls
              [{"name", "arguments"}], tool results have the role "tool"
    tools     [{"name", "description", "parameters"}], absent if none
    kind      "exact": the answer, without reasoning and surrounding white space, is `expected`;
              "numeric": the last number of the answer is `expected`;
              "tool_call": the answer is one call, equal to `expected` {"name", "arguments"}

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
    out = {"id": f"{group}/{number}", "group": group, "thinking": chat.thinking, "messages": chat.messages[:last]}
    if chat.tools:
        out["tools"] = chat.tools
    if kind == "tool_call":
        expected = answer["tool_calls"][0]
    else:
        expected = answer["content"].strip()
        if kind == "numeric":
            expected = expected.split()[-1]
    return out | {"kind": kind, "expected": expected}


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
