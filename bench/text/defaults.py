"""What the defaults of `steelyard train text` are worth: positions and batch size, for the same passes over a text.

The first 400,000 characters of the bundled novel, 85 % of them to train, windows of 128, the models' own sizes, the
rate of `steelyard train`; bits per character of the last 10 % of these characters, which run.py has for training.

    python bench/text/defaults.py [--epochs 2] [--seeds 2] [--only rnn transformer]
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import steelyard as sy
from steelyard.learn.seeding import seeded
from steelyard.learn.tasks.text import bundled

HERE = Path(__file__).parent
CHARACTERS, CONTEXT, RATE = 400_000, 128, 3e-3
RECIPES: list[tuple[str, dict[str, Any], int]] = [
    ("transformer", {"positions": "learned"}, 32),
    ("transformer", {"positions": "learned"}, 8),
    ("transformer", {"positions": "rotary"}, 32),
    ("transformer", {"positions": "rotary"}, 8),
    ("rnn", {}, 32),
    ("rnn", {}, 8),
]


def trained(path: str, name: str, options: dict[str, Any], batch: int, epochs: int, seed: int) -> dict[str, Any]:
    task = sy.task(f"text:{path}", model=name, context=CONTEXT, batch_size=batch, seed=seed)
    with seeded(seed):
        model = sy.model(name, task.interface, **options)
    began = time.process_time()
    run = sy.train(task, model, rate=RATE, epochs=epochs, clip=1.0, seed=seed, progress=False)
    seconds = time.process_time() - began
    bits = next(r["value"] for r in sy.evaluate(run.model, task).rows if r["metric"] == "bits per character")
    told = {"model": name, **options, "batch": batch, "epochs": epochs, "seed": seed}
    return told | {"bits per character": round(bits, 4), "CPU seconds": round(seconds, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--only", nargs="+", default=["rnn", "transformer"])
    given = parser.parse_args()
    torch.set_num_threads(1)
    result = HERE / "results" / f"{datetime.date.today()}-defaults.json"
    rows = json.loads(result.read_text())["rows"] if result.exists() else []
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/part.txt"
        Path(path).write_text(bundled()[:CHARACTERS])
        for seed in range(given.seeds):
            for name, options, batch in RECIPES:
                if name in given.only:
                    rows.append(trained(path, name, options, batch, given.epochs, seed))
                    print(rows[-1], flush=True)
    told = {"characters": CHARACTERS, "context": CONTEXT, "rate": RATE}
    told |= {"torch": torch.__version__, "python": platform.python_version()}
    result.write_text(json.dumps(told | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
