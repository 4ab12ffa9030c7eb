"""Tensors of up to 16 bits per value: counted by bit pattern. Everything follows from the counts, exactly."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from steelyard.explain.lines import Lines
from steelyard.explain.patterns import Alphabet
from steelyard.explain.reading import Numbers, Workspace
from steelyard.explain.sums import Sums, Tally


class _Patterns:
    """Counts by pattern; two bytes at a time where a value is one byte."""

    def __init__(self, width: int, space: Workspace, worker: int, lines: Lines | None):
        self.width, self.compiled, self.lines = width, space.compiled, lines
        self.tables = space.zeros(worker, "counts", (2, 65536), np.uint32)
        self.counts = space.zeros(worker, "all counts", (1 << 8 * width,), np.int64)
        self.pending = 0

    def add(self, first: int, block: np.ndarray) -> None:
        patterns = block.view(f"u{self.width}")
        if self.lines is not None:
            self.lines.add(first, patterns)
        if not self.compiled:
            self.counts += np.bincount(patterns, minlength=self.counts.size)
            return
        from steelyard.kernels.counts import count_16

        if self.width == 1:
            if patterns.size % 2:
                self.counts[patterns[-1]] += 1
            patterns = patterns[: patterns.size // 2 * 2].view(np.uint16)
        self.pending += patterns.size
        count_16(patterns, self.tables)
        if self.pending > 1 << 31:
            self.empty()

    def empty(self) -> None:
        """Move the counts out of the tables, whose counters have 32 bits."""
        if self.pending:
            for table in self.tables:
                if self.width == 2:
                    self.counts += table
                else:
                    self.counts += sum(table.reshape(256, 256).sum(axis=k, dtype=np.int64) for k in (0, 1))
            self.tables.fill(0)
            self.pending = 0


def narrow(numbers: Numbers, known: Alphabet, lines: Lines | None) -> Tally:
    """The tally of a tensor of up to 16 bits per value."""
    width = numbers.numpy.itemsize
    accounts = numbers.each_by(lambda k: _Patterns(width, numbers.space, k, lines and lines.empty(numbers.space, k)))
    for account in accounts:
        account.empty()
    counts = sum(account.counts for account in accounts)
    counts = counts.reshape(-1, known.values.size).sum(axis=0)  # a narrower value has the rest of its byte unused
    in_order = counts[known.order]
    present = np.flatnonzero(in_order)
    values, times = known.ordered[present], in_order[present]
    running = np.cumsum(times)
    finite = int(running[-1]) if running.size else 0
    significands, exponents = known.significands[present], known.exponents[present]

    def ordered(ranks: Sequence[int]) -> list[float]:
        return [float(v) + 0.0 for v in values[np.searchsorted(running, ranks, "right")]]

    def bins(low: float, high: float, count: int) -> tuple[list[float], list[int]]:
        edges = np.linspace(low, high, count + 1)
        return edges.tolist(), _between(values, times, edges)

    rows, columns = Lines.norms([a.lines for a in accounts])
    return Tally(
        numbers.size,
        finite,
        int(times[values == 0].sum()),
        int(counts[known.negative_zero].sum()),
        int(times[values > 0].sum()),
        int(counts[known.subnormal].sum()),
        int(counts[known.nan].sum()),
        (int(counts[known.infinite[0]].sum()), int(counts[known.infinite[1]].sum())),
        Sums(
            _weighed(times, significands, exponents),
            _weighed(times, abs(significands), exponents),
            _weighed(times, significands**2, 2 * exponents),
            known.base,
        ),
        counts,
        int(np.count_nonzero(counts)),
        ordered,
        bins,
        rows,
        columns,
    )


def _between(values: np.ndarray, times: np.ndarray, edges: np.ndarray) -> list[int]:
    """How many values lie in each bin; the last one has both of its edges."""
    bin_of = np.clip(np.searchsorted(edges, values, "right") - 1, 0, len(edges) - 2)
    counts = np.zeros(len(edges) - 1, np.int64)
    np.add.at(counts, bin_of, times)
    return counts.tolist()


def _weighed(times: np.ndarray, factors: np.ndarray, exponents: np.ndarray) -> int:
    """The exact sum of times x factor x 2^exponent; a factor has up to 32 bits."""
    if not times.size:
        return 0
    total = 0
    for share, shift in ((times & 0xFFFFF, 0), (times >> 20, 20)):  # so that no product overflows
        sums = np.zeros(int(exponents.max()) + 1, np.int64)
        np.add.at(sums, exponents, share * factors)
        total += sum(int(sums[e]) << (int(e) + shift) for e in np.flatnonzero(sums))
    return total
