"""What is no Weights, no path or no format is told in one line where it is given, with the remedy."""

from __future__ import annotations

import numpy as np
import pytest

import steelyard as sy
from steelyard.errors import FormatError, WeightsError
from steelyard.formats.npz import Npz

SOME = sy.Weights.of({"a": np.zeros((2, 2), np.float32)})
TAKES = {
    "inventory": sy.inventory,
    "statistics": sy.statistics,
    "spectra": sy.spectra,
    "health": sy.health,
    "diff": lambda weights: sy.diff(weights, SOME),
    "diff, second": lambda weights: sy.diff(SOME, weights),
}


@pytest.mark.parametrize("name", TAKES)
@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("a.safetensors", r"got str: open the file first with sy\.open"),
        ({"a": np.zeros(1)}, r"got dict: make them of arrays by name with sy\.Weights\.of"),
        (5, r"got int: sy\.open"),
    ],
)
def test_what_is_no_weights(name, wrong, said):
    with pytest.raises(WeightsError, match=rf"expected Weights, {said}"):
        TAKES[name](wrong)


def test_what_cannot_be_written(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(WeightsError, match="expected Weights, got dict"):
        sy.write({"a": np.zeros(1)}, path)
    with pytest.raises(FormatError, match="expected a format by name, such as 'npz', or with its options, got int"):
        sy.write(SOME, path, 5)
    with pytest.raises(FormatError, match="expected a path or an address, got int"):
        sy.write(SOME, 5)
    with pytest.raises(FormatError, match="expected a path or an address, got int"):
        sy.write(SOME, 5, Npz())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("wrong", [5, None, b"a.npz", SOME])
def test_what_cannot_be_opened(wrong):
    with pytest.raises(FormatError, match=f"expected a path or an address, got {type(wrong).__name__}"):
        sy.open(wrong)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: sy.Weights.of({"a": [1.0]}), "'a': expected a numpy array, got list: numpy.asarray makes one"),
        (lambda: sy.Weights.of({1: np.zeros(1)}), "expected a name, got int: names are text"),
        (lambda: sy.Weights.of({"a": np.zeros(1)}, meta={"step": 5}), "metadata are text under text, got 'step': int"),
        (lambda: SOME.with_meta(step=5), "metadata are text under text, got 'step': int"),
        (lambda: SOME.with_ties({"b": "c"}), "the tie 'b' -> 'c' must lead from a free name"),
        (lambda: sy.where(5), r"expected a pattern such as '\*.weight', got int"),
        (lambda: sy.open("a" * 5000), "cannot be read: File name too long"),
    ],
)
def test_what_weights_cannot_be_made_of(make, said):
    with pytest.raises(sy.SteelyardError, match=said):
        make()


def test_another_byte_order_is_turned_and_rows_have_numbers_of_numpy():
    weights = sy.Weights.of({"a": np.arange(6, dtype=">f4").reshape(3, 2)})
    assert weights["a"].array().dtype == np.float32
    assert weights["a"][np.int64(1)].tolist() == [2, 3]
