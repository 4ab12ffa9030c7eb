"""What a Run costs over the bare loop in torch: zero_grad, loss, backward, step, loss.item().

Both train the same start on the same batches with the same optimizer; processor seconds of one thread, in pairs one
after the other, the order changing. A transformer of 19 million weights and a fully connected net of 100,000.

    python bench/run_overhead/run.py [--repeats 9]
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from steelyard.learn.data import Examples
from steelyard.learn.measures import accuracy, cross_entropy
from steelyard.learn.models import model
from steelyard.learn.optimizers import optimizer_for
from steelyard.learn.run import Run
from steelyard.learn.task import Batch, Interface, Split, Task, build_seeded

HERE = Path(__file__).parent


def task_of(kind: str) -> Task:
    """Random data: only the time matters."""
    random = torch.Generator().manual_seed(0)
    if kind == "mlp":
        interface, size = Interface((784,), 10), 64
        inputs, targets = torch.randn(6400, 784, generator=random), torch.randint(10, (6400,), generator=random)
        options: dict[str, Any] = {"widths": (110, 100)}
    else:
        interface, size = Interface((64,), 128, vocabulary=128), 4
        inputs = torch.randint(128, (16, 64), generator=random)
        targets = inputs.roll(-1, 1)
        options = {"width": 512, "layers": 6, "heads": 8}
    data = Examples({"train": inputs}, {"train": targets}, size, 0)

    def batches(split: Split, epoch: int) -> Iterable[Batch]:
        return data(split, epoch) if split == "train" else ()

    task = Task(kind, lambda: model(kind, interface, **options), data, cross_entropy, {"accuracy": accuracy}, interface)
    return replace(task, batches=batches)


def bare(task: Task, epochs: int) -> float:
    """Processor seconds of the loop that everybody writes."""
    net = build_seeded(task, 0)
    optimizer = optimizer_for(net, "adamw", 1e-3, 0.01)
    net.train()
    start = time.process_time()
    for epoch in range(epochs):
        for batch in task.batches("train", epoch):
            optimizer.zero_grad()
            outputs = net(batch.inputs)
            loss = nn.functional.cross_entropy(outputs.flatten(0, -2), batch.targets.flatten())
            loss.backward()
            optimizer.step()
            loss.item()
    return time.process_time() - start


def ours(task: Task, epochs: int) -> float:
    """Processor seconds of the same steps in a Run."""
    run = Run(task, build_seeded(task, 0), rate=1e-3, epochs=epochs, schedule="constant", keep="last")
    start = time.process_time()
    for _ in run:
        pass
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=9)
    told = parser.parse_args()
    torch.set_num_threads(1)
    figures: dict[str, Any] = {}
    pairs: dict[str, Any] = {}
    for kind, epochs in (("mlp", 3), ("transformer", 1)):
        task = task_of(kind)
        steps = epochs * len(list(task.batches("train", 0)))
        bare(task, 1), ours(task, 1)
        found = []
        for i in range(told.repeats):
            order = (bare, ours) if i % 2 else (ours, bare)
            times = {work.__name__: work(task, epochs) for work in order}
            found.append((times["bare"], times["ours"]))
        ratios = [b / a for a, b in found]
        pairs[kind] = found
        figures[f"{kind}: weights"] = sum(p.numel() for p in build_seeded(task, 0).parameters())
        figures[f"{kind}: overhead, %"] = round(100 * (statistics.median(ratios) - 1), 2)
        figures[f"{kind}: overhead, lowest and highest, %"] = [round(100 * (f(ratios) - 1), 1) for f in (min, max)]
        figures[f"{kind}: bare, ms a step"] = round(1e3 * statistics.median(a for a, _ in found) / steps, 3)
        print({k: v for k, v in figures.items() if k.startswith(kind)}, flush=True)
    (HERE / "results").mkdir(exist_ok=True)
    machine = {"cpus": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__}
    result = {"date": datetime.date.today().isoformat(), "machine": machine, "figures": figures, "seconds": pairs}
    (HERE / "results" / f"{result['date']}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
