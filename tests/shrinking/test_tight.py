"""Training for size: within the tolerance on validation data, never looking at the test split, exact in the file."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from steelyard import formats
from steelyard.codecs.multiples import Multiples, costs
from steelyard.errors import ModelError
from steelyard.formats.module import from_module, into_module
from steelyard.learn.levels import levelled, levels_of
from steelyard.learn.models import model
from steelyard.learn.run import train
from steelyard.learn.task import build_seeded
from steelyard.learn.tasks import task as find_task
from steelyard.shrinking.deep import headline
from steelyard.shrinking.tight import Tight, tighten, weigh

QUICK = Tight(tolerance=0.03, prices=(2e-5, 1e-4, 1e-2), epochs=10, more_epochs=8, tune_epochs=2)


SHORT = Tight(tolerance=0.05, prices=(1e-4, 1e-3), epochs=3, more_epochs=2, tune_epochs=1)


@pytest.fixture(scope="module")
def trained():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = find_task("digits")
    task = found.with_model(lambda: model("mlp", found.interface, widths=(32,)))
    yield task, train(task, build_seeded(task), epochs=20, progress=False).model
    torch.set_num_threads(threads)


def test_the_stages_keep_the_promise_on_validation_data(blind, trained, tmp_path: Path):
    task, net = trained
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    stages = {stage.name: stage for stage in tighten(net, blind(task), QUICK)}
    assert list(stages) == ["price 2e-05", "price 0.0001", "price 0.01", "weighed", "coded"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    original = headline(net, task, "valid")
    assert original - stages["price 0.0001"].valid <= QUICK.tolerance < original - stages["price 0.01"].valid
    assert "of price 0.0001" in stages["weighed"].note, "the last price that was borne"
    assert original - stages["weighed"].valid <= QUICK.tolerance
    sizes = [sum(w.read().nbytes for w in stage.weights.values()) for stage in stages.values()]
    assert sizes[0] > sizes[1] > sizes[2]
    path = tmp_path / "small.safetensors"
    size = formats.write(stages["coded"].weights, path)
    assert size < from_module(net).nbytes / 12
    again = build_seeded(task)
    into_module(formats.open(path), again)
    assert headline(again, task, "valid") == pytest.approx(stages["coded"].valid)
    assert list(formats.open(path)) == list(before)


def test_the_weighing_saves_bits_and_prefers_what_does_least_harm(trained):
    task, net = trained
    student = levelled(build_seeded(task), step=0.7)
    values = net.state_dict()
    for name, (_, latent) in levels_of(student).items():
        with torch.no_grad():
            latent.copy_(values[name])
    coded = _sizes(student)
    before = {name: levels.numbers(latent).clone() for name, (levels, latent) in levels_of(student).items()}
    accuracy = headline(student, task)
    moved = weigh(student, task, 3e-5)
    assert moved > 50
    after = {name: levels.numbers(latent) for name, (levels, latent) in levels_of(student).items()}
    for name in before:
        assert bool((after[name].abs() <= before[name].abs()).all())
    assert _sizes(student) < 0.97 * coded
    assert headline(student, task) > accuracy - 0.05
    assert costs(after["fc1.weight"].numpy())[0].sum() < costs(before["fc1.weight"].numpy())[0].sum()


def _sizes(student) -> int:
    numbers = [levels.numbers(latent).numpy() + np.float32(0) for levels, latent in levels_of(student).values()]
    return sum(Multiples().encode(x)["stream"].size for x in numbers)


def test_a_model_with_norms_and_convolutions_and_wrong_settings(trained):
    task, _ = trained
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
    *_, last = tighten(net, task, replace(QUICK, prices=(1e-4,), epochs=2, tune_epochs=0))
    held = {name: weight.scheme for name, weight in last.weights.items()}
    assert held["0.weight"].codec == Multiples()
    assert held["1.running_mean"] is None
    assert last.weights["1.weight"].spec.dtype.name in ("float16", "float32")
    with pytest.raises(ModelError, match="chooses no trainable parameter"):
        list(tighten(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64)), task, QUICK))
    for wrong in ({"prices": ()}, {"prices": (2e-6, 1e-6)}, {"epochs": 0}, {"tolerance": -1.0}, {"prices": (-1.0,)}):
        with pytest.raises(ModelError, match="expected"):
            replace(QUICK, **wrong)


@pytest.fixture(scope="module")
def small():
    found = find_task("breast-cancer")
    task = found.with_model(lambda: model("mlp", found.interface, widths=(16,)))
    return task, train(task, build_seeded(task), epochs=3, progress=False).model


def _bytes(stages, folder: Path) -> list[bytes]:
    found = []
    for stage in stages:
        formats.write(stage.weights, folder / "stage.safetensors")
        found.append((folder / "stage.safetensors").read_bytes())
    return found


def test_it_goes_on_from_the_step_at_which_it_was_broken_off(small, tmp_path: Path):
    task, net = small
    steps: list[int] = []
    whole = _bytes(tighten(net, task, SHORT, progress=lambda run: steps.append(1)), tmp_path)
    assert len(whole) == 4
    done: list[int] = []

    def broken(_run):
        done.append(1)
        if len(done) % 25 == 0:
            raise KeyboardInterrupt  # within a step, as a kill would be: the run cannot keep its state then

    for _ in range(len(steps)):
        try:
            found = _bytes(tighten(net, task, SHORT, checkpoint=tmp_path / "kept", progress=broken), tmp_path)
        except KeyboardInterrupt:
            continue
        break
    assert found == whole
    epoch, breaks = len(list(task.batches("train", 0))), len(done) // 25
    assert len(steps) + breaks <= len(done) <= len(steps) + breaks * epoch, "an epoch at most is made twice"
    again = _bytes(tighten(net, task, SHORT, checkpoint=tmp_path / "kept", progress=broken), tmp_path)
    assert again == whole
    assert not list((tmp_path / "kept").glob("*under-way*"))


def test_the_folder_of_another_training_is_refused(small, tmp_path: Path):
    task, net = small
    next(tighten(net, task, SHORT, checkpoint=tmp_path))
    with pytest.raises(ModelError, match="another search, which differs in its settings"):
        next(tighten(net, task, replace(SHORT, epochs=4), checkpoint=tmp_path))


def test_it_learns_from_the_teacher_that_is_given(small, tmp_path: Path):
    task, net = small
    stubborn = build_seeded(task)
    with torch.no_grad():
        for parameter in stubborn.parameters():
            parameter.zero_()
        list(stubborn.parameters())[-1][0] = 9.0  # it says class 0 whatever it sees
    student = build_seeded(task)
    found = next(tighten(net, task, replace(SHORT, epochs=12), teacher=stubborn, checkpoint=tmp_path))
    into_module(found.weights, student)
    said = torch.cat([student(batch.inputs).argmax(-1) for batch in task.batches("valid", 0)])
    assert (said == 0).float().mean() > 0.95, "true is that of four in ten"
    with pytest.raises(ModelError, match="another search, which differs in its teacher"):
        next(tighten(net, task, replace(SHORT, epochs=12), checkpoint=tmp_path))


def test_prices_rise_while_they_are_borne_and_then_close_in():
    told = Tight(prices=(1.0, 4.0, 16.0, 64.0), rungs=5)
    tried: dict[float, bool] = {}
    while (price := told.price_after(tried)) is not None:
        tried[price] = price < 10
    assert list(tried) == [1, 4, 16, 8, pytest.approx(8 * 2**0.5)]
    assert told.price_after({1.0: False}) == 0.25
    assert replace(told, rungs=0).price_after({1.0: True, 4.0: False}) is None
    assert replace(told, more_epochs=0).price_after({1.0: True}) is None
