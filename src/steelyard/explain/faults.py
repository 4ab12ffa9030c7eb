"""What can be wrong with one tensor, seen from its values: each fault with a threshold and the reason for it.

Decides what counts as a fault of a single tensor; knows no other tensor, no model and no gradient.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod, sqrt
from typing import Literal

import numpy as np

from steelyard.core.weights import Weight
from steelyard.explain.reading import BLOCK
from steelyard.explain.sums import Tally, exact_mean_and_spread, median

Severity = Literal["error", "warning", "note"]

# The gain that the usual initialisations give, std x sqrt(fan-in), is 0.58 (torch's linear layers) to 1.41 (He), and
# 0.3 to 3 in trained layers. An embedding of unit variance has sqrt(width), and is left out by its name.
GAIN = (1e-3, 50.0)
# A norm this many times the median one, and this many robust standard deviations away: the rows of a random matrix
# differ by a few per cent, those of trained language models by up to five times.
OUTLIER, OUTLIER_DEVIATIONS = 6.0, 12.0
FAR_OUT = 100.0  # such a row rules every sum that it enters: not a trained channel, but a fault
LEAST_LINES = 16  # rows or columns from which on a median says something
LEAST_WIDTH = 8  # of a row for its being constant to mean something
FEW_VALUES = 256  # distinct values that eight bits could index ...
MANY = 4096  # ... in a tensor of at least so many, where chance would give more
VARIED = 32  # distinct values from which on cleared trailing bits are no coincidence of small whole numbers
AT_LARGEST_8 = 0.01  # of values with 8 bits: scaling puts the largest one there, but not one in a hundred
LISTED = 5  # rows or columns that are named
EMBEDDING = re.compile(r"emb|wte|wpe|token|position|vocab", re.IGNORECASE)


@dataclass(frozen=True)
class Finding:
    """One thing found: where, what, how bad, how it shows, and what to do about it."""

    name: str
    finding: str
    severity: Severity
    evidence: str
    remedy: str


@dataclass(frozen=True)
class Looked:
    """A tensor after its values were looked at: what the tally says, and what rows and trailing bits say."""

    weight: Weight
    tally: Tally
    mean: float
    std: float
    lowest: float
    highest: float
    constant_rows: np.ndarray  # indices of rows whose patterns are all alike
    broken_rows: np.ndarray  # of rows with a value that is not finite
    first_broken: int | None  # flat index
    used_bits: int  # the patterns of a float32 tensor, or-ed


def look(weight: Weight, found: Tally) -> Looked:
    """Go over rows once more, and keep what a tally does not."""
    mean, std, lowest, highest = 0.0, 0.0, 0.0, 0.0
    if found.finite:
        mean, std, _, _ = exact_mean_and_spread(found.sums, found.finite)
        lowest, highest = found.ordered([0, found.finite - 1])
    broken = found.finite < found.size
    constant: list[np.ndarray] = []
    at_fault: list[np.ndarray] = []
    first_broken, used = None, 0
    width = _width(weight)
    for first, block in _lines_of(weight, width) if weight.spec.dtype.kind == "float" else ():
        patterns = block.view(f"u{block.dtype.itemsize}")
        if block.shape[1] == width:
            constant.append(first // width + np.flatnonzero(patterns.min(axis=1) == patterns.max(axis=1)))
        if block.dtype == np.float32:
            used |= int(np.bitwise_or.reduce(patterns, axis=None))
        if broken:
            places = first + np.flatnonzero(~np.isfinite(block))
            at_fault.append(np.unique(places // width))
            if first_broken is None and places.size:
                first_broken = int(places[0])
    none = np.empty(0, np.int64)
    return Looked(
        weight,
        found,
        mean,
        std,
        lowest,
        highest,
        np.concatenate(constant or [none]),
        np.unique(np.concatenate(at_fault or [none])),
        first_broken,
        used,
    )


def _width(weight: Weight) -> int:
    """The elements of a row; a tensor of fewer than two axes is one row."""
    shape = weight.spec.shape
    return max(prod(shape[1:]) if len(shape) > 1 else weight.spec.size, 1)


def _lines_of(weight: Weight, width: int) -> Iterator[tuple[int, np.ndarray]]:
    """Whole rows, as many as make a block, or pieces of one row that is longer; and the flat index of the first."""
    first = 0
    for block in weight.blocks(BLOCK // width * width or BLOCK):
        yield first, block.reshape(-1, min(width, block.size))
        first += block.size


def faults(looked: Looked) -> Iterator[Finding]:
    """Everything that is wrong with one tensor by itself."""
    if not looked.tally.size:
        return
    yield from _not_finite(looked)
    if looked.weight.spec.dtype.kind != "float" or not looked.tally.finite:
        return
    yield from _range(looked)
    yield from _precision(looked)
    if len(looked.weight.spec.shape) >= 2:
        if looked.tally.finite == looked.tally.size == looked.tally.zeros:
            severity: Severity = "note" if "lora_b" in looked.weight.name.lower() else "warning"
            text = "a layer of zeros passes nothing on; load it again, or start it anew"
            yield Finding(looked.weight.name, "all zero", severity, f"{looked.tally.size:,} zeros", text)
            return
        yield from _lines(looked)
        yield from _scale(looked)


def _not_finite(looked: Looked) -> Iterator[Finding]:
    name, found = looked.weight.name, looked.tally
    place = ""
    if looked.first_broken is not None:
        index = np.unravel_index(looked.first_broken, looked.weight.spec.shape)
        place = f", first at [{', '.join(map(str, index))}]"
        if len(index) > 1:
            place += f"; in {looked.broken_rows.size:,} rows: {_listed(looked.broken_rows)}"
    if found.nan:
        evidence = f"{found.nan:,} of {found.size:,} values{place}"
        yield Finding(name, "NaN", "error", evidence, "every output will be NaN; go back to an earlier checkpoint")
    if sum(found.infinite):
        evidence = f"{found.infinite[0]:,} × +Inf, {found.infinite[1]:,} × -Inf of {found.size:,} values{place}"
        yield Finding(name, "infinite", "error", evidence, "it overflowed; cast from a wider dtype, or saturate")


def _range(looked: Looked) -> Iterator[Finding]:
    import ml_dtypes

    name, found, dtype = looked.weight.name, looked.tally, looked.weight.spec.dtype
    if found.subnormal and found.subnormal == found.finite - found.zeros:
        evidence = f"{found.subnormal:,} subnormal values, {found.zeros:,} zeros, largest {looked.highest:.3g}"
        yield Finding(name, "all subnormal", "warning", evidence, "precision is lost; scale it, or hold it wider")
    largest = float(ml_dtypes.finfo(dtype.numpy).max)
    if largest not in (looked.highest, -looked.lowest):
        return
    above, below = _at(looked, largest), _at(looked, -largest)
    if dtype.bits > 8 or above + below > AT_LARGEST_8 * found.size:
        evidence = f"{above + below:,} of {found.size:,} values are ±{largest:.4g}"
        yield Finding(name, "saturated", "warning", evidence, "values were cut off; cast again from a wider dtype")


def _at(looked: Looked, value: float) -> int:
    """How many values equal one end of the range: by bisection over ranks."""
    found = looked.tally
    low, high = 0, found.finite
    if (looked.lowest if value < 0 else looked.highest) != value:
        return 0
    while low < high:
        middle = (low + high) // 2
        inside = found.ordered([middle])[0] == value
        if (value > 0) == inside:
            high = middle
        else:
            low = middle + 1
    return found.finite - low if value > 0 else low


def _precision(looked: Looked) -> Iterator[Finding]:
    name, found, dtype = looked.weight.name, looked.tally, looked.weight.spec.dtype
    few = found.distinct is not None and found.distinct <= FEW_VALUES
    if dtype.bits > 8 and few and found.distinct and found.distinct > 2 and found.size >= MANY:
        bits = (found.distinct - 1).bit_length()
        evidence = f"{found.distinct} distinct values among {found.size:,}; {bits} of {dtype.bits} bits would do"
        yield Finding(name, "looks quantised", "note", evidence, "hold it by a palette: steelyard share, or pack")
    if not looked.used_bits or (found.distinct is not None and found.distinct < VARIED):
        return
    if looked.used_bits & 0xFFFF == 0:
        yield _narrower(name, "bfloat16", 16, found.size)
    elif looked.used_bits & 0x1FFF == 0 and 2.0**-24 <= max(-looked.lowest, looked.highest) <= 65504:
        yield _narrower(name, "float16", 13, found.size)


def _narrower(name: str, was: str, bits: int, size: int) -> Finding:
    evidence = f"the last {bits} bits of all {size:,} float32 values are zero"
    return Finding(name, f"was {was}", "note", evidence, f"cast to {was} without loss and with half of the bytes")


def _lines(looked: Looked) -> Iterator[Finding]:
    name, found = looked.weight.name, looked.tally
    remedy = {
        "rows": "these outputs are constant; prune them, or start them anew",
        "columns": "these inputs are unused",
    }
    for kind, norms in (("rows", found.rows), ("columns", found.columns)):
        if norms is None or not norms.size:
            continue
        dead = np.flatnonzero(norms == 0)
        if kind == "rows":
            dead = np.setdiff1d(dead, looked.broken_rows)
        elif found.finite < found.size:
            dead = dead[:0]  # what is not finite has no norm
        if dead.size:
            padding = kind == "rows" and dead.size == 1 and EMBEDDING.search(name)
            severity: Severity = "note" if padding else "warning"
            text = f"{dead.size:,} of {norms.size:,}: {_listed(dead)}"
            yield Finding(name, f"dead {kind}", severity, text, "a padding row" if padding else remedy[kind])
        yield from _outliers(name, kind, norms)
    width = prod(looked.weight.spec.shape[1:])
    alike = looked.constant_rows
    if alike.size and width >= LEAST_WIDTH and found.rows is not None:
        alike = np.setdiff1d(alike[found.rows[alike] > 0], looked.broken_rows)
        if alike.size:
            text = f"{alike.size:,} of {found.rows.size:,}: {_listed(alike)}"
            yield Finding(name, "constant rows", "warning", text, "rows of one value were not trained; load them again")


def _outliers(name: str, kind: str, norms: np.ndarray) -> Iterator[Finding]:
    """Norms far above the median one; a dead line is no outlier."""
    norms = norms[np.isfinite(norms)]
    if norms.size < LEAST_LINES:
        return
    middle = median(norms)
    deviation = 1.4826 * median(np.abs(norms - middle))
    if not middle:
        return
    far = np.flatnonzero((norms > OUTLIER * middle) & (norms - middle > OUTLIER_DEVIATIONS * deviation))
    if far.size:
        worst = far[np.argmax(norms[far])]
        ratio = norms[worst] / middle
        evidence = (
            f"{far.size:,} of {norms.size:,}, the largest norm {norms[worst]:.4g} in {kind[:-1]} {worst}: "
            f"{ratio:.1f} times the median"
        )
        severity: Severity = "warning" if ratio > FAR_OUT else "note"
        yield Finding(name, f"outlier {kind}", severity, evidence, "quantise by row or column, or keep these wide")


def _scale(looked: Looked) -> Iterator[Finding]:
    name, shape = looked.weight.name, looked.weight.spec.shape
    fan_in = prod(shape[1:])
    gain = looked.std * sqrt(fan_in)
    if EMBEDDING.search(name) or looked.tally.zeros == looked.tally.finite or not gain or min(shape[0], fan_in) < 2:
        return
    if not GAIN[0] <= gain <= GAIN[1]:
        evidence = f"std {looked.std:.3g} with fan-in {fan_in:,}: {gain / sqrt(2):.3g} times that of He"
        word = "large" if gain > 1 else "small"
        yield Finding(name, f"scale too {word}", "warning", evidence, "check its scale factor and its dtype's range")


def _listed(indices: np.ndarray) -> str:
    rest = f" and {indices.size - LISTED:,} more" if indices.size > LISTED else ""
    return ", ".join(map(str, indices[:LISTED].tolist())) + rest
