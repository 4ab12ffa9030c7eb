from __future__ import annotations

import json

import numpy as np
import pytest

from steelyard.core.packed import Layout, Packed, Scheme, dismantle, nest, pack, smallest
from steelyard.core.recipe import Reader
from steelyard.core.spec import Spec
from steelyard.errors import CodecError, UnknownNameError

X = np.float32([1, 2, 3, 4, 5])


def test_no_plan_is_the_plain_array():
    assert pack(X, None) is X


def test_a_codec_holds_its_parts_as_it_says_and_a_scheme_has_the_last_word(codecs):
    Split, Scaled = codecs["split"], codecs["scaled"]
    told = pack(X, Split())
    assert told.parts["left"].codec == Scaled()
    assert isinstance(told.parts["right"], np.ndarray)
    other = pack(X, nest(Split(), left=None, right=Scaled(4)))
    assert isinstance(other.parts["left"], np.ndarray)
    assert other.parts["right"].codec == Scaled(4)
    for packed in (told, other):
        assert packed.array().tolist() == X.tolist()
        assert packed.array().dtype == np.float32
        assert packed.nbytes == X.nbytes


def test_the_scheme_of_a_packed_tensor_packs_the_same_again(codecs):
    packed = pack(X, nest(codecs["split"](), right=codecs["scaled"](8)))
    again = pack(X, packed.scheme)
    assert again.scheme == packed.scheme
    assert again.parts["right"].parts["values"].tolist() == packed.parts["right"].parts["values"].tolist()


def test_smallest_is_plain_where_describing_costs_more_than_it_saves(codecs):
    class Half(codecs["scaled"]):
        def encode(self, x):
            return {"values": x[: x.size // 2]}

    assert pack(X, smallest(Half(), None)) is X
    large = np.ones(4000, np.float32)
    assert isinstance(pack(large, smallest(None, Half())), Packed)
    assert pack(large, smallest(None, codecs["scaled"]())) is large


def test_smallest_of_nothing():
    with pytest.raises(CodecError, match="name at least one"):
        smallest()


def test_a_scheme_names_parts_that_exist(codecs):
    with pytest.raises(UnknownNameError, match="no part of split 'lfet'; did you mean 'left'"):
        nest(codecs["split"](), lfet=None)


def test_a_codec_that_returns_undeclared_parts(codecs):
    class Loose(codecs["scaled"]):
        def encode(self, x):
            return {"more": x}

    with pytest.raises(CodecError, match="declared"):
        pack(X, Loose())


@pytest.mark.parametrize("spec", [Spec.of((5,), "float16"), Spec.of((4,), "float32")])
def test_parts_that_do_not_give_what_the_spec_says(codecs, spec):
    class Wrong(codecs["scaled"]):
        def decode(self, parts, spec):
            return parts["values"]

    with pytest.raises(CodecError, match=r"expected float.*decoded float32\[5\]"):
        Packed(spec, Wrong(), {"values": X}).array()


def test_taken_apart_and_put_together_again_through_json(codecs):
    packed = pack(X, nest(codecs["split"](), right=nest(codecs["split"](), right=codecs["scaled"](8))))
    description, leaves = dismantle("fc.weight", packed)
    assert list(leaves) == ["fc.weight/left/values", "fc.weight/right/left/values", "fc.weight/right/right/values"]
    layout = Layout.parse(json.loads(json.dumps(description)), Reader(codecs, {}).codec, "$")
    assert layout.keys() == list(leaves)
    assert layout.scheme == packed.scheme
    assert layout.spec == packed.spec
    again = layout.assemble(leaves.__getitem__)
    assert again.array().tobytes() == X.tobytes()
    assert again.nbytes == packed.nbytes


def description(**changes):
    right = {"shape": [5], "dtype": "float32", "codec": {"scaled": {"factor": 4.0}}, "parts": {"values": "a/values"}}
    return {**right, **changes}


@pytest.mark.parametrize(("data", "message"), [
    (None, "expected an object of"),
    ([], "expected an object of"),
    ({"shape": [5]}, "expected an object of"),
    ({**description(), "more": 1}, "expected an object of"),
    (description(shape="5"), "expected a list as shape"),
    (description(dtype=5), "expected a list as shape"),
    (description(parts=["values"]), "expected a list as shape"),
    (description(parts={"wrong": "a/wrong"}), "has no part 'wrong'"),
    (description(parts={"values": 7}), r"\$\.parts\.values: expected an object"),
    (description(shape=[-1]), "non-negative"),
    (description(shape=[True]), "non-negative"),
    (description(dtype="float31"), "no dtype"),
    (description(codec="scald"), "did you mean 'scaled'"),
    (description(codec={"scaled": {"factor": "x"}}), "expected a number"),
    (description(codec={"scaled": {"factor": 0}}), "must not be 0"),
    (description(codec={"scaled": {"facto": 1}}), "did you mean 'factor'"),
    (description(codec={"scaled": 3}), "expected settings"),
    (description(codec=None), "expected one codec"),
])  # fmt: skip
def test_a_description_that_cannot_be_right(codecs, data, message):
    from steelyard.errors import SteelyardError

    class Table(dict):
        def __missing__(self, name):
            raise UnknownNameError("codec", name, self)

    with pytest.raises(SteelyardError, match=message):
        Layout.parse(data, Reader(Table(codecs), {}).codec, "$")


def test_a_hostile_description_of_great_depth_is_an_error_of_ours(codecs):
    data = description()
    for _ in range(100_000):
        data = description(codec="split", parts={"left": data})
    with pytest.raises(CodecError, match="codecs are nested more than 32 deep"):
        Layout.parse(data, Reader(codecs, {}).codec, "$")


def test_equality_of_schemes_is_by_value(codecs):
    assert nest(codecs["split"](), left=None) == Scheme(codecs["split"](), {"left": None})
    assert nest(codecs["split"]()) != nest(codecs["split"](), left=None)
