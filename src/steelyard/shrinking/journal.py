"""What a long search has found so far, kept as it goes: whoever comes again for the same thing gets it at once.

Decides that an answer counts once its line is on the disk, and that answers of another search are refused. Knows
nothing of what is asked. In the folder: ``journal.jsonl``, a safetensors file for each answer that is weights, and a
folder for an answer that is being worked at.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

from steelyard import formats
from steelyard.core.weights import Weights
from steelyard.errors import ModelError

_FILE = "journal.jsonl"


def _unasked() -> Weights:
    raise ModelError("the journal lacks an answer that it says it has: remove its folder")


class Journal:
    """Answers by their question; ``of(question, compute)`` computes only what is not known.

    folder: where they are kept (None: in memory, for this process alone). identity: what the answers depend on;
    a folder with another one is refused with ModelError and left as it is.

    >>> journal = Journal(None, {})
    >>> journal.of("answer", lambda: 42), journal.of("answer", lambda: 0)
    (42, 42)
    """

    def __init__(self, folder: str | Path | None, identity: dict[str, Any]):
        self._known: dict[str, Any] = {}
        self._folder = None if folder is None else Path(folder)
        self.found = 0  # answers that were known when asked for
        if self._folder is None:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._begin(self._folder / _FILE, json.loads(json.dumps(identity)))
        except OSError as error:
            why = (error.strerror or str(error)).lower()
            raise ModelError(f"{self._folder}: cannot keep the search there: {why}; choose another folder") from error

    def of(self, question: str, compute: Callable[[], Any]) -> Any:
        """The answer: anything that JSON can say."""
        if question in self._known:
            self.found += 1
        else:
            self._known[question] = compute()
            self._add({"question": question, "answer": self._known[question]})
        place = self.under_way(question)
        if place is not None and place.exists():
            shutil.rmtree(place)
        return self._known[question]

    def known(self, beginning: str) -> dict[str, Any]:
        """The answers to all questions that begin so, in the order in which they were asked."""
        return {question: answer for question, answer in self._known.items() if question.startswith(beginning)}

    def under_way(self, question: str) -> Path | None:
        """A folder for what an answer that takes long has so far; it goes when the question is answered."""
        return self.place(f"{question} under way")

    def place(self, name: str) -> Path | None:
        """Where a journal of its own belongs into this one; None where all is kept in memory."""
        return None if self._folder is None else self._folder / _plain(name)

    def weights(self, question: str, compute: Callable[[], Weights] = _unasked) -> Weights:
        """The answer where it is weights; without `compute` it has to be known."""
        if self._folder is None:
            return self.of(question, lambda: compute().settle())  # type: ignore[no-any-return]
        name = self.of(question, lambda: self._written(question, compute()))
        return formats.open(self._folder / name)

    def _written(self, question: str, weights: Weights) -> str:
        name = f"{_plain(question)}.safetensors"
        assert self._folder is not None
        formats.write(weights, self._folder / name)
        return name

    def _begin(self, file: Path, identity: dict[str, Any]) -> None:
        whole = file.read_bytes() if file.exists() else b""
        whole = whole[: whole.rfind(b"\n") + 1]  # a line that was broken off is asked for again
        lines = [json.loads(line) for line in whole.splitlines()]
        if lines and lines[0] != identity:
            other = [name for name in identity if lines[0].get(name) != identity[name]]
            raise ModelError(f"{file.parent} holds another search, which differs in its {', '.join(other)}: choose "
                             "another folder, or remove that one")  # fmt: skip
        self._known = {line["question"]: line["answer"] for line in lines[1:]}
        with file.open("r+b" if file.exists() else "xb") as out:
            out.truncate(len(whole))
        if not lines:
            self._add(identity)

    def _add(self, line: dict[str, Any]) -> None:
        if self._folder is None:
            return
        with (self._folder / _FILE).open("ab") as file:
            file.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def fingerprint(weights: Weights) -> str:
    """A hash of names, shapes, dtypes and values."""
    found = sha256()
    for name, weight in weights.items():
        found.update(f"{name} {weight.spec}".encode() + weight.array().tobytes())
    return found.hexdigest()[:32]


def _plain(question: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in question)
