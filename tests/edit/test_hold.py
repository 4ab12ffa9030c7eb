"""Quantize, pack, settle and the recipes: how tensors are held afterwards."""

from __future__ import annotations

import numpy as np
import pytest

from steelyard.codecs.affine import Affine
from steelyard.codecs.bitmask import Bitmask
from steelyard.core.packed import Packed, Scheme, smallest
from steelyard.core.transform import on
from steelyard.core.weights import Weights
from steelyard.core.where import where
from steelyard.edit.pack import Pack
from steelyard.edit.prune import Prune
from steelyard.edit.quantize import Quantize
from steelyard.edit.settle import Settle
from steelyard.edit.share import Share
from steelyard.errors import CodecError
from steelyard.recipes import coded_sparse, deep_compression


def some():
    rng = np.random.default_rng(3)
    arrays = {
        "fc.weight": rng.normal(size=(100, 120)).astype(np.float32),
        "fc.bias": rng.normal(size=100).astype(np.float32),
        "ids": np.arange(200).reshape(2, 100),
    }
    return Weights.of(arrays)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("settings", [{}, {"symmetric": False}, {"axis": 0}, {"group": 20}])
def test_quantized_within_half_a_step(bits, settings):
    x = some()["fc.weight"].array()
    q = Quantize(bits, **settings)(some())["fc.weight"]
    assert isinstance(q.read(), Packed)
    assert q.read().nbytes < x.size * (bits + 32 / 20) / 8 + 420  # at most one float32 scale for 20 elements or a row
    levels = 2**bits - (2 if settings.get("symmetric", True) else 1)
    step = (2 * np.abs(x).max() if settings.get("symmetric", True) else np.ptp(x)) / levels
    assert np.abs(q.array() - x).max() <= step / 2 * (1 + 1e-5)


def test_finer_shares_of_scale_lose_less():
    x = some()["fc.weight"].array()
    loss = [np.sum((Quantize(4, **s)(some())["fc.weight"].array() - x) ** 2) for s in ({}, {"axis": 0}, {"group": 12})]
    assert loss[0] > loss[1] > loss[2]


def test_quantize_leaves_the_rest_and_names_what_it_cannot_hold():
    w = some()
    q = Quantize()(w)
    assert q["fc.bias"] is w["fc.bias"]
    assert q["fc.weight"].scheme == Scheme(Affine(8))
    with pytest.raises(CodecError, match="bits is 9"):
        Quantize(9)
    with pytest.raises(CodecError, match="exclude each other"):
        Quantize(axis=0, group=3)
    with pytest.raises(CodecError, match=r"memory: 'a': affine"):
        Quantize()(Weights.of({"a": np.float32([[np.nan, 1]])}))["a"].array()


def test_pack_is_lossless_with_lossless_codecs_and_says_its_scheme():
    w = Prune(0.9)(some())
    packed = Pack(Bitmask())(w)
    assert {n: x.tobytes() for n, x in packed.arrays().items()} == {n: x.tobytes() for n, x in w.arrays().items()}
    assert packed["fc.weight"].scheme == Scheme(Bitmask())
    assert packed["fc.weight"].read().nbytes < 100 * 120 * 4 / 5
    assert Pack(None)(packed)["fc.weight"].read().dtype == np.float32


def test_pack_chooses_for_each_tensor():
    plan = smallest(Bitmask(), None)
    chosen = Pack(plan)(Prune(0.9)(some()))
    assert chosen["fc.weight"].scheme == plan  # the choice is made when it is read
    assert isinstance(chosen["fc.weight"].read(), Packed)
    assert isinstance(chosen["fc.bias"].read(), np.ndarray)


def test_pack_names_the_tensor_that_it_cannot_hold():
    with pytest.raises(CodecError, match="'ids': affine"):
        Pack(Affine())(some())["ids"].array()


def test_settle_reads_once_and_keeps_what_is_packed():
    reads = []
    w = on(where("fc.weight"), lambda w: w.with_items(i.then(lambda x: reads.append(1) or x) for i in w.values()))(
        some()
    )
    settled = Settle()(Share(4)(w))
    assert reads == [1]
    assert isinstance(settled["fc.weight"].read(), Packed)
    settled["fc.weight"].array()
    assert reads == [1]


def test_deep_compression_shrinks_matrices_and_leaves_the_rest():
    w = some()
    small = deep_compression(0.9, 16)(w)
    assert small["fc.weight"].scheme == coded_sparse(16)
    packed = small["fc.weight"].read()
    x = packed.array()
    assert np.count_nonzero(x) == 1200
    assert np.unique(x).size == 17
    assert x.tobytes() == Share(16)(Prune(0.9)(w))["fc.weight"].array().tobytes()
    assert packed.nbytes < 48_000 / 18  # 10 % of the weights at 4 bits, and a mask of entropy 0.47 bits
    for name in ("fc.bias", "ids"):
        assert small[name].array().tobytes() == w[name].array().tobytes()
        assert small[name].scheme is None
