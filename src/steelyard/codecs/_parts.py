"""What codecs share: the bit patterns of a tensor, and parts that are checked before they are used.

Knows no codec. Every check raises CodecError, so that a damaged file never becomes another exception.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from steelyard.core.spec import Spec
from steelyard.errors import CodecError


def is_whole(value: object, low: int, high: int | None = None) -> bool:
    """Whether a setting is a whole number from `low` to `high`.

    >>> is_whole(3, 1, 4), is_whole(2.5, 1, 4), is_whole(5, 1, 4)
    (True, False, False)
    """
    return isinstance(value, (int, np.integer)) and bool(low <= value and (high is None or value <= high))


def whole(codec: str, name: str, value: object, low: int, high: int | None = None) -> None:
    """Raise CodecError unless a setting is a whole number from `low` to `high`.

    >>> whole("palette", "k", 2.5, 1, 256)
    Traceback (most recent call last):
    ...
    steelyard.errors.CodecError: palette: k is 2.5, expected 1 to 256
    """
    if not is_whole(value, low, high):
        expected = f"at least {low}" if high is None else f"{low} to {high}"
        raise CodecError(f"{codec}: {name} is {value!r}, expected {expected}")


def patterns(x: np.ndarray) -> np.ndarray:
    """The elements of `x` as unsigned integers of the same width, 1-D; two of them each for complex128.

    >>> patterns(np.float16([0, -0.0, 1])).tolist()
    [0, 32768, 15360]
    """
    flat = np.ascontiguousarray(x).reshape(-1)
    return flat.view(f"u{min(flat.dtype.itemsize, 8)}")


def nonzero(x: np.ndarray) -> np.ndarray:
    """Which elements of `x` have a bit set (so -0.0 counts), 1-D bool."""
    words = max(1, x.dtype.itemsize // 8)
    return np.asarray((patterns(x).reshape(-1, words) != 0).any(axis=1))


def blank(spec: Spec) -> np.ndarray:
    """Zeros of `spec`; raises CodecError where the memory for them cannot be had."""
    try:
        return np.zeros(spec.shape, spec.dtype.numpy)
    except (MemoryError, ValueError) as error:
        raise CodecError(f"{spec} does not fit in memory ({error}); the description is damaged or too large") from None


def part(
    parts: Mapping[str, np.ndarray],
    name: str,
    codec: str,
    *,
    dtypes: tuple[Any, ...],
    shape: tuple[int, ...] | None = None,
) -> np.ndarray:
    """One part, of one of `dtypes`, of `shape` or (where that is None) with one axis; contiguous."""
    if name not in parts:
        raise CodecError(f"{codec}: the part {name!r} is missing; present are {sorted(parts) or '(none)'}")
    found = parts[name]
    if all(found.dtype != np.dtype(d) for d in dtypes):
        raise CodecError(f"{codec}: the part {name!r} is {found.dtype}, expected {' or '.join(map(_spell, dtypes))}")
    if (found.ndim != 1) if shape is None else (found.shape != shape):
        wanted = "one axis" if shape is None else f"the shape {list(shape)}"
        raise CodecError(f"{codec}: the part {name!r} has the shape {list(found.shape)}, expected {wanted}")
    return np.ascontiguousarray(found).reshape(found.shape)


def _spell(dtype: Any) -> str:
    return str(np.dtype(dtype))
