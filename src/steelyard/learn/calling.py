"""The boundary to the user's own code: what fails there is the user's to mend, and is told in one line.

Decides which errors pass through as they are, and which line of a traceback is the user's.
Knows nothing of models or tasks.
"""

from __future__ import annotations

import os
import sysconfig
import traceback
from collections.abc import Callable
from types import TracebackType

from steelyard.errors import ModelError, SteelyardError, printable

_OURS = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_INSTALLED = tuple({sysconfig.get_path(kind) + os.sep for kind in ("stdlib", "platstdlib", "purelib", "platlib")})


class calling:  # noqa: N801 - read as a statement: with calling("the loss"): ...
    """Within the block an exception becomes a ModelError that names what was called, and the user's file and line.

    What Steelyard raises on purpose, a lack of memory, a closed pipe and Ctrl-C pass through.

    >>> with calling("the model"):
    ...     {}["x"]
    Traceback (most recent call last):
    steelyard.errors.ModelError: the model fails: KeyError: 'x'
    """

    def __init__(self, what: str, why: Callable[[], str] | None = None):
        """why: asked for the likely cause of a failure; '' if it knows none."""
        self.what, self.why = what, why

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not isinstance(error, Exception) or isinstance(error, (SteelyardError, MemoryError, BrokenPipeError)):
            return
        lines = [line for line in str(error).splitlines() if line.strip()]
        said = type(error).__name__ + (f": {printable(lines[0].strip())}" if lines else "")
        if self.why is not None and (cause := self.why()):
            said = f"{said.rstrip('.')}; {cause}"
        raise ModelError(f"{self.what} fails{_users_line(trace)}: {said}") from error


def _users_line(trace: TracebackType | None) -> str:
    """', file:line' of the innermost frame that belongs neither to us nor to an installed package; '' for none."""
    for frame in reversed(traceback.extract_tb(trace)):
        path = os.path.abspath(frame.filename)
        if not frame.filename.startswith("<") and not path.startswith((_OURS + os.sep, *_INSTALLED)):
            return f", {printable(frame.filename)}:{frame.lineno}"
    return ""
