"""Weights of examples: k is k copies and 0 is removed, whatever the loss, the parts of a batch and the processes."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader

from steelyard.claims import weighting
from steelyard.errors import ModelError, RecipeError, SteelyardError, UnknownNameError
from steelyard.learn.balance import BalancedSampler, balanced_order
from steelyard.learn.data import Examples
from steelyard.learn.examples import (
    ExampleLoss,
    GlobalMean,
    class_weights,
    effective_sample_size,
    focal,
    importance_weights,
)
from steelyard.learn.measures import accuracy
from steelyard.learn.run import Run
from steelyard.learn.task import Task


@pytest.mark.parametrize("name", weighting.LOSSES)
def test_a_weight_is_so_many_copies(name: str) -> None:
    case = weighting.case(name)
    assert (case.weight == 0).any()
    copies = weighting.of_copies(case)
    assert copies.abs().max() > 1e-3
    assert torch.allclose(weighting.of_weights(case), copies, rtol=0, atol=1e-13)
    for parts in (1, 2, 8):
        assert torch.allclose(weighting.of_parts(case, parts), copies, rtol=0, atol=1e-13)


@pytest.mark.parametrize("wrapped", [True, False])
def test_two_processes_have_the_gradient_of_one(wrapped: bool) -> None:
    for name, found in weighting.of_processes(wrapped).items():
        assert torch.allclose(found, weighting.of_copies(weighting.case(name)), rtol=0, atol=1e-13), name


@pytest.mark.parametrize("name", weighting.LOSSES)
def test_without_weights_it_is_the_mean_of_torch(name: str) -> None:
    case = weighting.case(name)
    outputs = case.outputs(case.model(), slice(None))
    function = getattr(
        functional,
        {
            "bce_with_logits": "binary_cross_entropy_with_logits",
            "cross_entropy": "cross_entropy",
            "kl_div": "kl_div",
        }.get(name, f"{name}_loss"),
    )
    theirs = function(outputs, case.y, reduction="batchmean" if name == "kl_div" else "mean", **case.loss.options)
    assert torch.allclose(case.loss.mean(outputs, case.y), theirs, rtol=1e-14)
    assert case.loss(outputs, case.y).shape == (weighting.EXAMPLES,)


def test_positions_of_an_example_are_counted_like_torch_counts_them() -> None:
    random = torch.Generator().manual_seed(0)
    outputs = torch.randn(3, 4, 5, generator=random, dtype=torch.float64)
    targets = torch.randint(4, (3, 5), generator=random)
    targets[1, 2:] = -100
    loss = ExampleLoss("cross_entropy", {"weight": torch.tensor([1.0, 2.0, 3.0, 4.0]).double()})
    theirs = functional.cross_entropy(outputs, targets, weight=loss.options["weight"])
    assert torch.allclose(loss.mean(outputs, targets), theirs)
    weighted = loss.mean(outputs, targets, torch.tensor([1.0, 0.0, 2.0]))
    rows = torch.tensor([0, 2, 2])
    assert torch.allclose(weighted, functional.cross_entropy(outputs[rows], targets[rows], loss.options["weight"]))
    soft = functional.one_hot(targets.clamp_min(0), 4).movedim(2, 1).double()
    assert torch.allclose(loss.mean(outputs, soft), functional.cross_entropy(outputs, soft, loss.options["weight"]))


def test_focal_is_cross_entropy_at_zero_and_that_of_the_paper_elsewhere() -> None:
    outputs, targets = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 3
    assert torch.allclose(
        focal(outputs, targets, gamma=0.0), functional.cross_entropy(outputs, targets, reduction="none")
    )
    p = outputs.softmax(1).gather(1, targets[:, None])[:, 0]
    alpha = torch.tensor([1.0, 2.0, 3.0])
    assert torch.allclose(focal(outputs, targets, 2.0, alpha), -alpha[targets] * (1 - p) ** 2 * p.log(), atol=1e-6)
    z, y = torch.tensor([2.0, -1.0]), torch.tensor([0.0, 1.0])
    p = z.sigmoid()
    expected = torch.stack([-0.75 * p[0] ** 2 * (1 - p[0]).log(), -0.25 * (1 - p[1]) ** 2 * p[1].log()])
    assert torch.allclose(focal(z, y, 2.0, 0.25), expected, atol=1e-6)
    assert ExampleLoss("focal", {"gamma": 2.0, "alpha": alpha}).mean(outputs, targets) > 0


def test_weights_of_classes_and_of_densities() -> None:
    targets = torch.tensor([0] * 6 + [1] * 3 + [2])
    assert torch.allclose(class_weights(targets), 10 / (3 * torch.tensor([6.0, 3.0, 1.0])))
    cui = class_weights(targets, beta=0.9)
    share = torch.tensor([(1 - 0.9) / (1 - 0.9**n) for n in (6, 3, 1)])
    assert torch.allclose(cui, share / share[targets].mean())
    assert class_weights(targets, beta=0.0).tolist() == [1.0, 1.0, 1.0]
    random = torch.Generator().manual_seed(0)
    x = torch.randn(20000, generator=random, dtype=torch.float64)
    w = importance_weights(0.5 * x)  # from N(0, 1) to N(0.5, 1)
    assert float(w.mean()) == pytest.approx(1)
    assert float((w * x).mean()) == pytest.approx(0.5, abs=0.03)
    assert effective_sample_size(w) / len(x) == pytest.approx(math.exp(-0.25), abs=0.03)
    capped = importance_weights(0.5 * x, largest=2.0)
    assert effective_sample_size(capped) > effective_sample_size(w)


def test_balanced_orders_are_balanced_repeatable_and_shared_out() -> None:
    groups = torch.tensor([0] * 50 + [1] * 7 + [2] * 3)
    order = balanced_order(groups, seed=1, epoch=2)
    counts = torch.bincount(groups[order])
    assert counts.sum() == 60
    assert counts.max() - counts.min() <= 1
    assert torch.bincount(order, minlength=60)[50:57].max() - torch.bincount(order, minlength=60)[50:57].min() <= 1
    assert torch.equal(order, balanced_order(groups, seed=1, epoch=2))
    assert not torch.equal(order, balanced_order(groups, seed=1, epoch=3))
    halves = [BalancedSampler(groups, replicas=2, rank=rank) for rank in (0, 1)]
    both = [list(half) for half in halves]
    assert [len(half) for half in both] == [30, 30] == [len(half) for half in halves]
    assert sorted(both[0] + both[1]) == sorted(balanced_order(groups).tolist())
    halves[0].set_epoch(1)
    assert list(halves[0]) != both[0]
    assert sum(len(b) for b in DataLoader(list(range(60)), 7, sampler=halves[0])) == 30


def test_a_run_on_weighted_or_balanced_examples(task: Task) -> None:
    given: Examples = task.batches  # type: ignore[assignment]
    weight = torch.arange(40.0) % 3
    loss = ExampleLoss("cross_entropy", {"weight": torch.tensor([1.0, 5.0, 0.5])})
    weighted = Examples(given.inputs, given.targets, 8, 0, weight={"train": weight})
    with Run(Task("weighted", task.build, weighted, loss, {"accuracy": accuracy}), epochs=1) as run:
        kept = {n: p.detach().clone() for n, p in run.model.named_parameters()}
        step = next(iter(run))
        assert step.batches[0].weight is not None
        rows = step.batches[0].weight > 0
        run.model.eval()
        run.model.load_state_dict(kept)
        expected = functional.cross_entropy(
            run.model(step.batches[0].inputs)[rows].repeat_interleave(step.batches[0].weight[rows].long(), 0),
            step.batches[0].targets[rows].repeat_interleave(step.batches[0].weight[rows].long()),
            loss.options["weight"],
        )
        assert step.loss == pytest.approx(expected.item(), rel=0.5)  # dropout is at work in the step
    rare = Examples(given.inputs, given.targets, 40, 0, balance=(torch.arange(40) < 3).long())
    (batch,) = rare("train", 0)
    assert sum(any(torch.equal(x, row) for row in given.inputs["train"][:3]) for x in batch.inputs) == 20
    (batch,) = rare("valid", 0)
    assert torch.equal(batch.inputs, given.inputs["valid"])


def test_the_loss_of_a_run_is_that_of_copies() -> None:
    x, y = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0, 1, 2])
    splits = ("train", "valid", "test")
    loss = ExampleLoss("cross_entropy", {"weight": torch.tensor([1.0, 5.0, 0.5])})
    data = Examples(dict.fromkeys(splits, x), dict.fromkeys(splits, y), 6, 0, weight={"train": torch.arange(6.0)})
    with Run(Task("t", lambda: nn.Linear(4, 3), data, loss, {"accuracy": accuracy}), epochs=1) as run:
        kept = {n: p.detach().clone() for n, p in run.model.named_parameters()}
        step = next(iter(run))
    rows = torch.repeat_interleave(torch.arange(6), torch.arange(6))
    z = x[rows] @ kept["weight"].T + kept["bias"]
    assert step.loss == pytest.approx(functional.cross_entropy(z, y[rows], loss.options["weight"]).item(), rel=1e-6)


def test_what_cannot_be_weighted_is_refused_in_one_line() -> None:
    loss, x = ExampleLoss("mse"), torch.zeros(3, 2)
    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: ExampleLoss("mes"), "did you mean 'mse'"),
        (lambda: ExampleLoss("huber", {"delt": 1.0}), "huber has no option 'delt'; did you mean 'delta'"),
        (lambda: ExampleLoss("mse", {"reduction": "sum"}), "has no option 'reduction'"),
        (lambda: loss.mean(x, torch.zeros(4, 2)), "do not begin with the same number of examples"),
        (lambda: loss.mean(x, x, torch.ones(2)), r"weights of shape \[2\]: expected one for each example, \[3\]"),
        (lambda: loss.mean(x, x, torch.tensor([1.0, math.nan, 1.0])), "weight of example 1 of the batch is nan"),
        (lambda: loss.mean(x, x, torch.tensor([1.0, 1.0, -2.0])), "weight of example 2 of the batch is -2.0"),
        (lambda: loss.mean(x, x, torch.zeros(3)), "the batch of 3 sum to 0"),
        (lambda: ExampleLoss("cross_entropy")(x, torch.tensor([0, 1, 7])), "Target 7 is out of bounds"),
        (lambda: class_weights(torch.tensor([0, 2])), "class 1 has no example"),
        (lambda: class_weights(torch.tensor([0, 1]), beta=1.0), "from 0 to less than 1"),
        (lambda: importance_weights(torch.tensor([math.inf])), "not finite"),
        (lambda: GlobalMean(nn.Linear(1, 1)).finish(), "nothing to finish"),
        (lambda: BalancedSampler(torch.zeros(3), rank=1), "expected 0 to 0"),
        (lambda: balanced_order(torch.zeros(0)), "expected one number for each example"),
    ]
    for wrong, message in cases:
        with pytest.raises((ModelError, RecipeError, UnknownNameError), match=message) as caught:
            wrong()
        assert isinstance(caught.value, SteelyardError)
        assert "\n" not in str(caught.value)
