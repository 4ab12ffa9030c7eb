"""Labels of single indices along axes, and which of them belong together: a union-find over whole arrays.

Decides nothing about operations. Label 0 is what must stay: whatever is joined with it stays, too.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

STAYS = 0
Axes = tuple[np.ndarray, ...]  # for each axis of a tensor the labels of its indices, (size of the axis,) int64


class Labels:
    """Labels are numbers from `fresh`; `join` makes two of them one.

    >>> labels = Labels()
    >>> a, b = labels.fresh(2), labels.fresh(2)
    >>> labels.join(a, b)
    >>> labels.find(b).tolist() == labels.find(a).tolist()
    True
    """

    def __init__(self) -> None:
        self._parent = np.zeros(1, np.int64)
        self._used = 1

    def fresh(self, count: int) -> np.ndarray:
        """So many labels that nothing has yet."""
        if self._used + count > len(self._parent):
            more = np.arange(len(self._parent), 2 * (self._used + count), dtype=np.int64)
            self._parent = np.concatenate([self._parent, more])
        self._used += count
        return np.arange(self._used - count, self._used, dtype=np.int64)

    def fresh_axes(self, shape: Sequence[int]) -> Axes:
        """Labels for every axis of a tensor."""
        return tuple(self.fresh(size) for size in shape)

    def find(self, labels: np.ndarray) -> np.ndarray:
        """The one label that stands for all that are joined with each."""
        found: np.ndarray = self._parent[labels]
        while True:
            above: np.ndarray = self._parent[found]
            if np.array_equal(above, found):
                self._parent[labels] = found
                return found
            found = above

    def join(self, a: np.ndarray, b: np.ndarray) -> None:
        """Element by element, what was `a` and what was `b` belong together from now on."""
        one, two = self.find(a), self.find(b)
        for x, y in {(int(x), int(y)) for x, y in zip(one, two, strict=True) if x != y}:
            first, second = sorted((self._root(x), self._root(y)))
            self._parent[second] = first  # the smaller one stands for both: 0 for all that it is joined with

    def stay(self, *axes: np.ndarray) -> None:
        """What these labels are of must stay."""
        for labels in axes:
            self.join(labels, np.zeros_like(labels))

    def free(self, labels: np.ndarray) -> bool:
        """Whether any of them is of something that may go."""
        return bool(self.find(labels).any())

    def _root(self, label: int) -> int:
        while (above := int(self._parent[label])) != label:
            label = above
        return label


def fixed(shape: Sequence[int]) -> Axes:
    """Axes of a tensor of which nothing may go."""
    return tuple(np.zeros(size, np.int64) for size in shape)
