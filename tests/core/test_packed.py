from __future__ import annotations

import numpy as np
import pytest

from steelyard.core.packed import Packed, Scheme, nest, pack, smallest
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


def test_equality_of_schemes_is_by_value(codecs):
    assert nest(codecs["split"](), left=None) == Scheme(codecs["split"](), {"left": None})
    assert nest(codecs["split"]()) != nest(codecs["split"](), left=None)
