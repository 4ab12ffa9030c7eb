"""Modules to weights and back: ties, buffers, casts, and all or nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from steelyard.core.spec import DTYPES
from steelyard.core.weights import Weight, Weights
from steelyard.errors import ModelError, SteelyardError
from steelyard.formats import open, write
from steelyard.formats.module import from_module, into_module, to_array, to_tensor


class Tied(nn.Module):
    """An embedding whose weight is that of the head, and buffers of both kinds."""

    def __init__(self, classes: int = 5, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.embed = nn.Embedding(5, 4, dtype=dtype)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, classes, bias=False, dtype=dtype)
        self.register_buffer("scratch", torch.zeros(3), persistent=False)
        if classes == 5:
            self.head.weight = self.embed.weight


def snapshot(module: nn.Module) -> dict[str, bytes]:
    return {name: to_array(tensor).tobytes() for name, tensor in module.state_dict().items()}


def renamed(weights: Weights, prefix: str) -> Weights:
    return Weights([Weight(prefix + n, i.spec, i.read) for n, i in weights.items()])


def statuses(table: object) -> dict[str, str]:
    return {row["name"]: row["status"] for row in table.rows}  # type: ignore[attr-defined]


def test_names_order_ties_and_values_are_those_of_state_dict() -> None:
    module = Tied()
    weights = from_module(module)
    state = module.state_dict()
    assert [*weights, *weights.ties] == list(state)
    assert dict(weights.ties) == {"head.weight": "embed.weight"}
    assert dict(weights.meta) == {"format": "pt"}
    for name, tensor in state.items():
        assert weights[name].array().tobytes() == to_array(tensor).tobytes()
    assert list(from_module(module, buffers=False)) == ["embed.weight", "norm.weight", "norm.bias"]


def test_shared_modules_are_ties() -> None:
    layer = nn.Linear(2, 2)
    module = nn.Sequential(layer, nn.ReLU(), layer)
    weights = from_module(module)
    assert list(weights) == ["0.weight", "0.bias"]
    assert dict(weights.ties) == {"2.weight": "0.weight", "2.bias": "0.bias"}
    assert [*weights, *weights.ties] == list(module.state_dict())


def test_a_read_is_a_copy_of_the_values_of_that_time() -> None:
    module = nn.BatchNorm1d(2)
    weights = from_module(module)
    before = weights["weight"].array()
    with torch.no_grad():
        module.weight.fill_(7)
    module.running_mean = torch.full((2,), 3.0)  # a new tensor, as a move to another device makes one
    assert before.tolist() == [1, 1]
    assert weights["weight"].array().tolist() == [7, 7]
    assert weights["running_mean"].array().tolist() == [3, 3]
    weights["weight"].array()[:] = 0
    assert module.weight.tolist() == [7, 7]


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_module_comes_back_from_a_file(suffix: str, dtype: torch.dtype, tmp_path: Path) -> None:
    module, other = Tied(dtype=dtype), Tied(dtype=dtype)
    module.norm.running_mean.fill_(float("nan"))
    write(from_module(module), tmp_path / f"m{suffix}")
    table = into_module(open(tmp_path / f"m{suffix}"), other)
    assert snapshot(other) == snapshot(module)
    assert other.head.weight is other.embed.weight
    assert statuses(table)["embed.weight"] == "loaded"
    assert statuses(table)["head.weight"] == "tied"
    assert set(statuses(table)) == set(module.state_dict())
    assert table.meta["loaded"] == 6


@pytest.mark.parametrize("name", [n for n, row in DTYPES.items() if row.torch])
def test_every_dtype_of_torch_survives_bit_for_bit(name: str) -> None:
    tensor = torch.arange(256, dtype=torch.uint8)
    tensor = (tensor % 2).bool() if name == "bool" else tensor.view(getattr(torch, name))
    array = to_array(tensor)
    assert array.dtype == DTYPES[name].numpy
    back = to_tensor(array)
    assert back.dtype == tensor.dtype
    assert torch.equal(back.view(torch.uint8), tensor.view(torch.uint8))
    assert to_array(to_tensor(array[:1].reshape(()))).shape == ()


def test_views_are_read_as_they_look() -> None:
    module = nn.Module()
    module.register_buffer("t", torch.arange(6.0).reshape(2, 3).T)
    module.register_buffer("c", torch.tensor([1 + 2j]).conj())
    module.register_buffer("n", torch.tensor([1 + 2j]).conj().imag)
    weights = from_module(module)
    assert weights["n"].array().tolist() == [-2]
    assert weights["t"].array().tolist() == [[0, 3], [1, 4], [2, 5]]
    assert weights["c"].array().tolist() == [1 - 2j]


def test_all_or_nothing() -> None:
    weights = from_module(Tied())
    module = Tied(classes=7)
    before = snapshot(module)
    extra = Weights([*weights.values(), Weight.of("more", np.zeros(1))], weights.ties)
    with pytest.raises(ModelError) as caught:
        into_module(extra, module)
    text = str(caught.value)
    assert text.startswith("2 of 8 names do not match Tied")
    assert "wrong shape 'head.weight' (expected float32[7, 4], found float32[5, 4])" in text
    assert "unexpected 'more'" in text
    assert "steelyard convert --rename" in text
    assert "steelyard finetune" in text
    assert snapshot(module) == before

    def crash() -> np.ndarray:
        raise RuntimeError("in the middle")

    broken = Weights([Weight(n, i.spec, crash if n == "norm.running_var" else i.read) for n, i in weights.items()])
    module = Tied()
    before = snapshot(module)
    with pytest.raises(RuntimeError, match="in the middle"):
        into_module(broken, module)
    assert snapshot(module) == before


def test_partial_keeps_what_does_not_fit_and_says_so() -> None:
    weights = from_module(Tied())
    module = Tied(classes=7)
    head = module.head.weight.detach().clone()
    module.extra = nn.Linear(1, 1)
    kept = snapshot(module.extra)
    more = Weights([*weights.values(), Weight.of("m\x1b", np.zeros(1))], weights.ties)
    table = into_module(more, module, partial=True)
    found = statuses(table)
    assert found["head.weight"] == "wrong shape"
    assert found["extra.weight"] == found["extra.bias"] == "missing"
    assert found["m\x1b"] == "unexpected"
    assert table.meta["unexpected"] == 1
    notes = {row["name"]: row["note"] for row in table.rows}
    assert notes["head.weight"] == notes["extra.weight"] == "kept as the module had it"
    assert torch.equal(module.head.weight, head)
    assert snapshot(module.extra) == kept
    assert to_array(module.embed.weight).tobytes() == weights["embed.weight"].array().tobytes()


def test_either_name_of_a_tie_is_enough() -> None:
    values = from_module(Tied()).arrays()
    for name in ("embed.weight", "head.weight"):
        weights = Weights.of({**{k: v for k, v in values.items() if k != "embed.weight"}, name: values["embed.weight"]})
        module = Tied()
        found = statuses(into_module(weights, module))
        assert {found["embed.weight"], found["head.weight"]} == {"loaded", "tied"}
        assert found[name] == "loaded"
        assert to_array(module.head.weight).tobytes() == values["embed.weight"].tobytes()


@pytest.mark.parametrize("partial", [False, True])
def test_two_values_for_one_parameter_are_an_error(partial: bool) -> None:
    values = from_module(Tied()).arrays()
    module = Tied()
    same = Weights.of({**values, "head.weight": values["embed.weight"].copy()})
    assert statuses(into_module(same, module))["head.weight"] == "tied"
    before = snapshot(module)
    with pytest.raises(ModelError, match="different values"):
        into_module(Weights.of({**values, "head.weight": values["embed.weight"] + 1}), module, partial=partial)
    assert snapshot(module) == before


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_the_prefix_of_a_wrapper_is_set_aside_on_either_side(prefix: str) -> None:
    weights = from_module(nn.Linear(2, 1))
    table = into_module(renamed(weights, prefix), nn.Linear(2, 1))
    assert all(f"prefix {prefix!r} of the weights set aside" in row["note"] for row in table.rows)
    wrapped: nn.Module = nn.Linear(2, 1)
    for part in reversed(prefix.rstrip(".").split(".")):
        outer = nn.Module()
        outer.add_module(part, wrapped)
        wrapped = outer
    table = into_module(weights, wrapped)
    assert set(statuses(table)) == {f"{prefix}weight", f"{prefix}bias"}
    assert all(f"prefix {prefix!r} of the module set aside" in row["note"] for row in table.rows)
    into_module(from_module(wrapped), wrapped)


def test_rename_takes_names_and_prefixes() -> None:
    weights = renamed(from_module(nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 1))), "old.")
    module = nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 1))
    table = into_module(weights, module, rename={"old.": "", "old.1.": "1."})
    assert "given as 'old.0.weight'" in table.rows[0]["note"]
    with pytest.raises(ModelError, match=r"both become '0\.weight'"):
        into_module(weights, module, rename={"old.": "", "old.1.weight": "0.weight"})
    found = statuses(into_module(weights, module, partial=True, rename={"old.0.weight": "0.weight"}))
    assert found["0.weight"] == "loaded"
    assert found["old.0.bias"] == "unexpected"
    assert "old.0.weight" not in found


@pytest.mark.parametrize(
    ("given", "target", "good"),
    [
        ([1.5, np.inf], torch.bfloat16, True),
        ([1e9], torch.float16, False),
        ([1.0, 2.0], torch.int32, True),
        ([1.5], torch.int32, False),
        ([np.nan], torch.int64, False),
        ([1 + 0j], torch.float32, False),
        ([1.0], torch.complex64, True),
        ([2**53 + 1], torch.float32, False),
        ([2**40], torch.int32, False),
        ([0, 1], torch.bool, True),
        ([2], torch.bool, False),
    ],
    ids=str,
)
def test_a_cast_is_noted_and_must_not_destroy_values(given: list, target: torch.dtype, good: bool) -> None:
    module = nn.Module()
    module.register_buffer("x", torch.zeros(len(given), dtype=target))
    weights = Weights.of({"x": np.array(given)})
    if good:
        table = into_module(weights, module)
        assert table.rows[0]["note"].startswith("cast ")
        assert module.x.to(torch.complex128).tolist() == given
    else:
        with pytest.raises(ModelError, match="do not survive the cast"):
            into_module(weights, module)
        assert not module.x.any()


def test_a_module_without_values_is_refused() -> None:
    weights = from_module(nn.Linear(2, 1))
    with pytest.raises(ModelError, match="meta device"):
        into_module(weights, nn.Linear(2, 1, device="meta"))
    with pytest.raises(ModelError, match="meta device"):
        from_module(nn.Linear(2, 1, device="meta"))
    with pytest.raises(ModelError, match="run the model once"):
        from_module(nn.LazyLinear(1))
    sparse = nn.Module()
    sparse.register_buffer("x", torch.eye(2).to_sparse())
    with pytest.raises(ModelError, match="sparse"):
        from_module(sparse)


def test_a_model_that_is_training_keeps_its_graph_and_gradients() -> None:
    module = nn.Linear(2, 1)
    weights = from_module(nn.Linear(2, 1))
    parameter = module.weight
    into_module(weights, module)
    assert module.weight is parameter
    assert module.weight.requires_grad
    assert module.weight.is_leaf


def test_a_cast_module_is_noticed_when_it_is_read() -> None:
    module = nn.Linear(2, 1)
    weights = from_module(module)
    module.half()
    with pytest.raises(SteelyardError, match="announced as float32"):
        weights["weight"].array()
