"""Packed tensors into separate ones and back, such as q, k and v. Decides by names; values are only moved.

The parts of a packed tensor lie one after the other along one axis. Layouts that interleave them by head, as
GPT-NeoX does, are not this.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from steelyard.core.transform import Step
from steelyard.core.weights import Weight, Weights
from steelyard.edit._names import fill, rule
from steelyard.edit._pieces import piece, together
from steelyard.errors import RecipeError, WeightsError, quoted


@dataclass(frozen=True)
class Split(Step):
    """Cut every tensor that a glob matches along an axis into several, in place; the others pass untouched.

    The ``*`` of `into` stand for what those of `pattern` matched. The parts are equal, or in the proportion of
    `shares`: with 32 query heads and 8 for keys and values, (32, 8, 8) as well as (4096, 1024, 1024).

    Raises RecipeError for fewer than two parts or shares that are not positive, WeightsError, naming the
    tensor, where nothing matches, the length cannot be divided so or the tensor has further names.

    >>> import numpy as np
    >>> w = Weights.of({"l.qkv": np.arange(6)})
    >>> {n: x.tolist() for n, x in Split("*.qkv", ("*.q", "*.k", "*.v"), (4, 1, 1))(w).arrays().items()}
    {'l.q': [0, 1, 2, 3], 'l.k': [4], 'l.v': [5]}
    """

    name: ClassVar[str] = "split"
    pattern: str
    into: tuple[str, ...]
    shares: tuple[int, ...] | None = None
    axis: int = 0

    def __post_init__(self) -> None:
        _check_patterns(self.pattern, *self.into)
        if len(self.into) < 2:
            raise RecipeError(f"splitting {self.pattern!r}: expected at least two names, got {len(self.into)}")
        if self.shares is not None and (len(self.shares) != len(self.into) or min(self.shares) < 1):
            raise RecipeError(f"splitting {self.pattern!r}: expected a positive share for each of {self.into}")

    def __call__(self, weights: Weights) -> Weights:
        matches = rule(self.pattern)
        if weights and not any(map(matches.match, weights)):
            raise WeightsError(nothing("splitting", self.pattern, weights))
        items: list[Weight] = []
        for name, item in weights.items():
            found = matches.match(name)
            if found is None:
                items.append(item)
            else:
                refuse_ties(weights, name)
                items += self._parts(item, [fill(to, list(found.groups())) for to in self.into])
        return weights.with_items(items)

    def _parts(self, item: Weight, names: list[str]) -> list[Weight]:
        shape = item.spec.shape
        axis = axis_of(item, self.axis)
        shares = self.shares or (1,) * len(names)
        if shape[axis] % sum(shares):
            parts = ":".join(map(str, shares))
            text = f"its axis {axis} of {shape[axis]} cannot be split {parts}; say the sizes of the parts"
            raise WeightsError(f"{item.origin}: {quoted(item.name)} is {item.spec}; {text}")
        parts, start = [], 0
        for name, share in zip(names, shares, strict=True):
            length = shape[axis] // sum(shares) * share
            parts.append(piece(item, name, axis, start, length, (*shape[:axis], length, *shape[axis + 1 :])))
            start += length
        return parts


@dataclass(frozen=True)
class Join(Step):
    """Put tensors of matching names one after the other along an axis into one, where the first of them stood.

    `parts` are globs whose ``*`` stand for the same text in all of them and in `into`.

    Raises RecipeError for fewer than two parts or unequal numbers of ``*``, WeightsError, naming the tensor, where
    nothing matches, a part is missing, shapes or dtypes do not fit or a part has further names.

    >>> import numpy as np
    >>> w = Weights.of({"l.k": np.int8([3]), "l.q": np.int8([1, 2])})
    >>> Join(("*.q", "*.k"), "*.qk")(w)["l.qk"].array().tolist()
    [1, 2, 3]
    """

    name: ClassVar[str] = "join"
    parts: tuple[str, ...]
    into: str
    axis: int = 0

    def __post_init__(self) -> None:
        _check_patterns(*self.parts, self.into)
        if len(set(self.parts)) < 2 or len({part.count("*") for part in self.parts}) > 1:
            raise RecipeError(f"joining into {self.into!r}: expected two or more globs, with as many '*' each")

    def __call__(self, weights: Weights) -> Weights:
        groups: dict[str, list[str]] = {}  # the name of each part -> the names of all parts, in their order
        rules = [rule(part) for part in self.parts]
        for name in weights:
            found = next((m for m in (r.match(name) for r in rules) if m), None)
            if found is not None and name not in groups:
                names = [fill(part, list(found.groups())) for part in self.parts]
                for one in names:
                    if one not in weights or one in weights.ties:
                        others = "the others are there" if name != one else "it is a further name of another"
                        raise WeightsError(f"joining into {self.into!r}: {quoted(one)} is missing, {others}")
                    refuse_ties(weights, one)
                groups.update({one: [fill(self.into, list(found.groups())), *names] for one in names})
        if weights and not groups:
            raise WeightsError(nothing("joining", self.parts[0], weights))
        items, done = [], set()
        for name, item in weights.items():
            if name not in groups:
                items.append(item)
            elif groups[name][0] not in done:
                new, *names = groups[name]
                items.append(self._whole([weights[one] for one in names], new))
                done.add(new)
        return weights.with_items(items)

    def _whole(self, parts: list[Weight], name: str) -> Weight:
        axis = axis_of(parts[0], self.axis)
        check_alike(parts, axis)
        return together(parts, name, axis, [part.spec.shape for part in parts])


def axis_of(item: Weight, axis: int) -> int:
    """`axis`, counted from the start; raises WeightsError where the tensor has none such."""
    rank = len(item.spec.shape)
    if not -rank <= axis < rank:
        raise WeightsError(f"{item.origin}: {quoted(item.name)} is {item.spec}: it has no axis {axis}")
    return axis % rank


def check_alike(parts: list[Weight], axis: int | None) -> None:
    """Raise WeightsError where dtypes differ, or shapes otherwise than along `axis`."""
    first, *others = parts

    def kind(item: Weight) -> tuple[object, ...]:
        shape: tuple[int | None, ...] = item.spec.shape
        if axis is not None and axis < len(shape):
            shape = (*shape[:axis], None, *shape[axis + 1 :])
        return item.spec.dtype, shape

    for other in others:
        if kind(other) != kind(first):
            text = f"{quoted(first.name)} is {first.spec}, {quoted(other.name)} is {other.spec}"
            raise WeightsError(f"{other.origin}: {text}: they do not fit together")


def refuse_ties(weights: Weights, name: str) -> None:
    """Raise WeightsError for a tensor with further names, which would stand for nothing afterwards."""
    alias = next((alias for alias, tied in weights.ties.items() if tied == name), None)
    if alias is not None:
        raise WeightsError(f"{quoted(name)} is also called {quoted(alias)}, which would be lost; leave it as it is")


def nothing(doing: str, pattern: str, weights: Weights) -> str:
    """What to say where no name matches."""
    begin = ", ".join(quoted(name) for name in list(weights)[:3])
    return f"{doing} {pattern!r} changes nothing: no name matches; the names begin with {begin}"


def _check_patterns(*patterns: str) -> None:
    for pattern in patterns:
        if not pattern or "?" in pattern or "#" in pattern:
            raise RecipeError(f"expected a name in which only '*' stands for any text, got {pattern!r}")
