"""The folder beside a target in which it is written: what it is for, who works in it, and what stays in it.

Decides when what a broken job has left may be gone on from: where the job is the same to the letter, its source
included. Knows nothing of containers, and only names and sizes of what it keeps for them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from steelyard import formats
from steelyard.core.packed import Packed
from steelyard.core.recipe import to_data
from steelyard.core.transform import Transform
from steelyard.core.weights import Weight, Weights
from steelyard.core.where import Where
from steelyard.errors import CodecError, DamageError, FormatError, VerdictError, printable, quoted
from steelyard.formats.base import Writable, locked, writing
from steelyard.formats.safetensors import Safetensors

if TYPE_CHECKING:
    import numpy as np

JOB, LOCK, MOVING = "job.json", "lock", "moving.json"
OWN = (JOB, f"{JOB}.new", LOCK, MOVING)
ENCODED = "encoded-"  # tensors that were encoded, each in a file of its own whose name begins so
WORTH = 1 << 16  # bytes of an encoded tensor that is kept


def describe(
    source: Iterable[Path], before: Weights, made: Weights, step: Transform, where: Where | None, format: Writable
) -> str:
    """All that decides which bytes are written: equal texts, equal bytes. Raises RecipeError for what is no Step.

    The files of the source count as the same while their sizes, times and inodes are.
    """
    from steelyard import __version__

    stamps = {}
    for path in sorted(source):
        status = os.stat(path)
        stamps[str(path.absolute())] = [status.st_size, status.st_mtime_ns, status.st_dev, status.st_ino]
    settings = {field.name: to_data(getattr(format, field.name)) for field in fields(format)}  # type: ignore[arg-type]
    tensors = hashlib.sha256()
    for weights in (before, made):
        for item in weights.values():
            tensors.update(json.dumps([item.name, str(item.spec)]).encode())
        tensors.update(json.dumps([dict(weights.ties), dict(weights.meta)]).encode())
    data = {
        "steelyard": __version__,
        "source": stamps,
        "step": to_data(step),
        "where": None if where is None else to_data(where),
        "format": [format.name, settings],
        "tensors": tensors.hexdigest(),
    }
    return json.dumps(data, indent=1)


@dataclass(frozen=True)
class Workplace:
    """The folder, while this process works in it."""

    folder: Path
    target: Path

    @property
    def draft(self) -> Path:
        """Where the target is written."""
        return self.folder / self.target.name

    @property
    def kept(self) -> int:
        """The bytes of what is there of the target."""
        return sum(path.stat().st_size for path in self.folder.iterdir() if not _own(path.name))

    @property
    def encoded(self) -> list[Path]:
        """The files of tensors that were encoded."""
        return [path for path in self.folder.iterdir() if path.name.startswith(ENCODED)]

    def keeping(self, weights: Weights) -> Weights:
        """The same weights; what a step has encoded of them is kept here, and the next attempt reads it from here."""

        def kept(number: int, item: Weight) -> Weight:
            if item.scheme is None or item.stored is not None:  # plain, or encoded in the source already
                return item
            return replace(item, read=partial(_through, item, self.folder / f"{ENCODED}{number}.safetensors"))

        return weights.with_items(kept(number, item) for number, item in enumerate(weights.values()))

    def forget(self) -> None:
        """Remove what `keeping` has kept."""
        for path in self.encoded:
            path.unlink()

    def named_as(self, error: FormatError, target: Path) -> FormatError:
        """The error, of the file that is to come about where it is of one here; `target` as the user names it."""
        path = error.path
        if not isinstance(path, Path) or path.parent != self.folder:
            return error
        return FormatError(error.message, path=target.with_name(path.name), offset=error.offset)

    def announce(self) -> None:
        """Before the files of the target are moved to their place: write down which ones they are."""
        data = {path.name: _inode(path) for path in self.folder.iterdir() if not _own(path.name)}
        _write(self.folder / MOVING, json.dumps(data))

    def move_back(self) -> None:
        """Fetch the files back that were moved when the process ended, so that all can be moved anew."""
        try:
            data: dict[str, Any] = json.loads((self.folder / MOVING).read_text())
        except (FileNotFoundError, ValueError):
            return
        places = {tuple(_inode(path)): path for path in self.target.parent.iterdir() if path.is_file()}
        for name, inode in data.items():
            found = places.get(tuple(inode))
            if found is not None and not (self.folder / name).exists():
                found.replace(self.folder / name)


def was_moved(target: Path) -> bool:
    """Whether a job ended after it had begun to move its files to their place, so that `finished` may hold."""
    return (_folder(target) / MOVING).exists()


def finished(target: Path, job: str) -> bool:
    """Whether the job ended just before it would have said so: all is moved, and what is left goes now."""
    folder = _folder(target)
    try:
        there = {path.name for path in folder.iterdir()}
        done = {JOB, MOVING} <= there and all(map(_own, there)) and (folder / JOB).read_text() == job
    except OSError:  # mostly: there is no such folder
        return False
    if done:
        shutil.rmtree(folder, ignore_errors=True)
    return done


def _folder(target: Path) -> Path:
    return target.parent / f".{target.name}.steelyard-part"


@contextmanager
def workplace(target: Path, job: str | None) -> Iterator[Workplace]:
    """A folder beside `target` to write it in; it is gone after the block, unless the job can be gone on with.

    With a `job`, what an earlier one of the same description has left is in it. A tensor that no codec can hold or
    decode, and a verdict, end a job for good: going on would end the same way. Raises FormatError where the
    folder cannot be made, is of something else, or another process works in it.
    """
    if not target.parent.is_dir():
        raise FormatError(f"the folder {quoted(str(target.parent))} is not there; create it first", path=target)
    place = Workplace(_folder(target), target)
    if place.folder.is_symlink():
        raise FormatError("is in the way, and a link; remove it", path=place.folder)
    with writing(target):
        place.folder.mkdir(exist_ok=True)
        lock = open(place.folder / LOCK, "wb")  # noqa: SIM115 - it is closed below
    with lock:
        _claim(lock, place)
        with writing(target):
            _prepare(place, job)
        try:
            yield place
        except BaseException as error:
            incurable = isinstance(error, (CodecError, VerdictError))  # the same command would fail the same way
            if job is None or incurable or not (place.kept or place.encoded):
                shutil.rmtree(place.folder, ignore_errors=True)
                if isinstance(error, DamageError):
                    error.add_note("nothing was written; where a source is damaged, fetch a whole copy of it")
            else:
                folder = printable(str(place.folder))
                error.add_note(f"what is done is kept: run the same command again to go on, or remove {folder}")
            raise
        shutil.rmtree(place.folder, ignore_errors=True)


def _prepare(place: Workplace, job: str | None) -> None:
    """Keep what is of the same job, remove what is of another one; raises FormatError for what is of none."""
    there = {path.name for path in place.folder.iterdir()}
    found = (place.folder / JOB).read_text() if JOB in there else None
    if found is None and not all(map(_own, there)):
        raise FormatError("is in the way, and not of an unfinished job; remove it", path=place.folder)
    if job is not None and found == job:
        place.move_back()
        return
    for name in there - {LOCK}:
        (place.folder / name).unlink()
    _write(place.folder / JOB, job or "")  # an empty one is gone on from by none, and still says whose the folder is


def _own(name: str) -> bool:
    """Whether a file of the folder is none that the target consists of."""
    return name in OWN or name.startswith(ENCODED)


def _through(item: Weight, path: Path) -> np.ndarray | Packed:
    """The value of `item`, from the file if it is there; else it is put there, if that is worth it."""
    if path.exists():
        return formats.open(path)[item.name].read()
    value = item.read()
    if isinstance(value, Packed) and value.nbytes >= WORTH:
        Safetensors().write(Weights.of({item.name: value}), path)  # whole and on the disk before it has its name
    return value


def _claim(lock: IO[bytes], place: Workplace) -> None:
    """Raise FormatError if another process works in the folder; the lock goes when a process ends, however it does."""
    if locked(lock.fileno()) is False:  # without locks, two jobs at a time with one target are the user's to avoid
        raise FormatError("another process is writing it; wait for that one to end", path=place.target)


def _inode(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_dev, status.st_ino]


def _write(path: Path, text: str) -> None:
    fresh = path.with_name(f"{path.name}.new")
    with open(fresh, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)
