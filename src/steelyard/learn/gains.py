"""The gain of each layer by the activation that was found to follow it.

Decides what a gain is where nothing of the kind follows: 1, for linear layers, gates and attention.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from steelyard.errors import ModelError
from steelyard.init import Init
from steelyard.learn.flow import Flow, Place, flow
from steelyard.learn.gain import gain


def asks_for_gain(init: Init) -> bool:
    """Whether the scheme wants the gain of what follows each layer."""
    return getattr(init, "gain", None) == "auto"


def with_gain(init: Init, place: Place | None) -> Init:
    """The scheme with the gain of what follows a layer there; of one that is not executed, 1.

    Raises ModelError for an activation that no gain makes up for.
    """
    if not asks_for_gain(init):
        return init
    found = 1.0
    if place is not None and place.activation is not None:
        try:
            found = gain(place.activation)
        except ModelError as error:
            raise ModelError(
                f"{place.name}, after the layer {place.layer!r}: {error}; give a number as gain"
            ) from error
    asking: Any = init
    given: Init = replace(asking, gain=found)
    return given


def known_flow(model: nn.Module, batch: Any, wanted: str) -> Flow:
    """The flow of a model; raises ModelError where it cannot be known without a batch, naming what `wanted` it."""
    found = flow(model, batch)
    if found.unknown:
        raise ModelError(f"{wanted} needs to know what follows each layer, and {found.unknown}; give a batch of inputs")
    return found
