"""Loops kept as objects: loaded without numba, made anew when they are damaged, and usable where nothing can be kept."""

from __future__ import annotations

import platform
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from steelyard.kernels import elf, moments
from steelyard.kernels.native import Native, _read

SIMPLE = sys.platform.startswith("linux") and platform.machine() == "x86_64"

ADD = """
import numpy as np, sys
from steelyard.kernels.compare import compare
sums, counts = np.zeros((5, 16)), np.zeros(6, np.int64)
compare(np.float32([1, 2]), np.float32([1, 3]), sums, counts)
print(sums[0].sum(), *counts, "numba" in sys.modules)
"""

STATISTICS = """
import ml_dtypes, numpy as np, sys
import steelyard as sy
from steelyard.explain.reading import Workspace
from steelyard.explain.tally import tally
for kind in (np.float32, np.float16, ml_dtypes.bfloat16):
    found = tally(sy.Weight.of("x", np.arange(6.0).reshape(2, 3).astype(kind)), Workspace(True))
    print(*found.ordered([0, 5]), found.rows[0] ** 2, "numba" in sys.modules)
print("llvmlite.binding" in sys.modules)
"""


def build(numba):
    def double(values, n):
        for i in range(n):
            values[i] = 2 * values[i]

    return double


def made(source: str = "one") -> Native:
    return Native("double", build, ("float64*", "int64"), source)


def run(native: Native) -> list[float]:
    x = np.arange(3.0)
    native(x, 3)
    return x.tolist()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    return tmp_path


def test_the_second_process_does_not_import_numba(folder):
    said = [
        subprocess.run([sys.executable, "-c", ADD], capture_output=True, text=True, check=True).stdout for _ in range(2)
    ]
    assert said == ["1.0 1 1 0 0 0 0 True\n", "1.0 1 1 0 0 0 0 False\n"]


def test_statistics_do_not_import_numba_the_second_time(folder):
    said = [
        subprocess.run([sys.executable, "-c", STATISTICS], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    ]
    first, second = (text.splitlines() for text in said)
    assert [line.split()[-1] for line in first] == ["True"] * 4
    assert second[:3] == [line.replace("True", "False") for line in first[:3]]
    if SIMPLE:
        assert second[3] == "False"


@pytest.mark.skipif(not SIMPLE, reason="objects of other processors and systems are left to LLVM")
def test_an_object_that_needs_something_from_outside_is_left_to_llvm(folder, monkeypatch):
    run(made())
    (kept,) = folder.glob("*.o")
    _, symbol, code = kept.read_bytes().split(b"\n", 2)
    assert elf.load(code, symbol.decode())
    assert elf.load(code, "another name") is None
    assert elf.load(code[:18] + b"\xb7" + code[19:], symbol.decode()) is None  # of another processor
    monkeypatch.setattr(elf, "load", lambda code, symbol: None)
    assert run(made()) == [0.0, 2.0, 4.0]


def test_both_ways_of_loading_give_the_same(folder, monkeypatch):
    x = np.random.default_rng(0).normal(size=(40, 300)).astype(np.float32)

    def found() -> list[float]:
        rows, columns = np.zeros(40), np.zeros(300)
        loop = replace(moments._ROWS["float32"])  # one that is not loaded yet
        loop(x, x, x, x.size, 1 << 16, 0, 300, rows, columns, 1)
        return [*rows.tolist(), *columns.tolist()]

    one = found()
    assert np.allclose(one[:40], (x.astype(float) ** 2).sum(axis=1))
    monkeypatch.setattr(elf, "load", lambda code, symbol: None)
    assert found() == one


def test_sums_may_be_reordered_where_that_is_said(folder):
    def add(numba):
        def total(values, n, out):
            result = 0.0
            for i in range(n):
                result += values[i]
            out[0] = result

        return total

    x = np.random.default_rng(0).normal(size=10_001)
    x[::2] *= 1e-9
    sums = {}
    for reordered in (False, True):
        out = np.zeros(1)
        Native("total", add, ("float64*", "int64", "float64*"), "a sum", reordered)(x, x.size, out)
        sums[reordered] = out[0]
    assert sums[False] == np.cumsum(x)[-1] != sums[True]
    assert abs(sums[True] - sums[False]) < 1e-12 * abs(x).sum()


def test_a_damaged_object_is_made_anew(folder):
    assert run(made()) == [0.0, 2.0, 4.0]
    (kept,) = folder.glob("*.o")
    whole = kept.read_bytes()
    for damaged in (b"", whole[:-1], whole.replace(b"\x7fELF", b"\x7fELG"), b"\n\n\n"):
        kept.write_bytes(damaged)
        assert run(made()) == [0.0, 2.0, 4.0]
        assert _read(kept)


def test_another_source_is_another_object(folder):
    run(made())
    run(made("two"))
    assert len(list(folder.glob("*.o"))) == 2


def test_where_nothing_can_be_written_it_is_compiled_each_time(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "file" / "below"))
    assert run(made()) == [0.0, 2.0, 4.0]


def test_too_few_values_are_an_error(folder):
    with pytest.raises(ValueError):
        made()(np.zeros(3))
