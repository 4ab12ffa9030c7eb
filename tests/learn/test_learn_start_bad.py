"""Bad input to a start: one clear line or a stated skip, and the model bit for bit as it was."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm

from steelyard.claims.architectures import noise
from steelyard.errors import ModelError, RecipeError, SteelyardError, UnknownNameError
from steelyard.explain.signal import signal
from steelyard.explain.starts import compare_starts
from steelyard.init.he import He
from steelyard.learn.coordinates import coordinate_check
from steelyard.learn.mup import mup
from steelyard.learn.start import init_


class Net(nn.Module):
    """Whatever may change in a pass: statistics, dropout, random numbers, a buffer that is replaced, modes."""

    def __init__(self, outputs: int = 3, fails: bool = False) -> None:
        super().__init__()
        self.first, self.norm, self.drop = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout()
        self.unused, self.head = nn.Linear(5, 5), nn.Linear(8, outputs)
        self.register_buffer("calls", torch.zeros(()))
        self.token = nn.Parameter(torch.ones(8))
        self.fails = fails

    def forward(self, x: Tensor) -> Tensor:
        random.random(), np.random.rand(), torch.rand(1)
        self.calls = self.calls + 1
        x = self.head(self.drop(torch.relu(self.norm(self.first(x)))) + self.token)
        if self.fails:
            raise RuntimeError("two\nlines")
        return x


def state(model: nn.Module) -> dict[str, Any]:
    """Everything that a start could leave otherwise than it was."""
    return {
        "values": [(n, id(v), v.detach().clone()) for n, v in (*model.named_parameters(), *model.named_buffers())],
        "gradients": [p.grad is None for p in model.parameters()],
        "trainable": [p.requires_grad for p in model.parameters()],
        "modes": [m.training for m in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),
        "torch": torch.get_rng_state().tolist(),
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "gradients on": torch.is_grad_enabled(),
    }


def assert_same(before: dict[str, Any], after: dict[str, Any], values: bool = True) -> None:
    pairs = list(zip(before.pop("values"), after.pop("values"), strict=True))
    assert before == after
    for (name, identity, value), (other_name, other, now) in pairs:
        assert (name, identity) == (other_name, other)
        if values or name in dict(Net().named_buffers()):
            assert torch.equal(value, now), name


def ruined(model: nn.Module) -> nn.Module:
    """One parameter that cannot be written to in the middle of a start: of one memory for all elements."""
    model.head.weight = nn.Parameter(torch.zeros(1).expand(3, 8))
    return model


X = noise(16, 4)
SCHEMES = ["he", "lecun(gain=auto)", "orthogonal", "data", "auto"]
# the model, the batch, the message; for every scheme
FAILING: dict[str, tuple[Callable[[], nn.Module], Any, str]] = {
    "a model that cannot run the batch": (Net, noise(16, 5), "fails.*: RuntimeError: mat1 and mat2 shapes"),
    "a model that fails at its end": (lambda: Net(fails=True), X, r"test_learn_start_bad\.py:\d+: RuntimeError: two$"),
    "no tensor": (Net, X.numpy(), "fails.*: TypeError"),
    "a wrong number of arguments": (Net, (X, X), "fails.*: TypeError"),
    "one parameter that cannot be written": (lambda: ruined(Net()), X, "more than one element of the written-to"),
}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("case", FAILING)
def test_a_start_that_fails_leaves_everything_as_it_was(case: str, scheme: str) -> None:
    build, batch, message = FAILING[case]
    model = build()
    model.norm.eval()
    before = state(model)
    with pytest.raises((SteelyardError, RuntimeError), match=message) as caught:
        init_(model, scheme, batch)
    assert case == "one parameter that cannot be written" or isinstance(caught.value, ModelError)
    assert "\n" not in str(caught.value) or not isinstance(caught.value, SteelyardError)
    assert_same(before, state(model))


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (
            torch.zeros(16, 4),
            "the layer 'first' gives only equal values on this batch; start with real inputs that vary",
        ),
        (torch.full((16, 4), torch.nan), "'first' gives values that are not finite"),
        (torch.zeros(0, 4), "'first' gives no number on this batch"),
    ],
)
def test_a_batch_that_says_nothing_of_scale(batch: Tensor, message: str) -> None:
    model = Net()
    before = state(model)
    with pytest.raises(ModelError, match=message):
        init_(model, "data", batch)
    assert_same(before, state(model))
    table = init_(model, "lecun(gain=auto)", batch) if len(batch) else None  # the order of layers can be seen from it
    assert table is None or table.column("activation")[0] == "relu after norm"


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_start_that_succeeds_changes_parameters_alone(scheme: str) -> None:
    model = Net()
    model.norm.eval()
    before = state(model)
    table = init_(model, scheme, X)
    after = state(model)
    changed = {
        n for (n, _, a), (_, _, b) in zip(before["values"], after["values"], strict=True) if not torch.equal(a, b)
    }
    assert changed == {"first.weight", "first.bias", "unused.weight", "unused.bias", "head.weight", "head.bias"}
    assert_same(before, after, values=False)
    rows = {row["layer"]: row for row in table.rows}
    assert rows["unused"]["done"].endswith("not executed by this batch")
    assert rows["unused"].get("order") is None
    assert table.meta["kept"] == ["token"]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_layer_with_one_output(scheme: str) -> None:
    for model, batch in (
        (Net(outputs=1), X),
        (nn.Sequential(nn.Linear(4, 1), nn.Tanh(), nn.Linear(1, 1)), X),
        (nn.Sequential(nn.Conv1d(4, 1, 3), nn.ReLU(), nn.ConvTranspose1d(1, 1, 3, stride=2)), noise(3, 4, 9)),
        (nn.Sequential(nn.Conv2d(2, 2, 1, groups=2)), noise(3, 2, 4, 4)),
    ):
        init_(model, scheme, batch)
        assert all(torch.isfinite(p).all() for p in model.parameters())
        assert all(p.any() for n, p in model.named_parameters() if n.endswith("weight"))


def test_a_single_number_has_no_standard_deviation() -> None:
    model = nn.Linear(4, 1)
    before = state(model)
    with pytest.raises(ModelError, match="single number on this batch; start with a batch of more samples"):
        init_(model, "data", X[:1])
    assert_same(before, state(model))


class Whole(nn.Module):
    """An embedding and a layer of whole numbers, before a layer that can be started."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.sums, self.head = nn.Embedding(10, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 3)
        for layer in (self.embed, self.sums):
            layer.weight = nn.Parameter(torch.arange(layer.weight.numel()).view_as(layer.weight), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.sums(self.embed(x)).float())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_whole_numbers_are_kept_and_it_is_said(scheme: str) -> None:
    model = Whole()
    before = [p.clone() for p in (model.embed.weight, model.sums.weight)]
    table = init_(model, scheme, torch.arange(10))
    rows = {row["layer"]: row for row in table.rows}
    assert all(torch.equal(p, q) for p, q in zip(before, (model.embed.weight, model.sums.weight), strict=True))
    for order, name in enumerate(("embed", "sums"), 1):
        assert rows[name]["done"].startswith("weight kept: not floating point")
        assert "not executed" not in rows[name]["done"]
        assert rows[name]["order"] == order
    if scheme == "data":
        assert rows["head"]["std"] == pytest.approx(1, abs=1e-4)
        assert table.meta["furthest from target"] < 1e-4


def on_meta() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, device="meta"))


def lazily() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(4))


def lazy_buffers() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.LazyBatchNorm1d(affine=False))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    ("build", "message"),
    [
        (on_meta, r"'1.weight' is on the meta device, without values; call model.to_empty"),
        (lazily, "'1.weight' has no shape yet; run the model once"),
        (lazy_buffers, "'1.running_mean' has no shape yet; run the model once"),
        (nn.ReLU, "ReLU has no layer with weights; there is nothing to start"),
    ],
)
def test_a_model_without_values(build: Callable[[], nn.Module], message: str, scheme: str) -> None:
    model = build()
    values = model[0].weight.clone() if isinstance(model, nn.Sequential) else None
    chance = torch.get_rng_state()
    with pytest.raises(ModelError, match=message):
        init_(model, scheme, X)
    assert values is None or torch.equal(values, model[0].weight)
    assert torch.equal(chance, torch.get_rng_state())


def test_what_is_no_model_and_what_is_no_scheme() -> None:
    for model, said in (("mlp", "got str"), (None, "got NoneType"), (nn.Linear, "got the class Linear")):
        with pytest.raises(ModelError, match=f"expected a torch.nn.Module, {said}"):
            init_(model)
    for scheme in (3, None, He):
        with pytest.raises(RecipeError, match="a scheme is a name, a call such as"):
            init_(Net(), scheme)


def test_a_model_that_merges_its_weights_when_it_is_evaluated() -> None:
    """Some adapters do; a look at the order of execution must not set that off."""

    class Merging(nn.Linear):
        def train(self, mode: bool = True) -> nn.Module:
            if not mode:
                self.weight.data += 1
            return super().train(mode)

    model = Merging(4, 3)
    init_(model, "zeros", X)
    assert not model.weight.any()


# inputs by keywords


class Named(nn.Module):
    """A model that is called with keywords."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.body, self.more, self.head = nn.Linear(4, width), nn.Linear(width, width), nn.Linear(width, 3)

    def forward(self, *, values: Tensor, scale: float = 1.0) -> Tensor:
        return self.head(torch.relu(self.more(torch.relu(self.body(values * scale)))))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_dict_is_keywords(scheme: str) -> None:
    plain, named = Net(), Net()
    plain.load_state_dict(named.state_dict())
    init_(plain, scheme, X)
    table = init_(named, scheme, {"x": X})
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), named.parameters(), strict=True))
    assert table.column("order")[0] == 1
    with pytest.raises(ModelError, match="unexpected keyword argument 'y'"):
        init_(named, "auto", {"y": X})


def test_a_dict_is_keywords_wherever_a_model_is_looked_at() -> None:
    batch = {"values": X, "scale": 2.0}, torch.arange(16) % 3
    assert coordinate_check(Named, [64, 128], batch, functional.cross_entropy).meta["verdict"] == "flat"
    assert mup(Named(64), batch=batch[0], base=32).table.column("kind").count("hidden") == 1
    assert signal(Named(), batch, functional.cross_entropy).column("layer") == ["body", "more", "head"]
    table = compare_starts(Named(), ["he", "data", "auto"], batch=batch, loss=functional.cross_entropy, seeds=1)
    assert all(row["score"] > 0 for row in table.rows)


@pytest.mark.parametrize("inputs", [X.tolist(), X.numpy(), {"values": 1}, None])
def test_inputs_that_are_no_tensors_are_named(inputs: Any) -> None:
    with pytest.raises(RecipeError, match="expected a tensor, a tuple of several or a dict of keywords"):
        compare_starts(Net(), ["he"], batch=(inputs, torch.arange(16) % 3), loss=functional.cross_entropy)


# names of other libraries, what is kept, calls that share a scale


@pytest.mark.parametrize(
    ("name", "ours"),
    [("glorot", "xavier"), ("kaiming_normal", "he(distribution=normal)"), ("GlorotUniform", "xavier(distribution=uniform)"),
     ("he_uniform", "he(distribution=uniform)")],
)  # fmt: skip
def test_names_of_other_libraries_are_answered_with_ours(name: str, ours: str) -> None:
    with pytest.raises(UnknownNameError, match=re.escape(f"there is no initialiser '{name}'; did you mean '{ours}'?")):
        init_(Net(), name)
    init_(Net(), ours)


def test_weights_that_are_computed_are_the_reason_why_nothing_is_proved() -> None:
    model = nn.Sequential(weight_norm(nn.Linear(4, 8)), nn.ReLU(), nn.Linear(8, 3))
    meta = init_(model, "auto", 100 * X).meta
    assert not meta["proved"]
    assert re.search(
        "the standard deviation of '0' is .* off its target, because its weights are kept: computed from other",
        meta["not proved because"],
    )


def test_calls_that_share_a_scale_and_miss_it_are_told_in_the_table() -> None:
    class Shared(nn.Module):
        """One layer, again and again, with something between that does not keep scales."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(3):
                x = torch.sinh(self.layer(x))
            return x

    table = init_(Shared(), "data", X)
    away = table.meta["furthest from target"]
    assert away > 0.02
    assert (
        f"{away:.0%} off its target, after 2 passes: its calls share one scale, give more passes="
        in table.rows[0]["done"]
    )
    more = init_(Shared(), "data", X, passes=12)
    assert more.meta["furthest from target"] <= 0.02
    assert "off" not in more.rows[0]["done"]


def test_the_first_comparison_leaves_the_generator_of_python_as_it_was() -> None:
    code = (
        "import random, torch, steelyard as sy; random.seed(3); before = random.getstate();"
        "batch = torch.randn(16, 4), torch.arange(16) % 2;"
        "sy.compare_starts(torch.nn.Linear(4, 2), ['he'], batch=batch, loss=torch.nn.functional.cross_entropy, seeds=1);"
        "assert random.getstate() == before"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
