"""What the checks of weights of examples share: eight losses, their gradients over parts of a batch and processes."""

from __future__ import annotations

import gc
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from steelyard.errors import ModelError
from steelyard.learn.examples import ExampleLoss, GlobalMean
from steelyard.learn.seeding import generator

EXAMPLES, FEATURES, OUTPUTS = 24, 5, 4
PROCESSES = 2
LOSSES: Mapping[str, Mapping[str, Any]] = {  # the hard options: what makes a mean of means wrong
    "cross_entropy": {
        "weight": torch.tensor([1.0, 4.0, 0.5, 2.0], dtype=torch.float64),
        "label_smoothing": 0.1,
        "ignore_index": 3,
    },
    "bce_with_logits": {"pos_weight": torch.tensor([1.0, 3.0, 0.5, 2.0], dtype=torch.float64)},
    "mse": {},
    "l1": {},
    "huber": {"delta": 0.5},
    "nll": {"weight": torch.tensor([1.0, 4.0, 0.5, 2.0], dtype=torch.float64), "ignore_index": 2},
    "poisson_nll": {},
    "kl_div": {},
}

TORCH = {"bce_with_logits": "binary_cross_entropy_with_logits", "cross_entropy": "cross_entropy", "kl_div": "kl_div"}


@dataclass(frozen=True, eq=False)
class Case:
    """A loss, a small model, and examples with weights 0 to 3."""

    loss: ExampleLoss
    x: Tensor  # (examples, features)
    y: Tensor  # as the loss wants it
    weight: Tensor  # (examples,), whole numbers

    def model(self) -> nn.Linear:
        """The same start each time."""
        layer = nn.Linear(FEATURES, OUTPUTS, dtype=torch.float64)
        with torch.no_grad():
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator(0, "w"), dtype=torch.float64))
            layer.bias.zero_()
        return layer

    def outputs(self, model: nn.Module, rows: slice | Tensor) -> Tensor:
        """What the loss takes: logits, or their logarithm of probabilities."""
        z: Tensor = model(self.x[rows])
        return z.log_softmax(1) if self.loss.name in ("nll", "kl_div") else z


def case(name: str) -> Case:
    """The examples of one loss."""
    random = generator(0, "weighting", name)
    x = torch.randn(EXAMPLES, FEATURES, generator=random, dtype=torch.float64)
    if name in ("cross_entropy", "nll"):
        y = torch.randint(OUTPUTS, (EXAMPLES,), generator=random)
    else:
        y = torch.rand(EXAMPLES, OUTPUTS, generator=random, dtype=torch.float64)
        y = {"bce_with_logits": y.round(), "kl_div": y / y.sum(1, keepdim=True)}.get(name, 3 * y)
    weight = torch.randint(4, (EXAMPLES,), generator=random).double()
    return Case(ExampleLoss(name, LOSSES[name]), x, y, weight)


def of_copies(case: Case) -> Tensor:
    """The gradient of torch's own mean over a batch in which an example of weight k occurs k times."""
    model = case.model()
    rows = torch.repeat_interleave(torch.arange(EXAMPLES), case.weight.long())
    name = case.loss.name
    function = getattr(functional, TORCH.get(name, f"{name}_loss"))
    reduction = "batchmean" if name == "kl_div" else "mean"
    function(case.outputs(model, rows), case.y[rows], reduction=reduction, **case.loss.options).backward()
    return flat(model)


def of_weights(case: Case) -> Tensor:
    """The gradient of the weighted mean over the full batch."""
    model = case.model()
    case.loss.mean(case.outputs(model, slice(None)), case.y, case.weight).backward()
    return flat(model)


def of_parts(case: Case, parts: int, rows: slice = slice(0, EXAMPLES), model: nn.Module | None = None) -> Tensor:
    """The gradient of some rows, accumulated over so many unequal parts; `model` may be one of several processes."""
    model = case.model() if model is None else model
    mean = GlobalMean(model)
    order = torch.arange(EXAMPLES)[rows]
    cuts = [round(len(order) * (i / parts) ** 1.5) for i in range(parts + 1)]  # unequal, some may be empty
    for start, stop in pairwise(cuts):
        part = order[start:stop]
        mean.backward(*case.loss.terms(case.outputs(model, part), case.y[part]), case.weight[part])
    mean.finish()
    return flat(model)


def flat(model: nn.Module) -> Tensor:
    """All gradients as one vector."""
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def of_processes(wrapped: bool = True) -> dict[str, Tensor]:
    """The gradient of each loss from two gloo processes that hold unequal shares of the rows, in two parts each.

    wrapped: in DistributedDataParallel, which averages gradients; otherwise `GlobalMean` sums them.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "steelyard.claims.weighting", folder, str(int(wrapped))]
        quiet: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}  # no pipe of ours is kept open
        processes = [subprocess.Popen([*command, str(rank)], **quiet) for rank in range(PROCESSES)]
        try:
            ends = [process.wait(timeout=300) for process in processes]
        finally:
            for process in processes:
                process.kill()
        if any(ends):
            raise ModelError(f"the processes ended with {ends}: run python -m steelyard.claims.weighting by hand")
        found: dict[str, Tensor] = torch.load(Path(folder) / "gradients", weights_only=True)
    return found


def _process(folder: str, wrapped: bool, rank: int) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=PROCESSES
    )
    rows = slice(0, 15) if rank == 0 else slice(15, EXAMPLES)
    found = {}
    for name in LOSSES:
        plain = case(name).model()
        model = nn.parallel.DistributedDataParallel(plain) if wrapped else plain
        found[name] = of_parts(case(name), 2, rows, model)
        del model
    if rank == 0:
        torch.save(found, Path(folder) / "gradients")
    torch.distributed.barrier()
    gc.collect()  # a wrapper that outlives the group of processes aborts when it is freed
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    _process(sys.argv[1], sys.argv[2] == "1", int(sys.argv[3]))
