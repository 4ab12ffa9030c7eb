"""Files of weights: one module = one container. ``open`` reads a header, ``write`` replaces a file as a whole.

Decides which container a file is. Importing this imports neither numpy nor torch.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from fnmatch import fnmatchcase
from os import PathLike
from pathlib import Path

from steelyard.core.registry import Registry, Row
from steelyard.core.weights import Weights, given
from steelyard.errors import FormatError, quoted
from steelyard.formats.base import HEAD, Format, Writable
from steelyard.formats.source import Folder, LocalFile, LocalFolder, Source

FORMATS: Registry[type[Format]] = Registry(
    "format",
    "formats",
    {
        "sharded": Row("steelyard.formats.sharded:Sharded", "an index, and the files that it names"),
        "safetensors": Row(
            "steelyard.formats.safetensors:Safetensors", "the open standard for weights; holds everything"
        ),
        "gguf": Row(
            "steelyard.formats.gguf:Gguf", "the container of llama.cpp; block types are codecs, splits are read"
        ),
        "npz": Row("steelyard.formats.npz:Npz", "the arrays of numpy in a zip archive"),
        "npy": Row("steelyard.formats.npz:Npy", "one array of numpy, named by its file"),
        "dcp": Row("steelyard.formats.dcp:Dcp", "a folder of torch.distributed.checkpoint; read only"),
        "torch": Row("steelyard.formats.torchzip:Torch", "what torch.save writes; read without unpickling"),
        "peft": Row("steelyard.formats.peft:Peft", "an adapter of PEFT: its config, and the file beside it"),
        "hdf5": Row("steelyard.formats.hdf5:Hdf5", "datasets of HDF5 and Keras; they are read, not written", "formats"),
        "keras": Row(
            "steelyard.formats.keras:Keras", "the archive of a Keras model; it is read, not written", "formats"
        ),
        "onnx": Row("steelyard.formats.onnx:Onnx", "a graph of operators; its tensors are read, it is not written"),
    },
)
WRITTEN = (
    "safetensors",
    "sharded",
    "npz",
    "npy",
    "gguf",
)  # the rows that are Writable, so that a suffix is found without importing all


def open(source: str | Path) -> Weights:
    """The weights in a file or a folder, lazily: only the header is read.

    The container is told by the content, and by the suffix where the content tells nothing; a folder is
    opened by the file in it that speaks for the others, and described by its config.json. Raises FormatError
    naming the file for one that is missing, empty, damaged or of an unknown format.

    >>> open("nowhere.safetensors")
    Traceback (most recent call last):
    ...
    steelyard.errors.FormatError: nowhere.safetensors: there is no such file; check the path
    """
    place = _place(source)
    found = entry(place) if isinstance(place, Folder) else place
    weights = FORMATS[_detect(found)]().open(found)
    if not isinstance(place, Folder):
        return weights
    from steelyard.formats.config import described

    return described(weights, place)


def files(weights: Weights, source: str | Path) -> list[Path] | None:
    """All files that `weights`, opened from `source`, lie in; None where one does not lie on this machine."""
    paths = {str(locate(source).path)} | {item.origin.rpartition(" @")[0] for item in weights.values()}
    return [Path(path) for path in sorted(paths)] if all(map(os.path.isfile, paths)) else None


def nbytes(weights: Weights, source: str | Path) -> int | None:
    """The bytes of all files that `weights`, opened from `source`, lie in, headers included; None as in `files`."""
    if isinstance(source, str) and "://" in source:
        return None
    found = files(weights, source)
    return None if found is None else sum(os.stat(path).st_size for path in found)


def part(source: Source) -> Weights:
    """The weights in one of several files that another names; raises FormatError if it names others in turn."""
    name = _detect(source)
    if FORMATS[name].several:
        raise FormatError(f"expected a file that holds tensors, found one that names others ({name})", path=source.path)
    return FORMATS[name]().open(source)


def write(weights: Weights, path: str | Path, format: str | Writable | None = None) -> int:
    """Write `weights` to `path` as `format`, or as the suffix says; the bytes of what was written.

    `format` is a name, or a format with its options. All or nothing: whatever goes wrong, a file that was
    there stays whole. Raises FormatError for an unknown suffix, for a format that is only read and for
    weights that the container cannot hold; WeightsError for what is no Weights.
    """
    return writer(path, format).write(given(weights), Path(path))


def writer(path: str | Path, format: str | Writable | None = None) -> Writable:
    """The format that `write` takes for `path`: `format`, or what the suffix says; raises FormatError.

    >>> writer("a.npz").name
    'npz'
    """
    _check_path(path)
    if isinstance(format, Writable):
        return format
    if not isinstance(format, (str, type(None))):
        what = type(format).__name__
        raise FormatError(f"expected a format by name, such as 'npz', or with its options, got {what}", path=path)
    name = _by_suffix(Path(path).name, path, WRITTEN) if format is None else format
    found = FORMATS[name]
    if not issubclass(found, Writable):
        raise FormatError(f"{name} is read here and not written; write {_endings(WRITTEN)}", path=path)
    return found()


def move(draft: str | Path, target: str | Path) -> None:
    """Give what was written to `draft`, on the same disk, the name `target`, as a whole; raises FormatError."""
    format = FORMATS[detect(draft)]()
    if not isinstance(format, Writable):
        raise FormatError(f"{format.name} is read here and not written", path=draft)
    format.move(Path(draft), Path(target))


def locate(source: str | Path) -> Source:
    """The file that `source`, a path or an address, means: itself, or the file that speaks for the folder.

    Raises FormatError if there is no such file, or none in the folder is known.
    """
    place = _place(source)
    return entry(place) if isinstance(place, Folder) else place


def _place(source: str | Path) -> Source | Folder:
    """The file or the folder that a path or an address means."""
    if isinstance(source, str) and "://" in source:
        from steelyard.formats import remote

        return remote.locate(source)
    _check_path(source)
    path = Path(source)
    return LocalFolder(path) if os.path.isdir(path) else LocalFile.of(path)


def _check_path(path: object) -> None:
    if not isinstance(path, (str, PathLike)):
        raise FormatError(f"expected a path or an address, got {type(path).__name__}: name a file")


def entry(folder: Folder) -> Source:
    """The file by which a folder of weights is opened; raises FormatError where there is none, or no only one."""
    names = folder.names()
    globs = [glob for format in FORMATS.values() for glob in format.entries]
    for glob in sorted(globs, key=lambda glob: "*" in glob):  # the names in use come before what only looks like one
        found = [name for name in names if fnmatchcase(name, glob)]
        if len(found) > 1:
            listed = ", ".join([*map(quoted, found[:3]), *["..."][: len(found) - 3]])
            raise FormatError(f"{len(found)} files could be meant ({listed}); name one", path=folder.path)
        if found:
            return folder.source(found[0])
    raise FormatError("no file of weights that is known lies in this folder; name the file", path=folder.path)


def detect(path: str | Path) -> str:
    """The name of the format of a file: by its content, else by its suffix.

    Raises FormatError if there is no such file or nothing claims it.
    """
    return _detect(locate(path))


def _detect(source: Source) -> str:
    head = source.bytes(0, min(HEAD, source.size))
    for name, format in FORMATS.items():
        if format().claims(head, source):
            return name
    try:
        return _by_suffix(source.name, source.path, list(FORMATS))
    except FormatError:
        text = f"unknown format: no container of weights begins with {head!r}; known are {', '.join(FORMATS)}"
        raise FormatError(text, path=source.path) from None


def _by_suffix(file: str, path: Path | str, among: Sequence[str]) -> str:
    """The format whose suffix `file` has, the longest first; raises FormatError."""
    suffixes = {suffix: name for name in among for suffix in FORMATS[name].suffixes}
    for suffix in sorted(suffixes, key=len, reverse=True):
        if file.lower().endswith(suffix):
            return suffixes[suffix]
    text = f"no format has the suffix {Path(file).suffix!r}; write it under a name ending in {_endings(among)}"
    raise FormatError(text, path=path)


def _endings(names: Sequence[str]) -> str:
    *others, last = [suffix for name in names for suffix in FORMATS[name].suffixes]
    return f"{', '.join(others)} or {last}"


__all__ = ["FORMATS", "WRITTEN", "Format", "Writable", "detect", "locate", "move", "open", "write", "writer"]
