"""Numbered tensors into one with an axis for the number and back, such as the experts of a layer. Moves values only."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from steelyard.core.transform import Step
from steelyard.core.weights import Weight, Weights
from steelyard.edit._names import fill, rule
from steelyard.edit._pieces import piece, together
from steelyard.edit.split import check_alike, nothing, refuse_ties
from steelyard.errors import RecipeError, WeightsError, quoted

MOST = 1_000_000  # tensors that one is taken apart into


@dataclass(frozen=True)
class Stack(Step):
    """Put tensors that differ by a number in their names on top of each other, along a new axis 0.

    In `pattern` ``#`` is the number and ``*`` any text; the ``*`` of `into` stand for the same text. The numbers must
    be 0, 1, 2, ... without a gap; they count as numbers, so that 10 follows after 9.

    Raises RecipeError for patterns without ``#`` or with several, WeightsError, naming the tensor, where nothing
    matches, a number is missing or there twice, shapes or dtypes differ or a tensor has further names.

    >>> import numpy as np
    >>> w = Weights.of({f"experts.{i}.w": np.int8([i, i]) for i in (1, 0)})
    >>> Stack("experts.#.w", "experts.w")(w)["experts.w"].array().tolist()
    [[0, 0], [1, 1]]
    """

    name: ClassVar[str] = "stack"
    pattern: str
    into: str

    def __post_init__(self) -> None:
        _check(self.pattern, self.into)

    def __call__(self, weights: Weights) -> Weights:
        matches = rule(self.pattern)
        found: dict[str, dict[int, Weight]] = {}  # new name -> number -> tensor
        owner: dict[str, str] = {}
        for name, item in weights.items():
            match = matches.match(name)
            if match is not None:
                refuse_ties(weights, name)
                owner[name] = fill(self.into, _texts(match))
                members, number = found.setdefault(owner[name], {}), int(match["number"])
                if number in members:
                    raise WeightsError(f"{quoted(members[number].name)} and {quoted(name)} have the same number")
                members[number] = item
        if weights and not found:
            raise WeightsError(nothing("stacking", self.pattern, weights))
        items, done = [], set()
        for name, item in weights.items():
            if name not in owner:
                items.append(item)
            elif owner[name] not in done:
                done.add(owner[name])
                items.append(_stacked(owner[name], found[owner[name]]))
        return weights.with_items(items)


def _stacked(name: str, members: dict[int, Weight]) -> Weight:
    missing = next((n for n in range(len(members)) if n not in members), None)
    if missing is not None:
        text = f"{len(members)} tensors up to number {max(members)}, but none with number {missing}"
        raise WeightsError(f"stacking into {quoted(name)}: found {text}")
    parts = [members[number] for number in range(len(members))]
    check_alike(parts, None)
    return together(parts, name, 0, [(1, *part.spec.shape) for part in parts])


@dataclass(frozen=True)
class Unstack(Step):
    """Take every tensor that a glob matches apart along its axis 0; ``#`` in `into` is the index.

    Raises RecipeError for an `into` without ``#`` or with several, WeightsError, naming the tensor, where nothing
    matches, a tensor has no axis or has further names.

    >>> import numpy as np
    >>> w = Weights.of({"experts.w": np.int8([[0, 0], [1, 1]])})
    >>> list(Unstack("experts.w", "experts.#.w")(w))
    ['experts.0.w', 'experts.1.w']
    """

    name: ClassVar[str] = "unstack"
    pattern: str
    into: str

    def __post_init__(self) -> None:
        _check(self.into, self.pattern)

    def __call__(self, weights: Weights) -> Weights:
        matches = rule(self.pattern)
        if weights and not any(map(matches.match, weights)):
            raise WeightsError(nothing("unstacking", self.pattern, weights))
        items: list[Weight] = []
        for name, item in weights.items():
            match = matches.match(name)
            if match is None:
                items.append(item)
                continue
            refuse_ties(weights, name)
            if not item.spec.shape or item.spec.shape[0] > MOST:
                what = "it has no axis to take apart" if not item.spec.shape else f"more than {MOST} would come of it"
                raise WeightsError(f"{item.origin}: {quoted(name)} is {item.spec}: {what}")
            count, *rest = item.spec.shape
            names = (fill(self.into, _texts(match)).replace("#", str(i)) for i in range(count))
            items += [piece(item, new, 0, i, 1, tuple(rest)) for i, new in enumerate(names)]
        return weights.with_items(items)


def _texts(match: re.Match[str]) -> list[str]:
    """What the ``*`` stand for."""
    return [match[i] for i in range(1, match.re.groups + 1) if i != match.re.groupindex.get("number")]


def _check(numbered: str, plain: str) -> None:
    if numbered.count("#") != 1 or "#" in plain or "?" in numbered + plain or not plain:
        raise RecipeError(
            f"expected one name with one '#' for the number and one without, and only '*' besides, "
            f"got {numbered!r} and {plain!r}"
        )
