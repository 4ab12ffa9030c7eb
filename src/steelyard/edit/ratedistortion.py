"""The least error for the bits: one step of the grid for each tensor, so that a bit buys as much everywhere.

Decides how coarse each tensor may be; how its levels are chosen and held is the trellis codec.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property, partial
from typing import ClassVar

import numpy as np

from steelyard.codecs.trellis import Trellis
from steelyard.core.packed import Packed, Scheme
from steelyard.core.transform import Step
from steelyard.core.weights import Weight, Weights
from steelyard.edit._solved import solved
from steelyard.edit.importance import scores_of
from steelyard.edit.kronecker import PAIRED, Kronecker, is_kronecker
from steelyard.edit.prune import in_scope
from steelyard.errors import CodecError, RecipeError, WeightsError, quoted

SAMPLE = 1 << 15  # elements by which the bits of a tensor are foreseen
WITHIN = {1: 1 / 12, 4: 0.27, 8: 0.26, 16: 0.255, 32: 0.25, 64: 0.245}  # squared error in squared steps, by states


@dataclass(frozen=True)
class RateDistortion(Step):
    """Round every weight to a grid of its tensor, the steps chosen together for the least error at their bits.

    Without `by`, the squared error of each tensor counts relative to the tensor's sum of squares: what a matrix makes
    of its input is then disturbed as much as what any other does. The least sum of these at a number of bits has
    the same slope everywhere: a step proportional to the root of the tensor's sum of squares, so that large
    tensors get fewer bits a weight than small ones. With `by`, importances >= 0 of the same names and shapes
    (a Fisher diagonal or what inputs contribute to a Hessian, say), the least ``sum by * error^2`` is sought instead:
    steps are inverse to the root of a tensor's mean importance, and levels are chosen by that of each element.

    With `by` from `sy.kronecker`, which knows what errors in pairs of rows and of columns cost, the least ``tr(A D B
    Dᵀ)`` is sought, summed over the tensors: rows and columns have steps of their own, and what one element loses is
    made up for by those after it. At the same bytes this often loses several times less; it takes longer to write.

    `importance` multiplies what the squared errors of tensors count, by globs of their names, of which the first
    that matches decides: queries and keys, say, reach the output through a softmax alone, and may have more error:
    ``{"*.query.*": 0.1, "*.key.*": 0.1}``.

    Give either `bits`, the mean number of bits a weight (foreseen by coding samples: a few per cent may be missing),
    or `error`, the root of the mean over all weights of their tensor's relative squared error. The tensors are read
    once before the first is written, one at a time. They are held by the `trellis` codec with `states` states.

    Only floating-point tensors of at least `min_ndim` axes take part; the others pass untouched.

    Raises RecipeError for settings that contradict each other, WeightsError for importances that are missing, have
    another shape or a glob that matches no weight, CodecError, naming the tensor, for NaN or infinite weights.

    >>> x = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    >>> w = RateDistortion(bits=3)(Weights.of({"a": x}))
    >>> round(8 * w["a"].read().nbytes / x.size, 1)
    3.0

    Source: the slope of rate and distortion: Y. Shoham and A. Gersho, Efficient Bit Allocation for an Arbitrary Set of
    Quantizers, IEEE Trans. ASSP 36, 1988; the choice of levels: see the codec.
    """

    name: ClassVar[str] = "ratedistortion"
    bits: float | None = None
    error: float | None = None
    states: int = 8
    min_ndim: int = 1
    by: Weights | None = None
    importance: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.bits is None) == (self.error is None):
            raise RecipeError("give either bits, the mean for each weight, or error, a relative one")
        if self.bits is not None and not 0 < self.bits <= 24:
            raise RecipeError(f"bits is {self.bits}, expected more than 0 and at most 24")
        if self.error is not None and not 0 < self.error < 1:
            raise RecipeError(f"error is {self.error}, expected between 0 and 1")
        for glob, factor in self.importance.items():
            if not 0 <= factor < math.inf:
                raise RecipeError(f"the importance of {glob!r} is {factor}, expected a number of at least 0")
        if self.error is not None and is_kronecker(self.by):
            raise RecipeError("the error of pairs of elements has no unit to be given in: give bits")
        self.codec()

    def codec(self) -> Trellis:
        """The codec that holds the levels."""
        try:
            return Trellis(states=self.states)  # type: ignore[arg-type]
        except CodecError as error:
            raise RecipeError(str(error)) from error

    def __call__(self, weights: Weights) -> Weights:
        chosen = [item for item in weights.values() if in_scope(item, self.min_ndim)]
        for glob in self.importance:
            if weights and not any(fnmatchcase(item.name, glob) for item in chosen):
                raise WeightsError(f"no weight in scope matches {quoted(glob)}, to which an importance is given")
        parts = tuple(self._part(item) for item in chosen)
        together = _Together(self, parts)
        return weights.with_items(
            item.then(partial(together.hold, name), scheme=Scheme(together.parts[name].codec))
            if name in together.parts
            else item
            for name, item in weights.items()
        )

    def _part(self, item: Weight) -> _Part:
        codec, factor = self.codec(), self._factor(item.name)
        if self.by is None or not is_kronecker(self.by):
            return _Part(item, codec, factor, importance=scores_of(self.by, item))
        if Kronecker.paired(self.by, item):  # what is made up for within a row has no path through a trellis
            codec = Trellis(states=1, lagrangian=PAIRED, turn=False, down=True)
        else:
            codec = replace(codec, turn=False, down=True)
        return _Part(item, codec, factor, pairs=self.by)

    def _factor(self, name: str) -> float:
        """What multiplies the importance of a tensor."""
        return next((factor for glob, factor in self.importance.items() if fnmatchcase(name, glob)), 1.0)


@dataclass(frozen=True)
class _Part:
    """A weight and what it counts."""

    weight: Weight
    codec: Trellis
    factor: float
    importance: Weight | None = None
    pairs: Weights | None = None  # evidence of `learn.kronecker`

    def kronecker(self) -> Kronecker | None:
        """What errors of pairs of elements cost, where that is known."""
        return None if self.pairs is None else Kronecker.of(self.pairs, self.weight)

    def important(self) -> np.ndarray | None:
        """The importance of each element, finite and not negative; None where none is given."""
        if self.importance is None:
            return None
        found = self.importance.array().astype(np.float64)
        if not (np.isfinite(found) & (found >= 0)).all():
            raise WeightsError(f"the importances of {quoted(self.weight.name)} must be finite and >= 0")
        return found

    def look(self) -> _Look:
        """Read it once, and keep what decides its step."""
        x = self.weight.array()
        if not x.size:
            return _Look(0, 0.0, 0.0, x.astype(np.float64).reshape(1, 0))
        with np.errstate(over="ignore", invalid="ignore"):
            squares = float(np.square(x, dtype=np.float64).sum())
        if not math.isfinite(squares):
            text = "NaN, infinite or too large values have no levels; repair them"
            raise CodecError(f"{self.weight.origin}: {quoted(self.weight.name)}: {text}")
        found = self.kronecker()
        if found is not None:
            return self._graded(x, found)
        important = self.important()
        importance = (1 / squares if squares else 0.0) if important is None else float(important.mean())
        rows = x.reshape(x.shape[0] if x.ndim > 1 else 1, -1)
        few = max(1, SAMPLE // rows.shape[1])
        step = max(1, -(-len(rows) // few))
        some, weigh = rows[::step][:, :SAMPLE].astype(np.float64), None
        if important is not None and importance > 0:
            weigh = important.reshape(rows.shape)[::step][:, :SAMPLE] / importance
        return _Look(x.size, squares, importance * self.factor, some, weigh)

    def _graded(self, x: np.ndarray, found: Kronecker) -> _Look:
        """In units of its grades, in which all tensors have one step."""
        if not found.counts:
            return _Look(x.size, 0.0, 0.0, x.astype(np.float64).reshape(1, -1)[:, :1])
        rows, columns = found.grades.factors
        matrix = x.reshape(len(rows), -1) / rows[:, None] / columns
        few = max(1, SAMPLE // matrix.shape[0])
        every = max(1, -(-matrix.shape[1] // few))
        by_row, by_column = found.noise
        spread = np.sqrt((np.outer(by_row[:SAMPLE], by_column[::every]) - 1) / 12)
        noise = np.random.default_rng(0).normal(size=spread.shape) * spread
        some = matrix[:SAMPLE, ::every]
        return _Look(x.size, float(np.square(matrix).sum()), self.factor, some, noise=noise)


@dataclass(frozen=True)
class _Look:
    size: int
    squares: float  # the sum of them
    importance: float  # of the squared error of one element
    sample: np.ndarray  # some rows, float64
    weigh: np.ndarray | None = None  # importances of the sample, of mean 1 in the whole tensor
    noise: np.ndarray | float = 0.0  # what other elements' errors add to the sample, in steps

    @property
    def step(self) -> float:
        """The step of the grid, up to a factor that all tensors share; 0 where every element may become 0."""
        return self.importance**-0.5 if self.importance > 0 and self.squares > 0 else 0.0

    def bits(self, factor: float, codec: Trellis) -> float:
        """Foreseen for the whole tensor."""
        if not self.step:
            return 0.0
        step = factor * self.step
        stream = codec.held(self.sample + step * self.noise, step, self.weigh)["stream"]
        return 8 * stream.size * self.size / self.sample.size


@dataclass
class _Together:
    """The factor of all steps, found when the first tensor is read. Safe with several threads."""

    settings: RateDistortion
    members: tuple[_Part, ...]
    lock: threading.Lock = field(default_factory=threading.Lock)

    @cached_property
    def parts(self) -> dict[str, _Part]:
        return {part.weight.name: part for part in self.members}

    def hold(self, name: str, x: np.ndarray) -> Packed:
        """`x`, the values of the weight of that name, on its grid."""
        with self.lock:
            looks, factor = self._looks, self._factor
        part, look = self.parts[name], looks[name]
        important = part.important()
        if important is not None and look.importance > 0:
            important *= part.factor / look.importance
        step = factor * look.step or None
        if not look.step:  # of no importance, or zeros
            x, important = np.zeros_like(x), None
        found = part.kronecker() if look.step else None
        try:
            if found is not None and step is not None:
                held = found.held(x, step, part.codec)
            else:
                held = part.codec.held(x, step, important)
        except CodecError as error:
            raise CodecError(f"{part.weight.origin}: {quoted(name)}: {error}") from error
        return Packed(part.weight.spec, part.codec, held)

    @cached_property
    def _looks(self) -> dict[str, _Look]:
        return {name: part.look() for name, part in self.parts.items()}

    @cached_property
    def _factor(self) -> float:
        looks = [look for look in self._looks.values() if look.step]
        count = sum(look.size for look in self._looks.values())
        if not looks:
            return 1.0
        if self.settings.bits is None:
            error = self.settings.error or 0.0
            noise = sum(look.size * look.size * look.step**2 / look.squares for look in looks)
            return error * math.sqrt(count / (WITHIN[self.settings.states] * noise))
        start = math.sqrt(sum(look.squares for look in looks) / sum(look.size * look.step**2 for look in looks))
        return solved(
            lambda factor: sum(look.bits(factor, self.parts[name].codec) for name, look in self._looks.items()) / count,
            self.settings.bits,
            start,
        )
