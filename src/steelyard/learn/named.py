"""Penalties and averages as words: ``l1=1e-4@conv*``, ``ema=0.99``. Decides their names, and how they are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from steelyard.core.where import Where, where
from steelyard.errors import RecipeError, UnknownNameError, quoted
from steelyard.learn.average import Ema, Swa
from steelyard.learn.decay import Decay
from steelyard.learn.penalties import L1, L2, L2SP, ElasticNet, GroupL1, Penalty, Spectral

PENALTIES: Mapping[str, Callable[[float, Where | None], Penalty | Decay]] = {
    "l1": lambda strength, chosen: L1(strength, where=chosen),
    "l2": lambda strength, chosen: L2(strength, where=chosen),
    "elastic-net": lambda strength, chosen: ElasticNet(strength, where=chosen),
    "group-l1": lambda strength, chosen: GroupL1(strength, "outputs", where=chosen),
    "group-l1-inputs": lambda strength, chosen: GroupL1(strength, "inputs", where=chosen),
    "group-l1-heads": lambda strength, chosen: GroupL1(strength, "heads", where=chosen),
    "l2-sp": lambda strength, chosen: L2SP(strength, where=chosen),
    "spectral": lambda strength, chosen: Spectral(strength, where=chosen),
    "decay": lambda strength, chosen: Decay(strength, where=chosen),
}
AVERAGES: Mapping[str, Callable[[float], Ema | Swa]] = {"ema": Ema, "swa": Swa}


def penalty(text: str) -> Penalty | Decay:
    """The penalty that ``NAME=STRENGTH`` says, on what decays, or ``NAME=STRENGTH@GLOB``, on tensors of such names.

    In GLOB a comma parts several patterns, and ``!`` before one excludes. Raises UnknownNameError for a name that is
    not in PENALTIES, RecipeError for what cannot be read.

    >>> penalty("l1=1e-4").strength
    0.0001
    >>> penalty("l1=small")
    Traceback (most recent call last):
    steelyard.errors.RecipeError: the penalty 'l1=small': expected NAME=STRENGTH or NAME=STRENGTH@GLOB, such as ...
    """
    name, _, rest = text.partition("=")
    strength, at, glob = rest.partition("@")
    if name not in PENALTIES:
        raise UnknownNameError("penalty", name, PENALTIES)
    number = _number(strength)
    if number is None or (at and not glob):
        raise RecipeError(
            f"the penalty {quoted(text)}: expected NAME=STRENGTH or NAME=STRENGTH@GLOB, such as l1=1e-4@conv*"
        )
    return PENALTIES[name](number, where(glob) if at else None)


def average(text: str) -> Ema | Swa:
    """The average that ``ema``, ``ema=DECAY``, ``swa`` or ``swa=START`` says.

    >>> average("ema=0.99"), average("swa")
    (Ema(decay=0.99), Swa(start=0.75))
    """
    name, given, value = text.partition("=")
    if name not in AVERAGES:
        raise UnknownNameError("average", name, AVERAGES)
    if not given:
        return {"ema": Ema, "swa": Swa}[name]()
    number = _number(value)
    if number is None:
        raise RecipeError(f"the average {quoted(text)}: expected {name} or {name}=NUMBER, such as {name}=0.9")
    return AVERAGES[name](number)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
