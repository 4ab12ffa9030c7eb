"""Constraints while training: zeros stay exactly zero, shared stays equal, gradients sum, and all ends plain."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from steelyard.core.weights import Weights
from steelyard.core.where import where
from steelyard.errors import UnknownNameError, WeightsError
from steelyard.formats.module import from_module
from steelyard.learn.constrain import Shared, masked, release, shared
from steelyard.learn.models import model
from steelyard.learn.run import train
from steelyard.learn.seeding import seeded
from steelyard.learn.task import Interface, Task, build_seeded


def half(net: nn.Module) -> Weights:
    random = np.random.default_rng(0)
    chosen = from_module(net).select(where("*.weight", ndim=2))
    return Weights.of({name: random.random(w.spec.shape) < 0.5 for name, w in chosen.items()})


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "rmsprop"])
def test_pruned_connections_stay_exactly_zero_and_the_others_learn(task: Task, optimizer: str) -> None:
    net = build_seeded(task)
    names = list(from_module(net))
    masks = half(net)
    before = from_module(net).arrays()
    masked(net, masks)
    run = train(task, net, optimizer=optimizer, epochs=3, rate=0.01, weight_decay=0.1, progress=False, keep="last")
    assert run.history().column("valid loss")[-1] < run.history().column("valid loss")[0]
    release(net)
    after = from_module(net)
    assert list(after) == names
    for name, mask in masks.items():
        values, kept = after[name].array(), mask.array()
        assert not values[~kept].any()
        assert not np.signbit(values[~kept]).any()
        assert np.all(values[kept] != before[name][kept])


def test_the_gradient_of_a_codebook_is_the_sum_over_its_weights() -> None:
    with seeded(0):
        net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 3))
        x = torch.randn(5, 1, 4, 4)
    random = np.random.default_rng(0)
    levels = np.float32([-0.5, 0.0, 0.25, 1.0])
    weights = Weights.of(
        {n: random.choice(levels, w.spec.shape) for n, w in from_module(net).items() if w.spec.shape[1:]}
    )
    plain = copy.deepcopy(net)
    with torch.no_grad():
        for name, weight in weights.items():
            plain.get_parameter(name).copy_(torch.from_numpy(weight.array()))
    shared(net, weights)
    outputs = net(x)
    assert torch.equal(outputs, plain(x))
    outputs.square().sum().backward()
    plain(x).square().sum().backward()
    for index in (0, 2):
        codebook = net[index].parametrizations.weight.original
        assert codebook.tolist() == [-0.5, 0.25, 1.0]  # zero is no entry: it is not trained
        gradient, values = plain[index].weight.grad, plain[index].weight
        summed = torch.stack([gradient[values == level].sum() for level in codebook.detach()])
        assert torch.allclose(codebook.grad, summed, rtol=1e-5, atol=1e-5)


def test_shared_weights_stay_shared_zeros_stay_zero_and_release_is_exact(task: Task) -> None:
    net = build_seeded(task)
    random = np.random.default_rng(0)
    levels = np.float32([-0.3, 0.0, 0.1, 0.4])
    given = {n: random.choice(levels, w.spec.shape) for n, w in from_module(net).items() if len(w.spec.shape) == 2}
    shared(net, Weights.of(given))
    run = train(task, net, epochs=4, rate=0.02, progress=False)
    assert run.history().column("valid loss")[-1] < run.history().column("valid loss")[0]
    held = {name: net[int(name[0])].weight.detach().clone().numpy() for name in given}
    release(net)
    after = from_module(net).arrays()
    for name, values in given.items():
        assert after[name].tobytes() == held[name].tobytes()
        assert not after[name][values == 0].any()
        for level in levels[[0, 2, 3]]:
            assert len(np.unique(after[name][values == level])) == 1
        assert (after[name] != values).any()
    train(task, net, epochs=1, progress=False)  # a plain module again


def test_palettes_are_shared_and_what_is_plain_stays_free(task: Task) -> None:
    from steelyard.edit.share import Share

    net = build_seeded(task)
    weights = Share(4)(from_module(net)).settle()
    shared(net, weights)
    assert net[0].parametrizations.weight.original.shape == (4,)
    assert isinstance(net[0].bias, nn.Parameter)
    assert np.array_equal(net[0].weight.detach().numpy(), weights["0.weight"].array())
    release(net)
    plain = from_module(net).settle()
    shared(net, plain.select(where("3.*")), where("3.weight"))
    assert net[3].parametrizations.weight.original.ndim == 1


@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
def test_recurrent_layers_use_their_constrained_weights(cell: str) -> None:
    interface = Interface((5, 3), 2)
    with seeded(0):
        net = model("rnn", interface, cell=cell, hidden=6)
        x = torch.randn(4, 5, 3)
    name = "recurrent.weight_hh_l0"
    masks = half(net)
    masks = Weights.of({name: np.random.default_rng(0).random(net.recurrent.weight_hh_l0.shape) < 0.5})
    plain = copy.deepcopy(net)
    mask = torch.from_numpy(masks[name].array())
    with torch.no_grad():
        plain.recurrent.weight_hh_l0.mul_(mask)
    masked(net, masks)
    for _ in range(2):
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (net, plain)]
        for m, optimizer in zip((net, plain), optimizers, strict=True):
            m(x).square().sum().backward()
            if m is plain:
                m.recurrent.weight_hh_l0.grad.mul_(mask)
            optimizer.step()
            optimizer.zero_grad()
    assert torch.allclose(net(x), plain(x), atol=1e-6)
    twin = copy.deepcopy(net)
    release(net)
    assert torch.allclose(net(x), twin(x))
    assert not net.recurrent.weight_hh_l0[~mask].any()
    assert torch.allclose(net.recurrent.weight_hh_l0, plain.recurrent.weight_hh_l0, atol=1e-6)
    assert not net.recurrent._forward_hooks
    assert all(w is p for w, p in zip(net.recurrent._flat_weights, net.recurrent.parameters(), strict=True))
    net.load_state_dict({n: t * 0 for n, t in net.state_dict().items()})
    assert not net(x).any()  # the layer computes with its own parameters again


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(x))


@pytest.mark.parametrize("kind", ["masked", "shared"])
def test_ties_stay_ties(kind: str) -> None:
    net = Tied()
    mask = np.random.default_rng(0).random((7, 4)) < 0.6
    if kind == "masked":
        masked(net, Weights.of({"head.weight": mask}))
    else:
        shared(net, Weights.of({"embed.weight": np.where(mask, 0.5, 0).astype(np.float32)}))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    assert len(optimizer.param_groups[0]["params"]) == 1
    x = torch.arange(7)
    nn.functional.cross_entropy(net(x), x).backward()
    optimizer.step()
    before = net(x).detach()
    release(net)
    assert net.head.weight is net.embed.weight
    assert not net.embed.weight.detach().numpy()[~mask].any()
    assert torch.equal(net(x), before)


def test_other_parametrizations_are_left_alone() -> None:
    net = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), nn.Linear(3, 2))
    masked(net, Weights.of({"1.weight": np.ones((2, 3), bool)}))
    release(net)
    assert "0.parametrizations.weight.original0" in dict(net.named_parameters())
    assert "1.weight" in dict(net.named_parameters())


def test_wrong_names_shapes_and_repetitions_are_refused() -> None:
    net = nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(UnknownNameError, match=r"did you mean '0.weight'"):
        masked(net, Weights.of({"0.wieght": np.ones((2, 3), bool)}))
    with pytest.raises(WeightsError, match=r"0.weight: the model has \[2, 3\], given is \[3, 2\]"):
        masked(net, Weights.of({"0.weight": np.ones((3, 2), bool)}))
    masked(net, Weights.of({"0.weight": np.ones((2, 3), bool)}))
    with pytest.raises(WeightsError, match="release the model first"):
        masked(net, Weights.of({"0.weight": np.ones((2, 3), bool)}))
    with pytest.raises(WeightsError, match="tied to a parameter that is also given"):
        masked(Tied(), Weights.of({n: np.ones((7, 4), bool) for n in ("embed.weight", "head.weight")}))


def test_the_gradient_of_a_codebook_does_not_depend_on_the_threads():
    """The order of a sum decides its last bits, and bits decide whether a run can be repeated."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(16, (128, 1024), generator=generator)
    scale = torch.randn(codes.shape, generator=generator)
    threads, found = torch.get_num_threads(), set()
    try:
        for count in (1, 2, 2, 2, 2, 2):
            torch.set_num_threads(count)
            codebook = torch.linspace(-1, 1, 16, requires_grad=True)
            step = Shared(codebook.detach(), codes, codes != 3)
            (step(codebook) * scale).sum().backward()
            found.add(codebook.grad.numpy().tobytes())
    finally:
        torch.set_num_threads(threads)
    assert len(found) == 1
