"""Averages of the weights along a run, and of several trained models: EMA, SWA, greedy soups.

Decides which tensors are averaged, in what precision, and when. An average knows tensors by their names without the
prefixes of torch.compile and DistributedDataParallel; a tied tensor is averaged once and stays tied. Knows nothing of
the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from steelyard.core.table import Column, Table
from steelyard.core.weights import Weights
from steelyard.errors import ModelError, RecipeError, UnknownNameError, quoted
from steelyard.formats._sharded import like, local
from steelyard.formats.module import into_module
from steelyard.learn.evaluate import evaluating, mean_outcomes
from steelyard.learn.options import check_fraction, to_number
from steelyard.learn.state import State, check_fits, copied, model_state, set_model_state, tensors_of
from steelyard.learn.task import Task, apply, as_batch, device_of

HALVES = (torch.float16, torch.bfloat16)  # in which small changes would be lost: their average is float32


@dataclass(frozen=True)
class Ema:
    """An exponential moving average, updated after each step (Polyak & Juditsky 1992).

    average = d average + (1 - d) weights, with d = min(decay, (1 + t) / (10 + t)) at update t = 1, 2, ...: the first
    weights, which are random, are forgotten soon. Buffers with fractions (running statistics) are averaged, too.
    """

    decay: float = 0.999

    def __post_init__(self) -> None:
        check_fraction(decay=self.decay)

    def share(self, count: int) -> float:
        """What the newest weights weigh at update ``count``."""
        return 1 - min(self.decay, (1 + count) / (10 + count))


@dataclass(frozen=True)
class Swa:
    """The mean of the weights after each epoch from the fraction ``start`` of the run on (Izmailov et al. 2018).

    The statistics of batch norm are those of the averaged weights: another pass over the training inputs measures them.
    """

    start: float = 0.75

    def __post_init__(self) -> None:
        check_fraction(start=self.start)

    def share(self, count: int) -> float:
        """What the newest weights weigh at update ``count``."""
        return 1 / count


AVERAGES: Mapping[str, Callable[..., Ema | Swa]] = {"ema": Ema, "swa": Swa}


def kind_of(given: Ema | Swa | str) -> Ema | Swa:
    """The average that ``ema``, ``ema=DECAY``, ``swa`` or ``swa=START`` says; an Ema or a Swa as it is.

    Raises UnknownNameError for a name that is not in AVERAGES, RecipeError for what cannot be read.

    >>> kind_of("ema=0.99"), kind_of("swa")
    (Ema(decay=0.99), Swa(start=0.75))
    """
    if isinstance(given, (Ema, Swa)):
        return given
    if not isinstance(given, str):
        raise RecipeError(f"the average {given!r:.100}: expected Ema(), Swa(), or a text such as ema=0.99")
    name, equals, value = given.partition("=")
    if name not in AVERAGES:
        raise UnknownNameError("average", name, AVERAGES)
    number = to_number(value) if equals else None
    if equals and number is None:
        raise RecipeError(f"the average {quoted(given)}: expected {name} or {name}=NUMBER, such as {name}=0.9")
    return AVERAGES[name]() if number is None else AVERAGES[name](number)


class Average:
    """A running average of a model's tensors, for `train(average=...)` or a loop of your own.

    ::

        average = Average(model, Ema(0.999))
        for ...:
            optimizer.step()
            average.update()
        with average.applied():                     # Swa and batch norm: applied(batches)
            evaluate(model)
    """

    def __init__(self, model: nn.Module, kind: Ema | Swa | str):
        self.model, self.kind = model, kind_of(kind)
        self.count = 0  # updates so far
        self._tensors: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights as they are now into the average."""
        now = {name: tensor.detach() for name, tensor in tensors_of(self.model).items()}
        self.count += 1
        if not self._tensors:
            self._tensors = {name: _wide(tensor).clone() for name, tensor in now.items()}
            return
        share = self.kind.share(self.count)
        fractions = [name for name, tensor in now.items() if tensor.is_floating_point() or tensor.is_complex()]
        held, new = [local(self._tensors[n]) for n in fractions], [local(_wide(now[n])) for n in fractions]
        torch._foreach_lerp_(held, new, share)
        for name in now.keys() - set(fractions):
            self._tensors[name].copy_(now[name])

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Give a model of the same names and shapes the averaged values, in place; nothing if there was no update.

        Raises ModelError, with the model untouched, for another one.
        """
        if self._tensors:
            check_fits(self._tensors, tensors_of(model), "the average", type(model).__name__)
            for name, tensor in tensors_of(model).items():
                tensor.copy_(self._tensors[name])

    @contextmanager
    def applied(self, batches: Iterable[Any] = ()) -> Iterator[None]:
        """Within the block the model has the averaged values; for Swa, batch norm is measured anew on ``batches``.

        batches: of the training data, each a Batch or a pair (inputs, targets), as a DataLoader gives them. Raises
        ModelError if Swa needs them and there are none.
        """
        kept = copied(model_state(self.model))
        try:
            self.copy_to(self.model)
            if self._tensors and isinstance(self.kind, Swa):
                update_batch_norm(self.model, batches)
            yield
        finally:
            set_model_state(self.model, kept)

    def state(self) -> State:
        """What goes on with `load`, bit for bit."""
        return {"count": self.count, "tensors": self._tensors}

    def load(self, state: State) -> None:
        """Go on from a `state`."""
        own = tensors_of(self.model)
        self.count = state["count"]
        self._tensors = {name: like(own[name], tensor) for name, tensor in state["tensors"].items()}


def update_batch_norm(model: nn.Module, batches: Iterable[Any]) -> int:
    """Measure the running statistics of each trained batch norm anew, as means over batches; how many there are.

    batches: each a Batch or a pair (inputs, targets). Everything else is in evaluation mode (no dropout). Modes and
    momenta are as before afterwards. Raises ModelError, with the statistics as they were, if there are no batches.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats and _trained(m)]
    if not norms:
        return 0
    before = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers(recurse=False)]
    momenta, device, seen = [norm.momentum for norm in norms], device_of(model), 0
    with evaluating(model):
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the plain mean over batches
            norm.train()
        try:
            for batch in batches:
                apply(model, as_batch(batch, "the source of batches").to(device))
                seen += 1
            if not seen:
                raise ModelError(f"the model has {len(norms)} batch norms, whose statistics are measured anew for "
                                 "averaged weights: give batches of the training data")  # fmt: skip
        except BaseException:
            for buffer, value in before:
                buffer.copy_(value)
            raise
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
    return len(norms)


def greedy_soup(model: nn.Module, candidates: Sequence[Weights], task: Task) -> Table:
    """Average trained weights of one architecture as long as it helps on validation examples (Wortsman et al. 2022).

    The candidates are taken in order of their validation loss; each stays in the mean if the mean is no worse with it.
    Batch norm is measured anew for each mean. The model ends with the soup. A row for each candidate, in that order.
    Raises ModelError if there is none or one does not fit, with the model as it was.
    """
    if not candidates:
        raise ModelError("no candidates: give the weights of at least one trained model")
    before = copied(model_state(model))
    try:
        alone = []
        for number, weights in enumerate(candidates):
            into_module(weights, model)
            alone.append((mean_outcomes(model, task, "valid")["loss"], number, copied(model_state(model))))
        alone.sort(key=lambda item: item[:2])
        soup, rows = Average(model, Swa()), []
        best, kept = float("inf"), alone[0][2]
        for loss, number, state in alone:
            soup_before = copied(soup.state())
            set_model_state(model, state)
            soup.update()
            soup.copy_to(model)
            if soup.count > 1:
                update_batch_norm(model, task.batches("train", 0))
            found = mean_outcomes(model, task, "valid")["loss"]
            stays = found <= best
            if stays:
                best, kept = found, copied(model_state(model))
            else:
                soup.load(soup_before)
            rows.append({"candidate": number, "valid loss": loss, "with it": found, "kept": stays})
    except BaseException:
        set_model_state(model, before)
        raise
    set_model_state(model, kept)
    columns = [Column("candidate"), Column("valid loss", "", "alone"), Column("with it", "", "valid loss of the mean"),
               Column("kept")]  # fmt: skip
    return Table.of(f"greedy soup for {task.name}", columns, rows, {"kept": soup.count, "valid loss": best})


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in HALVES else tensor


def _trained(norm: nn.Module) -> bool:
    own = list(norm.parameters(recurse=False))
    return not own or any(p.requires_grad for p in own)
