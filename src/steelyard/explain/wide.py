"""Tensors of 32 or 64 bits per value: counted by their leading 16 bits, summed as whole numbers.

An order statistic is found exactly by counting, in a further pass, what follows the leading bits that it has.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np

from steelyard.explain.lines import Lines
from steelyard.explain.patterns import WIDE, Wide
from steelyard.explain.reading import PIECE, Numbers, Workspace
from steelyard.explain.sums import Sums, Tally

DISTINCT = 4096  # up to so many different patterns are counted
LIMB = 16


class _Account(ABC):
    """What a pass over numbers of 32 or 64 bits gathers."""

    def __init__(self, wide: Wide, space: Workspace, worker: int, lines: Lines | None):
        self.wide, self.lines = wide, lines
        self.counts = space.zeros(worker, "all counts", (65536,), np.int64)
        self.special = np.zeros(4, np.int64)  # 0.0, -0.0, +Inf, -Inf
        self.total = self.absolute = self.squares = 0

    @abstractmethod
    def add(self, first: int, block: np.ndarray) -> None: ...

    @abstractmethod
    def finish(self) -> None: ...


def _specials(wide: Wide) -> np.ndarray:
    if wide.fraction is None:
        return np.zeros(1, wide.unsigned)
    infinity = ((1 << (wide.bits - 1 - wide.fraction)) - 1) << wide.fraction
    sign = 1 << (wide.bits - 1)
    return np.array([0, sign, infinity, sign | infinity], wide.unsigned)


class _Exact(_Account):
    """By numpy: the significands in limbs of 16 bits, each summed by exponent. float64 holds these sums exactly."""

    def add(self, first: int, block: np.ndarray) -> None:
        if self.lines is not None:
            self.lines.add(first, block)
        for at in range(0, block.size, PIECE):
            self._add(block[at : at + PIECE].view(self.wide.unsigned))

    def _add(self, patterns: np.ndarray) -> None:
        wide = self.wide
        self.counts += np.bincount(wide.leading(patterns), minlength=65536)
        for k, sought in enumerate(_specials(wide)):
            self.special[k] += np.count_nonzero(patterns == sought)
        size, shift, negative = _taken_apart(wide, patterns)
        limbs = [((size >> LIMB * i) & 0xFFFF).astype(np.float64) for i in range(wide.bits // LIMB)]
        up = int(shift.max(initial=0)) + 1
        signed = shift + np.where(negative, up, 0)
        for i, limb in enumerate(limbs):
            sums = np.bincount(signed, limb, 2 * up)
            plus, minus = _shifted(sums[:up], LIMB * i, 1), _shifted(sums[up:], LIMB * i, 1)
            self.total += plus - minus
            self.absolute += plus + minus
            for j in range(i, len(limbs)):
                sums = np.bincount(shift, limb * limbs[j], up)
                self.squares += _shifted(sums, LIMB * (i + j), 2) * (1 if i == j else 2)

    def finish(self) -> None: ...


def _taken_apart(wide: Wide, patterns: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sizes, shifts and signs: a finite value is ±size x 2^(base + shift). One that is not finite has the size 0."""
    one = patterns.dtype.type(1)
    negative = (patterns >> patterns.dtype.type(wide.bits - 1)) == one if wide.signed else np.zeros(patterns.size, bool)
    if wide.fraction is None:
        return np.where(negative, ~patterns + one, patterns), np.zeros(patterns.size, np.int64), negative
    fraction = patterns.dtype.type(wide.fraction)
    last = (1 << (wide.bits - 1 - wide.fraction)) - 1
    exponent = ((patterns >> fraction) & patterns.dtype.type(last)).astype(np.int64)
    size = patterns & ((one << fraction) - one)
    size |= (exponent > 0).astype(patterns.dtype) << fraction
    size[exponent == last] = 0
    return size, np.where(exponent == last, 0, np.maximum(exponent, 1) - 1), negative


def _shifted(sums: np.ndarray, by: int, power: int) -> int:
    """Sums by exponent as one whole number."""
    return sum(int(sums[e]) << (power * int(e) + by) for e in np.flatnonzero(sums))


class _Halves(_Account):
    """float32 by machine code: the count of each leading half, and the sum of the trailing halves that follow it.

    That gives the exact sums of x and |x|. Of x² = (head + rest)², the sums of head² and of head x rest are exact as
    well; that of rest², less than 2^-14 of the whole, is added up in float64.
    """

    def __init__(self, wide: Wide, space: Workspace, worker: int, lines: Lines | None):
        super().__init__(wide, space, worker, lines)
        self.tables = space.zeros(worker, "counts and sums", (2, 65536), np.uint64)
        self.trailing = space.zeros(worker, "trailing", (65536,), np.int64)
        self.pending = 0

    def add(self, first: int, block: np.ndarray) -> None:
        from steelyard.kernels.counts import PER_TABLE, count_32
        from steelyard.kernels.moments import squares_of_rests

        patterns = block.view(np.uint32)
        if self.lines is not None:
            self.lines.add(first, block)
        if self.pending + block.size > 2 * PER_TABLE:
            self.finish()
        self.pending += block.size
        count_32(patterns, self.tables)
        for rest in squares_of_rests(patterns, PIECE).tolist():
            numerator, denominator = rest.as_integer_ratio()
            self.squares += (numerator << -2 * self.wide.base) // denominator

    def finish(self) -> None:
        from steelyard.kernels.counts import COUNT

        for table in self.tables:
            self.counts += (table >> np.uint64(COUNT)).astype(np.int64)
            self.trailing += (table & np.uint64((1 << COUNT) - 1)).astype(np.int64)
        self.tables[:], self.pending = 0, 0

    def sums(self) -> None:
        """Add what the counts say to the sums."""
        present = np.flatnonzero(self.counts)
        present = present[(present & 0x7F80) != 0x7F80]
        size, shift, negative = _taken_apart(self.wide, present.astype(np.uint32) << np.uint32(16))
        heads, times, trailing = size.astype(np.int64), self.counts[present], self.trailing[present]
        sums = heads * times + trailing  # below 2^63 up to 2^39 numbers
        minus = np.where(negative, sums, 0)
        below, whole = _by_exponent(minus, shift), _by_exponent(sums, shift)
        self.absolute += _shifted(whole, 0, 1)
        self.total += _shifted(whole, 0, 1) - 2 * _shifted(below, 0, 1)
        once = sums + trailing  # heads² x times + 2 heads x trailing = heads x this
        for part, by in ((once & 0xFFFFFFFF, 16), (once >> 32, 48)):
            self.squares += _shifted(_by_exponent((heads >> 16) * part, shift), by, 2)


def _found_specials(numbers: Numbers, whole: _Halves) -> np.ndarray:
    """How often zeros and infinities occur. Where nothing follows their leading halves, these were counted alone."""
    sought = _specials(whole.wide)
    heads = (sought >> np.uint32(16)).astype(np.int64)
    if not whole.trailing[heads].any():
        return whole.counts[heads]
    from steelyard.kernels.counts import count_exactly

    found = np.zeros(sought.size, np.int64)
    for _, block in numbers.blocks(0, numbers.size):
        count_exactly(block.view(np.uint32), sought, found)
    return found


def _by_exponent(values: np.ndarray, shift: np.ndarray) -> np.ndarray:
    sums = np.zeros(256, np.int64)
    np.add.at(sums, shift, values)
    return sums


def wide_tally(numbers: Numbers, kind: str, lines: Lines | None) -> Tally:
    """The tally of a tensor of 32 or 64 bits per value."""
    wide, space = WIDE[kind], numbers.space
    fast = space.compiled and kind == "float32"
    later = kind in ("float64",)  # whose squares may overflow: norms need to know the scale
    account: Callable[..., _Account] = _Halves if fast else _Exact
    accounts = numbers.each_by(
        lambda k: account(wide, space, k, None if later or lines is None else lines.empty(space, k))
    )
    numbers.progress = None  # what follows looks at bytes again
    for a in accounts:
        a.finish()
    whole = accounts[0]
    for a in accounts[1:]:
        whole.counts += a.counts
        whole.special += a.special
        whole.squares += a.squares
        whole.total += a.total
        whole.absolute += a.absolute
        if isinstance(whole, _Halves) and isinstance(a, _Halves):
            whole.trailing += a.trailing
    if isinstance(whole, _Halves):
        whole.sums()
        whole.special = _found_specials(numbers, whole)
    order, in_order = wide.in_order(whole.counts)
    finite = int(in_order.sum())
    zeros, minus_zeros, plus, minus = map(int, whole.special)
    positive = int(in_order[order < 32768].sum() if wide.signed else finite) - zeros  # still those of 0.0 alone
    subnormal = 0
    if wide.fraction is not None:
        heads = 1 << (wide.fraction - (wide.bits - 16))  # leading patterns without an exponent
        small = int(whole.counts[:heads].sum() + whole.counts[32768 : 32768 + heads].sum())
        zeros += minus_zeros
        subnormal = small - zeros

    def ordered(ranks: Sequence[int]) -> list[float]:
        return _select(numbers, wide, order, in_order, ranks)

    def bins(low: float, high: float, count: int) -> tuple[list[float], list[int]]:
        return _snapped_bins(wide, order, in_order, low, high, count)

    if later and lines is not None:
        scale = 1.0
        if finite:
            ends = ordered([0, finite - 1])
            scale = 2.0 ** min(480 - int(np.frexp(max(abs(ends[0]), abs(ends[1])))[1]), 1000)  # squares up to 2^960
        shares = numbers.each_by(lambda k: lines.empty(space, k, scale))
        rows, columns = Lines.norms(shares)
    else:
        rows, columns = Lines.norms([a.lines for a in accounts])
    return Tally(
        numbers.size,
        finite,
        zeros,
        minus_zeros,
        positive,
        subnormal,
        numbers.size - finite - plus - minus,
        (plus, minus),
        Sums(whole.total, whole.absolute, whole.squares, wide.base),
        whole.counts.copy(),
        _distinct(numbers, wide),
        ordered,
        bins,
        rows,
        columns,
    )


def _select(numbers: Numbers, wide: Wide, order: np.ndarray, in_order: np.ndarray, ranks: Sequence[int]) -> list[float]:
    """The values with these ranks: their leading bits from the counts, then 16 bits more with each pass."""
    running = np.cumsum(in_order)
    at = np.searchsorted(running, ranks, "right")
    found = order[at].tolist()  # the leading bits of each
    left = (np.asarray(ranks) - (running[at] - in_order[at])).tolist()  # ranks among those that share them
    for known in range(16, wide.bits, 16):
        prefixes = sorted(set(found))
        accounts = numbers.each_by(lambda k, p=prefixes, b=known: _Trailing(wide, p, b, numbers, k))
        tables = accounts[0].tables
        for other in accounts[1:]:
            tables += other.tables
        down = [wide.descending(prefix >> (known - 16)) for prefix in prefixes]
        behind = [np.cumsum(t[::-1] if d else t, dtype=np.int64) for t, d in zip(tables, down, strict=True)]
        for i, prefix in enumerate(found):
            row = prefixes.index(prefix)
            place = int(np.searchsorted(behind[row], left[i], "right"))
            left[i] -= int(behind[row][place - 1]) if place else 0
            found[i] = prefix << 16 | (65535 - place if down[row] else place)
    values = np.array(found, wide.unsigned).view(numbers.numpy)
    return [int(v) if wide.fraction is None else float(v) + 0.0 for v in values]


class _Trailing:
    """How often each pattern of the next 16 bits occurs behind given leading bits."""

    def __init__(self, wide: Wide, prefixes: list[int], known: int, numbers: Numbers, worker: int):
        self.wide, self.prefixes, self.known = wide, prefixes, known
        self.fast = numbers.space.compiled and wide.bits == 32
        counter = np.uint32 if numbers.size < 1 << 32 else np.int64
        self.tables = numbers.space.zeros(worker, "behind", (len(prefixes), 65536), counter)
        self.slots = numbers.space.zeros(worker, "slots", (65536,), np.uint8)
        if known == 16:
            self.slots[prefixes] = np.arange(1, len(prefixes) + 1)
        self.gathered = numbers.space.array(worker, "gathered", (PIECE + 1,), np.uint32)

    def add(self, _first: int, block: np.ndarray) -> None:
        patterns = block.view(self.wide.unsigned)
        if self.fast:
            from steelyard.kernels.counts import count_trailing

            count_trailing(patterns, self.slots, self.gathered, self.tables)
            return
        heads = patterns >> patterns.dtype.type(self.wide.bits - self.known)
        for table, prefix in zip(self.tables, self.prefixes, strict=True):
            chosen = patterns[heads == prefix] >> patterns.dtype.type(self.wide.bits - self.known - 16)
            counts = np.bincount((chosen & patterns.dtype.type(65535)).astype(np.int64), minlength=65536)
            table += counts.astype(table.dtype)


def _snapped_bins(
    wide: Wide, order: np.ndarray, in_order: np.ndarray, low: float, high: float, count: int
) -> tuple[list[float], list[int]]:
    """Bins of nearly equal width whose inner edges are values with 16 bits, so that the counts are exact."""
    unsigned = wide.unsigned.type
    kind = {("f", 32): "f4", ("f", 64): "f8"}.get(("f", wide.bits)) if wide.fraction is not None else None
    patterns = order.astype(wide.unsigned) << unsigned(wide.bits - 16)
    kind = kind or f"{'i' if wide.signed else 'u'}{wide.bits // 8}"
    # the least value of each group: a negative float's group ends, towards zero, at its leading pattern
    least = patterns | np.where(
        (order >= 32768) & (wide.fraction is not None), unsigned((1 << (wide.bits - 16)) - 1), unsigned(0)
    )
    starts = least.view(kind).astype(np.float64)
    half = 1.0 if high - low < np.inf else 0.5  # so that the width of the whole is a float64
    wanted = np.linspace(low * half, high * half, count + 1)[1:-1] / half
    at = np.unique(np.searchsorted(starts, wanted, "left"))
    at = at[(at < starts.size)]
    at = at[(starts[np.minimum(at, starts.size - 1)] > low) & (starts[np.minimum(at, starts.size - 1)] < high)]
    running = np.concatenate([[0], np.cumsum(in_order)])
    cuts = np.concatenate([[0], at, [starts.size]])
    return [low, *starts[at].tolist(), high], np.diff(running[cuts]).tolist()


def _distinct(numbers: Numbers, wide: Wide) -> int | None:
    """How many different patterns there are, as long as they are few."""
    seen = np.empty(0, wide.unsigned)
    if numbers.space.compiled and wide.bits == 32:
        from steelyard.kernels.counts import distinct_up_to

        table, found, count = np.full(4 * DISTINCT, -1, np.int32), np.empty(DISTINCT, np.uint32), np.zeros(1, np.int64)
        for first in (0, PIECE):  # the beginning shows, as a rule, that there are many
            for _, block in numbers.blocks(first, min(PIECE, numbers.size) if not first else numbers.size):
                distinct_up_to(block.view(np.uint32), DISTINCT, table, found, count)
                if count[0] > DISTINCT:
                    return None
        return int(count[0])
    for _, block in numbers.blocks(0, numbers.size):
        for at in range(0, block.size, 4 * DISTINCT):
            seen = np.union1d(seen, block[at : at + 4 * DISTINCT].view(wide.unsigned))
            if seen.size > DISTINCT:
                return None
    return int(seen.size)
