"""A log that is read again: from SQLite and Parquet, while it grows, after a kill; and its course, thinned."""

from __future__ import annotations

import math
import os
import signal
import sqlite3
import subprocess
import sys

import numpy as np
import pytest

import steelyard as sy
from steelyard.errors import FormatError, MissingExtraError, UnknownNameError, WeightsError
from steelyard.learn.watch.course import Binned, Course, grouped
from steelyard.learn.watch.log import Log
from steelyard.learn.watch.reading import SqliteLog
from steelyard.learn.watch.schema import TABLES


def written(path=None, steps=7):
    log = Log(path, {"model": "Net", "optimizer": "SGD"})
    log.add("tensors", [("a.weight", "2x3", "float32", 1), ("a.bias", "2", "float32", 0)])
    more(log, range(steps))
    log.add("faults", [(3, "NaN", "a", "error", "seen", "mend")])
    log.write()
    return log


def more(log, steps):
    for step in steps:
        log.add("steps", [(step, 0.5 * step, 0.1, 10.0**-step, 1e-3)])
        log.add(
            "norms", [(step, "a.weight", 1.0, 2.0, 0.5, 10.0 ** -(step % 3)), (step, "a.bias", 0.0, None, 0.1, None)]
        )
        log.add("layers", [(step, "a", "Linear", "healthy", 1.0 + step, 1.0, None, 0.25, None, None, None)])
        log.add("notes", [(step, "loss", math.nan if step == 5 else 7.0 - step)])
    log.write()


def same(one, other):
    for name in TABLES:
        assert repr(one[name].rows) == repr(other[name].rows)  # NaN is not equal to itself
        assert one[name].columns == other[name].columns


def test_every_table_comes_back_with_units_nan_and_none(tmp_path):
    log = written(tmp_path / "log")
    found = sy.read_log(tmp_path / "log")
    assert dict(found.meta) == {"steelyard.watch": "1", "model": "Net", "optimizer": "SGD"}
    assert set(found) == set(TABLES)
    assert math.isnan(found["notes"].rows[5]["value"])
    assert found["norms"].rows[1]["gradient norm"] is None
    assert [c.unit for c in found["steps"].columns] == ["", "s", "", "", "x"]
    for name in TABLES:
        assert repr(found[name].rows) == repr(log.table(name).rows)
    assert [row["tensor"] for row in found.table("norms", tensor="a.bias").rows] == ["a.bias"] * 7


def test_pieces_after_a_place(tmp_path, monkeypatch):
    monkeypatch.setattr("steelyard.learn.watch.reading.PIECE", 4)
    written(tmp_path / "log")
    found = sy.read_log(tmp_path / "log")
    assert [len(piece) for piece in found.pieces("norms")] == [4, 4, 4, 2]
    assert [row[0] for piece in found.pieces("norms", 5, "a.weight") for row in piece] == [3, 4, 5, 6]
    assert len(found.table("norms").rows) == 14


def test_what_is_no_log(tmp_path):
    (tmp_path / "text").write_text("no log " * 99)
    sqlite3.connect(tmp_path / "empty").close()
    for name, said in (
        ("text", "expected the log of a watch"),
        ("empty", "expected the log"),
        ("gone", "no such file"),
    ):
        with pytest.raises(FormatError, match=said):
            sy.read_log(tmp_path / name)
    written(tmp_path / "log")
    with pytest.raises(UnknownNameError, match="did you mean 'norms'"):
        sy.read_log(tmp_path / "log")["norm"]


def test_who_reads_does_not_hold_up_who_writes(tmp_path):
    log = written(tmp_path / "log")
    log._base.execute("PRAGMA busy_timeout = 0")
    reader = sqlite3.connect(tmp_path / "log")
    rows = reader.execute("SELECT * FROM norms")
    rows.fetchone()
    more(log, [7])
    log.close()
    reader.close()
    assert len(sy.read_log(tmp_path / "log")["steps"].rows) == 8


def test_a_log_whose_writer_was_killed_is_read(tmp_path):
    code = f"""
import sys, time
sys.path.insert(0, {os.path.dirname(__file__)!r})
from test_learn_watch_log import written
log = written({str(tmp_path / "log")!r})
print("ready", flush=True)
time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert len(sy.read_log(tmp_path / "log")["steps"].rows) == 7


def test_parquet_says_the_same(tmp_path, monkeypatch):
    pq = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr("steelyard.learn.watch.reading.PIECE", 5)
    log = written(tmp_path / "log")
    paths = log.to_parquet(tmp_path / "folder")
    assert [p.name for p in paths] == [f"{name}.parquet" for name in TABLES]
    found = sy.read_log(tmp_path / "folder")
    same(found, sy.read_log(tmp_path / "log"))
    assert dict(found.meta) == dict(sy.read_log(tmp_path / "log").meta)
    assert [row[0] for piece in found.pieces("norms", 5, "a.weight") for row in piece] == [3, 4, 5, 6]
    schema = pq.read_schema(tmp_path / "folder" / "steps.parquet")
    assert schema.field("seconds").metadata == {
        b"unit": b"s",
        b"about": b"since the watch began, at the end of the step",
    }
    assert str(schema.field("step").type) == "int64"
    assert sy.watched(tmp_path / "folder" / "steps.parquet", "faults").rows[0]["where"] == "a"
    sy.read_log(tmp_path / "log").to_parquet(tmp_path / "folder")  # again, in the place of the first


def test_parquet_that_is_damaged_or_no_log(tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")
    pa = pytest.importorskip("pyarrow")
    written().to_parquet(tmp_path / "folder")
    (tmp_path / "folder" / "norms.parquet").write_bytes(b"PAR1 and no more")
    found = sy.read_log(tmp_path / "folder")
    with pytest.raises(FormatError, match=r"norms.parquet: expected a table of a log, a Parquet file"):
        found["norms"]
    (tmp_path / "folder" / "norms.parquet").unlink()
    with pytest.raises(FormatError, match=r"there is no norms.parquet in it"):
        found["norms"]
    pq.write_table(pa.table({"step": [1]}), tmp_path / "folder" / "steps.parquet")
    with pytest.raises(FormatError, match="this is no table of a log"):
        sy.read_log(tmp_path / "folder")
    with pytest.raises(FormatError, match="expected a folder"):
        written().to_parquet(tmp_path / "folder" / "steps.parquet")
    with pytest.raises(FormatError, match="create it first"):
        written().to_parquet(tmp_path / "no" / "folder")


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"a log in Parquet needs .*pip install 'steelyard\[parquet\]'"):
        written().to_parquet(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_a_log_is_not_written_as_parquet(tmp_path):
    with pytest.raises(WeightsError, match=r"a log that grows is SQLite; .* log\.to_parquet\(folder\)"):
        Log(tmp_path / "run.parquet")
    assert not (tmp_path / "run.parquet").exists()


def test_reading_a_log_needs_no_torch(tmp_path):
    written(tmp_path / "log")
    code = f"""
import sys
import steelyard as sy
from steelyard.learn.watch.course import Course
course = Course(sy.read_log({str(tmp_path / "log")!r}))
course.update()
assert course.summary().rows[0]["steps"] == 7
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_binned_values_are_those_of_numpy():
    random = np.random.default_rng(0)
    values = random.lognormal(size=(1000, 3))
    values[5, 1] = np.nan
    binned, plain = Binned(log=True, bins=16), Binned(bins=16)
    for start in range(0, 1000, 70):  # rows by rows, as a log grows
        part = values[start : start + 70]
        steps = np.repeat(np.arange(start, start + len(part)), 3)
        for one in (binned, plain):
            one.add(steps.tolist(), ["a", "b", "c"] * len(part), part.ravel().tolist())
    assert binned.width == 64
    assert binned.starts == list(range(0, 1000, 64))
    for i, start in enumerate(binned.starts):
        part = values[start : start + 64]
        assert binned.mean()[i] == pytest.approx(np.exp(np.nanmean(np.log(part), 0)))
        assert plain.mean()[i] == pytest.approx(np.nanmean(part, 0))
        assert plain.low()[i] == pytest.approx(np.nanmin(part, 0))
        assert binned.high()[i] == pytest.approx(np.nanmax(part, 0))


def test_the_course_is_the_same_however_often_it_was_asked(tmp_path):
    log = written(tmp_path / "log")
    often = Course(sy.read_log(tmp_path / "log"), bins=8)
    assert often.update()
    assert not often.update()
    more(log, range(7, 30))
    assert often.update()
    once = Course(sy.read_log(tmp_path / "log"), bins=8)
    once.update()
    tables = [(c.summary(), c.faults(), c.tensors(), c.looked(), c.spread(), c.shares("dead"),
               c.over_time(c.notes["loss"], "loss"), c.by_layer(c.layers["rms"], "rms")) for c in (often, once)]  # fmt: skip
    for one, other in zip(*tables, strict=True):
        assert len(one.rows) == len(other.rows)
        for row, again in zip(one.rows, other.rows, strict=True):
            assert row == pytest.approx(again)  # sums are taken in another order
    row = once.summary().rows[0]
    assert (row["steps"], row["time"], row["loss, first"], row["loss, last"], row["faults"]) == (30, 14.5, 7, -22, 1)
    assert once.faults().rows[0]["time"] == 1.5
    assert once.spread().rows[0]["median"] == pytest.approx(10.0 ** -((0 + 1 + 2 + 0) / 4))
    assert [r["layer"] for r in once.shares("dead").rows] == ["a"] * len(once.layers["dead"].starts)
    assert not once.shares("drift").rows


def test_many_layers_are_put_together_by_what_holds_them(tmp_path):
    names = [f"h.{i}.{part}.weight" for i in range(20) for part in ("q", "k", "v")]
    log = Log()
    log.add("tensors", [(name, "2x2", "float32", 1) for name in names])
    log.add("norms", [(0, name, 1.0, 1.0, 1.0, (1e-2, 1e-4, 1e-3)[i % 3]) for i, name in enumerate(names)])
    log.write()
    course = Course(SqliteLog("in memory", log._read()._connect))
    course.update()
    table = course.by_layer(course.ratios, "update ratio", "x")
    assert table.column("layer") == [f"h.{i}" for i in range(20)]
    assert table.column("update ratio") == pytest.approx([1e-3] * 20)
    assert grouped(["a", "b"]) == {"a": ["a"], "b": ["b"]}


def test_a_course_of_nothing_yet(tmp_path):
    log = Log(tmp_path / "log")
    log.write()
    course = Course(sy.read_log(tmp_path / "log"))
    assert not course.update()
    assert course.summary().rows[0]["steps"] == 0
    assert not course.spread().rows
    assert not course.tensors().rows
