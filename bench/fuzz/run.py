"""Does any mutated file of weights end in an exception that is not an error of ours, or in another verdict?

Every row of tests/fuzzing.py: structure-aware mutations of small files, opened and read in memory. Mutated safetensors
files go to the reference library, too: it must take whatever is taken here, and may take more only for listed reasons.

    python bench/fuzz/run.py [--count 1000000] [--others 50000] [--seed 1]
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import random
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "tests"))
from fuzzing import ROWS, disagreement, judge  # noqa: E402 - the table lies beside the tests


def run(format: str, count: int, seed: int) -> dict[str, Any]:
    """Figures of `count` mutations of one format."""
    rng, seeds = random.Random(seed), ROWS[format].seeds()
    verdicts: Counter[str] = Counter()
    wrong: list[str] = []
    slowest = 0.0
    start = time.process_time()
    for _ in range(count):
        content = ROWS[format].mutate(rng, rng.choice(seeds), seeds)
        before = time.process_time()
        try:
            said = judge(format, content)
        except Exception as error:  # noqa: BLE001 - that there are none is what is measured
            wrong.append(f"{type(error).__name__}: {error}; {content!r}"[:2000])
            continue
        slowest = max(slowest, time.process_time() - before)
        verdicts["read" if said is None else "refused"] += 1
        if format == "safetensors" and (against := disagreement(content, said)):
            wrong.append(f"{against}; {content!r}"[:2000])
    cpu = time.process_time() - start
    return {
        "mutations": count,
        **verdicts,
        "untyped or disagreeing": wrong,
        "cpu, s": cpu,
        "slowest file, cpu s": slowest,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--others", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    figures = {}
    for format in ROWS:
        figures[format] = run(format, options.count if format == "safetensors" else options.others, options.seed)
        print(format, {key: value for key, value in figures[format].items() if key != "untyped or disagreeing"})
        for text in figures[format]["untyped or disagreeing"][:5]:
            print("  ", text)
    (HERE / "results").mkdir(exist_ok=True)
    machine = {"cpus": os.cpu_count(), "python": platform.python_version(), "machine": platform.machine()}
    result = {"date": datetime.date.today().isoformat(), "machine": machine, "seed": options.seed, "figures": figures}
    (HERE / "results" / f"{result['date']}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
