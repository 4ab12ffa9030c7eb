"""The checkpoint of a run: a folder that always holds one whole state, whenever the process is killed.

Decides which files lie there and in what order they are written. Knows nothing of what a state means.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from steelyard.errors import FormatError, ModelError, printable
from steelyard.formats.base import writing
from steelyard.learn.treefile import read_tree, write_tree

STATE, STEPS = "state.safetensors", "steps.jsonl"
_AGAIN = "put back a whole copy of the folder, or begin the run anew in another one"


class Checkpoint:
    """A folder with two files.

    ``state.safetensors`` is replaced as a whole. ``steps.jsonl``, a row for each step, only grows: the state says how
    many of its bytes belong to it, and what a killed process wrote after that is cut off when the run goes on.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._bytes = self._rows = 0  # of the steps that are on the disk

    def begin(self) -> None:
        """Make the folder for a run that begins; raises ModelError if another run's checkpoint is there."""
        if (self.folder / STATE).exists():
            raise ModelError(
                f"{printable(str(self.folder))} holds the checkpoint of a run: go on with it "
                "(resume=True, or --resume), or name another folder"
            )
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / STEPS).write_bytes(b"")

    def load(self) -> tuple[Mapping[str, Any], list[dict[str, Any]]] | None:
        """The state and the rows of its steps; None if there is none. Raises FormatError for a damaged one."""
        if not (self.folder / STATE).exists():
            return None
        state = read_tree(self.folder / STATE)
        steps = self.folder / STEPS
        kept = state["steps"]["bytes"]
        data = steps.read_bytes() if steps.exists() else b""
        if len(data) < kept:
            raise FormatError(
                f"expected {kept:,} bytes of steps, found {len(data):,}: a part is missing; {_AGAIN}", path=steps
            )
        if len(data) > kept:
            with writing(steps):
                os.truncate(steps, kept)
        try:
            rows = [json.loads(line) for line in data[:kept].splitlines()]
        except ValueError as error:
            raise FormatError(f"a row is damaged; {_AGAIN}", path=steps) from error
        self._bytes, self._rows = kept, len(rows)
        return state, rows

    def save(self, state: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
        """Write the steps that are new, then replace the state; a kill in between leaves the state before."""
        new = "".join(json.dumps(row, default=float) + "\n" for row in rows[self._rows :]).encode()
        steps = self.folder / STEPS
        with writing(steps), open(steps, "ab") as file:
            file.truncate(self._bytes)
            file.write(new)
            file.flush()
            os.fsync(file.fileno())
        self._bytes, self._rows = self._bytes + len(new), len(rows)
        write_tree({**state, "steps": {"bytes": self._bytes}}, self.folder / STATE)
