"""What is wrong in the user's own code or data is said in one line, with the place; it is no defect of ours."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from steelyard.errors import ModelError, RecipeError, UnknownNameError
from steelyard.learn.calling import calling
from steelyard.learn.evaluate import evaluate
from steelyard.learn.finetune import find_head
from steelyard.learn.models import model
from steelyard.learn.run import Run, train
from steelyard.learn.task import Batch, Task, build_seeded
from steelyard.learn.tasks import task as find_task

X, Y = torch.zeros(4, 5), torch.arange(4) % 3
HERE = os.path.basename(__file__)


def failing(error: BaseException) -> Callable[..., Any]:
    def fail(*_: object) -> Any:
        raise error

    return fail


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (Batch({"ids": X}, Y), "gives inputs that are a dict: expected a Batch of a tensor, or a tuple of tensors"),
        (Batch((X, 3), Y), r"inputs that are a tuple of 2 \(Tensor, int\)"),
        (Batch([X], Y), r"inputs that are a list of 1 \(Tensor\)"),
        (Batch(X, 3), "targets that are a int"),
        (Batch(X, torch.tensor(3)), "targets that are a tensor without axes"),
        (Batch(X, Y, 2.0), "weights that are a float"),
        ((X, Y, X), r"gives a tuple of 3 \(Tensor\): expected a Batch"),
        ({"x": X}, "gives a dict: expected a Batch"),
        (None, "gives a NoneType"),
        (SimpleNamespace(inputs=X, targets=Y), "gives a SimpleNamespace"),
    ],
)
def test_a_batch_of_another_kind_is_named(task: Task, given: Any, said: str) -> None:
    wrong = replace(task, batches=lambda split, epoch: [given])
    for use in (lambda: train(wrong, progress=False), lambda: evaluate(build_seeded(task), wrong)):
        with pytest.raises(ModelError, match=f"the task 'blobs' .*{said}") as caught:
            use()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("pair", [tuple, list])
def test_plain_pairs_are_batches(task: Task, pair: type) -> None:
    def batches(split: Any, epoch: int) -> list[Any]:
        return [pair((b.inputs, b.targets)) for b in task.batches(split, epoch)]

    a, b = (train(t, epochs=2, progress=False) for t in (task, replace(task, batches=batches)))
    assert a.history().column("valid loss") == b.history().column("valid loss")
    assert len(replace(task, batches=batches).batches("train", 0)) == 5


def test_a_served_task_stays_as_it_is(task: Task) -> None:
    own = replace(task, batches=lambda split, epoch: iter([(X, Y)]))
    assert replace(own, name="other").batches is own.batches
    assert find_task("digits").batches.sizes["train"] == 1078  # ours are not wrapped


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(7, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


class Two(nn.Linear):
    def __init__(self) -> None:
        super().__init__(5, 3)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * mask


class Detached(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).detach()


def late(split: object, epoch: object) -> Any:
    yield X, Y
    raise KeyError("label")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"build": Wide}, rf"Wide, called with \(20, 5\), fails, \S*{HERE}:\d+: RuntimeError: mat1 and mat2"),
        ({"build": Two}, r"Two, called with \(20, 5\), fails: TypeError: .*missing 1 required positional argument"),
        ({"build": lambda: Detached(5, 3)}, "the gradient of the loss fails: RuntimeError: element 0"),
        ({"build": failing(OSError("no\nweights"))}, rf"building the model .*{HERE}:\d+: OSError: no$"),
        ({"batches": failing(KeyError("y"))}, rf"serving the train batches of .* fails, \S*{HERE}:\d+: KeyError: 'y'"),
        ({"batches": late}, rf"serving the train batches of .* fails, \S*{HERE}:\d+: KeyError: 'label'"),
        ({"batches": lambda split, epoch: 3}, "serving the train batches .*TypeError: 'int' object is not iterable"),
        ({"loss": failing(ValueError())}, rf"'loss', called with \(20, 3\) and \(20,\), fails, \S*{HERE}:\d+: Val"),
        ({"metrics": {"f1": failing(ZeroDivisionError("x"))}}, "'f1', called with .*: ZeroDivisionError: x"),
    ],
)
def test_users_code_that_fails_is_told_with_its_place(task: Task, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError, match=said) as caught:
        train(replace(task, **changes), epochs=1, progress=False)
    assert caught.value.__cause__ is not None
    assert "\n" not in str(caught.value)


def test_finding_the_head_tells_the_same(task: Task) -> None:
    with pytest.raises(ModelError, match="Wide, called with"):
        find_head(Wide(), task)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RecipeError("x"), MemoryError(), BrokenPipeError()])
def test_what_is_no_failure_of_users_code_passes_through(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, calling("the model"):
        raise error
    assert caught.value is error


def test_the_boundary_costs_next_to_nothing() -> None:
    boundary = calling("the model")
    start = time.perf_counter()
    for _ in range(10_000):
        with boundary:
            pass
    assert time.perf_counter() - start < 0.5  # 50 us each at the very most; it takes less than one


def test_users_factories_that_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own_failing.py").write_text(
        "from torch import nn\ndef net(): return nn.Linear('a', 2)\ndef made(n=0): return 1 / n\n"
    )
    with pytest.raises(ModelError, match=r"own_failing:net fails, .*own_failing.py:2: TypeError: "):
        model("own_failing:net", find_task("digits").interface)
    with pytest.raises(ModelError, match=r"own_failing:made fails, .*own_failing.py:3: ZeroDivisionError: division"):
        find_task("own_failing:made")


def test_a_factory_may_take_an_option_called_name_or_interface(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_named.py").write_text(
        "from dataclasses import replace\nimport steelyard as sy\nfrom torch import nn\n"
        "def made(name='mine'): return replace(sy.task('digits'), name=name)\n"
        "def net(given, name='', interface=3): return nn.Linear(64, interface)\n"
    )
    assert find_task("own_named:made", name="other").name == "other"
    assert model("own_named:net", find_task("digits").interface, name="x", interface=5).out_features == 5


def test_names_of_a_huge_module_are_not_all_listed() -> None:
    with pytest.raises(ModelError, match=r"no 'zzzz' in it; known are (\w+, ){12}\.\.\.$"):
        find_task("torch:zzzz")
    with pytest.raises(UnknownNameError, match=r"known are a, b$"):
        raise UnknownNameError("x", "zzz", "ab")


def spoiled(task: Task, what: str) -> Task:
    def batches(split: Any, epoch: int) -> list[Batch]:
        found = list(task.batches(split, epoch))
        if split == "train":
            x, y = found[2].inputs.clone(), found[2].targets.double()
            (x if what == "inputs" else y)[:2] = torch.nan
            found[2] = Batch(x, y if what == "targets" else found[2].targets)
        return found

    def squared(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return (outputs[:, 0] - targets).square()

    return replace(task, batches=batches, **({"loss": squared} if what == "targets" else {}))


@pytest.mark.parametrize(
    ("what", "said"),
    [("inputs", "10 of the 40 numbers in the inputs of its batch"), ("targets", "2 of the 8 numbers in the targets")],
)
def test_a_loss_that_is_not_finite_because_of_the_data(task: Task, what: str, said: str) -> None:
    with pytest.raises(
        ModelError,
        match=rf"step 2 \(batch 2 of epoch 0\): the loss is nan: {said}.* not finite, the first in example .*: mend the data",
    ):
        train(spoiled(task, what), epochs=1, progress=False)


def test_a_loss_that_is_not_finite_because_of_the_weights(task: Task) -> None:
    net = build_seeded(task)
    nn.init.constant_(net[3].bias, torch.nan)
    with pytest.raises(ModelError, match=r"step 0 .*starts with weights that are not finite, in 3\.bias"):
        train(task, net, progress=False)

    def overflow(net: nn.Module) -> None:
        with torch.no_grad():
            net[0].weight[0] = torch.inf

    with pytest.raises(ModelError, match=r"step 1 .*not finite any more, in 0\.weight: lower the learning rate"):
        train(task, after_step=overflow, progress=False)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rate": float("inf")}, "rate=inf: expected a positive rate"),
        ({"rate": float("nan")}, "rate=nan"),
        ({"rate": "1e-3"}, "rate='1e-3'"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1: expected a finite number, 0 or more"),
        ({"weight_decay": float("nan")}, "weight_decay=nan"),
        ({"epochs": 1.5}, "epochs=1.5"),
    ],
)
def test_numbers_of_a_run_that_make_no_sense(task: Task, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError, match=said):
        Run(task, **options)
