"""What takes part when starts are compared: models of a depth and a seed, schemes by name, the batch and the loss.

Decides what is a start, and what arguments fit together. Knows nothing of how starts are judged.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from steelyard.errors import ModelError, RecipeError
from steelyard.init import Init, scheme_of
from steelyard.learn.calling import calling
from steelyard.learn.seeding import derive, seeded
from steelyard.learn.start import init_
from steelyard.learn.task import Batch, Task, build_seeded, device_of, first_batch
from steelyard.learn.tracing import swap, tensors

Scheme = str | Init | Callable[[nn.Module], object]
Loss = Callable[[Any, Any], Tensor]

GIVEN, DEFAULT = "as given", "default"  # the weights that the model comes with; torch's reset_parameters()
BY_BATCH = ("data", "auto")  # the schemes that look at the batch
FEWEST = 8  # samples of which one is left out


@dataclass(frozen=True)
class Material:
    """What every start is judged on."""

    batch: Batch
    loss: Loss
    task: Task | None


def named(schemes: Sequence[Scheme] | Mapping[str, Scheme]) -> dict[str, Scheme]:
    """The schemes by name, looked at before anything is run."""
    if isinstance(schemes, str):
        raise RecipeError(f"schemes is a sequence or a mapping, not the text {schemes!r}; write [{schemes!r}]")
    if isinstance(schemes, Mapping):
        named = dict(schemes)
    else:
        named = {(s if isinstance(s, str) else getattr(s, "__name__", None) or repr(s)): s for s in schemes}
    if len(named) < len(schemes) or not named:
        raise RecipeError(
            f"{len(schemes)} starts with {len(named)} names: give each one a name, {{'name': scheme, ...}}"
        )
    for scheme in named.values():
        if isinstance(scheme, str) and scheme not in (GIVEN, DEFAULT, *BY_BATCH):
            scheme_of(scheme)
        elif not isinstance(scheme, (str, Init)) and not callable(scheme):
            raise RecipeError(f"a start is a name, an initialiser or a function of a module, not {scheme!r}")
    return named


def material(
    subject: Any, model: Any, batch: Any, loss: Loss | None, train: int
) -> tuple[Task | nn.Module | Callable[..., nn.Module], Material]:
    """What builds the models, and what they are judged on."""
    if isinstance(subject, Task):
        found = first_batch(subject, "train") if batch is None else _batch(batch)
        return subject if model is None else model, Material(found, loss or subject.loss, subject)
    if model is not None:
        raise RecipeError(
            "model= is another model for a task; without a task it comes first: compare_starts(model, ...)"
        )
    if batch is None or loss is None:
        raise RecipeError("without a task the comparison needs batch=(inputs, targets) and loss=")
    if train:
        raise RecipeError("training needs a task: compare_starts(task, ..., model=model, train=steps)")
    return subject, Material(_batch(batch), loss, None)


def builder(given: Any, depth: int | None) -> Callable[[int], nn.Module]:
    """A new model for each seed; a module that was given is copied."""
    if isinstance(given, (Task, nn.Module)) and depth is not None:
        raise RecipeError("depths need a function that builds a model of a depth: model=lambda depth: ...")
    if isinstance(given, Task):
        return partial(build_seeded, given)
    if not callable(given):
        raise RecipeError(f"expected a task, a module or a function that builds one, not {type(given).__name__}")

    def built(seed: int) -> nn.Module:
        with seeded(derive(seed, "build")), calling("building the model"):
            if isinstance(given, nn.Module):
                return copy.deepcopy(_with_values(given))
            net = given() if depth is None else given(depth)
        if not isinstance(net, nn.Module):
            raise ModelError(f"the model is built as a {type(net).__name__}, expected a torch.nn.Module")
        return _with_values(net)

    return built


def _with_values(model: nn.Module) -> nn.Module:
    """The model; raises ModelError for one without values."""
    for name, p in model.named_parameters():
        if isinstance(p, nn.parameter.UninitializedParameter):
            raise ModelError(f"{name!r} has no shape yet; run the model once on a batch before starts are compared")
        if p.is_meta:
            raise ModelError(f"{name!r} is on the meta device, without values; call model.to_empty(device='cpu') first")
    return model


def first(batch: Batch, examples: int) -> Batch:
    if len(batch) < FEWEST:
        raise ModelError(f"the batch has {len(batch)} samples, expected at least {FEWEST}: nothing can be left out")
    count = len(batch)
    inputs = swap(batch.inputs, lambda x: x[:examples] if isinstance(x, Tensor) and x.shape[:1] == (count,) else x)
    return Batch(inputs, batch.targets[:examples])


def moved(batch: Batch, device: torch.device) -> Batch:
    """Inputs, in a mapping, too, and targets on another device."""
    inputs = swap(batch.inputs, lambda x: x.to(device) if isinstance(x, Tensor) else x)
    return Batch(inputs, batch.targets.to(device))


def begin(net: nn.Module, scheme: Scheme, used: Material, seed: int) -> None:
    """Start a module in place."""
    if scheme == GIVEN:
        return
    if scheme == DEFAULT:
        with seeded(derive(seed, DEFAULT)):
            for layer in reversed(list(net.modules())):  # what a module does with its layers comes after theirs
                reset = getattr(layer, "reset_parameters", None) or getattr(layer, "_reset_parameters", None)
                if callable(reset):
                    reset()
    elif isinstance(scheme, str) and scheme in BY_BATCH:
        init_(net, scheme, moved(used.batch, device_of(net)), seed=seed)
    elif isinstance(scheme, (str, Init)):
        init_(net, scheme, seed=seed)
    else:
        with seeded(derive(seed, "start")), calling(f"the start {getattr(scheme, '__name__', scheme)!r}"):
            scheme(net)


def _batch(given: Any) -> Batch:
    """A Batch as it is, a pair as a Batch."""
    if isinstance(given, Batch):
        return given
    if not isinstance(given, (tuple, list)) or len(given) != 2 or not isinstance(given[1], Tensor):
        raise RecipeError(f"the batch is (inputs, targets) or a Batch, with a tensor of targets, not {_what(given)}")
    inputs = given[0]
    if isinstance(inputs, Mapping):
        inputs = dict(inputs)
    if not isinstance(inputs, (Tensor, tuple, dict)) or not any(True for _ in tensors(inputs)):
        raise RecipeError(
            f"the inputs of the batch are {_what(inputs)}: expected a tensor, a tuple of several or a dict of keywords"
        )
    return Batch(inputs, given[1])


def _what(value: object) -> str:
    names = dict.fromkeys(type(x).__name__ for x in value) if isinstance(value, (tuple, list)) else ()
    return f"a {type(value).__name__}" + (f" of {' and '.join(names)}" if names else "")


def checked_depths(depths: Sequence[int]) -> Sequence[int]:
    if not depths or any(isinstance(d, bool) or not isinstance(d, int) or d < 1 for d in depths):
        raise RecipeError(f"depths={depths!r}: expected whole numbers, 1 or more")
    return depths
