"""Numbers that tell the contents of rows and columns apart, without keeping any of the contents.

Decides that such a number is a sum of the stored bits times random numbers (mod 2^64), which two tensors that hold the
same rows share; the random numbers are drawn anew in each process, so that no file can be made to collide. A few blocks
and one number for each row and column are in memory. Knows nothing of magnitudes.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np

from steelyard.core.weights import Weight
from steelyard.explain.diff.tally import BLOCK


@dataclass(frozen=True)
class Sums:
    """One number for each row (first axis) and each column (second axis), and one for the multiset of all elements."""

    rows: np.ndarray
    columns: np.ndarray
    elements: int


def sums(weight: Weight, shape: tuple[int, ...] | None = None) -> Sums:
    """The numbers of a tensor, taken to have `shape`; one of rank 0 or 1 is a single row."""
    shape = weight.spec.shape if shape is None else shape
    shape = shape if len(shape) > 1 else (1, weight.spec.size)
    rest = math.prod(shape[2:])
    width = shape[1] * rest
    rows, columns = np.zeros(shape[0], np.uint64), np.zeros(shape[1], np.uint64)
    elements = np.zeros(1, np.uint64)
    for first, at, values in pieces(weight, width):  # (rows, part of the width)
        bits = values.astype(np.uint64)
        elements += mixed(bits).sum(dtype=np.uint64)
        count, part = bits.shape
        rows[first : first + count] += (bits * factors(at, part)).sum(axis=1, dtype=np.uint64)
        lines = factors(first * rest, count * rest).reshape(count, 1, rest)
        if part == width:
            columns += (bits.reshape(count, shape[1], rest) * lines).sum(axis=(0, 2), dtype=np.uint64)
        else:  # one row, in parts
            where = np.arange(at, at + part)
            np.add.at(columns, where // rest, bits[0] * lines[0, 0, where % rest])
    return Sums(rows, columns, int(elements[0]))


def pieces(weight: Weight, width: int) -> Iterator[tuple[int, int, np.ndarray]]:
    """The bits as (first row, first element in it, (rows, elements)): some whole rows, or a part of one."""
    if width <= BLOCK:
        many = BLOCK // width * width
        for i, block in enumerate(weight.blocks(many)):
            yield i * (many // width), 0, unsigned(block).reshape(-1, width)
        return
    at = 0
    for block in weight.blocks(BLOCK):
        flat = unsigned(block)
        while flat.size:
            row, start = divmod(at, width)
            part = flat[: width - start]
            yield row, start, part[None]
            flat, at = flat[part.size :], at + part.size


def unsigned(block: np.ndarray) -> np.ndarray:
    """The bits of flat values, one unsigned number each; of a wide complex number, both halves mixed into one."""
    if block.dtype.itemsize == 16:
        halves = block.view(np.uint64).reshape(-1, 2)
        both: np.ndarray = mixed(halves[:, 0]) + halves[:, 1]
        return both
    return block.view(f"u{block.dtype.itemsize}")


def mixed(bits: np.ndarray) -> np.ndarray:
    """Each number scattered over 64 bits (splitmix64), so that a sum tells multisets apart."""
    with np.errstate(over="ignore"):
        z = bits + _seed()
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    scattered: np.ndarray = z ^ (z >> np.uint64(31))
    return scattered


def factors(first: int, count: int) -> np.ndarray:
    """The random odd numbers for the places from `first` on; they are the same for rows and for columns."""
    with np.errstate(over="ignore"):
        places = np.arange(first, first + count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return mixed(places) | np.uint64(1)


@cache
def _seed() -> np.uint64:
    return np.uint64(secrets.randbits(64))
