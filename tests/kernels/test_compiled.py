"""The loops by themselves: carries, exact tables, the cache of machine code."""

from __future__ import annotations

import os
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

from steelyard.kernels import coder, distinct, rans


def test_the_tables_are_the_same_on_every_machine() -> None:
    squash, stretch, rates = coder.tables()
    assert squash.size == 2 * coder.STRETCHED + 1
    assert (np.diff(squash) >= 0).all()
    assert 1 <= squash[0] <= squash[-1] <= 65535
    sums = [zlib.crc32(np.ascontiguousarray(t, "<i8").tobytes()) for t in (squash, stretch, rates)]
    assert sums == [1655491418, 543925451, 1975878096]


@pytest.mark.parametrize("p", [1, 300, 32768, 65000, 65535])
def test_bits_survive_with_carries(p: int) -> None:
    rng = np.random.default_rng(p)
    buffer, state = np.zeros(60_000, np.uint8), np.zeros(4, np.int64)
    bits = rng.random(20_000) < p / 65536
    bits[:2000] = rng.random(2000) < 0.5
    coder.start(state, buffer, False)
    for bit in bits:
        coder.code_bit(state, buffer, p, int(bit), False)
    used = coder.finish(state, buffer, False)
    coder.start(state, buffer[:used], True)
    assert [coder.code_bit(state, buffer[:used], p, 0, True) for _ in bits] == bits.tolist()
    assert coder.finish(state, buffer[:used], True) == used


def test_a_full_buffer_is_reported_and_not_overrun() -> None:
    symbols = np.random.default_rng(0).integers(0, 256, 5000, np.uint8)
    room = np.zeros(6000, np.uint8)
    *_, rates = coder.tables()
    assert coder.code_adaptive(symbols, room[:1000], 8, 1023, 1023, rates, False) == -1
    assert not room[1000:].any()


def test_distinct_stops_at_the_limit() -> None:
    x, codes = np.uint32([5, 9, 5, 7]), np.empty(4, np.int32)
    assert distinct.distinct(x, 3, codes).tolist() == [5, 9, 7]
    assert codes.tolist() == [0, 1, 0, 2]
    assert distinct.distinct(x, 2, codes).size == 3


def test_distinct_finds_what_a_sort_finds() -> None:
    x = np.random.default_rng(1).integers(0, 3000, 20_000).astype(np.uint16)
    codes = np.empty(x.size, np.int32)
    found = distinct.distinct(x, 65536, codes)
    assert sorted(found) == np.unique(x).tolist()
    assert (found[codes] == x).all()


def test_states_return_to_where_they_began() -> None:
    symbols = np.random.default_rng(2).integers(0, 3, 1001).astype(np.uint8)
    frequencies = np.array([100, 100, 56], np.int64)
    words = rans.encode(symbols, frequencies, 8)
    out = np.zeros_like(symbols)
    assert rans.decode(words, frequencies, 8, out)
    assert (out == symbols).all()
    assert not rans.decode(words[:-1], frequencies, 8, out)
    assert not rans.decode(np.append(words, np.uint16(1)), frequencies, 8, out)


def test_machine_code_is_kept_where_it_is_told(tmp_path: Path) -> None:
    program = "import numpy as np; from steelyard.kernels.bits import pack_bits; print(pack_bits(np.uint8([1, 2]), 3))"
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, capture_output=True)
    assert list(tmp_path.rglob("*pack_bits*.nbi"))
