"""Repeated layers in one row: what is counted together, and that nothing is lost."""

from __future__ import annotations

import numpy as np
import pytest

from steelyard.codecs.affine import Affine
from steelyard.core.packed import pack
from steelyard.core.weights import Weights
from steelyard.errors import UnknownNameError
from steelyard.explain import repeats as module
from steelyard.explain.inventory import summary
from steelyard.explain.repeats import repeats, spans


def model(layers: int = 4) -> Weights:
    values: dict[str, np.ndarray] = {"embed.weight": np.zeros((10, 4), np.float32)}
    for i in range(layers):
        values[f"layers.{i}.conv2d.weight"] = np.zeros((4, 4), np.float32)
        values[f"layers.{i}.experts.{i % 2}.up_1.bias"] = np.zeros(4, np.float16)
    values["layers.9.conv2d.weight"] = np.zeros((4, 5), np.float32)
    return Weights.of(values)


def add_up(table, weights):
    total = summary(weights).rows[0]
    for column in ("tensors", "elements", "bytes", "stored"):
        cells = table.column(column)
        assert (None if None in cells else sum(cells)) == total[column]


def test_layers_of_one_kind_are_one_row_and_add_up_to_the_totals() -> None:
    table = repeats(model())
    assert [(row["name"], row["tensors"], row["shape"]) for row in table.rows] == [
        ("embed.weight", 1, [10, 4]),
        ("layers.{0..3}.conv2d.weight", 4, [4, 4]),
        ("layers.{0..3}.experts.{0..1}.up_1.bias", 4, [4]),
        ("layers.9.conv2d.weight", 1, [4, 5]),
    ]
    add_up(table, model())


def test_the_smallest_make_way_and_are_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    table = repeats(model(), rows=2)
    assert table.column("name") == ["embed.weight", "layers.{0..3}.conv2d.weight", "(2 others)"]
    add_up(table, model())
    monkeypatch.setattr(module, "KINDS", 1)
    table = repeats(model(), rows=2)
    assert table.column("name") == ["embed.weight", "(9 others)"]
    add_up(table, model())


def test_packed_tensors_are_not_counted_with_plain_ones() -> None:
    x = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)
    table = repeats(Weights.of({"l.0.w": x, "l.1.w": pack(x, Affine(bits=4)), "l.2.w": pack(x, Affine(bits=4))}))
    assert [(row["name"], row["held"]) for row in table.rows] == [
        ("l.0.w", "plain"),
        ("l.{1..2}.w", "affine(bits=4, codes=bits)"),
    ]


def test_rows_are_sorted_by_their_sums() -> None:
    assert repeats(model(), sort="elements").column("elements") == [64, 40, 20, 16]
    assert repeats(model(), sort="name").column("name")[-1] == "layers.{0..3}.experts.{0..1}.up_1.bias"
    with pytest.raises(UnknownNameError):
        repeats(model(), sort="nam")


@pytest.mark.parametrize(
    ("numbers", "shown"),
    [("3", "3"), ("0 1 2", "{0..2}"), ("7 0 1", "{0..1,7}"), ("0 2 4 6 8", "{0..8: 5 numbers}"), ("01 1 2", "{1..2}")],
)
def test_numbers_as_a_person_writes_them(numbers: str, shown: str) -> None:
    assert spans(numbers.split()) == shown


def test_a_number_of_a_thousand_digits_is_a_number() -> None:
    assert spans(["9" * 5000, "1"]) == f"{{1,{'9' * 18}}}"
