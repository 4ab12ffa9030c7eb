"""Evidence is what it says: second moments predict the change of the outputs, gradients are those of autograd."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from steelyard import formats
from steelyard.core.weights import Weights
from steelyard.edit.evidence import About, Rows, check_same, hessian_of
from steelyard.errors import ModelError, SteelyardError, UnknownNameError, WeightsError
from steelyard.formats.module import from_module
from steelyard.learn.evidence import score
from steelyard.learn.task import Batch, build_seeded

from .conftest import blobs


class InputsFirst(nn.Module):
    """As transformers' Conv1D: the weight is (inputs, outputs)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 4))
        self.bias = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.reshape(-1, 5), self.weight).reshape(*x.shape[:-1], 4)


class Function(nn.Module):
    """A weight that no layer holds."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 5))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight)


class Bare(nn.Module):
    """A product from the right, and one example at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 5))

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight @ x.t()).t()


class Twice(nn.Module):
    """One weight for two calls."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x), self.one(3 * x + 1)])


LAYERS = {
    "linear": (nn.Linear(5, 4), (7, 5)),
    "linear, time": (nn.Linear(5, 4), (3, 7, 5)),
    "linear, turned": (nn.Linear(5, 4, bias=False), (7, 3, 5)),
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2), (3, 4, 12)),
    "conv2d": (nn.Conv2d(4, 6, (3, 2), padding=(1, 0)), (3, 4, 7, 6)),
    "conv2d, groups": (nn.Conv2d(4, 6, 3, groups=2), (3, 4, 7, 6)),
    "conv2d, depthwise": (nn.Conv2d(4, 4, 3, groups=4, padding="same"), (3, 4, 7, 6)),
    "conv3d": (nn.Conv3d(2, 3, 2, stride=(1, 2, 1)), (2, 2, 4, 5, 4)),
    "inputs first": (InputsFirst(), (3, 7, 5)),
    "function": (Function(), (3, 7, 5)),
    "bare": (Bare(), (7, 5)),
    "twice": (Twice(), (7, 5)),
}


def batches(shape: tuple[int, ...]) -> list[Tensor]:
    random = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=random) + 0.5 for _ in range(2)]


def predicted(rows: Rows, h: np.ndarray, d: np.ndarray) -> float:
    """The sum over outputs of the mean squared change by `d`: tr(D H Dᵀ)."""
    blocks = np.split(rows.matrix(d), rows.blocks)
    return float(sum(np.einsum("oi,ij,oj->", part, own, part) for part, own in zip(blocks, h, strict=True)))


@pytest.mark.parametrize("name", LAYERS)
def test_the_hessian_predicts_how_far_outputs_move(name: str) -> None:
    layer, shape = LAYERS[name]
    if name == "linear, turned":
        data = [x.transpose(0, 1) for x in batches(shape)]
    else:
        data = batches(shape)
    evidence = score(layer, data, "hessian", precision="float64")
    ((key, weight),) = [(n, p) for n, p in layer.named_parameters() if n.endswith("weight")]
    rows, h = hessian_of(evidence, from_module(layer)[key])
    d = torch.randn(weight.shape, generator=torch.Generator().manual_seed(9)) * 0.1
    with torch.no_grad():
        before = torch.cat([layer(x) for x in data])
        weight += d
        after = torch.cat([layer(x) for x in data])
        weight -= d
    outputs = rows.matrix(d.numpy()).shape[0]
    actual = float((after - before).double().square().sum()) / (before.numel() / outputs)
    assert actual == pytest.approx(predicted(rows, h, d.numpy()), rel=2e-4)


@pytest.mark.parametrize("name", LAYERS)
def test_norms_and_moments_are_the_diagonal_of_the_hessian(name: str) -> None:
    layer, shape = LAYERS[name]
    data = batches(shape)
    key = "one.weight" if name == "twice" else "weight"
    weight = from_module(layer)[key]
    rows, h = hessian_of(score(layer, data, "hessian", precision="float64"), weight)
    norms = score(layer, data, "norms", precision="float64")[key].array()
    mean, square = score(layer, data, "moments", precision="float64")[key].array()
    every = np.broadcast_to(norms, weight.spec.shape)
    diagonal = np.repeat(np.stack([np.diag(own) for own in h]), rows.matrix(every).shape[0] // rows.blocks, axis=0)
    assert rows.matrix(every) ** 2 == pytest.approx(diagonal, rel=1e-6)
    assert square == pytest.approx(norms**2, rel=1e-6)
    assert (mean**2 <= square * (1 + 1e-9)).all()


@pytest.mark.parametrize("same", [True, False])
def test_packed_attention_has_the_inputs_of_queries_keys_and_values(same: bool) -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    q = torch.randn(2, 3, 8)
    k, v = (q, q) if same else (torch.randn(2, 5, 8), torch.randn(2, 5, 8) + 1)
    evidence = score(attention, [(q, k, v)], "hessian", precision="float64")
    found = evidence["in_proj_weight"].array()
    expected = [x.reshape(-1, 8).double() for x in ((q,) if same else (q, k, v))]
    assert found == pytest.approx(np.stack([(x.T @ x / len(x)).numpy() for x in expected]), rel=1e-5)
    norms = score(attention, [(q, k, v)], "norms")["in_proj_weight"].array()
    assert norms.shape == ((1, 8) if same else (24, 8))
    with torch.no_grad():
        attention.out_proj.weight.copy_(torch.eye(8))
        attention.out_proj.bias.zero_()
        seen = attention.eval()(q, k, v)[0].reshape(-1, 8).double()
    assert evidence["out_proj.weight"].array()[0] == pytest.approx((seen.T @ seen / len(seen)).numpy(), rel=1e-4)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embed(tokens).tanh())


def test_a_tied_weight_counts_both_of_its_uses() -> None:
    net, tokens = Tied(), torch.tensor([[0, 1, 1, 5]])
    x = net.embed.weight.detach()[tokens[0]].tanh().double().numpy()
    often = np.array([1, 2, 0, 0, 0, 1]) / 4
    found = score(net, [tokens], "norms", precision="float64")
    assert dict(found.ties) == {"head.weight": "embed.weight"}
    assert found["head.weight"].array() ** 2 == pytest.approx(often[:, None] + (x**2).mean(0), rel=1e-5)
    h = score(net, [tokens], "hessian", precision="float64")["embed.weight"].array()[0]
    assert h == pytest.approx(x.T @ x / 4 + np.eye(4) / 6, rel=1e-5)


def test_an_embedding_alone_is_weighed_by_lookups() -> None:
    table = nn.Embedding(5, 3)
    norms = score(table, [torch.tensor([[0, 0, 4]])], "norms")["weight"].array()
    assert (norms**2).ravel().tolist() == pytest.approx([2 / 3, 0, 0, 0, 1 / 3])
    assert (
        score(table, [torch.tensor([1])])["weight"].array().tolist()
        == (np.eye(3, dtype=np.float32)[None] / np.float32(5)).tolist()
    )


def test_recurrent_weights_have_the_inputs_of_every_step() -> None:
    rnn = nn.LSTM(4, 3, batch_first=True)
    x = torch.randn(2, 5, 4)
    found = score(rnn, [x], "hessian", precision="float64")
    flat = x.reshape(-1, 4).double()
    assert found["weight_ih_l0"].array()[0] == pytest.approx((flat.T @ flat / 10).numpy(), rel=1e-5)
    states = torch.cat([torch.zeros(2, 1, 3), rnn(x)[0][:, :-1]], 1).reshape(-1, 3).detach().double()
    assert found["weight_hh_l0"].array()[0] == pytest.approx((states.T @ states / 10).numpy(), rel=1e-4)


def test_gradients_are_those_of_autograd_example_by_example() -> None:
    task = blobs()
    model = build_seeded(task).eval()
    wanted = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    squares = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    count = 0
    for batch in task.batches("train", 0):
        for i in range(len(batch)):
            loss = task.loss(model(batch.inputs[i : i + 1]), batch.targets[i : i + 1]).mean()
            for (name, _), g in zip(
                model.named_parameters(), torch.autograd.grad(loss, [*model.parameters()]), strict=True
            ):
                wanted[name] += g
                squares[name] += g**2
            count += 1
    fisher, gradient = score(model, task, "fisher"), score(model, task, "gradient")
    assert list(fisher) == list(wanted)
    for name in wanted:
        assert gradient[name].array() == pytest.approx((wanted[name] / count).numpy(), abs=1e-6)
        assert fisher[name].array() == pytest.approx((squares[name] / count).numpy(), rel=1e-4, abs=1e-9)
    one = score(model, task, "taylor", batches=1)["0.weight"].array()
    g = score(model, task, "gradient", batches=1)["0.weight"].array()
    assert one == pytest.approx((g * model[0].weight.detach().numpy()) ** 2, rel=1e-4, abs=1e-12)


def test_an_example_of_weight_two_counts_twice() -> None:
    x, y = torch.randn(3, 5), torch.tensor([0, 1, 2])
    task = blobs()
    model = build_seeded(task)

    def measured(batch: Batch) -> np.ndarray:
        from dataclasses import replace

        return score(model, replace(task, batches=lambda split, epoch: [batch]), "fisher")["0.weight"].array()

    weighted = measured(Batch(x, y, torch.tensor([2.0, 1.0, 1.0])))
    repeated = measured(Batch(torch.cat([x[:1], x]), torch.cat([y[:1], y])))
    assert weighted == pytest.approx(repeated, rel=1e-5)


def test_the_model_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Conv1d(2, 3, 2), nn.BatchNorm1d(3), nn.Dropout(0.5)).train()
    model[0].weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    for kind in ("norms", "fisher"):
        score(model, [torch.randn(4, 2, 5)], kind, loss=lambda m, x: m(x).square().mean())
        state = torch.get_rng_state() if kind == "norms" else state
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert not model[0].weight.requires_grad
    assert all(p.grad is None for p in model.parameters())


def test_evidence_survives_a_file(tmp_path) -> None:
    net = Tied()
    evidence = score(net, [torch.tensor([[0, 1, 2]])], "hessian")
    formats.write(evidence, tmp_path / "e.safetensors")
    again = formats.open(tmp_path / "e.safetensors")
    assert About.of(again) == About.of(evidence)
    assert About.of(again).kind == "hessian"
    assert dict(again.ties) == {"head.weight": "embed.weight"}
    assert again["embed.weight"].array().tobytes() == evidence["embed.weight"].array().tobytes()
    assert json.loads(again.meta["evidence"])["examples"] == 1


def test_evidence_of_another_training_is_refused_and_that_of_rounded_weights_is_not() -> None:
    task = blobs()
    model, other = build_seeded(task, 0), build_seeded(task, 1)
    about = About.of(score(model, task, "hessian"))
    item = from_module(model)["0.weight"]
    x = item.array()
    check_same(about, item, x)
    check_same(about, item, np.where(np.abs(x) > np.quantile(np.abs(x), 0.8), x, 0))
    check_same(about, item, np.sign(x))
    check_same(about, item, x.astype(np.float16))
    for wrong in (from_module(other)["0.weight"].array(), -x, np.tile(x, 2)):
        with pytest.raises(WeightsError, match=r"'0.weight' was measured on other weights"):
            check_same(about, item, wrong)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"kind": "hesian"}, UnknownNameError, "did you mean 'hessian'"),
        ({"data": []}, ModelError, "no examples"),
        ({"data": torch.ones(2, 5)}, ModelError, "put it in a list"),
        ({"batches": 0}, ModelError, "batches=0"),
        ({"where": "nothing*"}, ModelError, "nothing chooses a weight matrix"),
        ({"kind": "fisher"}, ModelError, "need a loss"),
        ({"data": [torch.ones(2, 9)]}, ModelError, "Linear, called with a batch, fails"),
        ({"data": [torch.full((2, 5), float("nan"))]}, ModelError, "'weight' is not finite"),
        ({"precision": "half"}, UnknownNameError, "precision"),
    ],
)
def test_what_is_wrong_is_named(change: dict, error: type[SteelyardError], says: str) -> None:
    settings = {"data": [torch.ones(2, 5)], **change}
    with pytest.raises(error, match=says):
        score(nn.Linear(5, 4), settings.pop("data"), **settings)


@pytest.mark.parametrize("kind", ["norms", "moments", "hessian", "gradient", "fisher"])
def test_the_weight_that_is_not_finite_is_named_and_not_what_follows_it(kind: str) -> None:
    net = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    with torch.no_grad():
        net[1].weight[2, 1] = float("nan")
    with pytest.raises(ModelError, match=r"has weights that are not finite, in '1.weight': repair them"):
        score(net, [torch.ones(2, 5)], kind, loss=lambda m, x: m(x).square().mean())
    assert np.isfinite(score(net, [torch.ones(2, 5)], "norms", where="0.*")["0.weight"].array()).all()


def test_a_chosen_weight_that_is_never_used_is_named() -> None:
    net = nn.ModuleDict({"used": nn.Linear(5, 4), "idle": nn.Linear(5, 4)})
    net.forward = net["used"].forward  # type: ignore[method-assign]
    assert list(score(net, [torch.ones(2, 5)])) == ["used.weight"]
    with pytest.raises(ModelError, match=r"by 'idle.weight' in these batches"):
        score(net, [torch.ones(2, 5)], where="idle*")


def test_evidence_of_another_kind_is_refused() -> None:
    net = nn.Linear(5, 4)
    with pytest.raises(WeightsError, match=r"expected evidence of the kind hessian, got 'norms'"):
        hessian_of(score(net, [torch.ones(2, 5)], "norms"), from_module(net)["weight"])
    with pytest.raises(WeightsError, match="has no tensor 'weight'"):
        hessian_of(Weights([]), from_module(net)["weight"])
    with pytest.raises(WeightsError, match=r"expected \[blocks, 5, 5\]"):
        hessian_of(Weights.of({"weight": np.eye(4)}), from_module(net)["weight"])
