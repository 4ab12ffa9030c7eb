"""Watching: what each step of an optimizer does to each tensor, in a Run or in anybody's loop.

``session`` holds the hooks and decides when things are read; ``norms`` (every step), ``looks`` and ``taps`` (some
steps) say how, ``suspects`` and ``origin`` ask the model, ``faults`` judges, ``log`` keeps it all.
"""

from __future__ import annotations

from steelyard.learn.watch.log import Log, watched
from steelyard.learn.watch.session import Watch, watch

__all__ = ["Log", "Watch", "watch", "watched"]
