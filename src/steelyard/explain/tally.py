"""One tensor looked at: exact counts and exact sums, in bounded memory.

A dtype of up to 16 bits is counted by bit pattern; of a wider one the leading halves are counted. Not-finite values
are counted and take no part in anything else. Knows one tensor at a time and no table.
"""

from __future__ import annotations

from steelyard.core.weights import Weight
from steelyard.explain.lines import Lines
from steelyard.explain.narrow import narrow
from steelyard.explain.patterns import WIDE, alphabet, part
from steelyard.explain.reading import Numbers, Progress
from steelyard.explain.sums import Tally
from steelyard.explain.wide import wide_tally


def tally(weight: Weight, compiled: bool, norms: bool = True, progress: Progress | None = None) -> Tally:
    """Look at every value of `weight` once, or, for dtypes of more than 16 bits, a few times.

    ``compiled`` says whether by machine code on two threads, or by numpy alone, which starts sooner. Memory: two
    blocks and their counts, whatever the size, where the weight can be read in parts.
    """
    numbers = Numbers(weight, 2 if compiled else 1, progress)
    kind = part(weight.spec.dtype)
    lines = Lines.of(weight, kind, compiled) if norms else None
    if kind not in WIDE:
        return narrow(numbers, alphabet(weight.spec.dtype), lines, compiled)
    return wide_tally(numbers, kind, lines, compiled)
