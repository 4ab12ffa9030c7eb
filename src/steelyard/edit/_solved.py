"""The step at which weights take as many bits as wanted. Knows nothing of what bits are of."""

from __future__ import annotations

import math
from collections.abc import Callable


def solved(bits: Callable[[float], float], wanted: float, factor: float, least: float) -> float:
    """The factor of all steps at which `bits` are as `wanted`, to half a per cent; `least` where they are fewer there.

    Where steps are fine, twice the factor takes one bit less from each weight; where they are coarse it takes fewer.
    """
    found, slope = bits(factor), -1.0
    for _ in range(40):
        if abs(found - wanted) <= wanted / 200 or (found < wanted and factor <= least):
            break
        change = min(max((wanted - found) / slope, -4.0), 4.0)
        change = max(change, math.log2(least / factor)) if least else change
        factor = max(factor * 2.0**change, least)
        before, found = found, bits(factor)
        slope = min((found - before) / change, -0.05)
    return factor
