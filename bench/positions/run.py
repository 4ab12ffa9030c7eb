"""Learned positions and class tokens under the start 'auto', beside torch's default and a start by hand, to the end.

Two blocks of attention of width 32 with 4 heads, norms before the branches. Digits are cut into 16 patches, with a
class token or a mean at the end; text is read letter by letter, 32 at a time. Positions are a parameter that starts at
0.02, as is usual, or an embedding. AdamW, a rate that rises over the first tenth and falls by a cosine; 15 epochs of
digits, 400 batches of 32 texts. Each seed gives all starts the same batches; differences are taken within seeds.

'auto before' leaves positions at 0.02 and streams at 1, as auto did. --share and --stream try other values, on seeds of
their own: so the two constants were chosen. Runs that today's result has are kept with --missing.

    python bench/positions/run.py --text moby-dick.txt [--seeds 5] [--starts auto] [--missing] [--share 1 --stream 0.1]
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import steelyard as sy
from steelyard.learn import added, auto
from steelyard.learn.intervals import student

HERE = Path(__file__).parent
WIDTH, BLOCKS, HEADS, TIME = 32, 2, 4, 32
SMALL = 0.02
CHOOSING = 100  # the first seed by which the share was chosen
EPOCHS, STEPS = 15, 400
MODELS = ("digits, class token", "digits, mean", "text, parameter", "text, embedding")
STARTS = ("torch default", "by hand", "auto before", "auto")
RATES = {"digits": (3e-3,), "text": (3e-3,)}


class Block(nn.Module):
    """Attention and a feed-forward net, each added to what by-passes it."""

    def __init__(self, causal: bool):
        super().__init__()
        self.causal = causal
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        q, k, v = self.qkv(self.norms[0](x)).view(batch, time, 3, HEADS, width // HEADS).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, time, width))
        return x + self.down(functional.gelu(self.up(self.norms[1](x))))


class Vision(nn.Module):
    """A small ViT for digits."""

    def __init__(self, token: bool):
        super().__init__()
        self.patches = nn.Conv2d(1, WIDTH, 2, 2)
        self.token = nn.Parameter(SMALL * torch.randn(1, 1, WIDTH)) if token else None
        self.positions = nn.Parameter(SMALL * torch.randn(1, 16 + token, WIDTH))
        self.blocks = nn.Sequential(*(Block(False) for _ in range(BLOCKS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        if self.token is not None:
            x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        x = self.norm(self.blocks(x + self.positions))
        return self.head(x.mean(1) if self.token is None else x[:, 0])


class Letters(nn.Module):
    """A small transformer that guesses the next letter."""

    def __init__(self, letters: int, embedded: bool):
        super().__init__()
        self.embed = nn.Embedding(letters, WIDTH)
        self.table = nn.Embedding(TIME, WIDTH) if embedded else None
        self.positions = None if embedded else nn.Parameter(SMALL * torch.randn(TIME, WIDTH))
        self.blocks = nn.Sequential(*(Block(True) for _ in range(BLOCKS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, letters)

    def forward(self, x: Tensor) -> Tensor:
        places = self.positions if self.table is None else self.table(torch.arange(x.shape[1]))
        return self.head(self.norm(self.blocks(self.embed(x) + places)))


def by_hand(model: nn.Module) -> None:
    """As ViTs and GPT-2 are usually started: everything normal, of standard deviation 0.02."""
    for layer in model.modules():
        if isinstance(layer, (nn.Linear, nn.Embedding)):
            nn.init.trunc_normal_(layer.weight, std=SMALL)
        if isinstance(layer, nn.Linear):
            nn.init.zeros_(layer.bias)


def started(model: nn.Module, start: str, x: Tensor, seed: int) -> str:
    """What kept it from being proved, if anything did."""
    if start == "by hand":
        by_hand(model)
    elif start.startswith("auto"):
        kept = added.SHARE, auto.STREAM
        words = start.split()
        share, stream = (SMALL, 1.0) if start == "auto before" else map(float, words[1:]) if words[1:] else kept
        added.SHARE, auto.SHARE, auto.STREAM = share, share, stream
        try:
            return str(sy.init_(model, "auto", x, seed=seed).meta.get("not proved because", ""))
        finally:
            added.SHARE, auto.SHARE, auto.STREAM = kept[0], *kept
    return ""


def rate_at(done: float, rate: float) -> float:
    return rate * (done / 0.1 if done < 0.1 else (1 + math.cos(math.pi * (done - 0.1) / 0.9)) / 2)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, rate: float) -> None:
    optimizer.param_groups[0]["lr"] = rate
    optimizer.zero_grad()
    functional.cross_entropy(model(x).flatten(0, -2), y.flatten()).backward()
    optimizer.step()


class Digits:
    """Accuracy on the test images."""

    def __init__(self) -> None:
        task = sy.task("digits", augment=False)
        self.parts = {}
        for split in ("train", "test"):
            batches = list(task.batches(split, 0))
            self.parts[split] = torch.cat([b.inputs for b in batches]), torch.cat([b.targets for b in batches])

    def run(self, model: str, start: str, rate: float, seed: int) -> tuple[float, str]:
        x, y = self.parts["train"]
        torch.manual_seed(seed)
        net = Vision("token" in model)
        unproved = started(net, start, x[:256], seed)
        optimizer, order = torch.optim.AdamW(net.parameters()), torch.Generator().manual_seed(seed)
        batches = [rows for _ in range(EPOCHS) for rows in torch.randperm(len(x), generator=order).split(64)]
        for i, rows in enumerate(batches):
            step(net, optimizer, x[rows], y[rows], rate_at(i / len(batches), rate))
        with torch.no_grad():
            x, y = self.parts["test"]
            return 100 * float((net(x).argmax(1) == y).double().mean()), unproved


class Text:
    """Loss on a part of the text that is not trained on, in nats a letter."""

    def __init__(self, path: Path):
        text = path.read_text()[:400_000]
        self.letters = sorted(set(text))
        number = {letter: i for i, letter in enumerate(self.letters)}
        found = torch.tensor([number[letter] for letter in text])
        self.train, self.test = found[:360_000], found[360_000:]

    def windows(self, source: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        rows = torch.stack([source[i : i + TIME + 1] for i in starts.tolist()])
        return rows[:, :-1], rows[:, 1:]

    def run(self, model: str, start: str, rate: float, seed: int) -> tuple[float, str]:
        torch.manual_seed(seed)
        net = Letters(len(self.letters), "embedding" in model)
        chance = torch.Generator().manual_seed(seed)
        starts = torch.randint(0, len(self.train) - TIME, (STEPS, 32), generator=chance)
        unproved = started(net, start, self.windows(self.train, starts[0])[0], seed)
        optimizer = torch.optim.AdamW(net.parameters())
        for i, rows in enumerate(starts):
            step(net, optimizer, *self.windows(self.train, rows), rate_at(i / STEPS, rate))
        with torch.no_grad():
            x, y = self.windows(self.test, torch.arange(0, len(self.test) - TIME, TIME)[:500])
            return float(functional.cross_entropy(net(x).flatten(0, 1), y.flatten())), unproved


def figures(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means with intervals of 95 %, and the differences to torch's default within seeds: positive is better."""
    table = []
    for model, rate in dict.fromkeys((row["model"], row["rate"]) for row in rows):
        mine = [row for row in rows if row["model"] == model and row["rate"] == rate]
        by = {(row["start"], row["seed"]): row["result"] for row in mine}
        for start in dict.fromkeys(row["start"] for row in mine):
            seeds = sorted(seed for found, seed in by if found == start)
            values = np.array([by[start, seed] for seed in seeds])
            line: dict[str, Any] = {"model": model, "rate": rate, "start": start, "runs": len(seeds)}
            line["mean"] = round(float(values.mean()), 4)
            sign = -1 if model.startswith("text") else 1
            base = np.array([by.get(("torch default", seed), math.nan) for seed in seeds])
            if start != "torch default" and len(seeds) > 1 and not np.isnan(base).any():
                better = sign * (values - base)
                low, high = student(better)
                line |= {"better by": round(float(better.mean()), 4), "low": round(low, 4), "high": round(high, 4)}
            line["not proved"] = sum(bool(row["not proved"]) for row in mine if row["start"] == start)
            table.append(line)
    return table


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=list(STARTS))
    parser.add_argument("--missing", action="store_true", help="only the runs that today's result lacks")
    parser.add_argument("--share", type=float, help="of positions: on other seeds, beside torch's default")
    parser.add_argument("--stream", type=float, help="the same of the scale of streams")
    told = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    data: dict[str, Digits | Text] = {"digits": Digits(), "text": Text(told.text)}
    starts, first, trying = told.starts, 0, told.share is not None or told.stream is not None
    if trying:
        values = [given if given is not None else ours
                  for given, ours in ((told.share, added.SHARE), (told.stream, auto.STREAM))]  # fmt: skip
        starts, first = ["torch default", "auto {} {}".format(*values)], CHOOSING
    machine = {"cpus": os.cpu_count(), "python": platform.python_version(), "torch": str(torch.__version__)}
    result: dict[str, Any] = {"date": datetime.date.today().isoformat(), "machine": machine}
    path = HERE / "results" / f"{result['date']}{'-chosen' if trying else ''}.json"
    path.parent.mkdir(exist_ok=True)
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []
    run: Callable[..., tuple[float, str]]
    for model in told.models:
        run = data[model.split(",")[0]].run
        for rate in RATES[model.split(",")[0]]:
            for seed in range(first, first + told.seeds):
                for start in starts:
                    key = {"model": model, "rate": rate, "seed": seed, "start": start}
                    old = [row for row in rows if key.items() <= row.items()]
                    if old and told.missing:
                        continue
                    value, unproved = run(model, start, rate, seed)
                    rows = [row for row in rows if row not in old]
                    rows.append({**key, "result": round(value, 4), "not proved": unproved})
                    print(rows[-1], flush=True)
                    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
                    head = json.dumps(result | {"figures": figures(rows)}, indent=1)[:-2]
                    path.write_text(f'{head},\n "rows": [\n{lines}\n ]\n}}\n')
    for line in figures(rows):
        print(line)


if __name__ == "__main__":
    main()
