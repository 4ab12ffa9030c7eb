"""One tensor looked at: exact counts and exact sums, in bounded memory.

A dtype of up to 16 bits is counted by bit pattern; of a wider one the leading halves are counted. Not-finite values
are counted and take no part in anything else. Knows one tensor at a time and no table.
"""

from __future__ import annotations

from steelyard.core.weights import Weight
from steelyard.explain.lines import Lines
from steelyard.explain.narrow import narrow
from steelyard.explain.patterns import WIDE, alphabet, part
from steelyard.explain.reading import Numbers, Progress, Workspace
from steelyard.explain.sums import Tally
from steelyard.explain.wide import wide_tally


def tally(weight: Weight, space: Workspace, norms: bool = True, progress: Progress | None = None) -> Tally:
    """Look at every value of `weight` once, or, for dtypes of more than 16 bits, a few times.

    Memory: two blocks and their counts, whatever the size, where the weight can be read in parts. What the tally is
    asked for later must be asked for before `space` serves the next tensor.
    """
    numbers = Numbers(weight, space, progress)
    kind = part(weight.spec.dtype)
    lines = Lines.of(weight, kind, space.compiled) if norms else None
    if kind not in WIDE:
        return narrow(numbers, alphabet(weight.spec.dtype), lines)
    return wide_tally(numbers, kind, lines)
