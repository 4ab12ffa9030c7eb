"""The least important weights become zero. Decides which ones, and how their rank is found in bounded memory.

Knows nothing of where a score comes from: it is Weights with the same names.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import islice
from typing import ClassVar, Literal, get_args

import numpy as np

from steelyard.core.transform import Step
from steelyard.core.weights import Weight, Weights
from steelyard.edit._options import check_options
from steelyard.edit.importance import Importance, importance
from steelyard.errors import RecipeError, WeightsError, quoted

Scope = Literal["global", "tensor", "row", "erk"]
DIGIT = 16  # bits of a rank that one pass over the tensors settles


@dataclass(frozen=True)
class Prune(Step):
    """Set the `fraction` of the weights with the smallest score to zero: ``Prune(0.9)`` keeps a tenth.

    The score is the magnitude |w|, or `by`: Weights of the same names and shapes, of which the least go
    first, or evidence of the kinds norms (Wanda), fisher or taylor (`steelyard.score`). Of the n elements in
    scope exactly round(fraction n) are chosen; equal scores go by position, the first first, in the order of
    the tensors. Elements that are zero already count (their magnitude is the least), so pruning by magnitude
    again to a larger fraction keeps the earlier zeros.

    Only floating-point tensors of at least `min_ndim` axes are in scope; the others pass untouched.
    The scope 'tensor' prunes every tensor by itself, 'row' the inputs of every output by themselves (as
    Wanda does); 'erk' gives every tensor a share to keep in proportion to the sum of its axes over their
    product (Evci et al. 2020), so that `fraction` goes of all together and small layers keep more. 'global'
    ranks all of them together; that takes a pass or two (four for float64) over all tensors in scope at the
    first read of any, once, with one tensor in memory at a time.

    Raises RecipeError for a fraction outside 0 to 1, WeightsError if no tensor is in scope, for a score that is
    missing, has another shape, or is NaN, and for weights that are NaN or infinite.

    >>> w = Weights.of({"a": np.float32([[1, -4]]), "b": np.float32([[3, 2]])})
    >>> {name: x.tolist() for name, x in Prune(0.5)(w).arrays().items()}
    {'a': [[0.0, -4.0]], 'b': [[3.0, 0.0]]}

    Sources: Han et al., "Learning both Weights and Connections for Efficient Neural Networks", 2015; Sun et al., "A
    Simple and Effective Pruning Approach for Large Language Models" (Wanda), 2023; Evci et al., "Rigging the Lottery",
    2020.
    """

    name: ClassVar[str] = "prune"
    fraction: float
    scope: Scope = "global"
    by: Weights | None = None
    min_ndim: int = 2

    def __post_init__(self) -> None:
        check_options(self)
        if not 0 <= self.fraction <= 1:
            raise RecipeError(f"the fraction to prune is between 0 and 1, not {self.fraction}")
        check_scope(self.scope, get_args(Scope))

    def __call__(self, weights: Weights) -> Weights:
        chosen = scoped(weights, self.min_ndim, "pruned")
        scored = {item.name: _Scored(importance(self.by, item)) for item in chosen}
        cut = _GlobalCut(tuple(scored.values()), self.fraction)
        shares = erk({item.name: item.spec.shape for item in chosen}, self.fraction) if self.scope == "erk" else {}

        def prune(one: _Scored, x: np.ndarray) -> np.ndarray:
            if self.scope == "global":
                return _zero(x, one, cut.digits, cut.find())
            if self.scope == "row":
                return _zero_rows(x, one, self.fraction)
            keys, fraction = one.keys(one.digits, x), shares.get(one.name, self.fraction)
            return _zero(x, one, one.digits, find_cut(lambda: [(one.name, keys)], x.size, fraction, one.digits))

        return weights.with_items(
            item.then(partial(prune, scored[name])) if name in scored else item for name, item in weights.items()
        )


def mask_of(weights: Weights, min_ndim: int = 2) -> Weights:
    """Where weights are not zero: boolean Weights of the same names, for tensors that `Prune` has in scope.

    >>> mask_of(Prune(0.5)(Weights.of({"a": np.float32([[1, -4]])})))["a"].array().tolist()
    [[False, True]]
    """
    from steelyard.core.spec import Spec

    return weights.select(lambda item: in_scope(item, min_ndim)).with_items(
        item.then(lambda x: x != 0, spec=Spec.of(item.spec.shape, "bool"))
        for item in weights.values()
        if in_scope(item, min_ndim)
    )


def check_scope(scope: str, known: tuple[str, ...] = ("global", "tensor")) -> None:
    """Raise RecipeError for a scope that is none of those."""
    if scope not in known:
        listed = ", ".join(map(repr, known[:-1]))
        raise RecipeError(f"the scope is {listed} or {known[-1]!r}, not {scope!r}")


def erk(shapes: Mapping[str, tuple[int, ...]], fraction: float) -> dict[str, float]:
    """The fraction of each tensor that goes, by the rule of Erdos, Renyi and kernels: `fraction` of all together.

    A tensor keeps in proportion to the sum of its axes over their product, and never more than all.

    >>> {name: round(f, 3) for name, f in erk({"a": (100, 100), "b": (10, 100)}, 0.9).items()}
    {'a': 0.929, 'b': 0.61}
    """
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    dense: set[str] = {name for name, size in sizes.items() if not size}
    while True:
        rest = [name for name in shapes if name not in dense]
        left = (1 - fraction) * sum(sizes.values()) - sum(sizes[name] for name in dense)
        raw = {name: sum(shapes[name]) / sizes[name] for name in rest}
        scale = left / sum(raw[name] * sizes[name] for name in rest) if rest else 0.0
        full = {name for name in rest if raw[name] * scale > 1}
        if not full:
            return {name: 0.0 if name in dense else min(max(1 - raw[name] * scale, 0.0), 1.0) for name in shapes}
        dense |= full


def in_scope(weight: Weight, min_ndim: int) -> bool:
    """Whether a step for weight matrices and kernels means this tensor."""
    return weight.spec.dtype.kind == "float" and len(weight.spec.shape) >= min_ndim


def scoped(
    weights: Weights,
    min_ndim: int,
    done: str,
    means: Callable[[Weight], bool] = lambda _: True,
    axes: str = "",
) -> list[Weight]:
    """The tensors that a step for weight matrices and kernels means; `done` is what it does.

    Of those of at least `min_ndim` axes it means the ones for which `means` holds; `axes` says which these are.

    Raises WeightsError if there are tensors and none is meant: who chose these wanted something to happen.

    >>> scoped(Weights.of({"b": np.zeros(2, np.float32)}), 2, "rounded")
    Traceback (most recent call last):
    ...
    steelyard.errors.WeightsError: none of the 1 tensors can be rounded: expected floating point and 2 axes or more, \
found 'b' float32[2]; choose others (where, or --where)
    """
    found = [item for item in weights.values() if in_scope(item, min_ndim) and means(item)]
    if weights and not found:
        few = ", ".join(f"{quoted(item.name)} {item.spec}" for item in islice(weights.values(), 3))
        axes = axes or (f"{min_ndim} axes or more" if min_ndim > 1 else "an axis or more")
        text = f"none of the {len(weights)} tensors can be {done}: expected floating point and {axes}, found {few}"
        raise WeightsError(f"{text}{', ...' * (len(weights) > 3)}; choose others (where, or --where)")
    return found


@dataclass(frozen=True)
class _Scored:
    """A weight and what ranks its elements, as keys."""

    rank: Importance

    @property
    def name(self) -> str:
        return self.rank.weight.name

    @property
    def digits(self) -> int:
        """How many passes rank its elements: float32 and narrower have half the bits of the rest."""
        return 4 if self.rank.wide else 2

    def keys(self, digits: int, values: np.ndarray | None = None) -> np.ndarray:
        """Whole numbers in the order of the scores, (size,) uint32 or uint64."""
        float_type, key_type = (np.float32, np.uint32) if digits == 2 else (np.float64, np.uint64)
        # + 0 makes -0.0 equal to 0.0
        x: np.ndarray = np.add(self.rank.of(values).ravel().astype(float_type), 0, dtype=float_type)
        # As sign-magnitude integers floats are in order; flip the negative ones, lift the others above them.
        bits = x.view(key_type)
        top = key_type(1) << key_type(DIGIT * digits - 1)
        return np.where(bits & top, ~bits, bits | top)


@dataclass(frozen=True)
class _Cut:
    """Everything below `key` goes, and of those equal to it the first `ties[name]` of each tensor (None: all)."""

    key: int
    ties: dict[str, int] | None


Passes = Callable[[], Iterable[tuple[str, np.ndarray]]]  # names and keys of all tensors, each time it is called


def find_cut(passes: Passes, size: int, fraction: float, digits: int) -> _Cut | None:
    """The cut below which round(fraction size) elements lie; None where nothing is to go.

    A radix selection: every pass settles 16 bits of the key of the last element that goes.
    """
    rank = round(fraction * size)
    if rank == 0:
        return None
    prefix = 0
    for digit in range(digits):
        counts = np.zeros(1 << DIGIT, np.int64)
        for _, keys in passes():
            counts += np.bincount(_digit(keys, digit, prefix, digits), minlength=1 << DIGIT)
        below = np.cumsum(counts)
        found = int(np.searchsorted(below, rank))
        rank -= int(below[found - 1]) if found else 0
        prefix = prefix << DIGIT | found
    if rank == counts[found]:  # all that are equal to the key go: nobody has to count them
        return _Cut(prefix, None)
    ties = {}
    for name, keys in passes():
        ties[name] = min(rank, int(np.count_nonzero(keys == prefix)))
        rank -= ties[name]
    return _Cut(prefix, ties)


@dataclass
class _GlobalCut:
    """Finds the cut over all tensors when it is first asked for, and only then. Safe with several threads."""

    scored: tuple[_Scored, ...]
    fraction: float
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def digits(self) -> int:
        return max((one.digits for one in self.scored), default=2)

    def find(self) -> _Cut | None:
        with self.lock:
            return self._found

    @cached_property
    def _found(self) -> _Cut | None:
        size = sum(one.rank.weight.spec.size for one in self.scored)
        digits = self.digits
        return find_cut(lambda: ((one.name, one.keys(digits)) for one in self.scored), size, self.fraction, digits)


def _digit(keys: np.ndarray, digit: int, prefix: int, digits: int) -> np.ndarray:
    """The next 16 bits of the keys that start with the `digit` digits of `prefix`."""
    shift = keys.dtype.type(DIGIT * (digits - 1 - digit))
    rest = keys >> shift
    if digit:
        rest = rest[rest >> keys.dtype.type(DIGIT) == prefix]
    return (rest & keys.dtype.type((1 << DIGIT) - 1)).astype(np.int64)


def _zero(x: np.ndarray, one: _Scored, digits: int, cut: _Cut | None) -> np.ndarray:
    """`x` with zeros for the elements below the cut."""
    if cut is None:
        return x
    keys = one.keys(digits, x)
    equal = np.flatnonzero(keys == cut.key)
    gone = keys < cut.key
    gone[equal if cut.ties is None else equal[: cut.ties[one.name]]] = True
    return np.where(gone.reshape(x.shape), x.dtype.type(0), x)


def _zero_rows(x: np.ndarray, one: _Scored, fraction: float) -> np.ndarray:
    """`x` with zeros for the least `fraction` of the inputs of every output; of equal ones the first go first."""
    if not x.size:
        return x
    rows = one.rank.rows
    scores = rows.matrix(one.rank.of(x))
    gone = np.zeros(scores.shape, bool)
    count = round(fraction * scores.shape[1])
    np.put_along_axis(gone, np.argsort(scores, axis=1, kind="stable")[:, :count], True, axis=1)
    return np.where(rows.tensor(gone), x.dtype.type(0), x)
