"""How packed tensors are described in files: there and back, and every description that cannot be right."""

from __future__ import annotations

import json

import numpy as np
import pytest

from steelyard.core.packed import nest, pack
from steelyard.core.recipe import Reader
from steelyard.errors import CodecError, SteelyardError, UnknownNameError
from steelyard.formats.layout import Layout, dismantle

from small_codecs import CODECS, Scaled, Split

X = np.float32([1, 2, 3, 4, 5])


class Table(dict):
    def __missing__(self, name):
        raise UnknownNameError("codec", name, self)


def parse(data, usual="a"):
    return Layout.parse(data, usual, Reader(Table(CODECS), {}).codec, "$")


@pytest.mark.parametrize(("prefix", "spelt"), [("fc.weight", False), ("fc.weight~", True)])
def test_taken_apart_and_put_together_again_through_json(prefix, spelt):
    packed = pack(X, nest(Split(), right=nest(Split(), right=Scaled(8))))
    data, leaves = dismantle(prefix, packed, "fc.weight")
    assert list(leaves) == [f"{prefix}/left/values", f"{prefix}/right/left/values", f"{prefix}/right/right/values"]
    assert (prefix in json.dumps(data)) == spelt  # the usual keys need no bytes
    layout = parse(json.loads(json.dumps(data)), "fc.weight")
    assert layout.keys() == list(leaves)
    assert layout.scheme == packed.scheme
    assert layout.spec == packed.spec
    again = layout.assemble(leaves.__getitem__)
    assert again.array().tobytes() == X.tobytes()
    assert again.nbytes == packed.nbytes


def layout(codec=None, dtype="float32", shape=None, parts=None):
    return [codec or {"scaled": {"factor": 4.0}}, dtype, [5] if shape is None else shape, parts or {"values": "k"}]


@pytest.mark.parametrize(("data", "message"), [
    (None, "expected .codec, dtype, shape, parts"),
    ("key", "expected .codec, dtype, shape, parts"),
    ([], "expected .codec, dtype, shape, parts"),
    ([*layout(), 1], "expected .codec, dtype, shape, parts"),
    (layout(shape="5"), "expected a name as dtype"),
    (layout(dtype=5), "expected a name as dtype"),
    (layout(parts=["values"]), "expected a name as dtype"),
    (layout(parts={"wrong": "a/wrong"}), "has no part 'wrong'"),
    (layout(parts={"values": -7}), r"\$\.parts\.values: expected a CRC-32"),
    (layout(parts={"values": True}), r"\$\.parts\.values: expected .codec, dtype"),
    (layout(parts={"values": [7, 7]}), r"\$\.parts\.values: expected .codec, dtype"),
    (layout(parts={"values": ["k", "7"]}), r"\$\.parts\.values: expected a CRC-32"),
    (layout(shape=[-1]), "non-negative"),
    (layout(shape=[True]), "non-negative"),
    (layout(dtype="float31"), "no dtype"),
    (layout(codec="scald"), "did you mean 'scaled'"),
    (layout(codec={"scaled": {"factor": "x"}}), "expected a number"),
    (layout(codec={"scaled": {"factor": 0}}), "must not be 0"),
    (layout(codec={"scaled": {"facto": 1}}), "did you mean 'factor'"),
    (layout(codec={"scaled": 3}), "expected settings"),
    (layout(codec=7), "expected a name"),
])  # fmt: skip
def test_a_layout_that_cannot_be_right(data, message):
    with pytest.raises(SteelyardError, match=message):
        parse(data)


def test_a_hostile_layout_of_great_depth_is_an_error_of_ours():
    data = layout()
    for _ in range(100_000):
        data = layout(codec="split", parts={"left": data})
    with pytest.raises(CodecError, match="codecs are nested more than 32 deep"):
        parse(data)
