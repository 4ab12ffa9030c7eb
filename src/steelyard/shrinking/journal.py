"""What a long search has found so far, kept as it goes: whoever comes again for the same thing gets it at once.

Decides that an answer counts once its line is on the disk, and that answers of another search, or less than all of
them, are refused. Knows nothing of what is asked. In the folder: ``journal.jsonl``, a safetensors file for each answer
that is weights, a folder for an answer that is being worked at, and ``journal.end``, which says where the journal
ended: without its last lines it would else be as good, and a look at proof examples that one of them told of forgotten.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

from steelyard import formats
from steelyard.core.weights import Weights
from steelyard.errors import ModelError, quoted
from steelyard.formats.base import COPY, locked, replacing

_FILE, _END, _LOCK = "journal.jsonl", "journal.end", "lock"


def _unasked() -> Weights:
    raise ModelError("the journal lacks an answer that it says it has: remove its folder")


class Journal:
    """Answers by their question; ``of(question, compute)`` computes only what is not known.

    folder: where they are kept (None: in memory, for this process alone). identity: what the answers depend on.
    Raises ModelError for a folder with another one, and where a line or a file that it had is damaged or gone; it is
    left as it is. A line that was being written when its process was killed is none.

    >>> journal = Journal(None, {})
    >>> journal.of("answer", lambda: 42), journal.of("answer", lambda: 0)
    (42, 42)
    """

    def __init__(self, folder: str | Path | None, identity: dict[str, Any]):
        if folder is not None and not (isinstance(folder, (str, os.PathLike)) and str(folder)):
            raise ModelError(f"checkpoint: expected the path of a folder, found {folder!r}")
        self._known: dict[str, Any] = {}
        self._folder = None if folder is None else Path(folder)
        self.found = 0  # answers that were known when asked for
        self._bytes = self._lines = self._crc = 0  # of the journal on the disk; each sum goes on from the last
        self._seen: set[str] = set()  # files that are as they were written
        if self._folder is None:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            others = [path.name for path in self._folder.iterdir() if path.name != _LOCK]
            if others and not kept(self._folder):
                raise ModelError(
                    f"{self._folder} holds files that are no search's, such as {quoted(min(others))}: choose a folder "
                    "that is empty, or not there yet"
                )
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

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other searches out of the folder meanwhile. Raises ModelError where one is at work there."""
        if self._folder is None:
            yield
            return
        with (self._folder / _LOCK).open("ab") as lock:
            if locked(lock.fileno()) is False:  # without locks, two at a time in one folder are the user's to avoid
                raise ModelError(
                    f"{self._folder}: another search is at work in this folder: wait for that one to end, or choose "
                    "another folder"
                )
            yield

    def known(self, beginning: str) -> dict[str, Any]:
        """The answers to all questions that begin so, in the order in which they were asked; by others, too."""
        self._refresh()
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
        kept = self.of(question, lambda: self._written(question, compute()))
        file = self._folder / kept["file"]
        if kept["file"] not in self._seen:
            if not file.exists():
                raise self._refused(f"{file} is gone")
            if _sum(file) != kept["crc"]:
                raise self._refused(f"{file} is damaged: its checksum is not that in {_FILE}")
            self._seen.add(kept["file"])
        return formats.open(file)

    def _written(self, question: str, weights: Weights) -> dict[str, str]:
        name = f"{_plain(question)}.safetensors"
        assert self._folder is not None
        formats.write(weights, self._folder / name)
        self._seen.add(name)
        return {"file": name, "crc": _sum(self._folder / name)}

    def _begin(self, file: Path, identity: dict[str, Any]) -> None:
        lines = self._read(file)
        if lines and lines[0] != identity:
            other = [name for name in identity if lines[0].get(name) != identity[name]]
            raise ModelError(f"{file.parent} holds another search, which differs in its {', '.join(other)}: choose "
                             "another folder, or remove that one")  # fmt: skip
        self._known = _answers(lines)
        with file.open("ab"):  # whether that can be written is said at once
            pass
        if not lines:
            self._add(identity)

    def _refresh(self) -> None:
        """Take in what another has written since, as who chooses from what a search has found so far."""
        if self._folder is None or _size(self._folder / _FILE) == self._bytes:
            return
        lines = self._read(self._folder / _FILE)
        if not lines:
            raise self._refused(f"{self._folder / _FILE} is gone")
        self._known |= _answers(lines)

    def _read(self, file: Path) -> list[dict[str, Any]]:
        """The lines of the journal, none of them damaged and none missing."""
        whole = file.read_bytes() if file.exists() else b""
        whole = whole[: whole.rfind(b"\n") + 1]  # a line that was broken off is asked for again
        self._crc = 0
        try:
            ended = _ended(file.with_name(_END))
        except (ValueError, KeyError, TypeError) as error:
            raise self._refused(f"{file.with_name(_END)} is damaged") from error
        lines: list[dict[str, Any]] = []
        for line in whole.splitlines(keepends=True):
            try:
                found = json.loads(line)
                told = found.pop("crc")
            except (ValueError, AttributeError, TypeError, KeyError):
                told, found = None, {}
            self._crc = zlib.crc32(_text(found), self._crc)
            if told != f"{self._crc:08x}":
                raise self._refused(f"{file}, line {len(lines) + 1} is damaged, or one before it is gone: its checksum "
                                    "does not hold")  # fmt: skip
            lines.append(found)
            if len(lines) == ended[0] and told != ended[1]:
                raise self._refused(f"{file}, line {len(lines)} is not the one that was written last")
        # A first line may be alone: its process was killed before it wrote the first end. No second line comes before.
        if len(lines) > 1 and not ended[0]:
            raise self._refused(f"{file.with_name(_END)} is gone")
        if len(lines) < ended[0]:
            raise self._refused(f"{file} has {len(lines)} of the {ended[0]} lines that were written")
        self._bytes, self._lines = len(whole), len(lines)
        return lines

    def _refused(self, why: str) -> ModelError:
        return ModelError(
            f"{why}; put back a whole copy of the folder {self._folder}, or remove it: what it has is found anew then, "
            "and how often it has asked proof examples is for you to remember"
        )

    def _add(self, line: dict[str, Any]) -> None:
        if self._folder is None:
            return
        self._refresh()
        crc = zlib.crc32(_text(line), self._crc)
        with (self._folder / _FILE).open("r+b") as out:
            out.truncate(self._bytes)  # what another left of a line that it was killed at
            out.seek(self._bytes)
            out.write(_text({"crc": f"{crc:08x}", **line}) + b"\n")
            out.flush()
            os.fsync(out.fileno())
            self._bytes, self._lines, self._crc = out.tell(), self._lines + 1, crc
        with replacing(self._folder / _END) as end:
            end.write(_text({"lines": self._lines, "crc": f"{crc:08x}"}))


def _answers(lines: list[dict[str, Any]]) -> dict[str, Any]:
    return {line["question"]: line["answer"] for line in lines[1:]}


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def _text(line: dict[str, Any]) -> bytes:
    return json.dumps(line, separators=(",", ":")).encode()


def _sum(file: Path) -> str:
    """The CRC-32 of the bytes of a file."""
    crc = 0
    with file.open("rb") as whole:
        while part := whole.read(COPY):
            crc = zlib.crc32(part, crc)
    return f"{crc:08x}"


def _ended(file: Path) -> tuple[int, str]:
    """How many lines the journal had when one was last written, and the checksum of that one."""
    try:
        end = json.loads(file.read_bytes())
        return int(end["lines"]), str(end["crc"])
    except FileNotFoundError:
        return 0, ""


def kept(folder: str | Path) -> bool:
    """Whether a journal is there."""
    return (Path(folder) / _FILE).exists() or (Path(folder) / _END).exists()


def fingerprint(weights: Weights) -> str:
    """A hash of names, shapes, dtypes and values."""
    found = sha256()
    for name, weight in weights.items():
        found.update(f"{name} {weight.spec}".encode() + weight.array().tobytes())
    return found.hexdigest()[:32]


def _plain(question: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in question)
