"""Chapter B, the steps of learning: each goes downhill, they go on after a kill, and their length is found."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from steelyard.claims.check import Bar, Check
from steelyard.claims.material import digits
from steelyard.errors import ModelError
from steelyard.learn.data import Examples
from steelyard.learn.evaluate import outcomes
from steelyard.learn.rate import find_lr
from steelyard.learn.run import Run, train
from steelyard.learn.seeding import generator
from steelyard.learn.state import tensors_of
from steelyard.learn.task import SPLITS, Task, build_seeded, objective

EPOCHS = 6


def _downhill() -> Mapping[str, float]:
    task, found, every = digits(), {}, []
    for optimizer in ("sgd", "adam", "adamw", "rmsprop"):
        rate = find_lr(None, task, optimizer, epochs=EPOCHS, effort="quick").meta["rate"]
        lower = []
        with Run(task, optimizer=optimizer, rate=rate, epochs=EPOCHS) as run:
            for step in run:
                with torch.no_grad():
                    again = float(objective(task, run.model(step.batch.inputs), step.batch))
                lower.append(again < step.loss)
        found[optimizer] = sum(lower) / len(lower)
        every += lower
    return {"share of steps": sum(every) / len(every), "steps": len(every)} | found


B3 = Check(
    "B3",
    "and gradient descent",
    "an MLP on digits, four optimizers at the rate that find_lr proposes: the loss of the same batch after each step",
    (Bar("share of steps", ">=", 0.9),),
    _downhill,
)


class Killed(BaseException):
    """Stands for the end of a process: nothing that comes after it is run."""


def _resumed() -> Mapping[str, float]:
    task = digits(model="cnn")
    options: dict[str, Any] = {"epochs": 2, "optimizer": "adamw", "seed": 3}
    whole = train(task, progress=False, **options)
    apart = 0
    kills = [5, 17, 23]
    with tempfile.TemporaryDirectory() as folder:
        options |= {"checkpoint": Path(folder) / "run", "every": 4, "resume": True}
        for kill in kills:

            def end(run: Run, kill: int = kill) -> None:
                if len(run.log) == kill:
                    raise Killed

            try:
                train(task, progress=end, **options)
            except Killed:
                random.seed(), np.random.seed(), torch.seed()  # a new process begins with other generators
        parts = train(task, progress=False, **options)
    for name, tensor in tensors_of(whole.model).items():
        apart += int((tensor.view(torch.uint8) != tensors_of(parts.model)[name].view(torch.uint8)).sum())
    moments = _moments(whole.optimizer), _moments(parts.optimizer)
    apart += sum(a != b for a, b in zip(*moments, strict=True))
    losses = [[row["loss"] for row in run.log] for run in (whole, parts)]
    return {"bytes that differ": apart, "losses that differ": sum(a != b for a, b in zip_longest(*losses)),
            "kills": len(kills), "steps": len(whole.log)}  # fmt: skip


def _moments(optimizer: torch.optim.Optimizer) -> bytes:
    kept = optimizer.state_dict()["state"].values()
    return b"".join(torch.as_tensor(value).numpy().tobytes() for state in kept for value in state.values())


B5 = Check(
    "B5",
    "over thousands of iterations these steps accumulate",
    "a CNN on digits, augmented, killed three times between two states and resumed, against the run in one go",
    (Bar("bytes that differ", "==", 0), Bar("losses that differ", "==", 0), Bar("kills", ">=", 3)),
    _resumed,
)


def _rate() -> Mapping[str, float]:
    task = _large_test()
    model = build_seeded(task, 0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    _a_little(task, model, optimizer)
    before = _everything(model, optimizer)
    found = find_lr(model, task, optimizer, epochs=EPOCHS)
    after = _everything(model, optimizer)
    grid = [_accuracy(task, float(rate)) for rate in np.geomspace(1e-5, 3, 20)]
    points = 100 * (max(grid) - _accuracy(task, found.meta["rate"]))
    return {"points below the best of 20": points, "parts that changed": sum(a != b for a, b in
            zip(before, after, strict=True)), "rate": found.meta["rate"], "best of 20, %": 100 * max(grid),
            "worst of 20, %": 100 * min(grid), "cost, runs": found.meta["cost"]}  # fmt: skip


def _large_test() -> Task:
    """The digits with half of them in the test split, so that half a point can be told from chance."""
    task = digits()
    data: Any = task.batches
    inputs, targets = (torch.cat([part[split] for split in SPLITS]) for part in (data.inputs, data.targets))
    order = torch.randperm(len(targets), generator=generator(0, "half"))
    rows = dict(zip(SPLITS, order.split([600, 300, len(order) - 900]), strict=True))
    given = ({split: of[chosen] for split, chosen in rows.items()} for of in (inputs, targets))
    return replace(task, batches=Examples(*given, batch_size=32, seed=0))


def _a_little(task: Task, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """A few steps of a loop of one's own, so that there are moments and gradients to be put back."""
    for batch in task.batches("train", 0):
        optimizer.zero_grad()
        objective(task, model(batch.inputs), batch).backward()
        optimizer.step()


def _everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[object]:
    """All that looking for a rate could change, one by one."""
    gradients = [None if p.grad is None else p.grad.numpy().tobytes() for p in model.parameters()]
    tensors = [t.detach().numpy().tobytes() for t in tensors_of(model).values()]
    modes = [module.training for module in model.modules()]
    groups = repr([sorted(group.items()) for group in optimizer.param_groups])
    drawn = random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().numpy().tobytes()
    return [*gradients, *tensors, *modes, _moments(optimizer), groups, *drawn]


def _accuracy(task: Task, rate: float) -> float:
    """On the test split, the mean of three seeds; 0 where training diverges."""
    found = []
    for seed in range(3):
        try:
            run = train(task, optimizer="sgd", rate=rate, epochs=EPOCHS, seed=seed, keep="last", progress=False,
                        weight_decay=0.0)  # fmt: skip
            found.append(float(outcomes(run.model, task)["accuracy"].mean()))
        except ModelError:
            found.append(0.0)
    return sum(found) / len(found)


B9 = Check(
    "B9",
    "the learning rate is decisive",
    "digits, an MLP in the middle of a loop of its own: the rate that is found without a look at a plot",
    (Bar("points below the best of 20", "<=", 0.5), Bar("parts that changed", "==", 0)),
    _rate,
)
