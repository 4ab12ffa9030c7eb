"""Several files that an index names, written and replaced as one.

Decides that at every moment the index names a whole set, the old one or the new one, and that no file which is
not of the old set is ever written over. Knows nothing of what the files hold.

A new set whose names are free is moved into place, and then its index. Where the old set has the same names,
the index first names the new files under names of their own; then each also gets its final name, the index
names those, and the names of their own go. Whatever stops this between two steps, the index is right.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from steelyard.errors import FormatError, quoted
from steelyard.formats.base import Sink, replacing, staging, writing


def write_set(
    index: Path,
    called: Callable[[str], Sequence[str]],
    put: Callable[[int, Path, Path], int],
    text: Callable[[Sequence[str]], bytes],
    named: Callable[[], Collection[str]],
) -> int:
    """Write the files ``called("")`` beside `index`, then the index; the bytes of all of them.

    ``called(mark)`` are names that contain `mark`, all equal but for it; ``put(i, place, path)`` puts the i-th file
    to `place`, with errors that call it `path`, and returns its bytes; ``text(names)`` is the index of files so
    named; ``named()`` are the files of this set that the index on the disk names at the moment, none where there
    is no index. Raises FormatError where a file cannot be written, or is there and is not of the old set.
    """
    folder, old, names = index.parent, set(named()), called("")
    taken = [name for name in names if os.path.lexists(folder / name)]
    for name in taken:
        if name not in old:
            found = f"is there already, and {quoted(index.name)} does not name it; choose another folder, or remove it"
            raise FormatError(found, path=folder / name)
    own = called(f"-{secrets.token_hex(4)}")
    first = own if taken else names
    with _removing(folder, first, named):
        size = 0
        for i, (name, final) in enumerate(zip(first, names, strict=True)):
            size += put(i, folder / name, folder / final)
        size += _write_index(index, text(first))
        if taken and _link(folder, own, names):
            size += len(text(names)) - len(text(first))
            _write_index(index, text(names))
    for name in {*own, *old}.difference(named()):
        (folder / name).unlink(missing_ok=True)
    return size


def resume_set(
    index: Path, names: Sequence[str], put: Callable[[int, Path], int], text: Callable[[Sequence[str]], bytes]
) -> int:
    """Write the files `names` beside `index`, in a folder of its own, then the index; the bytes of all of them.

    ``put(i, path)`` puts the i-th file to `path`, or finds that an attempt before has done so, and returns its bytes.
    """
    size = sum(put(i, index.parent / name) for i, name in enumerate(names))
    return size + _write_index(index, text(names))


def stream(place: Path, path: Path, fill: Callable[[Sink], object]) -> int:
    """A new file at `place` that ``fill(sink)`` writes, whole or not there; its bytes. Errors call it `path`."""
    with staging(path, path) as (sink, temporary):
        fill(sink)
        with writing(path):
            os.fsync(sink.fileno())
            temporary.replace(place)
            return os.fstat(sink.fileno()).st_size


def _write_index(index: Path, data: bytes) -> int:
    with replacing(index) as sink:
        return sink.write(data)


def _link(folder: Path, own: Sequence[str], names: Sequence[str]) -> bool:
    """Give every file its final name as well; False where the file system gives no second name to a file."""
    for source, name in zip(own, names, strict=True):
        second = folder / f"{source}.tmp"
        try:
            os.link(folder / source, second)
        except OSError:
            return False
        try:
            second.replace(folder / name)
        finally:
            second.unlink(missing_ok=True)
    return True


@contextmanager
def _removing(folder: Path, names: Sequence[str], named: Callable[[], Collection[str]]) -> Iterator[None]:
    """Whatever goes wrong in the block, of the files `names` only those stay that the index names."""
    try:
        yield
    except BaseException:
        kept = named()
        for name in names:
            if name not in kept:
                (folder / name).unlink(missing_ok=True)
        raise
