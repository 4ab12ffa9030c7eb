"""Files of weights: one module = one container. ``open`` reads a header, ``write`` replaces a file as a whole.

Decides which container a file is. Importing this imports neither numpy nor torch.
"""

from __future__ import annotations

from pathlib import Path

from steelyard.core.registry import Registry, Row
from steelyard.core.weights import Weights
from steelyard.errors import FormatError
from steelyard.formats.base import HEAD, Format, Source

FORMATS: Registry[type[Format]] = Registry(
    "format",
    "formats",
    {
        "safetensors": Row(
            "steelyard.formats.safetensors:Safetensors", "the open standard for weights; holds everything"
        ),
        "npz": Row("steelyard.formats.npz:Npz", "the arrays of numpy in a zip archive"),
        "npy": Row("steelyard.formats.npz:Npy", "one array of numpy, named by its file"),
    },
)


def open(source: str | Path) -> Weights:
    """The weights in a file, lazily: only its header is read.

    The container is told by the content, and by the suffix where the content tells nothing. Raises
    FormatError naming the file for one that is missing, empty, damaged or of an unknown format.

    >>> open("nowhere.safetensors")
    Traceback (most recent call last):
    ...
    steelyard.errors.FormatError: nowhere.safetensors: there is no such file; check the path
    """
    path = Path(source)
    return FORMATS[detect(path)]().open(path)


def write(weights: Weights, path: str | Path, format: str | None = None) -> int:
    """Write `weights` to `path` as `format`, or as the suffix says; the bytes of the finished file.

    All or nothing: whatever goes wrong, a file that was there stays whole. Raises FormatError for an
    unknown suffix and for weights that the container cannot hold.
    """
    path = Path(path)
    return FORMATS[_by_suffix(path) if format is None else format]().write(weights, path)


def detect(path: str | Path) -> str:
    """The name of the format of a file: by its content, else by its suffix.

    Raises FormatError if there is no such file or nothing claims it.
    """
    path = Path(path)
    source = Source.of(path)
    head = source.bytes(0, min(HEAD, source.size))
    for name, format in FORMATS.items():
        if format().claims(head, path):
            return name
    try:
        return _by_suffix(path)
    except FormatError:
        text = f"unknown format: no container of weights begins with {head!r}; known are {', '.join(FORMATS)}"
        raise FormatError(text, path=path) from None


def _by_suffix(path: Path) -> str:
    suffixes = {suffix: name for name, format in FORMATS.items() for suffix in format.suffixes}
    found = suffixes.get(path.suffix.lower())
    if found is None:
        *others, last = suffixes
        endings = f"{', '.join(others)} or {last}"
        text = f"no format has the suffix {path.suffix!r}; write it under a name ending in {endings}"
        raise FormatError(text, path=path)
    return found


__all__ = ["FORMATS", "Format", "detect", "open", "write"]
