"""Signed effects against finite differences, and gradients against central differences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from steelyard.errors import ModelError
from steelyard.explain.gradients import check_gradients
from steelyard.explain.signed import signed
from steelyard.learn.task import Task

Learned = tuple[nn.Module, Task]


def test_signs_of_a_linear_model_are_those_of_its_weights(linear_tumours: Learned) -> None:
    model, task = linear_tumours
    x = torch.cat([b.inputs for b in task.batches("test", 0)])  # type: ignore[misc]
    table = signed(model, x, 1, features=task.features)
    assert table.meta["agreement"] == 1.0
    assert table.column("sign") == ["+" if w > 0 else "-" for w in model.head.weight[1]]  # type: ignore[union-attr]
    assert table.column("input") == list(task.features)


def test_signs_through_depth(mlp_digits: Learned) -> None:
    model, task = mlp_digits
    x = next(iter(task.batches("test", 0))).inputs[:64]  # type: ignore[index]
    table = signed(model, x, 3)
    assert table.meta["agreement"] >= 0.95
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_a_kinked_function_disagrees_where_it_must() -> None:
    class Valley(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x[:, :1] - 0.2).abs() - 10 * (x[:, :1] - 0.21).relu()

    x = torch.tensor([[0.205], [5.0], [-5.0]])
    table = signed(Valley(), x, 0, step=0.1)
    assert table.rows[0]["agreement"] == pytest.approx(2 / 3)
    assert table.rows[0]["positive"] == pytest.approx(1 / 3)


def test_an_input_without_effect_has_no_sign() -> None:
    class First(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, :1] * 2

    table = signed(First(), torch.randn(9, 2), 0)
    assert table.column("sign") == ["+", "0"]
    assert table.meta["agreement"] == 1.0


def test_wrong_outputs_and_names() -> None:
    with pytest.raises(ModelError, match=r"\[5, 2\]"):
        signed(nn.Linear(3, 2), torch.ones(5, 3), 2)
    with pytest.raises(ModelError, match="1 feature names"):
        signed(nn.Linear(3, 2), torch.ones(5, 3), 1, features=("a",))


def test_right_gradients_pass_and_the_model_is_untouched() -> None:
    net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.BatchNorm1d(4), nn.Linear(4, 3)).train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    batch = torch.randn(8, 5), torch.randint(3, (8,))
    table = check_gradients(net, batch, nn.functional.cross_entropy)
    assert table.meta["worst"] < 1e-5
    assert table.column("tensor") == [n for n, _ in net.named_parameters()]
    assert table.column("tried") == [20, 4, 4, 4, 12, 3]
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


class Half(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(_ctx: object, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient / 2


class Wrong(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, Half.apply(self.bias))


def test_a_wrong_backward_pass_is_named() -> None:
    table = check_gradients(Wrong(5, 3), (torch.randn(8, 5), torch.randn(8, 3)), nn.functional.mse_loss)
    errors = dict(zip(table.column("tensor"), table.column("relative error"), strict=True))
    assert errors["weight"] < 1e-6
    assert errors["bias"] == pytest.approx(0.5, abs=1e-4)


def test_a_parameter_that_is_not_used_has_no_gradient_and_no_error() -> None:
    net = nn.Linear(5, 3)
    net.spare = nn.Parameter(torch.ones(2))
    table = check_gradients(net, (torch.randn(8, 5), torch.randn(8, 3)), nn.functional.mse_loss)
    assert table.rows[-1]["relative error"] < 1e-6  # type: ignore[operator]
    with pytest.raises(ModelError, match="no trainable weight"):
        check_gradients(net.requires_grad_(False), (torch.ones(1, 5), torch.ones(1, 3)), nn.functional.mse_loss)
