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

from steelyard.codecs.trellis import LIMIT, Trellis
from steelyard.core.packed import Packed, Scheme
from steelyard.core.transform import Step
from steelyard.core.weights import Weight, Weights
from steelyard.edit._apart import Apart
from steelyard.edit._kept import Kept
from steelyard.edit._levels import finite
from steelyard.edit._options import check_options
from steelyard.edit._solved import solved
from steelyard.edit.evidence import About, either
from steelyard.edit.kronecker import KIND, OUTPUTS, PAIRS, Kronecker, routed, sensitive, sensitivities
from steelyard.edit.prune import scoped
from steelyard.errors import CodecError, RecipeError, WeightsError, quoted

FEW = 1.2  # bits of a weight, below which a trellis loses more than one quantizer, where errors are made up for
FLOAT = LIMIT / 2**24  # errors are made up for in float32, in which fewer levels differ
NOTHING = 2.0**40  # times a usual step: of that size, a step leaves zeros alone
ONCE = 1 << 27  # bytes of what evidence says that are kept from choosing the steps until the tensors are rounded
SAMPLE = 1 << 15  # elements by which the bits of a tensor are foreseen
WITHIN = {1: 1 / 12, 4: 0.27, 8: 0.26, 16: 0.255, 32: 0.25, 64: 0.245}  # squared error in squared steps, by states


@dataclass(frozen=True)
class RateDistortion(Step):
    """Round every weight to a grid of its tensor, the steps chosen together for the least error at their bits.

    What an error costs is said by evidence `by`:

    - none: its square, relative to the tensor's sum of squares: what a matrix makes of its input is then disturbed as
      much as what any other does.
    - importances >= 0 of the same names and shapes, such as evidence of the kind fisher: ``sum by * error^2``.
    - of the kind hessian, second moments H of the inputs: ``sum_i g_i d_i H d_iᵀ``, with d_i the error of a row (an
      output), and g_i what the output matters: ``mean_j F_ij / mean_j H_jj`` with the Fisher information F
      (`fisher`), a tenth of the tensor's mean added; without it ``1 / tr(W H Wᵀ)``, relative as above.
    - of `sy.kronecker`, for pairs of outputs and of inputs: ``tr(A D B Dᵀ)``.

    The least sum over all tensors at a number of bits has the same slope everywhere: a step inverse to the root of what
    an error costs. By the last two kinds rows and columns have steps of their own, and what one element loses is made
    up for by those after it: at the same bytes this often loses several times less, and takes longer to write. Hessians
    say nothing of tensors with one axis, nor does the last kind of buffers: these then pass untouched. A matrix without
    a Hessian, where others have one, counts by `fisher`, or relatively.

    `importance` multiplies what the squared errors of tensors count, by globs of their names, of which the first
    that matches decides: queries and keys, say, reach the output through a softmax alone, and may have more error:
    ``{"*.query.*": 0.1, "*.key.*": 0.1}``.

    `damping` is added to the diagonal of what is known of pairs, as a share of its mean: evidence of few examples, or
    of other inputs than those of use, does not know which errors cost nothing. Without it 0.03, for Hessians 0.01; 1
    for what a model makes of random inputs, where there are no data.

    Give either `bits`, the mean number of bits a weight (foreseen by coding samples: a few per cent may be missing; of
    tensors in which errors cost something, others become zeros; less where none can be held finer), or `error`, the
    root of the mean over all weights of their tensor's relative squared error. The tensors are read once before the
    first is written, one at a time. They are held by the `trellis` codec with `states` states, but for one state below
    1.2 bits where rows and columns have steps of their own: there a trellis loses more.

    Only floating-point tensors of at least `min_ndim` axes take part; the others pass untouched.

    Raises RecipeError for settings that contradict each other, WeightsError if no tensor takes part, for evidence that
    is missing, of another kind or shape or of other weights, or a glob that matches no weight, CodecError, naming the
    tensor, for NaN or infinite weights.

    >>> x = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    >>> w = RateDistortion(bits=3)(Weights.of({"a": x}))
    >>> round(8 * w["a"].read().nbytes / x.size, 1)
    3.0

    Sources: the slope of rate and distortion: Y. Shoham and A. Gersho, Efficient Bit Allocation for an Arbitrary Set of
    Quantizers, IEEE Trans. ASSP 36, 1988; by inputs: Lifar et al., "WaterSIC", 2026; see `edit.kronecker` for both
    sides, and the codec for the choice of levels.
    """

    name: ClassVar[str] = "ratedistortion"
    bits: float | None = None
    error: float | None = None
    states: int = 8
    min_ndim: int = 1
    by: Weights | None = None
    fisher: Weights | None = None
    importance: Mapping[str, float] = field(default_factory=dict)
    damping: float | None = None

    def __post_init__(self) -> None:
        check_options(self)
        if (self.bits is None) == (self.error is None):
            raise RecipeError("give either bits, the mean for each weight, or error, a relative one")
        if self.bits is not None and not 0 < self.bits <= 24:
            raise RecipeError(f"bits is {self.bits}, expected more than 0 and at most 24")
        if self.error is not None and not 0 < self.error < 1:
            raise RecipeError(f"error is {self.error}, expected between 0 and 1")
        for glob, factor in self.importance.items():
            if not 0 <= factor < math.inf:
                raise RecipeError(f"the importance of {glob!r} is {factor}, expected a number of at least 0")
        if self.kind not in (None, "fisher", *PAIRS):
            kinds = either((*PAIRS, "fisher"))
            raise WeightsError(f"expected evidence of the kind {kinds}, got {quoted(str(self.kind))} (score)")
        if self.error is not None and self.kind in PAIRS:
            raise RecipeError("the error of pairs of elements has no unit to be given in: give bits")
        if self.fisher is not None and self.kind != "hessian":
            raise RecipeError("fisher says what outputs matter beside evidence of the kind hessian: give that as by "
                              "(score), or the Fisher information alone as by")  # fmt: skip
        if self.damping is not None and self.kind not in PAIRS:
            raise RecipeError(f"damping is of evidence of the kind {either(PAIRS)}: give that as by (score)")
        if self.damping is not None and not 0 < self.damping < 1e6:
            raise RecipeError(f"damping is a share of the mean of the diagonal, above 0, not {self.damping}")
        self.codec()

    def codec(self) -> Trellis:
        """The codec that holds the levels."""
        try:
            return Trellis(states=self.states)  # type: ignore[arg-type]
        except CodecError as error:
            raise RecipeError(str(error)) from error

    @property
    def kind(self) -> str | None:
        """Of the evidence; None for importances that somebody else made, or none."""
        return None if self.by is None else About.of(self.by).kind

    def __call__(self, weights: Weights) -> Weights:
        return self.rounded(weights, Kept(ONCE))

    def rounded(self, weights: Weights, kept: Kept) -> Weights:
        """The same; `kept` is that of earlier calls with the same weights and all the same settings but `bits`."""
        chosen = scoped(weights, self.min_ndim, "rounded", self._means)
        for glob in self.importance:
            if weights and not any(fnmatchcase(item.name, glob) for item in chosen):
                raise WeightsError(f"no weight in scope matches {quoted(glob)}, to which an importance is given")
        parts = tuple(self._part(item) for item in chosen)
        if self.kind in PAIRS and parts and not any(part.kind or part.vector for part in parts):
            raise WeightsError(f"the evidence ({self.kind}) has no tensor {quoted(chosen[0].name)}, nor any other in "
                               "scope; measure it on these weights (score)")  # fmt: skip
        together = _Together(self, parts, kept)
        return weights.with_items(
            item.then(partial(together.hold, name), scheme=Scheme(together.parts[name].codec))
            if name in together.parts
            else item
            for name, item in weights.items()
        )

    def _means(self, item: Weight) -> bool:
        """Whether anything is known of what errors in a tensor cost, or nothing need be."""
        return self.by is None or self.kind not in PAIRS or len(item.spec.shape) > 1 or item.name + OUTPUTS in self.by

    def _part(self, item: Weight) -> _Part:
        codec, factor = self.codec(), self._factor(item.name)
        few = replace(codec, states=1) if (self.bits or FEW) < FEW else codec
        route = None if self.by is None else routed(self.by, item, few)
        if route is not None:
            return _Part(item, route, factor, self.by, self.fisher, self.kind, self.damping)
        single = self.fisher if self.kind == "hessian" else self.by
        if single is not None and self.kind != KIND:
            sensitivities(single, item)
        return _Part(item, codec, factor, single, damping=self.damping)

    def _factor(self, name: str) -> float:
        """What multiplies the importance of a tensor."""
        return next((factor for glob, factor in self.importance.items() if fnmatchcase(name, glob)), 1.0)


@dataclass(frozen=True)
class _Part:
    """A weight and what it counts."""

    weight: Weight
    codec: Trellis
    factor: float
    by: Weights | None = None
    fisher: Weights | None = None
    kind: str | None = None  # of evidence of pairs
    damping: float | None = None

    @property
    def vector(self) -> bool:
        """Whether it is one of which such evidence knows what an error costs."""
        return self.by is not None and len(self.weight.spec.shape) < 2 and About.of(self.by).kind == KIND

    def important(self, x: np.ndarray) -> np.ndarray | None:
        """The importance of each element, finite and not negative; None where none is given."""
        if self.by is None:
            return None
        if self.vector:
            found = self.kronecker(x)
            return found.outputs * (1 + found.damping) ** 2  # as damping adds to the mean of both factors of a matrix
        return sensitive(self.by, self.weight, x)

    def look(self, kept: Kept) -> _Look:
        """Read it once, and keep what decides its step."""
        x = self.weight.array()
        if not x.size:
            return _Look(0, 0.0, 0.0, x.astype(np.float64).reshape(1, 0))
        with np.errstate(over="ignore", invalid="ignore"):
            squares = float(np.square(x, dtype=np.float64).sum())
        if not math.isfinite(squares):
            finite(self.weight, x)
            text = "values so large that their squares are infinite have no levels; scale them"
            raise CodecError(f"{self.weight.origin}: {quoted(self.weight.name)}: {text}")
        if self.kind:
            return self._graded(x, kept)
        important = self.important(x)
        importance = (1 / squares if squares else 1.0) if important is None else float(important.mean())
        rows = x.reshape(x.shape[0] if x.ndim > 1 else 1, -1)
        few = max(1, SAMPLE // rows.shape[1])
        step = max(1, -(-len(rows) // few))
        some, weigh = rows[::step][:, :SAMPLE].astype(np.float64), None
        if important is not None and importance > 0:
            weigh = important.reshape(rows.shape)[::step][:, :SAMPLE] / importance
        most = float(np.abs(x).max())
        return _Look(
            x.size, squares, importance * self.factor, some, weigh, within=WITHIN[self.codec.states], most=most
        )

    def _graded(self, x: np.ndarray, kept: Kept) -> _Look:
        """In units of its grades, in which all tensors have one step."""
        found, matrix = self.kronecker(x), x.reshape(len(x), -1)
        if not found.counts:
            return _Look(x.size, 0.0, 0.0, matrix[:1, :1])
        apart = self.apart(x, kept, found)
        down, across = apart.grades.factors
        squares = np.square(matrix, dtype=np.float64)
        by_row, by_column = squares @ across**-2.0 * down**-2.0, down**-2.0 @ squares * across**-2.0
        importance, within = self.factor, WITHIN[self.codec.states]
        if self.fisher is None and self.kind == "hessian":
            whole = found.cost(x)
            importance /= whole if whole > 0 else math.inf
        if (parts := apart.components) is not None:
            some = parts.some(matrix, spaced(by_row, max(1, 2 * SAMPLE // len(across))))
            most = math.sqrt((squares.sum(axis=1) * down**-2.0).max()) * float(np.linalg.norm(parts.analysis, 2))
            return _Look(x.size, found.cost(x), importance, some, told=apart.told, within=within, most=most)
        squares *= across**-2.0
        squares *= down[:, None] ** -2.0
        most = FLOAT * math.sqrt(squares.max())
        rows, columns = places = sampled(by_row, by_column)
        some = matrix[np.ix_(*places)] / down[rows, None] / across[columns]
        noise = np.random.default_rng(0).normal(size=some.shape) * apart.spread(*places)
        return _Look(
            x.size, float(by_row.sum()), importance, some, noise=noise, told=apart.told, within=within, most=most
        )

    def kronecker(self, x: np.ndarray) -> Kronecker:
        """What errors of pairs cost, for the values `x` of the weight."""
        assert self.by is not None
        found = Kronecker.by(self.by, self.fisher, self.weight, x)
        return found if self.damping is None else replace(found, damping=self.damping)

    def apart(self, x: np.ndarray, kept: Kept, evidence: Kronecker | None = None) -> Apart:
        """The same, taken apart. Raises WeightsError where that cannot be."""

        def found() -> Apart:
            try:
                return (evidence or self.kronecker(x)).apart(x, turn=self.codec.turn)
            except np.linalg.LinAlgError:
                raise WeightsError(
                    f"{self.weight.origin}: the evidence ({self.kind}) for {quoted(self.weight.name)} is not positive "
                    "definite even with damping; measure it again, on more examples"
                ) from None

        return kept.of((self.weight.name, "apart", self.codec.turn), found)


def sampled(*squares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Some rows and columns by their sums of squares, of all sizes, which cross in at most `SAMPLE` elements."""
    rows, columns = map(len, squares)
    across = min(columns, max(1, math.isqrt(SAMPLE * columns // rows)))
    down = min(rows, max(1, SAMPLE // across))
    across = min(columns, SAMPLE // down)
    return spaced(squares[0], down), spaced(squares[1], across)


def spaced(sizes: np.ndarray, count: int) -> np.ndarray:
    """Indices of at most `count` numbers, as many of each size as there are."""
    count = min(count, len(sizes))
    return np.sort(np.argsort(sizes, kind="stable")[(2 * np.arange(count) + 1) * len(sizes) // (2 * count)])


@dataclass(frozen=True)
class _Look:
    size: int
    squares: float  # the sum of them
    importance: float  # of the squared error of one element
    sample: np.ndarray  # some rows, float64
    weigh: np.ndarray | None = None  # importances of the sample, of mean 1 in the whole tensor
    noise: np.ndarray | None = None  # what other elements' errors add to the sample, as a share of an element's error
    told: int = 0  # bytes besides the levels
    within: float = 1.0  # the squared error of an element in squared steps, which depends on the states
    most: float = 0.0  # the greatest value in the unit of the step, at most

    @property
    def nbytes(self) -> int:
        """In memory."""
        return sum(x.nbytes for x in (self.sample, self.weigh, self.noise) if x is not None)

    @property
    def step(self) -> float:
        """The step of the grid, up to a factor that all tensors share; 0 where every element may become 0."""
        return (self.importance * self.within) ** -0.5 if self.importance > 0 and self.squares > 0 else 0.0

    @property
    def finest(self) -> float:
        """The least factor for which there are levels enough."""
        return 1.001 * self.most / (LIMIT * self.step) if self.step else 0.0

    def at(self, factor: float) -> float:
        """The step for a factor, or the finest that can be held."""
        return max(factor, self.finest) * self.step

    def bits(self, factor: float, codec: Trellis) -> float:
        """Foreseen for the whole tensor."""
        if not self.step:
            return 0.0
        step, sample = self.at(factor), self.sample
        if self.told:  # the sample is in components already
            codec = replace(codec, turn=False)
        if self.noise is not None:  # nothing loses more than itself
            lost = np.minimum(np.square(sample), self.within * step**2).mean()
            sample = sample + math.sqrt(lost) * self.noise
        stream = codec.held(sample, step, self.weigh)["stream"]
        return 8 * (stream.size * self.size / self.sample.size + self.told)


@dataclass
class _Together:
    """The factor of all steps, found when the first tensor is read. Safe with several threads."""

    settings: RateDistortion
    members: tuple[_Part, ...]
    kept: Kept
    lock: threading.Lock = field(default_factory=threading.Lock)

    @cached_property
    def parts(self) -> dict[str, _Part]:
        return {part.weight.name: part for part in self.members}

    def hold(self, name: str, x: np.ndarray) -> Packed:
        """`x`, the values of the weight of that name, on its grid."""
        with self.lock:
            looks, factor = self._looks, self._factor
        part, look = self.parts[name], looks[name]
        step, important = look.at(factor), None
        if step and not part.kind and (important := part.important(x)) is not None:
            important *= part.factor / look.importance
        if step and part.kind:
            held = part.apart(x, self.kept).held(x, step, part.codec)
        else:  # zeros, where nothing is of importance
            held = part.codec.held(x if step else np.zeros_like(x), step or None, important)
        return Packed(part.weight.spec, part.codec, held)

    @cached_property
    def _looks(self) -> dict[str, _Look]:
        return {
            name: self.kept.of((name, "look", part.codec), lambda part=part: part.look(self.kept))  # type: ignore[misc]
            for name, part in self.parts.items()
        }

    @cached_property
    def _factor(self) -> float:
        looks = [look for look in self._looks.values() if look.step]
        if not looks:
            return 1.0
        if self.settings.bits is None:
            error, count = self.settings.error or 0.0, sum(look.size for look in self._looks.values())
            noise = sum(look.size * look.size * look.step**2 / look.squares for look in looks)
            return self._coarse(error * math.sqrt(count / (WITHIN[self.settings.states] * noise)), error)
        # What nothing minds becomes zeros and is no part of the mean: others would get the bits that it does without.
        count = sum(look.size for look in self._looks.values() if look.importance > 0)
        start = math.sqrt(sum(look.squares for look in looks) / sum(look.size * look.step**2 for look in looks))

        def bits(factor: float) -> float:
            return sum(look.bits(factor, self.parts[name].codec) for name, look in self._looks.items()) / count

        graded = self.settings.kind in PAIRS  # with grades of their own, rows may go on
        if not graded and self.settings.bits < (least := bits(start * NOTHING)):
            text = f"{self.settings.bits:g} bits for each weight are too few: with every weight 0 these tensors take"
            raise RecipeError(f"{text} {least:.2g}; ask for more, or leave tensors of few weights as they are")
        # At the least of all factors each tensor has the finest levels that can be held: no more bits can be bought.
        return solved(bits, self.settings.bits, start, min(look.finest for look in looks))

    def _coarse(self, factor: float, error: float) -> float:
        """The factor; raises RecipeError where a tensor would need more levels than there are."""
        name, look = max(self._looks.items(), key=lambda found: found[1].finest)
        if look.finest >= factor:
            where, enough = f"{self.parts[name].weight.origin}: {quoted(name)}", 1.05 * error * look.finest / factor
            raise RecipeError(f"{where}: error={error:g} would need more than 2^28 levels on either side of 0: ask for "
                              f"{enough:.2g} or more, or pack without any loss (the codec entropy)")  # fmt: skip
        return factor
