"""What a proof cannot do is said before the search: examples that were seen, tolerances finer than rounding."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from steelyard.errors import ModelError, ProofWarning
from steelyard.formats.module import from_module
from steelyard.learn.data import Examples
from steelyard.learn.evaluate import outcomes
from steelyard.learn.imitation import imitation
from steelyard.learn.measures import accuracy, cross_entropy
from steelyard.learn.task import SPLITS, Task, build_seeded
from steelyard.shrinking.foresight import copied, reachable, unseen
from steelyard.shrinking.promise import Promise
from steelyard.shrinking.within import shrink


def task_of(inputs: Mapping[str, Tensor]) -> Task:
    targets = {split: torch.zeros(len(x), dtype=torch.long) for split, x in inputs.items()}
    return Task("rows", lambda: nn.Linear(5, 2), Examples(dict(inputs), targets, 32, 0), cross_entropy,
                {"accuracy": accuracy})  # fmt: skip


def drawn(count: int, seed: int) -> Tensor:
    return torch.randn(count, 5, generator=torch.Generator().manual_seed(seed))


SEPARATE = {split: drawn(200, seed) for seed, split in enumerate(SPLITS)}


def test_splits_apart_are_silent() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert unseen(task_of(SEPARATE), training=True) == ""


@pytest.mark.parametrize(("split", "name"), [("valid", "validation"), ("train", "training")])
def test_a_proof_split_that_is_another_one_is_refused(split: str, name: str) -> None:
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    same = task_of({**SEPARATE, "test": SEPARATE[split][order]})
    with pytest.raises(ModelError, match=rf"200 of 200 proof examples .* have the inputs of {name} examples"):
        unseen(same, training=True)
    if split == "train":
        assert unseen(same, training=False) == "", "without training nothing has seen its targets"


def test_a_few_shared_examples_are_a_warning_with_their_number() -> None:
    shared = task_of({**SEPARATE, "test": torch.cat([SEPARATE["valid"][:13], SEPARATE["test"]])})
    with pytest.warns(ProofWarning, match="13 of 213 proof examples have the inputs of validation examples"):
        told = unseen(shared, training=True)
    assert told.startswith("13 of 213")


def test_data_of_few_different_examples_are_no_leak() -> None:
    """Draws of three bits: each split has all eight, many times."""
    bits = {split: (drawn(300, seed) > 0).float() for seed, split in enumerate(SPLITS)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert unseen(task_of({s: x * torch.tensor([1, 1, 1, 0, 0]) for s, x in bits.items()}), training=True) == ""


def test_copies_are_no_draws_of_few_different_examples() -> None:
    copies = {split: drawn(50, seed).repeat(6, 1) for seed, split in enumerate(SPLITS)}
    with pytest.warns(ProofWarning, match="the 300 proof examples are copies of 50: what is proven may be too good"):
        assert unseen(task_of(copies), training=True) == "the 300 proof examples are copies of 50"
    one = task_of(dict.fromkeys(SPLITS, copies["test"]))
    with pytest.raises(ModelError, match=r"300 of 300 proof examples .* have the inputs of validation examples"):
        unseen(one, training=True)


def test_a_part_that_is_copies_is_told_with_what_it_shares() -> None:
    test = torch.cat([drawn(50, 7).repeat(4, 1), drawn(100, 8)])
    with pytest.warns(ProofWarning, match="150 of 300 proof examples are copies of others"):
        unseen(task_of({**SEPARATE, "test": test}), training=True)
    with pytest.warns(
        ProofWarning, match="are copies of others; 250 of 300 proof examples have the inputs of validation"
    ):
        unseen(task_of({**SEPARATE, "test": test, "valid": test[:250]}), training=False)


@pytest.mark.parametrize("size", [1, 4])
def test_batches_of_other_lengths_are_compared_as_well(size: int) -> None:
    """Texts that are there twice, batches of which are as long as their longest."""
    texts = [
        torch.randint(50, (size, length), generator=torch.Generator().manual_seed(length)) for length in range(3, 23)
    ]
    served = {"test": [(x, x[:, 0]) for x in texts + texts], "valid": [(x + 100, x[:, 0]) for x in texts]}
    task = Task(
        "texts", lambda: nn.Linear(1, 2), lambda split, epoch: served[split], cross_entropy, {"accuracy": accuracy}
    )
    with pytest.warns(ProofWarning, match=f"the {40 * size} proof examples are copies of {20 * size}"):
        unseen(task, training=False)
    served["test"] = [(x, x[:, 0]) for x in texts + texts[:5]]
    assert unseen(task, training=False) == "", "few of one length say nothing of what is nearly the same"


@pytest.mark.parametrize("seed", range(10))
def test_tables_of_few_values_that_go_together_are_no_copies(seed: int) -> None:
    g = np.random.default_rng(seed)
    kind = g.integers(6, size=(3, 400, 1))
    values = np.where(g.random((3, 400, 5)) < 0.8, kind, g.integers(3, size=(3, 400, 5)))  # columns mostly say the kind
    table = {split: torch.tensor(x, dtype=torch.float32) for split, x in zip(SPLITS, values, strict=True)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert unseen(task_of(table), training=True) == ""


@pytest.mark.parametrize("rate", [0.3, 1.0, 3.0, 30.0])
def test_draws_are_not_held_for_copies(rate: float) -> None:
    g = np.random.default_rng(0)
    even = [g.multinomial(int(300 * rate), np.full(300, 1 / 300)) for _ in range(200)]
    uneven = [g.multinomial(int(300 * rate), g.dirichlet(np.ones(300))) for _ in range(200)]
    assert sum(copied(counts[counts > 0]) for counts in even) <= 3
    assert not any(copied(counts[counts > 0]) for counts in uneven)


def test_several_inputs_of_other_dtypes_are_compared_together() -> None:
    x = SEPARATE["test"].to(torch.bfloat16), torch.arange(200)
    y = torch.zeros(200)
    other = (x[0], torch.arange(200) + 1)  # the same rows, with another number beside each
    served = {"test": [(x, y)], "valid": [(other, y)]}
    pairs = Task(
        "pairs", lambda: nn.Linear(5, 2), lambda split, epoch: served[split], cross_entropy, {"accuracy": accuracy}
    )
    assert unseen(pairs, training=False) == ""
    served["valid"] = [(x, y)]
    with pytest.raises(ModelError, match="200 of 200"):
        unseen(pairs, training=False)


def test_batches_of_nothing_and_inputs_of_one_number_are_compared_as_well() -> None:
    rows, y = torch.arange(200.0), torch.zeros(200)
    served = {"test": [(rows[:0], y[:0]), (rows, y)], "valid": [(rows + 300, y)]}
    numbers = Task("numbers", lambda: nn.Linear(1, 2), lambda split, epoch: served[split], cross_entropy,
                   {"accuracy": accuracy})  # fmt: skip
    assert unseen(numbers, training=False) == ""
    served["valid"] = [(rows.flip(0), y), (torch.zeros(3, 0), y[:3])]
    with pytest.raises(ModelError, match="200 of 200"):
        unseen(numbers, training=False)


def test_shrink_refuses_it_before_it_measures() -> None:
    same = task_of({**SEPARATE, "test": SEPARATE["valid"]})
    said: list[str] = []
    with pytest.raises(ModelError, match="give a test split that nothing else has seen"):
        shrink(build_seeded(same), same, tolerance=0.1, epochs=0, say=lambda what, _share: said.append(what))
    assert said == ["comparing the splits"]


def squared(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().mean(1)


def line(examples: int = 400) -> tuple[Task, nn.Module]:
    """A task of numbers, and a model of it that is right but for noise."""
    g = torch.Generator().manual_seed(0)
    true = torch.randn(32, 24, generator=g)
    x = {split: torch.randn(examples, 24, generator=g) for split in SPLITS}
    y = {split: rows @ true.T + torch.randn(examples, 32, generator=g) for split, rows in x.items()}
    task = Task("line", lambda: nn.Linear(24, 32), Examples(x, y, 32, 0), squared, {"squared error": squared},
                lower_is_better=("squared error",))  # fmt: skip
    model = task.build()
    with torch.no_grad():
        model.weight.copy_(true)
        model.bias.zero_()
    return task, model


def test_a_tolerance_finer_than_rounding_is_refused_with_one_that_could_be_proven() -> None:
    task, model = line()
    said: list[str] = []
    with pytest.raises(
        ModelError, match=r"400 proof examples cannot prove a tolerance of 1e-06: by \d+ validation"
    ) as told:
        shrink(model, task, tolerance=1e-6, epochs=0, say=lambda what, _share: said.append(what))
    assert not [what for what in said if "making" in what]
    least = float(str(told.value).split("may fall by ")[1].split()[0])
    assert 1e-6 < least < 0.1
    found = shrink(model, task, tolerance=least * 8, epochs=0)
    assert found.proof.rows[0]["loss at most"] <= least * 8


def test_it_is_not_refused_where_it_can_be_proven() -> None:
    task, model = line()
    before = outcomes(model, task, "valid")["squared error"]
    reachable(build_seeded(task), from_module(model).settle(), task, before, 400, Promise(0.5))


def likeness(outputs: Tensor, targets: Tensor) -> Tensor:
    """1 for the model itself, exactly, and between 0 and 1 for all others."""
    return torch.exp(-squared(outputs, targets))


def test_a_metric_of_which_the_original_has_all_is_not_held_for_right_or_wrong() -> None:
    """Were it right or wrong, 60 examples could prove no less than 0.049."""
    _, model = line()
    g = torch.Generator().manual_seed(1)
    alike = imitation(model, [torch.randn(20, 24, generator=g) for _ in range(10)], likeness)
    assert (outcomes(model, alike, "valid")["likeness"] == 1).all()
    found = shrink(model, alike, tolerance=0.02, epochs=0)
    assert found.proof.rows[0]["examples"] == 60
    assert found.search is not None
    assert not found.search.learned.shares
    with pytest.raises(ModelError, match=r"60 proof examples cannot prove a tolerance of 1e-09: by \d+ validation"):
        shrink(model, alike, tolerance=1e-9, epochs=0)
