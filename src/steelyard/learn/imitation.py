"""A task without labels: do what this model does. Its outputs on inputs that nobody has labelled are the targets.

Decides how batches of inputs become three splits, and what it means to agree. Changes nothing in the model.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from steelyard.errors import ModelError
from steelyard.learn.evaluate import evaluating
from steelyard.learn.measures import accuracy, cross_entropy
from steelyard.learn.options import check_choice, check_kind
from steelyard.learn.seeding import generator
from steelyard.learn.task import (
    SPLITS,
    Batch,
    PerExample,
    Split,
    Task,
    apply,
    batch_arguments,
    check_model,
    device_of,
    what_it_is,
)

Agreement = Literal["agreement", "cosine"]
KEPT = 2**26  # bytes of answers
SHARES: Mapping[Split, float] = {"train": 0.5, "valid": 0.2, "test": 0.3}


def imitation(
    model: nn.Module, inputs: Iterable[Any], metric: Agreement | PerExample = "agreement", *, seed: int = 0
) -> Task:
    """The task to do what `model` does on these inputs: for `shrink`, fine-tuning or comparison without labels.

    inputs: batches of what the model is called with: a tensor, a tuple of tensors, or a Batch whose targets are left
    unread. They are dealt out whole: about half to train, a fifth to validate, the rest to test, by `seed`; at least
    one each. metric: 'agreement', the share of decisions (the largest output, at every position) that are the same;
    'cosine', the cosine of the two outputs of an example, all positions together; or a function of (outputs, outputs
    of the model) that gives a number for each example, more of which is better. The model itself has 1, or the best.

    A copy of the model gives the targets, batch by batch as they are asked for; it stays in memory, and so do those of
    validation and test while they are no more than 64 MB. Raises ModelError
    for what are no batches of tensors, fewer than three, an unknown metric, and where the model gives no tensor.

    >>> net, random = nn.Linear(4, 3), torch.Generator().manual_seed(0)
    >>> task = imitation(net, [torch.randn(8, 4, generator=random) for _ in range(10)])
    >>> from steelyard.learn.evaluate import evaluate
    >>> evaluate(net, task).rows[0]["value"]
    1.0
    """
    if not callable(metric):
        check_choice("metric of agreement", metric, get_args(Agreement))
    check_model(model)
    batches = _arguments(inputs)
    if len(batches) < len(SPLITS):
        raise ModelError(f"{len(batches)} batches of inputs: expected at least three, one for each split")
    teacher = copy.deepcopy(model).requires_grad_(False)
    dealt, classes = _dealt(batches, seed), metric == "agreement"
    known: dict[tuple[Split, int], Batch] = {}  # answers that are asked for again and again, while they are small

    def answer(split: Split, i: int) -> Batch:
        found = known.get((split, i)) or _answered(teacher, dealt[split][i], classes)
        if split != "train" and found.targets.nbytes + sum(b.targets.nbytes for b in known.values()) <= KEPT:
            known[split, i] = found
        return found

    def served(split: Split, epoch: int) -> Iterator[Batch]:
        order = torch.randperm(len(dealt[split]), generator=generator(seed, "imitation", epoch)).tolist()
        for i in order if split == "train" else range(len(order)):
            yield answer(split, i)

    name = metric if isinstance(metric, str) else getattr(metric, "__name__", "metric")
    losses: dict[str, PerExample] = {"agreement": cross_entropy, "cosine": _distance}
    metrics: dict[str, PerExample] = {"agreement": accuracy, "cosine": cosine}
    about = {"seed": seed, "metric": name, "batches": {split: len(found) for split, found in dealt.items()}}
    return Task(
        name=f"imitation of {type(model).__name__}",
        build=lambda: copy.deepcopy(teacher).requires_grad_(True),
        batches=served,
        loss=losses.get(name, _squared) if isinstance(metric, str) else _squared,
        metrics={name: metrics[metric] if isinstance(metric, str) else metric},
        about=about,
    )


def cosine(outputs: Tensor, targets: Tensor) -> Tensor:
    """The cosine between the outputs and the targets of each example, everything of an example as one vector."""
    return functional.cosine_similarity(outputs.flatten(1), targets.flatten(1), dim=1)


def _distance(outputs: Tensor, targets: Tensor) -> Tensor:
    return 1 - cosine(outputs, targets)


def _squared(outputs: Tensor, targets: Tensor) -> Tensor:
    """The squared error of an example relative to its target's square."""
    error = (outputs - targets).flatten(1).square().sum(1)
    return error / targets.flatten(1).square().sum(1).clamp_min(torch.finfo(targets.dtype).tiny)


def _answered(teacher: nn.Module, arguments: tuple[Tensor, ...], classes: bool) -> Batch:
    arguments = tuple(x.to(device_of(teacher)) for x in arguments)
    asked = Batch(arguments if len(arguments) > 1 else arguments[0], arguments[0])
    with evaluating(teacher):
        outputs = apply(teacher, asked)
    return Batch(asked.inputs, outputs.argmax(-1) if classes else outputs)


def _arguments(inputs: object) -> list[tuple[Tensor, ...]]:
    """What the model is called with, batch by batch; raises ModelError for what it could not be called with."""
    expected = "batches of what the model is called with, in a list or another iterable"
    if isinstance(inputs, Tensor):
        raise ModelError(
            f"inputs: expected {expected}, found one tensor of {tuple(inputs.shape)}: give inputs.split(32)"
        )
    check_kind("inputs", inputs, () if isinstance(inputs, (str, Mapping)) else Iterable, expected)
    assert isinstance(inputs, Iterable)
    found = []
    for i, batch in enumerate(inputs):
        arguments = batch_arguments(batch)
        if not arguments or not all(isinstance(x, Tensor) and x.ndim for x in arguments):
            raise ModelError(
                f"inputs: batch {i} is {what_it_is(batch)}: expected a tensor, a tuple of tensors, or a Batch, with "
                f"examples along the first axis; {'make it a tuple' if isinstance(batch, list) else 'wrap the model'}"
            )
        found.append(arguments)
    return found


def _dealt(batches: list[tuple[Tensor, ...]], seed: int) -> dict[Split, list[tuple[Tensor, ...]]]:
    order = torch.randperm(len(batches), generator=generator(seed, "deal")).tolist()
    test = max(1, round(len(order) * SHARES["test"]))
    valid = max(1, round(len(order) * SHARES["valid"]))
    rows: dict[Split, list[int]] = {
        "test": order[:test],
        "valid": order[test : test + valid],
        "train": order[test + valid :],
    }
    return {split: [batches[i] for i in rows[split]] for split in SPLITS}
