"""`inspect`: the text is golden, and its totals follow from its rows."""

from __future__ import annotations

import csv
import io
import json

import numpy as np
import pytest

import steelyard as sy
from steelyard.codecs.affine import Affine
from steelyard.codecs.bits import Bits
from steelyard.core.packed import nest, pack, smallest
from steelyard.core.recipe import Reader, parse_call
from steelyard.errors import RecipeError, UnknownNameError, WeightsError
from steelyard.explain.inventory import held, inventory, kinds, summary


def test_text_of_inspect(steelyard, model, golden):
    result = steelyard("inspect", model)
    assert result.status == 0
    golden(result.out)
    rows, total = result.out.split("\nkinds\n")[0].splitlines()[3:], result.out.split("\ntotal\n")[1]
    elements = [int(row.split()[3]) for row in rows if row]
    said = dict(line.split(maxsplit=1) for line in total.splitlines() if not line.startswith("bits"))
    assert int(said["tensors"]) == len(elements)
    assert int(said["elements"]) == sum(elements) == 40 * 16 + 16 * 32 + 32 + 1


def test_json_is_complete_and_its_parts_add_up(steelyard, model):
    result = steelyard("inspect", model, "--json")
    tables = {table["title"]: table for table in map(json.loads, result.out.splitlines())}
    assert list(tables) == ["tensors", "kinds", "roles", "layers", "architecture", "total"]
    tensors, total = tables["tensors"], tables["total"]
    for column in ("elements", "bytes", "stored"):
        found = total["rows"][0][column]
        for title in ("tensors", "kinds", "roles", "layers"):
            assert sum(row[column] for row in tables[title]["rows"]) == found
    assert tensors["rows"][0]["shape"] == [40, 16]
    assert tensors["rows"][0]["also"] == "head.weight"
    assert total["rows"][0]["ties"] == 1
    assert total["rows"][0]["file"] == model.stat().st_size > total["rows"][0]["stored"]
    assert {"name": "stored", "unit": "B", "about": "in the file"} in tensors["columns"]


def test_metadata_are_shown_escaped_and_cut_and_are_whole_as_data(steelyard, tmp_path):
    path = tmp_path / "meta.safetensors"
    sy.write(sy.Weights.of({"a": np.zeros(1, np.float32)}, meta={"k\x1b[2J": "v\n", "long": "x" * 1000}), path)
    shown = steelyard("inspect", path).out
    assert r"k\x1b[2J" in shown
    assert "x" * 200 + "… (1000 characters)" in shown
    tables = {table["title"]: table for table in map(json.loads, steelyard("inspect", path, "--json").out.splitlines())}
    assert tables["metadata"]["rows"][1] == {"key": "long", "value": "x" * 1000}


def test_csv_is_the_first_table(steelyard, model):
    rows = list(csv.DictReader(io.StringIO(steelyard("inspect", model, "--csv").out)))
    assert [row["name"] for row in rows] == list(sy.open(model))
    assert sum(int(row["bytes"]) for row in rows) == sy.open(model).nbytes


def test_csv_of_several_is_one_table_that_says_the_source(steelyard, model, tmp_path):
    other, damaged = tmp_path / "other.npz", tmp_path / "damaged.npz"
    sy.write(sy.Weights.of({"w": np.zeros(3, np.float32)}), other)
    damaged.write_bytes(other.read_bytes()[:50])
    found = steelyard("inspect", other, damaged, model, "--csv")
    assert found.status == 2
    assert str(damaged) in found.err
    rows = list(csv.DictReader(io.StringIO(found.out)))
    names = [(str(other), "w"), *((str(model), name) for name in sy.open(model))]
    assert [(row["source"], row["name"]) for row in rows] == names
    assert {row["also"] for row in rows} == {"", "head.weight"}  # a column that only one of the tables has


def test_names_that_steer_a_terminal_are_escaped_and_stay_different(steelyard, tmp_path):
    path = tmp_path / "hostile.safetensors"
    sy.write(sy.Weights.of({name: np.zeros(1, np.float32) for name in ("red", "\x1b[31mred")}), path)
    rows = csv.DictReader(io.StringIO(steelyard("inspect", path, "--csv").out))
    assert [row["name"] for row in rows] == ["red", r"\x1b[31mred"]
    assert json.loads(steelyard("inspect", path, "--json").out.splitlines()[0])["rows"][1]["name"] == "\x1b[31mred"
    assert r"\x1b[31mred" in steelyard("inspect", path).out


def test_where_sort_and_depth(steelyard, model):
    def names(*words):
        return [
            row["name"] for row in json.loads(steelyard("inspect", model, *words, "--json").out.splitlines()[0])["rows"]
        ]

    assert names("--where", "*.weight") == ["model.embed.weight", "model.layer.weight"]
    assert names("--where", "*.weight", "--where", "*.bias", "--where", "!*embed*") == [
        "model.layer.weight",
        "model.layer.bias",
    ]
    assert names("--sort", "elements")[-1] == "model.steps"
    assert names("--sort", "name") == sorted(sy.open(model))
    assert names("--depth", "2") == ["model.embed", "model.layer", "model.steps"]
    assert names("--depth", "1", "--sort", "stored") == ["model"]


def test_html_is_written_beside_the_text(steelyard, model, tmp_path):
    result = steelyard("inspect", model, "--html", tmp_path / "page.html")
    assert "model.layer.weight" in result.out
    assert "model.layer.weight" in (tmp_path / "page.html").read_text()


def test_nothing_is_read(model):
    weights = sy.open(model)
    untouched = sy.Weights(
        [sy.Weight(w.name, w.spec, lambda: pytest.fail("read"), w.stored) for w in weights.values()], weights.ties
    )
    assert [len(make(untouched).rows) for make in (inventory, kinds, summary)] == [4, 2, 1]


def test_stored_bytes_and_schemes_of_a_packed_file(tmp_path):
    x = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    path = tmp_path / "packed.safetensors"
    sy.write(sy.Weights.of({"a": pack(x, Affine(bits=4)), "b": x}), path)
    row = inventory(sy.open(path)).rows[0]
    assert row["held"] == "affine(bits=4, codes=bits)"
    assert 64 * 64 // 2 <= row["stored"] < 64 * 64 // 2 + 64
    total = summary(sy.open(path)).rows[0]
    assert total["ratio"] == total["bytes"] / total["stored"]
    assert total["bits per element"] == 8 * total["stored"] / total["elements"]
    assert [(r["held"], r["tensors"]) for r in kinds(sy.open(path)).rows] == [("affine", 1), ("plain", 1)]


@pytest.mark.parametrize(
    "plan",
    [None, Bits(), Affine(bits=3), nest(Affine(axis=0), codes=None), smallest(nest(Affine(), codes=Bits()), None)],
)
def test_held_is_a_call_that_reads_back(plan):
    from steelyard.codecs import CODECS

    x = np.arange(8, dtype=np.int32).reshape(2, 4) if plan == Bits() else np.ones((2, 4), np.float32)
    again = Reader(CODECS, {}).plan(parse_call(held(plan)))
    first, second = pack(x, plan), pack(x, again)
    if isinstance(first, np.ndarray):
        assert isinstance(second, np.ndarray)
    else:
        assert first.scheme == second.scheme
        assert held(first.scheme) == held(second.scheme)


def test_wrong_arguments_of_the_library():
    weights = sy.Weights.of({"a": np.zeros(1)})
    with pytest.raises(WeightsError, match="the names begin with 'a'"):
        inventory(weights, sy.where("b"))
    with pytest.raises(UnknownNameError, match="did you mean 'name'"):
        inventory(weights, sort="nam")
    with pytest.raises(RecipeError, match="at least 1"):
        inventory(weights, depth=0)
    assert summary(sy.Weights([])).rows[0]["tensors"] == 0


def large(path, layers=150):
    shapes = {f"layers.{i}.{part}.weight": (4, 4) for i in range(layers) for part in ("up", "down")}
    sy.write(sy.Weights.of({name: np.zeros(shape, np.float32) for name, shape in shapes.items()}), path)


def test_many_tensors_stay_readable_as_text_and_complete_as_data(steelyard, tmp_path):
    path = tmp_path / "large.safetensors"
    large(path)
    shown = steelyard("inspect", path).out
    assert "layers.{0..149}.up.weight" in shown
    assert len(shown.splitlines()) < 60
    assert "layers.149.down.weight" in steelyard("inspect", path, "--depth", "0").out
    for words in (("--csv",), ("--depth", "0", "--csv"), ("--where", "*", "--csv")):
        assert len(steelyard("inspect", path, *words).out.splitlines()) == 301
    assert len(json.loads(steelyard("inspect", path, "--json").out.splitlines()[0])["rows"]) == 300
    assert len(steelyard("inspect", path, "--where", "*.up.weight").out.splitlines()) > 150


def test_a_batch_goes_on_after_a_file_that_cannot_be_read(steelyard, model, tmp_path):
    bad = tmp_path / "bad\x1b[31m.safetensors"
    bad.write_bytes(b"\x02\0\0\0\0\0\0\0{]")
    result = steelyard("inspect", bad, model, tmp_path / "nowhere.safetensors", model, "--json")
    assert result.status == 2
    errors = result.err.splitlines()
    assert len(errors) == 2
    assert errors[0].startswith(f"steelyard: {tmp_path}/bad\\x1b[31m.safetensors, byte 9: ")
    assert "nowhere.safetensors: there is no such file" in errors[1]
    tables = [json.loads(line) for line in result.out.splitlines()]
    assert [table["meta"]["source"] for table in tables] == [str(model)] * len(tables)
    alone = steelyard("inspect", model, "--json").out.splitlines()
    assert len(tables) == 2 * len(alone)
    assert steelyard("inspect", model, model).status == 0


def test_a_choice_that_matches_nothing_names_its_file_in_a_batch(steelyard, model, tmp_path):
    large(tmp_path / "large.safetensors", 1)
    result = steelyard("inspect", tmp_path / "large.safetensors", model, "--where", "model.*")
    assert result.status == 2
    assert result.err.startswith(f"steelyard: {tmp_path}/large.safetensors: none of the 2 tensors matches")
    assert "model.embed.weight" in result.out


def test_the_page_of_a_batch_has_all_tables(steelyard, model, tmp_path):
    large(tmp_path / "large.safetensors", 1)
    steelyard("inspect", model, tmp_path / "large.safetensors", "--html", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "model.layer.weight" in page
    assert "layers.0.up.weight" in page


def test_statistics_on_the_command_line(steelyard, model):
    result = steelyard("inspect", model, "--stats", "--where", "*.layer.*")
    assert result.status == 0
    assert result.err == ""
    assert "\nquantiles\n" in result.out
    assert "histogram" not in result.out
    shown, quantiles, histogram, total = map(
        json.loads, steelyard("inspect", model, "--stats", "--json").out.splitlines()
    )
    assert [row["name"] for row in shown["rows"]] == list(sy.open(model))
    for row, ranks, bins in zip(shown["rows"], quantiles["rows"], histogram["rows"], strict=True):
        x = sy.open(model)[row["name"]].array()
        assert row["minimum"] == ranks["minimum"] == x.min()
        assert row["mean"] == pytest.approx(x.astype(np.float64).mean())
        assert ranks["25 %"] == np.quantile(x, 0.25, method="inverted_cdf")
        assert sum(bins["counts"]) == x.size
    assert total["title"] == "total"
    rows = list(csv.DictReader(io.StringIO(steelyard("inspect", model, "--stats", "--csv").out)))
    assert [float(row["maximum"]) for row in rows] == [row["maximum"] for row in shown["rows"]]


def test_statistics_of_a_damaged_file_are_an_error_of_one_line(steelyard, model):
    weights = sy.open(model)
    model.write_bytes(model.read_bytes()[:-1])
    result = steelyard("inspect", model, "--stats")
    assert result.status == 2
    assert result.err.count("\n") == 1
    assert "fetch it again" in result.err or "ends" in result.err
    with pytest.raises(sy.SteelyardError, match="changed since it was opened"):
        sy.statistics(weights)


def test_health_on_the_command_line(steelyard, tmp_path):
    x = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    x[3] = np.nan
    path = tmp_path / "ill.safetensors"
    sy.write(sy.Weights.of({"\x1b[31mred": x}), path)
    result = steelyard("inspect", path, "--health", "--html", tmp_path / "page.html")
    assert result.status == 0
    assert r"\x1b[31mred" in result.out
    assert "first at [3, 0]" in result.out
    table, total = map(json.loads, steelyard("inspect", path, "--health", "--json").out.splitlines())
    assert table["meta"]["errors"] == 1
    assert table["rows"][0]["finding"] == "NaN"
    assert total["title"] == "total"


def test_the_page_of_statistics_has_pictures(steelyard, model, tmp_path):
    result = steelyard("inspect", model, "--stats", "--html", tmp_path / "page.html")
    assert result.status == 0
    assert "histogram" not in result.out
    page = (tmp_path / "page.html").read_text()
    assert "Distribution of the values" in page
    assert "model.layer.weight" in page
