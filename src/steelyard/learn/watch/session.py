"""`watch`: what an optimizer does to a model's tensors, logged at each of its steps, in anybody's loop.

Decides when things are read: around the optimizer's step, by its own hooks. Changes nothing of model, optimizer,
gradients or random generators. Knows nothing of how norms are taken or how a log is kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from steelyard.errors import ModelError
from steelyard.learn.gauges import plain_name
from steelyard.learn.watch.log import Log
from steelyard.learn.watch.norms import Norms, Readings

if TYPE_CHECKING:
    from steelyard.learn.run import Run


class Watch:
    """The watch over a model and its optimizer, as a context manager; see `watch`."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, path: str | Path | None = None, run: Run | None = None
    ):
        self.model, self.optimizer, self.run = model, optimizer, run
        self.norms = Norms(_tensors(model, optimizer))
        meta = {"model": type(model).__name__, "optimizer": type(optimizer).__name__, "torch": str(torch.__version__)}
        self.log = Log(path, meta)
        self._step, self._start = 0, time.perf_counter()
        self._handles: list[Any] = []
        self._progress = None if run is None else run.progress

    def __enter__(self) -> Log:
        self._start = time.perf_counter()
        self.log.add("tensors", [(name, *_described(p)) for name, p in self.norms.tensors.items()])
        self._handles = [
            self.model.register_forward_pre_hook(_Hook(self._ran)),
            self.optimizer.register_step_pre_hook(self._before),
            self.optimizer.register_step_post_hook(self._after),
        ]
        if self.run is not None:
            self.run.progress = self._of_run
        return self.log

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self.run is not None:
            self.run.progress = self._progress
        self.norms.close()
        self.log.close()

    def _ran(self) -> None:
        if torch.is_grad_enabled():
            self.log.noted = self._step

    def _before(self, *_: object) -> None:
        self.log.noted = self._step
        self.norms.before()

    def _after(self, *_: object) -> None:
        self._record(self.norms.after())
        self._step += 1

    def _record(self, found: Readings) -> None:
        rate = float(self.optimizer.param_groups[0]["lr"])
        size, ratio = _total(found.weight), None
        if size:
            ratio = _total(found.update) / size
        seconds = time.perf_counter() - self._start
        self.log.add("steps", [(self._step, seconds, rate, _total(found.gradient), ratio)])
        gradients = np.where(found.learning, found.gradient, None).tolist()
        ratios = np.where(found.weight != 0, found.ratio, None).tolist()
        cells = zip(self.norms.tensors, found.weight.tolist(), gradients, found.update.tolist(), ratios, strict=True)
        self.log.add("norms", [(self._step, *row) for row in cells])

    def _of_run(self, run: Run) -> None:
        """Note the loss of a Run's step, and show its progress as before."""
        self.log.note(loss=run.log[-1]["loss"])
        if self._progress is not None:
            self._progress(run)


class _Hook:
    """A hook of a module. A copy of it, in a copy of the module, does nothing: the watch is over the original."""

    def __init__(self, call: Callable[[], None] | None = None):
        self.call = call

    def __call__(self, *_: object) -> None:
        if self.call is not None:
            self.call()

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        return _Hook, ()


def watch(
    model: nn.Module | Run, optimizer: torch.optim.Optimizer | None = None, *, path: str | Path | None = None
) -> Watch:
    """Log what each step of the optimizer does to each tensor of the model, in any loop::

        with sy.watch(model, optimizer) as log:
            for x, y in batches:
                optimizer.zero_grad()
                loss = criterion(model(x), y)
                loss.backward()
                optimizer.step()
                log.note(loss=loss)

    At every step and for every tensor: ||W|| before the step, ||g|| as the optimizer got it (after clipping), the
    exact ||W_after - W||, and its ratio to ||W||, all in float64 (off the processor in float32). The training is the
    same, bit for bit, with and without. A parameter that is tied is watched once. A trainable tensor is copied
    before each step: 4 bytes more for a float32 weight.

    Args:
        model: any module; or a Run, whose optimizer and losses are taken.
        optimizer: any torch optimizer over some or all of the model's parameters.
        path: an SQLite file for the log, which must not exist yet; None keeps it in memory.

    Entering gives the `Log`: `log.table("norms")` and so on, then and later; a file is read by `watched`. Raises
    ModelError if the optimizer holds none of the model's parameters, WeightsError if the file is there already.

    >>> model = nn.Linear(2, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> with watch(model, optimizer) as log:
    ...     model(torch.ones(1, 2)).sum().backward()
    ...     optimizer.step()
    >>> [round(x, 4) for x in log.table("norms").column("update norm")]
    [0.1414, 0.1]
    """
    from steelyard.learn.run import Run

    if isinstance(model, Run):
        return Watch(model.model, model.optimizer if optimizer is None else optimizer, path, model)
    if optimizer is None:
        raise ModelError("watch: expected an optimizer beside the model: sy.watch(model, optimizer)")
    return Watch(model, optimizer, path)


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> Mapping[str, Tensor]:
    """The model's parameters by their plain names."""
    if not isinstance(model, nn.Module):
        raise ModelError(f"watch: expected a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ModelError(f"watch: expected a torch optimizer, got {type(optimizer).__name__}")
    tensors = {plain_name(name): p for name, p in model.named_parameters()}
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not held & {id(p) for p in tensors.values()}:
        text = "make it from model.parameters(), after the model was moved or wrapped"
        raise ModelError(f"watch: none of the model's {len(tensors)} parameters is in the optimizer: {text}")
    return tensors


def _described(p: Tensor) -> tuple[str, str, int]:
    """Shape, dtype, and whether it is trained."""
    shape = "not known yet" if nn.parameter.is_lazy(p) else "x".join(map(str, p.shape)) or "scalar"
    return shape, str(p.dtype).removeprefix("torch."), int(p.requires_grad)


def _total(norms: np.ndarray) -> float:
    """The norm of all tensors together."""
    return float(np.sqrt(np.square(norms).sum()))
