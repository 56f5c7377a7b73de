"""Draw the loss curve and the scores during training as SVG.

    python plot.py HISTORY.json OUT.svg
"""

import json
import sys

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402

SHOWN = ["recall 24", "lookup 16", "needle 2000 x4", "copy", "add", "tools tools-call", "knowledge"]


def main(history_path, out):
    history = json.load(open(history_path, encoding="utf-8"))
    millions = [h["tokens"] / 1e6 for h in history]
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 7), sharex=True)
    top.plot(millions, [h["loss"] for h in history], label="weighted cross-entropy", lw=1)
    top.plot(millions, [h["index"] for h in history], label="indexer KL, 3 layers", lw=1)
    some = [(m, h["mtp"]) for m, h in zip(millions, history) if h["mtp"]]
    top.plot(*zip(*some), label="MTP cross-entropy", lw=1)
    top.set_yscale("log")
    top.set_ylabel("loss")
    top.legend()
    for name in SHOWN:
        points = [(m, h["scores"][name]) for m, h in zip(millions, history) if name in h.get("scores", {})]
        bottom.plot(*zip(*points), label=name, marker=".", lw=1)
    bottom.set_xlabel("million tokens")
    bottom.set_ylabel("exact answers, held out")
    bottom.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(out, metadata={"Date": None})


if __name__ == "__main__":
    main(*sys.argv[1:])
