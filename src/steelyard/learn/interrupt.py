"""Ctrl-C, held back until it does no harm. Knows nothing of what is interrupted."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class Interrupt:
    """Ctrl-C takes effect at `check`; a second one acts at once. Only the main thread gets signals."""

    def __init__(self) -> None:
        self._previous: Any = None
        self.asked = False

    def hold(self) -> None:
        """Hold it back from now on."""
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._note)

    def release(self) -> None:
        """As it was before `hold`."""
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None

    def check(self) -> None:
        """Raise KeyboardInterrupt if it was asked for."""
        if self.asked:
            self.asked = False
            raise KeyboardInterrupt

    def _note(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 - the signature of a signal handler
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
