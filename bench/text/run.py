"""Bits per character of language models on the last tenth of a novel, beside compressors and counts of characters.

The bundled text, 1.19 million characters: 85 % to train, 5 % to choose the epoch, the last 10 % to measure, every
character once, from at least three quarters of the context before it; 95 % intervals by a bootstrap of blocks. One
thread; the CPU seconds are those of training with its measurements. Beside them, for the same characters:

- the interpolated Kneser-Ney estimate of order 5 (Kneser & Ney 1995; discounts n1 / (n1 + 2 n2) of each order), counted
  on the 90 % before;
- xz (preset 9e), bz2 (9) and PPMd (variant H; order 6, 64 MB; `pyppmd`, if installed): bits that the last tenth adds to
  the compressed text before it. Compressors go on learning while they read, models do not.

    pip install --target peer pyppmd==1.3.1
    python bench/text/run.py [--peer peer] [--only rnn transformer baselines] [--seeds 1]

Rows are added to those of today's result, so that it can be made in parts.
"""

from __future__ import annotations

import argparse
import bz2
import datetime
import json
import lzma
import math
import platform
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

import steelyard as sy
from steelyard.learn.intervals import blocks
from steelyard.learn.seeding import seeded

HERE = Path(__file__).parent
CONTEXT = 64
MODELS: dict[str, dict[str, Any]] = {
    "rnn": {"model": {"hidden": 192, "dropout": 0.1}, "batch": 16, "epochs": 5, "rate": 4e-3},
    "transformer": {
        "model": {"width": 96, "layers": 2, "positions": "rotary", "tied": True},
        "batch": 16,
        "epochs": 2,
        "rate": 4e-3,
    },
}


def trained(name: str, seed: int) -> dict[str, Any]:
    """One training by its recipe, and the table of its test."""
    told = MODELS[name]
    task = sy.task("text", model=name, context=CONTEXT, batch_size=told["batch"], seed=seed)
    with seeded(seed):
        model = sy.model(name, task.interface, **told["model"])
    began = time.process_time()
    run = sy.train(task, model, rate=told["rate"], epochs=told["epochs"], clip=1.0, seed=seed, progress=False)
    seconds = time.process_time() - began
    row = next(r for r in sy.evaluate(run.model, task).rows if r["metric"] == "bits per character")
    prompt = "The whale "
    return {
        "what": name,
        **told,
        "seed": seed,
        "parameters": sum(p.numel() for p in model.parameters()),
        "bits per character": row["value"],
        "low": row["low"],
        "high": row["high"],
        "CPU seconds": round(seconds, 1),
        "epochs seen": run.epoch_log,
        "drawn": prompt + sy.sample(run.model, task, prompt, length=300, temperature=0.7, seed=seed),
    }


def compressors(before: str, rest: str, peer: str) -> list[dict[str, Any]]:
    """The bits that the rest adds to the compressed text before it."""
    found = {
        "xz": lambda data: len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)),
        "bz2": lambda data: len(bz2.compress(data, 9)),
    }
    if peer:
        sys.path.insert(0, peer)
        import pyppmd

        found["PPMd"] = lambda data: len(pyppmd.compress(data, max_order=6, mem_size=64 << 20))
    whole, first = (before + rest).encode(), before.encode()
    return [{"what": name, "bits per character": 8 * (size(whole) - size(first)) / len(rest),
             "of the whole text": 8 * size(whole) / len(before + rest)} for name, size in found.items()]  # fmt: skip


def kneser_ney(before: str, rest: str, order: int) -> np.ndarray:
    """Bits of each character of the rest, by interpolated Kneser-Ney counts of the text before it."""
    counts: list[dict[str, dict[str, int]]] = [defaultdict(lambda: defaultdict(int)) for _ in range(order)]
    for i in range(order - 1, len(before)):
        counts[order - 1][before[i - order + 1 : i]][before[i]] += 1
    for n in range(order - 1, 0, -1):  # in how many contexts, one character longer, does the pair occur
        for context, after in counts[n].items():
            for character in after:
                counts[n - 1][context[1:]][character] += 1
    discounts = []
    for level in counts:
        ones, twos = (sum(v == k for after in level.values() for v in after.values()) for k in (1, 2))
        discounts.append(ones / (ones + 2 * twos) if ones else 0.5)
    known = len(set(before)) + 1

    def probability(context: str, character: str) -> float:
        found = 1 / known
        for n in range(order):
            after = counts[n].get(context[len(context) - n :] if n else "")
            if after is None:
                break
            total, d = sum(after.values()), discounts[n]
            found = (max(after.get(character, 0) - d, 0) + d * len(after) * found) / total
        return found

    text = before[-order:] + rest
    return np.array([-math.log2(probability(text[i - order + 1 : i], text[i])) for i in range(order, len(text))])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", default="", help="folder with pyppmd")
    parser.add_argument("--only", nargs="+", default=["baselines", *MODELS])
    parser.add_argument("--seeds", type=int, default=1)
    told = parser.parse_args()
    torch.set_num_threads(1)
    path = HERE / "results" / f"{datetime.date.today()}.json"
    result = json.loads(path.read_text()) if path.exists() else {"rows": []}
    result |= {"context": CONTEXT, "torch": torch.__version__, "python": platform.python_version()}
    rows = result["rows"]
    task = sy.task("text", context=CONTEXT)
    code, test = task.batches.code, task.about["characters"]["test"]
    text = "".join(task.classes[i] for i in code)
    result["characters"] = task.about["characters"]
    if "baselines" in told.only:
        rows += compressors(text[:-test], text[-test:], told.peer)
        for order in (5, 7):
            bits = kneser_ney(text[:-test], text[-test:], order)
            low, high = blocks(bits.reshape(-1, CONTEXT // 4).mean(1))
            rows.append({"what": f"Kneser-Ney, order {order}", "bits per character": float(bits.mean())})
            rows[-1] |= {"low": low, "high": high}
        rows.append({"what": "frequencies of characters", "bits per character": task.baselines["bits per character"]})
    for name in MODELS:
        for seed in range(told.seeds if name in told.only else 0):
            rows.append(trained(name, seed))
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(result, indent=1) + "\n")
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    for row in rows:
        interval = f" ({row['low']:.3f} to {row['high']:.3f})" if "low" in row else ""
        print(f"{row['what']}: {row['bits per character']:.3f}{interval} {row.get('CPU seconds', '')}")


if __name__ == "__main__":
    main()
