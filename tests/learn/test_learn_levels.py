"""Training on whole numbers of steps: what rounds, what it costs, what vanishes, and that a run goes on exactly."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from steelyard.codecs.affine import Affine
from steelyard.codecs.multiples import Multiples, step_of
from steelyard.codecs.palette import Palette
from steelyard.core.packed import Packed, nest, pack
from steelyard.edit.pack import Pack
from steelyard.errors import CodecError, ModelError, UnknownNameError, WeightsError
from steelyard.formats.module import from_module
from steelyard.learn.constrain import masked, release
from steelyard.learn.evaluate import evaluate
from steelyard.learn.levels import EntropyRate, Levels, levelled, levels_of, straight_through
from steelyard.learn.models import model as build
from steelyard.learn.penalize import penalize
from steelyard.learn.run import Run, train
from steelyard.learn.state import tensors_of
from steelyard.learn.task import Task, build_seeded
from steelyard.learn.tasks import task as find_task


@pytest.fixture(scope="module")
def task() -> Task:
    found = find_task("digits")
    return found.with_model(lambda: build("mlp", found.interface, widths=(32,)))


def test_rounding_passes_the_gradient_and_learns_the_step() -> None:
    layer = levelled(nn.Linear(3, 2, bias=False), step=0.5)
    levels, x = levels_of(layer)["weight"]
    weight = layer.weight
    step = levels.log_step.exp()
    assert torch.allclose(weight, (x / step).round() * step)
    assert weight.unique().numel() > 1
    upstream = torch.randn(2, 3)
    by_x, by_step = torch.autograd.grad((weight * upstream).sum(), [x, levels.log_step])
    assert torch.allclose(by_x, upstream)
    expected = (upstream * ((x / step).round() - x / step)).sum() * step  # Esser et al. 2020, for the logarithm
    assert by_step.item() == pytest.approx(expected.item(), rel=1e-4)


def test_numbers_stay_within_what_a_file_holds_and_the_step_grows_where_that_cuts() -> None:
    layer = levelled(nn.Linear(30, 20, bias=False), step=0.001)
    levels, x = levels_of(layer)["weight"]
    weight = layer.weight
    outside = (x / levels.log_step.exp()).abs() > 255.5
    assert 0.5 < outside.float().mean() < 1
    assert levels.numbers(x).abs().max() == 255
    by_x, by_step = torch.autograd.grad((weight - x.detach()).square().sum(), [x, levels.log_step])
    assert bool((by_x[outside] == 0).all())
    assert by_step < 0  # descent makes the step larger
    release(layer)
    assert pack(layer.weight.detach().numpy(), Multiples()).nbytes > 0


def test_the_bits_have_the_gradient_that_they_say() -> None:
    torch.manual_seed(0)
    levels = Levels(torch.randn(4, 5, dtype=torch.float64), 0.3)
    with torch.no_grad():
        for p in (levels.row, levels.column, levels.shape):
            p.normal_(0, 0.1)
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    parameters = [levels.log_step, levels.row, levels.column, levels.shape]

    def bits(*_: object) -> torch.Tensor:
        return levels.bits(x)

    assert torch.autograd.gradcheck(bits, (x, *parameters))
    huge = torch.full((4, 5), 1e30, dtype=torch.float64, requires_grad=True)
    value = levels.bits(huge)
    value.backward()
    assert bool(value.isfinite())
    assert bool(huge.grad.isfinite().all())


def test_the_expected_bits_are_about_those_of_the_coder() -> None:
    rng = np.random.default_rng(0)
    share = 0.05 * np.exp(rng.normal(0, 1, (80, 1)) + rng.normal(0, 1, 120))
    numbers = rng.choice([-1, 1], (80, 120)) * rng.geometric(0.6, (80, 120)) * (rng.random((80, 120)) < share)
    x = nn.Parameter(torch.from_numpy(numbers).float() * 0.5)
    levels = Levels(x.detach(), 0.5)
    optimizer = torch.optim.Adam([levels.row, levels.column, levels.shape], lr=1e-2)
    for _ in range(300):
        optimizer.zero_grad()
        levels.bits(x).backward()
        optimizer.step()
    stream = Multiples().encode(x.detach().numpy())["stream"]
    assert levels.bits(x).item() / 8 == pytest.approx(stream.size, rel=0.12)


def test_a_run_makes_it_small_and_whole_neurons_vanish(task: Task) -> None:
    before = build_seeded(task)
    train(task, before, epochs=15, progress=False)
    found = {}
    for strength in (0.0, 4e-4):
        model = levelled(build_seeded(task))
        model.load_state_dict({**model.state_dict(), **_latent(before)})
        run = train(task, model, epochs=25, penalties=[EntropyRate(strength, 0.5)] if strength else [],
                    weight_decay=0.0, keep="last", progress=False)  # fmt: skip
        release(model)
        assert [n for n, _ in model.named_parameters()] == ["fc1.weight", "fc1.bias", "head.weight", "head.bias"]
        arrays = [p.detach().numpy() for p in model.parameters()]
        assert all(np.abs(step_of(_snapped(a))[1]).max() <= 255 for a in arrays)
        found[strength] = sum(int((a != 0).sum()) for a in arrays), evaluate(model, task).column("value")[0]
        if strength:
            logged = run.table().column("EntropyRate(0.0004, 0.5)")
            assert logged[0] == 0
            assert max(logged) > logged[-1] > 0
            assert sum(not p.any() for p in model.fc1.weight.detach()) >= 2, "no neuron vanished"
    assert found[4e-4][0] < 0.4 * found[0.0][0]
    assert found[4e-4][1] > found[0.0][1] - 0.06


def _latent(model: nn.Module) -> dict[str, torch.Tensor]:
    named = {n.rpartition(".")[::2]: p for n, p in model.named_parameters()}
    return {f"{layer}.parametrizations.{kind}.original": p.detach() for (layer, kind), p in named.items()}


def _snapped(x: np.ndarray) -> np.ndarray:
    """x with its step rounded so that multiples of it are exact."""
    step = np.abs(x[x != 0]).min() if x.any() else 1.0
    numbers = np.rint(x / step)
    return (numbers * (np.float32(step).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)).astype(
        np.float32
    ) + 0


def test_a_run_that_is_broken_off_goes_on_exactly(task: Task, tmp_path: Path) -> None:
    def run(folder: str, **more: object) -> Run:
        model = levelled(build_seeded(task))
        return Run(task, model, epochs=4, penalties=[EntropyRate(1e-4, 0.8)], keep="last", weight_decay=0.0,
                   checkpoint=tmp_path / folder, **more)  # type: ignore[arg-type]  # fmt: skip

    with run("whole") as whole:
        for _ in whole:
            pass
    with run("broken") as broken:
        for step in broken:
            if step.index == 17:
                break
    with run("broken", resume=True) as again:
        for _ in again:
            pass
    for name, tensor in tensors_of(whole.model).items():
        assert torch.equal(tensor, tensors_of(again.model)[name]), name
    assert whole.table().column("EntropyRate(0.0001, 0.8)") == again.table().column("EntropyRate(0.0001, 0.8)")


def test_the_strength_ramps_up_and_is_full_in_a_loop_that_says_nothing() -> None:
    layer = levelled(nn.Linear(4, 3))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    penalized = penalize(layer, optimizer, EntropyRate(2.0, 0.5))
    full = penalized.value()
    assert full == pytest.approx(2 * EntropyRate(1.0).value(layer).item())
    for done, share in ((0.0, 0.0), (0.25, 0.5), (0.5, 1.0), (0.9, 1.0)):
        penalized.at(done)
        assert penalized.value() == pytest.approx(share * full)
        layer(torch.ones(1, 4)).sum().backward()
        optimizer.step()
        levels, _ = levels_of(layer)["weight"]
        assert levels.row.grad is not None
        assert bool(levels.row.grad.any()) == (share > 0)
        optimizer.zero_grad()


def test_ties_stay_ties() -> None:
    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 6))
    model[1].weight = model[0].weight
    levelled(model, "0.weight")
    assert model[0].weight.data_ptr() != 0
    assert torch.equal(model[0].weight, model[1].weight)
    assert list(levels_of(model)) == ["0.weight"]
    release(model)
    assert model[0].weight is model[1].weight


def test_what_release_leaves_is_held_by_multiples_exactly() -> None:
    torch.manual_seed(0)
    model = levelled(nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 5)), step=0.6)
    before = {name: x.detach().clone() for name, x in (("0.weight", model[0].weight), ("1.bias", model[1].bias))}
    release(model)
    held = Pack(Multiples())(from_module(model).select(lambda w: w.name in before))
    for name, x in before.items():
        assert isinstance(held[name].read(), Packed)
        assert np.array_equal(held[name].array(), dict(model.named_parameters())[name].detach().numpy())
        np.testing.assert_allclose(held[name].array(), x, rtol=2**-8)


@pytest.mark.parametrize("plan", [Affine(bits=3, axis=0), Palette(5), nest(Affine(bits=2), codes=Palette(2))])
def test_straight_through_any_codec(plan: object) -> None:
    layer = straight_through(nn.Linear(16, 4), plan)  # type: ignore[arg-type]
    latent = layer.parametrizations.weight.original
    assert layer.weight.unique().numel() < 30 < latent.unique().numel()
    (gradient,) = torch.autograd.grad(layer.weight.sum(), latent)
    assert torch.equal(gradient, torch.ones(4, 16))
    expected = layer.weight.detach().clone()
    assert torch.equal(expected, torch.from_numpy(pack(latent.detach().numpy(), plan).array())), "what a file holds"  # type: ignore[arg-type, union-attr]
    release(layer)
    assert torch.equal(layer.weight, expected)
    assert layer.bias.unique().numel() == 4


def test_training_under_a_codec_beats_rounding_afterwards(task: Task) -> None:
    model = build_seeded(task)
    train(task, model, epochs=15, progress=False)
    rounded = straight_through(build_seeded(task), Affine(bits=2))
    rounded.load_state_dict({**rounded.state_dict(), **{
        k: v for k, v in _latent(model).items() if "weight" in k}, **{k: v for k, v in model.state_dict().items() if "bias" in k}})  # fmt: skip
    after = evaluate(rounded, task, "valid").column("value")[0]
    train(task, rounded, epochs=10, progress=False)
    assert evaluate(rounded, task, "valid").column("value")[0] > after + 0.02


def test_wrong_use_is_named() -> None:
    layer = nn.Linear(4, 3)
    with pytest.raises(ModelError, match="call levelled"):
        penalize(layer, torch.optim.SGD(layer.parameters(), 0.1), EntropyRate(1.0))
    with pytest.raises(ModelError, match="chooses no trainable parameter of Linear: it has weight, bias"):
        levelled(layer, "nothing")
    for step in (0, -1.0, math.inf, "much"):
        with pytest.raises(ModelError, match="expected a number of root mean squares"):
            levelled(layer, step=step)  # type: ignore[arg-type]
    with torch.no_grad():
        layer.weight[0, 0] = math.nan
    with pytest.raises(ModelError, match="'weight' has values that are not finite"):
        levelled(layer)
    assert not hasattr(layer, "parametrizations")
    layer = levelled(nn.Linear(4, 3))
    for where in (None, "*"):
        with pytest.raises(WeightsError, match="weight is constrained already"):
            levelled(layer, where)
    for strength, ramp in ((-1.0, 0.0), (math.nan, 0.0), (1.0, 1.5)):
        with pytest.raises(ModelError, match="EntropyRate"):
            EntropyRate(strength, ramp).value(layer)
    with pytest.raises((CodecError, UnknownNameError)):
        straight_through(nn.Linear(4, 3).half(), Affine(bits=9))
    layer = straight_through(nn.Linear(4, 3), Affine(bits=4))
    with torch.no_grad():
        layer.parametrizations.weight.original[0] = math.nan
    with pytest.raises(CodecError, match="'weight': affine"):
        layer(torch.ones(1, 4))
    with pytest.raises(WeightsError, match="constrained already"):
        masked(layer, masked_of(layer))


def masked_of(layer: nn.Module) -> object:
    from steelyard.core.weights import Weights

    return Weights.of({"weight": np.ones((3, 4), np.bool_)})
