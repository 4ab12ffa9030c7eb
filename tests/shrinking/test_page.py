"""The page of a finished file: every byte of it has its place, and what was tried stands beside the tolerance."""

from __future__ import annotations

from dataclasses import replace
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from steelyard.core.table import Column, Table
from steelyard.core.weights import Weights
from steelyard.report.html import render
from steelyard.report.plots import Bars, Line, Picture, Treemap
from steelyard.shrinking import account
from steelyard.shrinking.alone import NOTHING, Alone
from steelyard.shrinking.page import page
from steelyard.shrinking.page_alone import page_alone
from steelyard.shrinking.precondition import Learned
from steelyard.shrinking.promise import Promise
from steelyard.shrinking.within import Shrunk

PROOF = {"bytes before": 4000, "bytes": 1000, "smaller": 4.0, "accuracy before": 0.97, "accuracy": 0.96, "loss": 0.01,
         "loss at most": 0.018, "tolerance": 0.02, "examples": 1000}  # fmt: skip
UNITS = {"bytes before": "B", "bytes": "B", "smaller": "x", "accuracy before": "%", "accuracy": "%", "loss": "pp",
         "loss at most": "pp", "tolerance": "pp", "examples": ""}  # fmt: skip


def shrunk(curve: Table, why: Table, running: Table | None = None) -> Shrunk:
    proof = Table.of("blobs: the promise", [Column(name, unit) for name, unit in UNITS.items()], [PROOF],
                     {"task": "blobs", "confidence": 0.95, "aim": "latency", "before": "plain safetensors"})  # fmt: skip
    return Shrunk(Weights.of({}), proof, why, curve, running)


@pytest.fixture
def weights() -> Shrunk:
    why = Table.of("where the bytes went, and why", [Column("tensor"), Column("bytes before", "B"), Column("bytes", "B")],
                   [{"tensor": "a.weight", "bytes before": 3000, "bytes": 500},
                    {"tensor": "a.bias", "bytes before": 100, "bytes": 50}])  # fmt: skip
    columns = [Column("candidate"), Column("bytes", "B"), Column("valid loss", "pp"), Column("loss", "pp"),
               Column("loss at most", "pp")]  # fmt: skip
    curve = Table.of("blobs: sizes to choose from", columns, [
        {"candidate": "8 bits", "bytes": 900, "loss": 0.0, "loss at most": 0.003},
        {"candidate": "4 bits", "bytes": 700, "valid loss": 0.01},
        {"candidate": "3 bits", "bytes": 550, "valid loss": 0.01, "loss": 0.01, "loss at most": 0.018}])  # fmt: skip
    return shrunk(curve, why)


@pytest.fixture
def runs() -> Shrunk:
    why = Table.of("what is left", [Column("tensor"), Column("weights before"), Column("weights")],
                   [{"tensor": "a.weight", "weights before": 750, "weights": 300}])  # fmt: skip
    columns = [Column("candidate"), Column("bytes", "B"), Column("faster", "x"), Column("valid loss", "pp"),
               Column("loss", "pp"), Column("loss at most", "pp"), Column("note")]  # fmt: skip
    curve = Table.of("blobs: files that run", columns, [
        {"candidate": "as it is, int8", "bytes": 900, "faster": 1.5, "valid loss": 0.0},
        {"candidate": "half, int8", "bytes": 500, "faster": 1.2, "valid loss": 0.01, "loss": 0.0, "loss at most": 0.018},
        {"candidate": "a quarter, int8", "note": "loses 0.0222 of accuracy"}])  # fmt: skip
    names = {"examples": "", "seconds before": "s", "seconds": "s", "faster": "x", "faster at least": "x",
             "memory before": "B", "memory": "B"}  # fmt: skip
    running = Table.of("ONNX Runtime", names, [dict(zip(names, (1, 2e-5, 1e-5, 2.0, 1.9, 10_000_000, 5_000_000), strict=True))],
                       {"onnxruntime": "1", "processor": "one", "rounds": 31})  # fmt: skip
    return shrunk(curve, why, running)


@pytest.mark.parametrize("metric", ["loss", "loss at most", "bytes", "examples", "seconds", "smaller", "a loss"])
def test_a_metric_may_be_called_as_a_column_of_the_promise(weights: Shrunk, metric: str) -> None:
    task = SimpleNamespace(name="mine", headline=metric, lower_is_better=(metric,))
    search = SimpleNamespace(before={"test": np.full(90, 0.5)}, task=task, learned=Learned("it"), evaluations=9,
                             seen_before="")  # fmt: skip
    worse = np.repeat([0.0, 0.03], 45)
    told = account.proof(search, worse, Promise(0.1), (4000, 1000), 2.0, {"before": "plain safetensors"})
    names, row = [column.name for column in told.columns], told.rows[0]
    assert len(set(names)) == len(names) == len(row)
    called = metric if metric == "a loss" else f"{metric} (metric)"
    assert (row[f"{called} before"], row[called]) == pytest.approx((0.5, 0.515))
    assert row["loss"] == pytest.approx(0.015)
    own = [row[name] for name in ("bytes before", "bytes", "smaller", "examples", "seconds")]
    assert own == [4000, 1000, 4, 90, 2]
    text = " ".join(render(page(replace(weights, proof=told), "small.file")).split())
    assert f"{called} is 0.515; before it was 0.5." in text


def pictures(found: Shrunk, kind: type[Picture]) -> list[Picture]:
    return [p for section in page(found, "file").sections for p in section.pictures if isinstance(p, kind)]


def test_the_areas_are_the_bytes_of_the_file(weights: Shrunk) -> None:
    (tree,) = pictures(weights, Treemap)
    trace = tree.figure()["data"][0]
    assert sum(trace["values"]) == PROOF["bytes"]
    assert dict(zip(trace["ids"], trace["values"], strict=True))["the header"] == 450


def test_what_the_proof_was_asked_about_stands_beside_the_tolerance(weights: Shrunk) -> None:
    (line,) = pictures(weights, Line)
    most, _, tolerance = line.figure()["data"]
    assert (most["x"], most["y"], tolerance["y"]) == ([550, 900], [1.8, 0.3], [2, 2])
    assert line.figure()["layout"]["yaxis"]["ticksuffix"] == " pp"


def test_files_that_run_are_in_the_order_of_what_they_gain(runs: Shrunk) -> None:
    (line,) = pictures(runs, Line)
    assert line.figure()["data"][1]["x"] == [1.2, 1.5]


@pytest.mark.parametrize("kind", ["weights", "runs"])
def test_the_page_names_the_promise_and_how_to_load_it(kind: str, request: pytest.FixtureRequest) -> None:
    text = render(page(request.getfixturevalue(kind), "small.file"))
    assert "it has fallen by no more than 1.80 pp" in " ".join(text.split())
    assert "small.file" in text[text.index("How to load it") :]
    assert "ordinary" not in text
    assert "4,000 bytes as plain safetensors to 1,000" in text
    assert "<script" not in text
    assert ("goes from larger to smaller candidates, those that are worth asking, and" in " ".join(text.split())) == (
        kind == "weights"
    )
    assert len(text) < 100_000
    assert str(request.getfixturevalue(kind)).startswith("blobs: the promise\nbytes before")


def test_the_page_says_of_which_file_it_speaks(weights: Shrunk, tmp_path: Path) -> None:
    file = tmp_path / "small.safetensors"
    file.write_bytes(b"weights")
    made = page(weights, str(file), "net.pt", "mlp(widths=(64,))")
    digest = "9a129038d9a00aed0cf6a7ea059ca50a813449061ab87848cf1a13eafdf33b2c"
    assert made.meta["of"] == "net.pt"
    assert made.meta["sha256 of the new file"] == digest
    assert date.fromisoformat(made.meta["date"]) <= date.today()
    assert "--model mlp(widths=(64,))" in render(made)
    assert not any("sha256" in name for name in page(weights, str(tmp_path)).meta)  # a folder has none


@pytest.mark.parametrize(
    ("file", "kinds"), [("small.safetensors", [Treemap, Bars]), ("small", [Treemap, Bars]), ("rounded.onnx", [])]
)
def test_the_page_of_weights_alone(file: str, kinds: list[type[Picture]]) -> None:
    row = {"bytes before": 3100, "bytes": 1000, "smaller": 3.1, "error": 0.0996, "error at most": 0.1,
           "largest error": 0.14, "tensor": "a.weight"}  # fmt: skip
    summary = Table.of("model: weights alone", dict.fromkeys(row, ""), [row], {"promise": NOTHING})
    why = Table.of("what each tensor lost", {"name": "", "before": "B", "after": "B"},
                   [{"name": "a.weight", "before": 3000, "after": 600}])  # fmt: skip
    made = page_alone(Alone(Weights.of({}), summary, why), file)
    text = " ".join(render(made).split())
    assert "nothing is said of any metric" in text
    assert file in text[text.index("How to load it") :]
    assert ("packed.safetensors</code> stays beside them, and may go then" in text) == (file == "small")
    pictures = made.sections[1].pictures
    assert [type(picture) for picture in pictures] == kinds
    if Treemap in kinds:
        assert sum(pictures[0].table.column("bytes")) == row["bytes"]
