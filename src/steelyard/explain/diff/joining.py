"""Several tensors of one file that are one of the other: q, k and v packed or split, gate and up, experts stacked.

Decides by the numbers of rows and columns that `marks` gives: the parts lie in the whole if it has their rows (or their
columns) and no others, in whatever order, such as those of the heads in turn. Looked at are only tensors that have no
partner, and of these only where the whole begins with the first elements of a part. Bounded: each is read once or
twice, in blocks. Knows nothing of parts that were changed besides.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from steelyard.core.weights import Weight
from steelyard.errors import SteelyardError, quoted
from steelyard.explain.diff.marks import sums, unsigned

SHOWN = 4  # names that are listed
BEGINNING = 4096  # elements of a part that are compared before anything is read


@dataclass(frozen=True)
class Joined:
    """One tensor that holds several others, in this order where it has one, and how."""

    whole: Weight
    parts: tuple[Weight, ...]
    how: str  # "rows", "columns" or "slices"
    places: tuple[int | None, ...]  # the row (column, slice) at which each part begins; None where they alternate

    def place(self, part: Weight) -> str:
        """Where a part lies in the whole, in words."""
        at = self.places[self.parts.index(part)]
        if at is None:
            return f"{self._lines} in turn with those of others"
        count = 1 if self.how == "slices" else part.spec.shape[self.how == "columns"]
        return f"{self._lines} {at} to {at + count - 1}" if count > 1 else f"{self._lines.removesuffix('s')} {at}"

    @property
    def _lines(self) -> str:
        """What the parts are made of, in words."""
        return self.how if len(self.whole.spec.shape) > 1 else "elements"

    @property
    def told(self) -> str:
        """What the whole holds, in words."""
        names = [quoted(part.name) for part in self.parts]
        shown = names if len(names) <= SHOWN else [*names[: SHOWN - 1], f"{len(names) - SHOWN + 1} others"]
        listed = f"{', '.join(shown[:-1])} and {shown[-1]}"
        if None in self.places:
            return f"holds the {self._lines} of {listed}, in turn"
        return f"holds {listed}, {'as its slices' if self.how == 'slices' else f'their {self._lines} after each other'}"


def joined(wholes: Sequence[Weight], parts: Sequence[Weight]) -> list[Joined]:
    """Those of `wholes` that are made of some of `parts`; no part is in two.

    >>> x = np.arange(24, dtype=np.float32).reshape(6, 4)
    >>> parts = [Weight.of("q", x[:2]), Weight.of("k", x[2:4]), Weight.of("v", x[4:])]
    >>> found = joined([Weight.of("qkv", x)], parts)[0]
    >>> [part.name for part in found.parts], found.place(parts[1])
    (['q', 'k', 'v'], 'rows 2 to 3')
    """
    free, found, known = list(parts), list[Joined](), _Known()
    for whole in wholes:
        try:
            ways = (_made(whole, free, how, known) for how in ("rows", "slices", "columns"))
            one = next((made for made in ways if made is not None), None)
        except SteelyardError:  # where one cannot be read, nothing is known of the whole
            one = None
        if one is not None:
            found.append(one)
            free = [part for part in free if part not in one.parts]
    return found


@dataclass(frozen=True)
class _Known:
    """What was read of the parts, since every whole asks for it."""

    heads: dict[str, np.ndarray] = field(default_factory=dict)
    numbers: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)

    def begins(self, whole: np.ndarray, part: Weight) -> bool:
        """Whether the first elements of a whole are those of the first row of a part."""
        if part.name not in self.heads:
            row = part.spec.size // part.spec.shape[0] if len(part.spec.shape) > 1 else part.spec.size
            self.heads[part.name] = _head(part, row)
        head = self.heads[part.name]
        return np.array_equal(whole[: head.size], head)

    def of(self, part: Weight, how: str) -> np.ndarray:
        """The numbers of a part."""
        if (part.name, how) not in self.numbers:
            self.numbers[part.name, how] = _numbers(part, "slice" if how == "slices" else how)
        return self.numbers[part.name, how]


def _head(weight: Weight, count: int) -> np.ndarray:
    """The bits of the first elements."""
    return unsigned(next(iter(weight.blocks(max(1, min(BEGINNING, count)))))).copy()


def _fits(whole: Weight, part: Weight, how: str) -> bool:
    """Whether a part has the dtype and the shape to be some rows, columns or one slice of the whole, but not all."""
    w, p = whole.spec.shape, part.spec.shape
    if whole.spec.dtype != part.spec.dtype or not 0 < part.spec.size < whole.spec.size:
        return False
    if how == "rows":
        return len(p) == len(w) and p[1:] == w[1:]
    if how == "slices":
        return p == w[1:]
    return len(p) == len(w) > 1 and p[0] == w[0] and p[2:] == w[2:]


def _made(whole: Weight, parts: Sequence[Weight], how: str, known: _Known) -> Joined | None:
    """The whole as some of the parts, nearest names first where more would do."""
    fitting = [part for part in parts if _fits(whole, part, how)]
    if sum(part.spec.size for part in fitting) < whole.spec.size or len(fitting) < 2:
        return None
    head = _head(whole, whole.spec.size)
    if not any(known.begins(head, part) for part in fitting):
        return None
    of_whole = _numbers(whole, how)
    left, chosen = Counter(of_whole.tolist()), list[tuple[Weight, np.ndarray]]()
    for part in sorted(fitting, key=lambda part: -_shared(part.name, whole.name)):
        numbers = known.of(part, how)
        if Counter(numbers.tolist()) <= left:
            left -= Counter(numbers.tolist())
            chosen.append((part, numbers))
    return _placed(whole, of_whole, chosen, how) if not left else None


def _placed(whole: Weight, of_whole: np.ndarray, chosen: Sequence[tuple[Weight, np.ndarray]], how: str) -> Joined:
    """The parts in the order in which they lie, and where each begins."""
    rest, at = list(chosen), 0
    parts, places = list[Weight](), list[int | None]()
    while rest:
        here = (pair for pair in rest if np.array_equal(of_whole[at : at + len(pair[1])], pair[1]))
        part, numbers = next(here, (None, None))
        if part is None or numbers is None:
            break
        parts.append(part)
        places.append(at)
        at += len(numbers)
        rest = [pair for pair in rest if pair[0] is not part]
    others = [part for part, _ in rest]
    return Joined(whole, (*parts, *others), how, (*places, *[None] * len(others)))


def _numbers(weight: Weight, how: str) -> np.ndarray:
    """One number for each row or column; of a tensor that is a slice, one for the whole."""
    if how == "slice":
        return sums(weight, (1, weight.spec.size)).rows
    found = sums(weight)
    return found.columns if how == "columns" or len(weight.spec.shape) < 2 else found.rows


def _shared(name: str, other: str) -> int:
    """How many components two names share at the beginning."""
    count = 0
    for left, right in zip(name.split("."), other.split("."), strict=False):
        if left != right:
            break
        count += 1
    return count
