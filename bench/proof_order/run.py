"""In which order should `shrink` ask its proof? Searches and proofs are drawn again and again from kept outcomes.

    python bench/proof_order/run.py --data FOLDER --work FOLDER [--splits 1 2] [--draws 30] [--epochs 30]

Each net of bench/promise/real.py is trained once for each split; all its sizes, what it becomes by training for size
and the files of single methods (bench/shrink_peers/singles.py) are measured once on 7,000 examples that neither
trained nor chose anything. A draw takes 600 of them to validate and 1,000 to prove, with replacement, so that the 7,000
are the truth; looks, chances and orders are those of the search. What was trained is the same in all draws of a net:
which prices were tried is not drawn anew.

Looks + prices + proofs are the nine evaluations of twelve that are free. "In error" asks no order, and errs.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import steelyard as sy
from steelyard.errors import ModelError
from steelyard.formats.module import from_module
from steelyard.shrinking.budget import Budget
from steelyard.shrinking.journal import Journal
from steelyard.shrinking.order import LEAST, SURE, Chain, Step, accepted, chances, evidence, middle, ordered, planned
from steelyard.shrinking.promise import Promise
from steelyard.shrinking.search import SIZES, Search, held_bytes

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "promise"), str(HERE.parent / "shrink_peers")]

import real  # noqa: E402
import singles  # noqa: E402

SEEN, PROOF, POOL = 600, 1000, 7000
LARGEST, SMALLEST = 6, 43  # of the sizes that are kept, beside the first
PROMISE = Promise(0.02)
Net = dict[str, Any]
Drawn = dict[str, np.ndarray]  # (candidates, 4): lost and gained in validation, and in the proof
Found = tuple[float, float]  # bytes, and what is lost in truth


def outcomes(name: str, split: int, told: argparse.Namespace, data: Any, build: Callable[[], nn.Module]) -> Net | None:
    """How every candidate of a net does on each example of the pool; None: the search refuses the net."""
    x, y = data[name.partition(",")[0]]
    given, _ = real.tasks(name, build, x, y, split)
    mixed = torch.randperm(len(x), generator=torch.Generator().manual_seed(split))
    pool = mixed[sum(real.SIZES.values()) - real.SIZES["test"] :][:POOL]
    model = sy.train(given, epochs=24 if name.startswith("table") else 6, seed=split, progress=False).model
    original, student = from_module(model).settle(), given.build()

    def right(weights: sy.Weights) -> np.ndarray:
        sy.into_module(weights, student)
        student.eval()
        with torch.no_grad():
            return np.concatenate([(student(x[i]).argmax(1) == y[i]).numpy() for i in pool.split(1000)])

    def lost(candidates: Iterable[sy.Weights]) -> np.ndarray:
        return np.stack([before.astype(np.int8) - right(weights) for weights in candidates])

    before = right(original)
    budget = Budget.of(12, training=bool(told.epochs))
    search = Search(model, given, original, PROMISE, Journal(None, {}), split, lambda *_: None, budget)
    try:
        search.precondition()
    except ModelError:
        return None
    search.plan(told.epochs)
    at = [0, *range(LARGEST, SMALLEST + 1)]
    sizes = [search.size(i) for i in at]
    if told.epochs:
        search.trained(told.epochs)
    files = [(method, singles._written(singles.chain(singles.vectors_halved(), step)(original)))
             for method, grid in singles.grids(model, given).items() for step in grid.values()]  # fmt: skip
    written = [(method, *file) for method, file in files if file is not None]
    every = {"sizes": sizes, "trained": search.others}
    net: Net = {
        "whole": sum(map(held_bytes, original.values())),
        "at": at,
        "method": [method for method, *_ in written],
    }
    net |= {f"{kind} bytes": [found.bytes for found in kept] for kind, kept in every.items()}
    net |= {f"{kind} lost": lost(found.weights for found in kept) for kind, kept in every.items() if kept}
    net |= {"single bytes": [size for _, size, _ in written], "single lost": lost(read for *_, read in written)}
    # of a file that holds what `ratedistortion` made: its header, as ours has one
    held = [size - sum(map(held_bytes, read.values())) for method, size, read in written if method == "ratedistortion"]
    return net | {"head": float(np.median(held))}


def kept(place: Path, made: Callable[[], Net | None]) -> Net | None:
    """What an earlier call has measured, or a new one."""
    if not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(place, **(made() or {}))
    with np.load(place) as file:
        return dict(file) or None


def drawn(net: Net, random: np.random.Generator) -> Drawn:
    """The counts of a draw."""
    sets = [random.integers(0, POOL, count) for count in (SEEN, PROOF)]
    parts = {kind: [net[f"{kind} lost"][:, rows] for rows in sets] for kind in ("sizes", "trained", "single")
             if f"{kind} lost" in net}  # fmt: skip
    return {kind: np.stack([(part == sign).sum(1) for part in found for sign in (1, -1)], 1)
            for kind, found in parts.items()}  # fmt: skip


@cache
def chance(mean: float, variance: float, share: float) -> float:
    """Of a proof that may spend a share of the error."""
    return Promise(0.02, 1 - 0.05 * share).chance(mean, variance, SEEN, PROOF, shares=True)


@cache
def holds(lost: int, gained: int, share: float) -> bool:
    """Whether so many of the proof examples prove it."""
    return Promise(0.02, 1 - 0.05 * share).kept(np.repeat([1.0, -1.0, 0.0], [lost, gained, PROOF - lost - gained]))


class Case:
    """A draw of a net, as a search meets it."""

    def __init__(self, net: Net, draw: Drawn, looks: int, prices: int):
        self.net, self.draw = net, draw
        self.place = {int(index): k for k, index in enumerate(net["at"])}
        self.prices = min(prices, len(net["trained bytes"]))
        self.seen: dict[int, tuple[float, float]] = {}
        low, high = -1, len(SIZES)
        while high - low > 1 and len(self.seen) < looks:
            at = min(max(middle(low, high), LARGEST), SMALLEST)
            if at in self.seen:
                break
            self.seen[at] = self.evidence("sizes", self.place[at])
            low, high = (at, high) if chance(*self.seen[at], 1.0) >= 0.5 else (low, at)
        if low < 0:
            self.seen[0] = self.evidence("sizes", 0)

    def evidence(self, kind: str, k: int) -> tuple[float, float]:
        """By the validation examples."""
        lost, gained = self.draw[kind][k, :2]
        return evidence(np.repeat([1.0, -1.0, 0.0], [lost, gained, SEEN - lost - gained]), shares=True)

    def steps(self, share: float) -> list[Step]:
        """As `Search.steps`."""
        found = chances(SIZES, self.seen, lambda mean, variance: chance(mean, variance, share))
        steps = [Step(float(self.net["sizes bytes"][k]), found[i], i, False, i in self.seen)
                 for i, k in self.place.items()]  # fmt: skip
        return steps + [Step(float(self.net["trained bytes"][k]), chance(*self.evidence("trained", k), share), k, True)
                        for k in range(self.prices)]  # fmt: skip

    def one(self, most: int, share: float = 1.0) -> Chain:
        """The order that begins with what is sure."""
        steps = [step for step in self.steps(share) if step.trained or step.chance >= LEAST or not step.index]
        first = [s for s in steps if (not s.index and not s.trained) or (s.measured and s.chance >= SURE)]
        return Chain(ordered(steps, first, most, float(self.net["whole"])), share)

    def halves(self, most: int, share: float) -> list[Chain]:
        """What was trained, by a share of the error; then what was rounded, by the rest, or by all if all held."""
        steps = [step for step in self.steps(share) if step.trained]
        size = float(self.net["sizes bytes"][0])
        found = [Chain(ordered(steps, steps, most - 1, size), share)] if steps else []
        rest = [step for step in self.steps(1 - share) if not step.trained and (step.chance >= LEAST or not step.index)]
        return [*found, Chain(ordered(rest, rest[:1], most - 1, float(self.net["whole"])), 1 - share)]

    def holds(self, step: Step, share: float) -> bool:
        """By the proof examples."""
        kind, k = ("trained", step.index) if step.trained else ("sizes", self.place[step.index])
        return holds(*self.draw[kind][k, 2:].tolist(), share)

    def smallest(self, steps: Iterable[Step]) -> Found:
        """Of the steps that hold; the original, where there is none."""
        best = min(steps, key=lambda step: step.bytes, default=None)
        if best is None:
            return float(self.net["whole"]), 0.0
        kind, k = ("trained", best.index) if best.trained else ("sizes", self.place[best.index])
        return best.bytes + float(self.net["head"]), float(self.net[f"{kind} lost"][k].mean())

    def single(self) -> Found:
        """The best of the single methods, each proven from its finest on: as if it had been known."""
        best, over = (math.inf, 0.0), set()
        for k, method in enumerate(self.net["method"]):
            if method not in over:
                if holds(*self.draw["single"][k, 2:].tolist(), 1.0):
                    best = min(best, (float(self.net["single bytes"][k]), float(self.net["single lost"][k].mean())))
                else:
                    over.add(method)
        return best


def ways(training: bool) -> Mapping[str, tuple[int, int, Callable[[Case], Found]]]:
    """By name: looks, prices, and what is found."""
    looks, prices, proofs = (2, 4, 3) if training else (4, 0, 5)

    def one(most: int, share: float = 1.0) -> Callable[[Case], Found]:
        return lambda case: case.smallest(accepted([case.one(most, share)], case.holds))

    def two(most: int) -> Callable[[Case], Found]:
        return lambda case: case.smallest(accepted(planned(case.steps, most, float(case.net["whole"])), case.holds))

    def halves(share: float) -> Callable[[Case], Found]:
        return lambda case: case.smallest(accepted(case.halves(proofs, share), case.holds))

    found = {f"one order, {looks}+{prices}+{proofs}": (looks, prices, one(proofs))}
    found[f"as the search, {looks}+{prices}+{proofs}"] = looks, prices, two(proofs)
    for other in ((2, 3, 4), (1, 4, 4), (2, 4, 5)) if training else ((3, 0, 6), (2, 0, 7), (4, 0, 9)):
        found[f"as the search, {'+'.join(map(str, other))}"] = *other[:2], two(other[2])
    if training:
        for share in (0.95, 0.8, 0.5):
            found[f"{share:.0%} for trained, the rest for rounded"] = looks, prices, halves(share)
    for share in (0.8, 0.5):
        found[f"one order, {share:.0%} of the error"] = looks, prices, one(proofs, share)
    found["in error, any of one order"] = (
        looks,
        prices,
        lambda case: case.smallest(step for step in case.one(proofs).steps if case.holds(step, 1.0)),
    )
    return found


def compared(nets: Mapping[str, Net], told: argparse.Namespace) -> dict[str, Any]:
    """Each way over all nets and draws: bytes beside those of the first way, and how it does beside single methods."""
    table: dict[str, list[list[tuple[float, bool, bool, bool]]]] = {}
    for net in nets.values():
        random = np.random.default_rng(told.seed)
        rows: dict[str, list[tuple[float, bool, bool, bool]]] = {}
        for _ in range(told.draws):
            draw = drawn(net, random)
            cases: dict[tuple[int, int], Case] = {}
            for name, (looks, prices, found) in ways(bool(told.epochs)).items():
                case = cases.setdefault((looks, prices), Case(net, draw, looks, prices))
                size, lost = found(case)
                row = math.log(size), size < case.single()[0], lost > PROMISE.tolerance, size == net["whole"]
                rows.setdefault(name, []).append(row)
        for name, drawings in rows.items():
            table.setdefault(name, []).append(drawings)
    first = np.array(next(iter(table.values())), float)[..., 0]
    result = {}
    for name, way in table.items():
        values = np.array(way, float)  # (nets, draws, 4)
        beside = (values[..., 0] - first).mean(1)
        result[name] = {"bytes": math.exp(beside.mean()), "error": float(beside.std(ddof=1)) / math.sqrt(len(beside))}
        result[name] |= dict(zip(("smaller than the best single", "broken", "nothing"),
                                 values[..., 1:].mean((0, 1)).tolist(), strict=True))  # fmt: skip
    return result


def main() -> None:
    """Print a row for each way, and write all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("data", "work"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    for name, default in (("draws", 30), ("epochs", 30), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--splits", type=int, nargs="+", default=[1, 2])
    told = parser.parse_args()
    torch.set_num_threads(1)
    data = real.sources(told.data)
    kinds = real.models(data["table"][0].shape[1], int(data["text"][1].max()) + 1)
    nets = {}
    for split in told.splits:
        for name, build in kinds.items():
            file = told.work / f"{split}-{told.epochs}" / f"{name.replace(', ', '-').replace(' ', '-')}.npz"
            net = kept(file, lambda n=name, s=split, b=build: outcomes(n, s, told, data, b))
            if net is not None:
                nets[f"{split} {name}"] = net
    found = compared(nets, told)
    for name, row in found.items():
        print(name.ljust(44), {key: round(value, 4) for key, value in row.items()})
    said = {"told": {k: v for k, v in vars(told).items() if k in ("draws", "epochs", "seed", "splits")}}
    place = HERE / "results" / f"{date.today()}-epochs{told.epochs}.json"
    place.write_text(json.dumps({**said, "nets": len(nets), "ways": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
