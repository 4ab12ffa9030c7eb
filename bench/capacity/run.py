"""How well norms, margins and sharpness rank the gap between seen and unseen, over sets of 30 trained nets.

The nets are those of claim D7: MLPs of random width, depth, rate, batch and weight decay on 200 digits, with a random
share of wrong labels up to 40 % each, and, in a second study, with right labels only, where nothing but the choice of
the net and its training tells the gaps apart. Kendall's tau of each measure with the gap in accuracy and in loss: the
mean over the sets with Student's interval. What chance gives is measured, too: the gaps shuffled.

    python bench/capacity/run.py [--sets 5]
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from steelyard.claims.d_capacity import MODELS, WRONG, measured
from steelyard.core.table import Table
from steelyard.explain.capacity import rank_gaps
from steelyard.learn.intervals import student

HERE = Path(__file__).parent
GAPS = ("gap in accuracy", "gap in loss")


def shuffled(tables: list[Table], random: np.random.Generator) -> list[Table]:
    """The tables with their gaps in another order."""
    order = random.permutation(len(tables))
    found = []
    for table, other in zip(tables, order, strict=True):
        gaps = {r["measure"]: r["value"] for r in tables[other].rows if r["family"] == "gap"}
        found.append(replace(table, rows=tuple({**r, "value": gaps.get(r["measure"], r["value"])} for r in table.rows)))
    return found


def study(sets: int, wrong: float) -> dict[str, Any]:
    taus: dict[str, dict[str, list[float]]] = {gap: {} for gap in (*GAPS, "shuffled")}
    gaps: list[float] = []
    start = time.process_time()
    for number in range(sets):
        tables = [measured(1000 * number + i, wrong) for i in range(MODELS)]
        gaps += [float(r["value"]) for t in tables for r in t.rows if r["measure"] == GAPS[0]]
        ranked = {gap: rank_gaps(tables, gap) for gap in GAPS}
        ranked["shuffled"] = rank_gaps(shuffled(tables, np.random.default_rng(number)))
        for gap, table in ranked.items():
            for row in table.rows:
                taus[gap].setdefault(str(row["measure"]), []).append(float(row["tau"]))
    found: dict[str, Any] = {"seconds for a set": (time.process_time() - start) / sets}
    found["quantiles of the gap in accuracy"] = np.quantile(gaps, [0, 0.25, 0.5, 0.75, 1]).round(3).tolist()
    for gap, by_measure in taus.items():
        found[gap] = {
            name: [round(float(x), 3) for x in (np.mean(values), *student(np.array(values)))]
            for name, values in by_measure.items()
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sets", type=int, default=5, help="of 30 nets")
    given = parser.parse_args()
    torch.set_num_threads(1)
    figures = {"labels wrong": study(given.sets, WRONG), "labels right": study(given.sets, 0.0)}
    for name, found in figures.items():
        print(name, {k: v for k, v in found.items() if k not in (*GAPS, "shuffled")})
        for measure in found[GAPS[0]]:
            print(f"  {measure:30}", *(found[gap][measure] for gap in (*GAPS, "shuffled")))
    machine = {"cpus": os.cpu_count(), "python": platform.python_version(), "machine": platform.machine()}
    date = datetime.date.today().isoformat()
    result = {"date": date, "machine": machine, "sets": given.sets, "models": MODELS, "figures": figures}
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / f"{date}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
