"""`steelyard watch`: the log of a training as tables, as a page, as Parquet."""

from __future__ import annotations

import json

import pytest

from steelyard.learn.watch.log import Log


@pytest.fixture
def log(tmp_path):
    path = tmp_path / "run.sqlite"
    log = Log(path, {"model": "Net"})
    log.add("tensors", [("a.weight", "2x3", "float32", 1)])
    for step in range(4):
        log.add("steps", [(step, 0.5 * step, 0.1, 1.0, 1e-3)])
        log.add("norms", [(step, "a.weight", 1.0, 2.0, 0.5, 1e-3)])
        log.add("notes", [(step, "loss", 2.0 - step)])
    log.add("faults", [(3, "dead ReLU", "a", "warning", "5 of 8 units", "mend")])
    log.close()
    return path


def test_the_course_and_the_faults(steelyard, log):
    found = steelyard("watch", log)
    assert (found.status, found.err) == (0, "")
    for words in ("loss, last      -1", "dead ReLU", "5 of 8 units", "update ratio    0.001×"):
        assert words in found.out
    tables = [json.loads(line) for line in steelyard("watch", log, "--json").out.splitlines()]
    assert [t["title"] for t in tables] == ["watched", "faults", "tensors, last step", "layers, last look"]
    assert tables[0]["rows"][0]["faults"] == 1


def test_one_table_of_the_log(steelyard, log):
    assert steelyard("watch", log, "--table", "notes", "--csv").out.splitlines()[1] == "0,loss,2.0"
    assert len(steelyard("watch", log, "--tensor", "a.weight", "--csv").out.splitlines()) == 5


def test_the_page(steelyard, log, tmp_path):
    found = steelyard("watch", log, "--html", tmp_path / "page.html")
    assert found.err == f"wrote {tmp_path / 'page.html'}\n"
    assert "Training of Net" in (tmp_path / "page.html").read_text()


def test_parquet_there_and_back(steelyard, log, tmp_path):
    pytest.importorskip("pyarrow")
    assert steelyard("watch", log, "--parquet", tmp_path / "folder").err == f"wrote {tmp_path / 'folder'}\n"
    first, again = (steelyard("watch", where, "--json").out for where in (log, tmp_path / "folder"))
    assert first == again


@pytest.mark.parametrize(("words", "said"), [
    (["gone.sqlite"], "gone.sqlite: there is no such file"),
    (["LOG", "--table", "nroms"], "there is no table of a log 'nroms'; did you mean 'norms'?"),
    (["LOG", "--tensor", "b.weight"], "there is no tensor in the log 'b.weight'; did you mean 'a.weight'?"),
    (["LOG", "--table", "steps", "--tensor", "a.weight"], "there is no table by tensor 'steps'"),
])  # fmt: skip
def test_errors_are_one_line(steelyard, log, words, said):
    found = steelyard("watch", *(log if word == "LOG" else word for word in words))
    assert found.status == 2
    assert said in found.err
    assert found.err.count("\n") == 1
