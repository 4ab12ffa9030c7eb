"""Uniform levels along a trellis, chosen for the least error plus price of their bits, and entropy-coded. Lossy.

Decides which levels stand for a tensor, whether a tall matrix is turned first so that its columns are uncorrelated,
and how a stream is laid out. Knows nothing of how much error a tensor may have: that is its `step`.
Sources: trellis-coded quantization and the choice by rate and distortion as in DeepCABAC (S. Wiedemann et al., 2019,
arXiv 1907.11900) and NNCodec; see `steelyard.kernels.trellis` and `steelyard.kernels.levels`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from steelyard.codecs._basis import fineness, may_turn, principal, product
from steelyard.codecs._grades import Grades
from steelyard.codecs._parts import blank, part
from steelyard.codecs._planes import read_varint, varint
from steelyard.core.packed import Codec
from steelyard.core.spec import Spec
from steelyard.errors import CodecError

_FLOATS = ("float32", "float16", "bfloat16", "float64")
LIMIT = 1 << 28  # levels are below this
_BLOCK = 1 << 21  # elements of a block that is coded by itself, at least
_PATH = 1 << 19  # elements whose path through the trellis is searched at a time


@dataclass(frozen=True)
class Trellis(Codec):
    """Hold each element as a whole number of steps, at close to the fewest bits that its error allows.

    With one state, an element is k * step. With more, there are two quantizers with levels at 2k * step and
    (2k - sign(k)) * step; the state says which one an element has, and whether k is odd says which state follows:
    at the bits of one quantizer, the error is nearer to that of both (8 states: by 1 dB, 32 by 1.1).

    A level is chosen for the least ``(error / step)^2 + lagrangian * bits``, with bits as statistics of the tensor
    estimate them. A matrix of at most 1,024 columns and 16 times as many rows is held in the basis of its principal
    components instead, where that takes fewer bytes; the basis is a part of the stream.

    The part ``stream`` (uint8, one axis) is nothing for a tensor without elements, else:

    - a byte: 1 if there is a basis, plus 2 if the step is a float64, plus 4 if rows and columns have grades; the step
      (float32 or float64, little-endian);
    - the rows of a block as a varint, 0 for all in one;
    - for each stream but the last its length as a varint, and the stream.

    The streams are the basis, if there is one (a square of levels of the step 2^-floor(log2(8 sqrt(columns))), beside
    grades 16 in place of 8; rows are components), the grades of the matrix' rows and those of its columns, if there are
    (each one row of whole numbers k, which multiply the step by 2^(k/4)), and each block of rows (what the first axis
    indexes; a tensor of one axis is one row) as `steelyard.kernels.levels.code_levels` writes it, beginning in state 0.
    A value is the whole number of steps (with a basis: of both steps, the sum over components exact) times the step in
    float64, rounded to the dtype.

    Args:
        step: what the whole numbers count, in the unit of the weights; None: the power of two nearest to an eighth
            of the root mean square.
        states: 1, 4, 8, 16, 32 or 64: each doubling takes twice the time to encode, and none to decode.
        lagrangian: what a bit is worth, in squared steps; 0 takes the nearest level. 0.4 is close to the best
            at 2 to 5 bits with 8 states, 0.1 with one.
        turn: whether a basis may be held.
        down: the columns of the matrix are the rows of the streams, so that a path goes down each of them.

    >>> x = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    >>> codec = Trellis(step=0.25)
    >>> parts = codec.encode(x)
    >>> error = x - codec.decode(parts, Spec.like(x))
    >>> round(8 * parts["stream"].size / x.size, 1), round(float(np.square(error).mean()), 3)
    (3.1, 0.016)

    Raises CodecError for NaN, infinities, a step that is not positive or too small for the values, and types other
    than float32, float16, bfloat16 and float64.
    """

    step: float | None = None
    states: Literal[1, 4, 8, 16, 32, 64] = 8
    lagrangian: float = 0.4
    turn: bool = True
    down: bool = False

    name: ClassVar[str] = "trellis"
    lossless: ClassVar[bool] = False
    settled: ClassVar[bool] = False
    parts: ClassVar[tuple[str, ...]] = ("stream",)

    def __post_init__(self) -> None:
        if self.step is not None and not (self.step > 0 and math.isfinite(self.step)):
            raise CodecError(f"trellis: step is {self.step}, expected a positive number")
        if self.states not in (1, 4, 8, 16, 32, 64):
            raise CodecError(f"trellis: states is {self.states}, expected 1, 4, 8, 16, 32 or 64")
        if not 0 <= self.lagrangian < math.inf:
            raise CodecError(f"trellis: lagrangian is {self.lagrangian}, expected a number of at least 0")

    def encode(self, x: np.ndarray) -> dict[str, np.ndarray]:
        """``{"stream": uint8}``; see the class."""
        return self.held(x, self.step)

    def held(self, x: np.ndarray, step: float | None, importance: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """`encode` with another step, squared errors weighed by `importance` (broadcasts to `x`, mean about 1)."""
        spec = Spec.like(x)
        _check(spec)
        if not x.size:
            return {"stream": np.zeros(0, np.uint8)}
        with np.errstate(invalid="ignore"):  # a signalling NaN
            values = self._laid(x.astype(np.float64).reshape(_rows(spec)))
        most = float(np.abs(values).max())
        if not math.isfinite(most):
            raise CodecError("trellis: NaN or infinite values have no levels; repair them")
        if step is None:  # scaled first, so that no square overflows or vanishes
            mean = most * math.sqrt(float(np.square(values / (most or 1)).mean()))
            step = 2.0 ** round(math.log2(mean / 8)) if mean else 0.0
        step = stored(step)
        if most / step >= LIMIT:
            raise CodecError(f"trellis: {most:g} is more than 2^28 steps of {step:g} from 0; take a greater step")
        weigh = None
        if importance is not None:
            weigh = self._laid(np.broadcast_to(importance, x.shape).astype(np.float64).reshape(_rows(spec)))
        values /= step
        found = self._plan(values, weigh)
        if weigh is None and self.turn and may_turn(*values.shape):
            turned = self._turned(values, principal(values))
            found = turned if len(turned) < len(found) else found
        return {"stream": np.frombuffer(_headed(found[0], step) + found[1:], np.uint8).copy()}

    def decode(self, parts: Mapping[str, np.ndarray], spec: Spec) -> np.ndarray:
        """The rounded tensor; raises CodecError for a stream that is cut off, too long or damaged beyond sense."""
        stream = part(parts, "stream", self.name, dtypes=(np.uint8,))
        _check(spec)
        if not spec.size:
            if stream.size:
                raise CodecError(f"trellis: {stream.size} bytes for a tensor without elements")
            return blank(spec)
        flags, step, at = _head(stream)
        based, graded = bool(flags & 1), bool(flags & 4)
        count, width = _rows(spec)[::-1] if self.down else _rows(spec)
        if based and not may_turn(count, width):
            raise CodecError(f"trellis: a basis for a matrix of {count} by {width}")
        rows, at = read_varint(stream, at)
        heights = _heights(count, rows)
        first = [(width, width)] * based + [(1, size) for size in _rows(spec)] * graded
        pieces = list(_cut(stream, at, len(first) + len(heights)))
        basis, factors = None, None
        if based:
            basis, step = self._wholes(pieces[0], first[0]), step / fineness(width, graded)
        if graded:
            own = [decoded(*both)[0] for both in zip(pieces[based:], first[based:], strict=False)]
            factors = Grades(*own).factors[:: -1 if self.down else 1]
        found = blank(spec).reshape(_rows(spec))
        out, ends = self._laid(found), np.cumsum([0, *heights])

        def block(i: int) -> None:
            part = slice(ends[i], ends[i + 1])
            values = self._wholes(pieces[len(first) + i], (heights[i], width))
            with np.errstate(over="ignore", invalid="ignore"):
                scaled = (values if basis is None else product(values, basis)) * np.float64(step)
                if factors is not None:
                    scaled = scaled * factors[1] * factors[0][part, None]
                out[part] = _nearest(scaled, spec)

        _each(block, range(len(heights)))
        return np.asarray(found.reshape(spec.shape))

    def turned(self, x: np.ndarray, step: float, components: np.ndarray, grades: Grades) -> dict[str, np.ndarray]:
        """The parts for a matrix x (rows, columns) in a basis of its rows, whose components are coded for themselves.

        components: (columns, columns), what a step of each adds to a row, in units of the grades; `may_turn` says
        for which shapes. Raises CodecError for a step that is too small.
        """
        down, across = grades.factors
        step = stored(step)
        stream = self._turned(x / (step * down[:, None] * across), components, grades)
        return {"stream": np.frombuffer(_headed(5, step) + stream[1:], np.uint8).copy()}

    def told(self, levels: np.ndarray, step: float, grades: Grades | None = None) -> dict[str, np.ndarray]:
        """The parts for levels, (rows, width) int32 as they lie in the streams; a path begins at each `starts_of`."""
        starts = starts_of(*levels.shape)
        step = stored(step)
        pieces = _each(lambda i: code(levels[starts[i] : starts[i + 1]], self.states), range(len(starts) - 1))
        if grades is not None:
            pieces = [*streams_of(grades), *pieces]
        head = _headed(0 if grades is None else 4, step)
        return {"stream": np.frombuffer(head + _framed(levels.shape, pieces), np.uint8).copy()}

    def _laid(self, matrix: np.ndarray) -> np.ndarray:
        """The matrix as the rows of the streams, and back."""
        return matrix.T if self.down else matrix

    def _plan(self, scaled: np.ndarray, weigh: np.ndarray | None, first: Sequence[bytes] = ()) -> bytes:
        """The whole stream for rows that are given in steps; first: the pieces before them, of which one is a basis."""
        starts = starts_of(*scaled.shape)

        def block(i: int) -> bytes:
            part = slice(starts[i], starts[i + 1])
            return self._block(scaled[part], None if weigh is None else weigh[part])

        return bytes([bool(first)]) + _framed(scaled.shape, [*first, *_each(block, range(len(starts) - 1))])

    def _turned(self, scaled: np.ndarray, components: np.ndarray, grades: Grades | None = None) -> bytes:
        """The whole stream in a basis."""
        basis, held = self.basis(components, grades is not None)
        first = [basis, *([] if grades is None else streams_of(grades))]
        return self._plan(np.linalg.solve(held.T, scaled.T).T, None, first)

    def basis(self, components: np.ndarray, graded: bool) -> tuple[bytes, np.ndarray]:
        """A square of components as a stream, and what it holds; graded: beside grades."""
        fine = fineness(len(components), graded)
        stream = self._block(components * fine, None)
        return stream, self._wholes(np.frombuffer(stream, np.uint8), components.shape) / fine

    def _block(self, scaled: np.ndarray, weigh: np.ndarray | None) -> bytes:
        """One stream of levels."""
        levels = self._levels(np.ascontiguousarray(scaled), weigh)
        return code(levels, self.states)

    def _levels(self, scaled: np.ndarray, weigh: np.ndarray | None) -> np.ndarray:
        """The levels (rows, width) int32 for elements in steps."""
        from steelyard.kernels import trellis

        following, second = trellis.tables(self.states)
        flat = scaled.reshape(-1)
        weights = np.ones(1) if weigh is None else np.ascontiguousarray(weigh).reshape(-1)
        if self.states == 1 and not self.lagrangian:
            return np.asarray(np.rint(scaled), np.int32)
        kinds, prices = prices_of(scaled, self.states)
        kinds = kinds.reshape(-1)
        levels, state = np.empty(flat.size, np.int32), 0
        for at in range(0, flat.size, _PATH):
            piece = slice(at, at + _PATH)
            some = weights if weigh is None else weights[piece]
            given = (flat[piece], some, kinds[piece], prices, self.lagrangian)
            if self.states == 1:
                trellis.nearest(*given, levels[piece])
            else:
                state = trellis.choose(*given, following, second, state, levels[piece])
        return levels.reshape(scaled.shape)

    def _wholes(self, stream: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
        """The whole numbers of steps (rows, width) int32 that a stream holds."""
        from steelyard.kernels import trellis

        levels = decoded(stream, shape, self.states)
        if self.states > 1:
            trellis.placed(levels.reshape(-1), *trellis.tables(self.states), 0, levels.reshape(-1))
        return levels


def code(levels: np.ndarray, states: int = 1) -> bytes:
    """Whole numbers (rows, width) int32 as one stream of `steelyard.kernels.levels`."""
    from steelyard.kernels import levels as coder
    from steelyard.kernels.trellis import tables

    flat = np.ascontiguousarray(levels).reshape(-1)
    room = 64 + flat.size
    while True:
        buffer = np.zeros(room, np.uint8)
        used = int(coder.code_levels(flat, levels.shape[1], *tables(states), buffer, *coder.learning(), False))
        if used >= 0:
            return buffer[:used].tobytes()
        room *= 4


def decoded(stream: np.ndarray, shape: tuple[int, int], states: int = 1) -> np.ndarray:
    """The inverse of `code`; raises CodecError for bytes that are too few or too many."""
    from steelyard.kernels import levels as coder
    from steelyard.kernels.trellis import tables

    levels = np.zeros(shape, np.int32)
    body = np.require(stream, requirements=["C", "W"])
    if coder.decode_levels(levels.reshape(-1), shape[1], *tables(states), body, *coder.learning()) < 0:
        raise CodecError(f"trellis: {stream.size} bytes are too few or too many for {levels.size} levels")
    return levels


def prices_of(scaled: np.ndarray, states: int) -> tuple[np.ndarray, np.ndarray]:
    """For a matrix in steps the class of each element, as its neighbours are large (uint8), and the bits of levels."""
    from steelyard.kernels import levels as coder

    near = np.rint(scaled / (1 if states == 1 else 2)).astype(np.int32)
    kinds = np.empty(scaled.shape, np.uint8)
    coder.sizes(near.reshape(-1), scaled.shape[1], kinds.reshape(-1))
    return kinds, _bits(scaled.reshape(-1), near.reshape(-1), kinds.reshape(-1), states)


def _bits(flat: np.ndarray, near: np.ndarray, kinds: np.ndarray, states: int) -> np.ndarray:
    """Bits of a level by class, quantizer and size, as often as sizes occur; a geometric law where that is seldom."""
    from steelyard.kernels.levels import CLASSES
    from steelyard.kernels.trellis import KNOWN

    prices = np.zeros((CLASSES, 2, KNOWN))
    sizes = np.arange(KNOWN)
    mean = 2.0 ** ((np.arange(CLASSES) - 28) / 4)[:, None]  # (classes, 1)
    law = (mean / (1 + mean)) ** sizes / (1 + mean)
    for quantizer in range(2 if states > 1 else 1):
        level = near if quantizer == 0 else np.rint((flat + np.sign(flat)) / 2)
        size = np.minimum(np.abs(level), KNOWN - 1).astype(np.int64)
        counts = np.bincount(kinds * np.int64(KNOWN) + size, minlength=CLASSES * KNOWN).reshape(CLASSES, KNOWN)
        chance = counts + 16 * law + 1e-9
        prices[:, quantizer] = -np.log2(chance / chance.sum(1, keepdims=True)) + (sizes > 0)
    return prices


def streams_of(grades: Grades) -> list[bytes]:
    """Those of rows and those of columns, a stream each."""
    return [code(np.ascontiguousarray(x[None], np.int32)) for x in (grades.rows, grades.columns)]


def _headed(flags: int, step: float) -> bytes:
    """The beginning of a stream, which `_head` reads."""
    narrow = 2.0**-126 <= step < 2.0**127
    return bytes([flags | (0 if narrow else 2)]) + np.array(step, "<f4" if narrow else "<f8").tobytes()


def _framed(shape: tuple[int, int], pieces: Sequence[bytes]) -> bytes:
    """What follows the beginning: how many rows a block has, and each piece."""
    framed = [text for piece in pieces[:-1] for text in (varint(len(piece)), piece)]
    return b"".join([varint(_height(*shape)), *framed, pieces[-1]])


def _check(spec: Spec) -> None:
    if spec.dtype.name not in _FLOATS:
        raise CodecError(f"trellis: cannot hold {spec.dtype}, only {', '.join(_FLOATS)}; cast the tensor first")


def stored(step: float) -> float:
    """The step as it is stored: the nearest float32 where that is a normal one; 1 where all that has levels is 0."""
    if 2.0**-126 <= step < 2.0**127:
        return float(np.float32(step))
    return step if step > 2.0**-1000 else 1.0


def _head(stream: np.ndarray) -> tuple[int, float, int]:
    """The flags, the step, and where the rest begins."""
    flags = int(stream[0]) if stream.size else 8
    length = 8 if flags & 2 else 4
    if flags > 7 or stream.size < 1 + length:
        raise CodecError("trellis: the stream has no beginning; it is damaged or from a later version")
    step = float(stream[1 : 1 + length].view(f"<f{length}")[0])
    if not (step > 0 and math.isfinite(step)):
        raise CodecError(f"trellis: the stream has a step of {step}; it is damaged")
    return flags, step, 1 + length


def _nearest(values: np.ndarray, spec: Spec) -> np.ndarray:
    """In the dtype, what is larger than its largest number as that: a level above the last value is no infinity."""
    found = values.astype(spec.dtype.numpy)
    if np.isfinite(found).all():
        return np.asarray(found)
    most = 2.0**128 - 2.0**120 if spec.dtype.name == "bfloat16" else float(np.finfo(spec.dtype.numpy).max)
    return np.asarray(np.clip(values, -most, most).astype(spec.dtype.numpy))


def _rows(spec: Spec) -> tuple[int, int]:
    """How a tensor lies as a matrix."""
    if len(spec.shape) < 2:
        return 1, spec.size
    return spec.shape[0], spec.size // spec.shape[0]


def _height(count: int, width: int) -> int:
    """The rows of a block that an encoder makes; 0: all in one."""
    return 0 if count * width < 2 * _BLOCK else -(-_BLOCK // width)


def starts_of(count: int, width: int) -> np.ndarray:
    """The first row of each block, and the end of the last."""
    return np.cumsum([0, *_heights(count, _height(count, width))])


def _heights(count: int, rows: int) -> list[int]:
    """The rows of each block."""
    if not rows:
        return [count]
    return [min(rows, count - at) for at in range(0, count, rows)]


def _cut(stream: np.ndarray, at: int, count: int) -> Iterator[np.ndarray]:
    for i in range(count):
        length = stream.size - at
        if i < count - 1:
            length, at = read_varint(stream, at)
        if not 0 <= length <= stream.size - at:
            raise CodecError(f"trellis: piece {i} has {length} bytes, {stream.size - at} are left in the stream")
        yield stream[at : at + length]
        at += length


def _each(work: Callable[[int], Any], items: Sequence[int]) -> list[Any]:
    """The results of `work`, with as many threads as there are processors."""
    if len(items) == 1:
        return [work(items[0])]
    with ThreadPoolExecutor(min(len(items), os.cpu_count() or 1)) as pool:
        return list(pool.map(work, items))
