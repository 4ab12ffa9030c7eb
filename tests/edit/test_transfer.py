"""From file to file: the same bits, in blocks, and nothing under the asked name that is not whole and true."""

from __future__ import annotations

import os
import tracemalloc

import ml_dtypes
import numpy as np
import pytest

import steelyard as sy
from steelyard.core.transform import chain
from steelyard.core.weights import Weight, Weights
from steelyard.edit.cast import Cast
from steelyard.edit.transfer import transfer, verify
from steelyard.errors import FormatError, VerdictError, WeightsError
from steelyard.explain.account import BLOCK, account
from steelyard.formats.safetensors import Safetensors
from steelyard.formats.sharded import Sharded

LARGE = 24_000_000  # bytes of the one large tensor


@pytest.fixture
def large(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "large.safetensors"
    sy.write(Weights.of({"a": rng.normal(size=LARGE // 4).astype(np.float32), "b": np.arange(5)}), path)
    return path


def highest(function):
    """The most bytes that were allocated at one time while `function` ran."""
    function()  # what is imported or cached on the way is no part of it
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("step", [chain(), Cast("bf16"), Cast("float64")], ids=["copy", "bf16", "float64"])
def test_a_tensor_is_never_in_memory_as_a_whole(large, step):
    target = large.with_name("out.safetensors")
    most = highest(lambda: transfer(large, target, step, force=True, verified=True))
    assert most < 16_000_000 < LARGE
    expected = step(sy.open(large))["a"].array()
    assert sy.open(target)["a"].array().tobytes() == expected.tobytes()


def test_the_account_reads_in_blocks(large):
    weights = sy.open(large)
    assert highest(lambda: account(weights, weights)) < 12_000_000


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int32", "complex64"])
def test_the_account_of_many_blocks_is_that_of_the_whole(dtype):
    rng = np.random.default_rng(0)
    size = 2 * BLOCK + 7
    x = rng.normal(size=size) * 100 + (1j * rng.normal(size=size) if dtype == "complex64" else 0)
    x = x.astype(sy.dtype(dtype).numpy)
    y = np.where(rng.random(size) < 0.3, x.dtype.type(0), x)
    tensors, total = account(Weights.of({"w": x}), Weights.of({"w": y}))
    a, b = (v.astype(np.complex128) for v in (x, y))
    assert tensors.rows[0]["zeros"] == np.count_nonzero(b == 0) / size
    assert tensors.rows[0]["error"] == pytest.approx(np.linalg.norm(b - a) / np.linalg.norm(a), rel=1e-12)
    assert total.rows[0]["error"] == tensors.rows[0]["error"]


def test_a_copy_is_the_same_file(large):
    target = large.with_name("out.safetensors")
    done = transfer(large, target, chain(), verified=True)
    assert target.read_bytes() == large.read_bytes()
    assert (done.files, done.verified) == ((large.stat().st_size, target.stat().st_size), 2)
    assert sorted(os.listdir(large.parent)) == ["large.safetensors", "out.safetensors"]


def test_what_is_watched_adds_up(large):
    parts = {}

    def watch(what, total):
        parts[what] = [total, 0]

        def tell(count):
            parts[what][1] += count

        return tell

    transfer(large, large.with_name("out.safetensors"), chain(), verified=True, watch=watch)
    assert list(parts) == ["writing", "verifying"]
    assert all(total == seen == LARGE + 40 for total, seen in parts.values())


@pytest.mark.parametrize(
    ("at", "named"), [(-1, "element 5999999 of 'a'"), (-LARGE - 40, "element 0 of 'b'"), (-9, "element 5999997 of 'a'")]
)
def test_a_target_that_lies_is_named_and_leaves_nothing(large, monkeypatch, at, named):
    target = large.with_name("out.safetensors")
    target.write_bytes(b"precious")
    write = Safetensors.write

    def damage(self, weights, path):
        size = write(self, weights, path)
        whole = bytearray(path.read_bytes())
        whole[at] ^= 1
        path.write_bytes(whole)
        return size

    monkeypatch.setattr(Safetensors, "write", damage)
    with pytest.raises(VerdictError, match=f"out.safetensors: verifying failed: {named} was to be") as caught:
        transfer(large, target, chain(), force=True, verified=True)
    assert caught.value.status == 1
    assert target.read_bytes() == b"precious"
    assert sorted(os.listdir(large.parent)) == ["large.safetensors", "out.safetensors"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: Weights(list(w.values())[:1], w.ties, w.meta), "where the tensor 'b' was to be, nothing was"),
        (lambda w: Weights(list(w.values())[::-1], w.ties, w.meta), "where the tensor 'a' was to be, 'b' was"),
        (lambda w: Weights(w.values(), {}, w.meta), "ties or metadata"),
        (lambda w: w.with_meta(k="w"), "ties or metadata"),
        (lambda w: w.with_items([w["a"], Weight.of("b", np.int8([1]))]), "'b' was to be int64"),
        (lambda w: w.with_items([Weight.of("a", np.float32([0.0, np.nan])), w["b"]]), "element 0 of 'a' was to be -0"),
    ],
)
def test_every_kind_of_difference_is_found(change, said):
    made = Weights.of({"a": np.float32([-0.0, np.nan]), "b": np.int64([1])}, {"c": "a"}, {"k": "v"})
    assert verify(made, made, "t") == 2
    with pytest.raises(VerdictError, match=said):
        verify(change(made), made, "t")


def test_wrong_use(large):
    with pytest.raises(FormatError, match="the source itself"):
        transfer(large, large, chain(), verified=True, force=True)
    with pytest.raises(FormatError, match="nowhere' is not there"):
        transfer(large, large.parent / "nowhere" / "x.npz", chain(), verified=True)
    with pytest.raises(WeightsError, match="none of the 2 tensors"):
        transfer(large, large.with_name("x.npz"), chain(), sy.where("zz"))
    assert os.listdir(large.parent) == ["large.safetensors"]


@pytest.mark.parametrize("format", [None, Sharded(100)], ids=["one", "many"])
def test_what_the_target_cannot_hold_is_an_error_of_the_target(tmp_path, format, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sy.write(Weights.of({"w": np.arange(4).astype(ml_dtypes.int4)}), "a.npz")
    name = "b.safetensors" if format is None else "b.safetensors.index.json"
    with pytest.raises(FormatError, match=r"^b[-0-9of]*\.safetensors: tensor 'w': safetensors holds no int4"):
        transfer("a.npz", name, chain(), format=format, resumed=True)
    assert os.listdir() == ["a.npz"]
