"""A tensor of which each group of m has at most n values that are not zero: those values, and where they stand."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from typing import ClassVar

import numpy as np

from steelyard.codecs._parts import blank, nonzero, part
from steelyard.codecs.bits import Bits
from steelyard.core.packed import Codec
from steelyard.core.spec import Spec
from steelyard.errors import CodecError

MOST = 16  # elements of a group: 12870 arrangements at most


@dataclass(frozen=True)
class NM(Codec):
    """Hold each group of `m` consecutive elements along `axis` as n values and the number of their arrangement.

    n is the most values that are not zero in any group: 2 of 4 for a tensor pruned by that pattern, m for a dense one.
    The part ``values`` has n of each group in the order of their places; of a group with fewer, zeros are among them.
    ``codes`` (uint16, one for each group) is the number of the set of places among the sets of n of m in the order of
    their sorted places: 3 bits for 2 of 4 where a mask takes 4, and what an entropy coder makes of it where one is
    nested. The last group is filled with zeros; of a tensor with fewer axes the last axis is taken.

    An element is zero here when all of its bits are: -0.0 and NaN are values and survive.

    >>> parts = NM(m=4).encode(np.float32([[0, 7, 0, -1, 5, 0, 0, 0]]))
    >>> parts["values"].tolist(), parts["codes"].tolist()  # places 1 and 3; 0 and 1
    ([7.0, -1.0, 5.0, 0.0], [4, 0])

    Source: Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021.
    """

    name: ClassVar[str] = "nm"
    lossless: ClassVar[bool] = True
    parts: ClassVar[tuple[str, ...]] = ("codes", "values")
    inner: ClassVar[Mapping[str, Codec]] = {"codes": Bits()}
    m: int = 4
    axis: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.m <= MOST:
            raise CodecError(f"nm: a group has 1 to {MOST} elements, not {self.m}")

    def encode(self, x: np.ndarray) -> dict[str, np.ndarray]:
        """``{"codes": uint16, "values": of the dtype of x}``."""
        groups = self._groups(np.ascontiguousarray(x))
        mask = nonzero(groups).reshape(groups.shape)
        n = int(mask.sum(1).max(initial=0))
        places = np.sort(np.argsort(~mask, axis=1, kind="stable")[:, :n], axis=1)
        number = {places: i for i, places in enumerate(combinations(range(self.m), n))}
        ranks = np.zeros(1 << self.m, np.uint16)
        for chosen, i in number.items():
            ranks[sum(1 << place for place in chosen)] = i
        codes = ranks[(1 << places).sum(1)] if n else np.zeros(len(groups), np.uint16)
        return {"codes": codes, "values": np.take_along_axis(groups, places, 1).reshape(-1)}

    def decode(self, parts: Mapping[str, np.ndarray], spec: Spec) -> np.ndarray:
        """The tensor of `spec`; raises CodecError where the parts are not those of its groups."""
        codes = part(parts, "codes", self.name, dtypes=(np.uint16,))
        values = part(parts, "values", self.name, dtypes=(spec.dtype.numpy,))
        shape: tuple[int, ...] = spec.shape or (1,)
        axis = self._axis(len(shape))
        length = -(-shape[axis] // self.m) * self.m
        count = math.prod(size for i, size in enumerate(shape) if i != axis) * length // self.m
        if codes.size != count or (values.size and not count) or (count and values.size % count):
            raise CodecError(f"nm: {codes.size} codes and {values.size} values for {count} groups")
        n = values.size // count if count else 0
        if n > self.m or (count and int(codes.max()) >= math.comb(self.m, n)):
            raise CodecError(f"nm: the parts do not say where {n} of {self.m} values stand")
        out = blank(spec)
        if not n:
            return out
        groups = np.zeros((count, self.m), spec.dtype.numpy)
        np.put_along_axis(groups, _places(self.m, n)[codes], values.reshape(count, n), 1)
        moved = (*(size for i, size in enumerate(shape) if i != axis), length)
        size = shape[axis]
        whole = np.moveaxis(groups.reshape(moved)[..., :size], -1, axis)
        out[...] = whole.reshape(spec.shape)
        return out

    def _axis(self, ndim: int) -> int:
        return min(self.axis, ndim - 1) if self.axis >= 0 else max(ndim + self.axis, 0)

    def _groups(self, x: np.ndarray) -> np.ndarray:
        """The elements, (groups, m), the last group along the axis filled with zeros."""
        last: np.ndarray = np.moveaxis(np.atleast_1d(x), self._axis(max(x.ndim, 1)), -1)
        short = -last.shape[-1] % self.m
        if short:
            last = np.concatenate([last, np.zeros((*last.shape[:-1], short), x.dtype)], -1)
        return np.ascontiguousarray(last).reshape(-1, self.m)


@cache
def _places(m: int, n: int) -> np.ndarray:
    """Every set of n places among m, in the order of their numbers: (sets, n)."""
    return np.array(list(combinations(range(m), n)), np.int64).reshape(math.comb(m, n), n)
