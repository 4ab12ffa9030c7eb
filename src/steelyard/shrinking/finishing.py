"""The finished file of a candidate: re-read by another process, measured once more, and only then under its name.

Decides which file gets the name.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from steelyard import formats
from steelyard.core.weights import Weights
from steelyard.errors import VerdictError
from steelyard.formats.base import staging, writing
from steelyard.shrinking import account
from steelyard.shrinking.reread import reread
from steelyard.shrinking.search import Candidate, Search


def finished(search: Search, found: Candidate, target: Path | None) -> tuple[Weights, tuple[int, int]]:
    """The weights as another process read them from the finished file, and the bytes before and after.

    The file gets its name last. Raises VerdictError if it does not hold what it was meant to.
    """
    made = account.as_written(search, found)
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder) / ("small.safetensors" if target is None else target.name)
        before = formats.write(search.original, Path(folder) / "original.safetensors")
        after = formats.write(made, draft)
        if after >= before:
            raise VerdictError(f"the smallest candidate that was proven takes {after:,} bytes, the weights as they are "
                               f"{before:,}: there is nothing to gain, and nothing is written")  # fmt: skip
        if target is None:
            return _checked(search, found, draft, made), (before, after)
        with staging(target, target) as (file, unproven):
            file.write(draft.read_bytes())
            os.fsync(file.fileno())
            kept = _checked(search, found, unproven, made)
            with writing(target):
                unproven.replace(target)
    return kept, (before, after)


def _checked(search: Search, found: Candidate, file: Path, made: Weights) -> Weights:
    """What another process reads, if it does on the proof examples what the candidate did; else VerdictError."""
    with search.work.on("files", "re-reading the file"):
        read = reread(file, made)
    worse = search.worse(read, "test")
    if found.test is None or worse.tolist() != found.test.tolist():
        raise VerdictError(
            f"the finished file loses {worse.mean():.4g} of {search.task.headline} on the proof examples, and not what "
            "its weights lost before they were written: nothing is kept"
        )
    return read
