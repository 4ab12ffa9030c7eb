"""What is worked out once and asked for again, as far as memory allows: the first comes stays, nothing is put out.

Who asks for all tensors in turn, again and again, would find nothing in a store that puts out what was used least
recently as soon as one tensor too many passes through it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Any, Protocol, TypeVar, cast


class Sized(Protocol):
    """What says how much memory it takes."""

    @property
    def nbytes(self) -> int: ...


Found = TypeVar("Found", bound=Sized)


class Kept:
    """Answers by their key, in at most `limit` bytes together. Safe with several threads.

    >>> import numpy as np
    >>> kept = Kept(limit=16)
    >>> asked = [("a", 1), ("b", 2), ("a", 3), ("c", 4), ("c", 5)]
    >>> [int(kept.of(key, lambda: np.float64(value))) for key, value in asked]
    [1, 2, 1, 4, 5]
    """

    def __init__(self, limit: int):
        self._left, self._known, self._lock = limit, dict[Hashable, Any](), threading.Lock()

    def of(self, key: Hashable, compute: Callable[[], Found]) -> Found:
        """The answer to a key: that of an earlier call with it, if there was room for that."""
        with self._lock:
            if key in self._known:
                return cast(Found, self._known[key])
        found = compute()
        with self._lock:
            if key not in self._known and found.nbytes <= self._left:
                self._left -= found.nbytes
                self._known[key] = found
        return found
