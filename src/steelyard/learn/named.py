"""Penalties as words: ``l1=1e-4@conv*``. Decides their names, and how they are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from steelyard.core.where import Where, where
from steelyard.errors import RecipeError, UnknownNameError, quoted
from steelyard.learn.decay import Decay
from steelyard.learn.options import to_number
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
    number = to_number(strength)
    if number is None or (at and not glob):
        raise RecipeError(
            f"the penalty {quoted(text)}: expected NAME=STRENGTH or NAME=STRENGTH@GLOB, such as l1=1e-4@conv*"
        )
    return PENALTIES[name](number, where(glob) if at else None)
