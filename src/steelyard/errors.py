"""Every error that a user can meet.

    SteelyardError                 status 2: wrong use or bad input
    ├── FormatError                a file is not what it claims to be
    ├── CodecError                 a tensor and its encoding do not fit each other
    │   └── DamageError            what a file holds of an encoded tensor cannot be decoded
    ├── WeightsError               a collection of weights is used wrongly
    ├── UnknownNameError           no such format, codec, model, verb, ...
    ├── MissingExtraError          the feature needs a package that is not installed
    ├── RecipeError                a recipe, an option or a configuration is wrong
    ├── ModelError                 a model or a task does not do what was asked of it
    └── VerdictError               status 1: all went well, and the answer is no
    TrainingWarning                a warning: training has started badly
    ProofWarning                   a warning: what is proven may be too good

A message is one line: what was expected, what was found, where, and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar


class SteelyardError(Exception):
    """The root of everything that Steelyard raises on purpose."""

    status: ClassVar[int] = 2  # the exit status of the command line


class TrainingWarning(UserWarning):
    """What an alarm says in the first steps of a training."""


class ProofWarning(UserWarning):
    """Proof examples were seen before: what is proven by them may be too good."""


class FormatError(SteelyardError):
    """A file is damaged, hostile, or of another format; says where it is wrong.

    >>> str(FormatError("header length is 9, the file has 4 bytes", path="a.safetensors", offset=0))
    'a.safetensors, byte 0: header length is 9, the file has 4 bytes'
    """

    def __init__(self, message: str, *, path: object = None, offset: int | None = None):
        self.message, self.path, self.offset = message, path, offset
        where = "" if path is None else printable(str(path))
        if offset is not None:
            where += f"{', ' if where else ''}byte {offset}"
        super().__init__(f"{where}: {message}" if where else message)


class CodecError(SteelyardError):
    """A codec cannot hold this tensor, or its parts contradict each other."""


class DamageError(CodecError):
    """Parts of a tensor that was read contradict each other: the file is damaged, or was written wrongly."""


class WeightsError(SteelyardError):
    """Names, ties or shapes of a collection of weights do not fit together."""


class UnknownNameError(SteelyardError):
    """A name is not in the table of its kind; the message suggests the nearest ones."""

    def __init__(self, kind: str, name: str, known: Iterable[str], hint: str = ""):
        self.kind, self.name = kind, name
        super().__init__(f"there is no {kind} {quoted(name)}; {hint or suggestion(name, known)}")


class MissingExtraError(SteelyardError):
    """An optional dependency is missing; the message is the command that installs it."""

    def __init__(self, feature: str, package: str, extra: str):
        self.extra = extra
        super().__init__(f"{feature} needs the package {package!r}: pip install 'steelyard[{extra}]'")


EXTRAS = {  # packages that come with an extra -> that extra
    "torch": "learn",
    "sklearn": "learn",
    "onnx": "deploy",
    "onnxruntime": "deploy",
    "onnxscript": "deploy",
    "h5py": "formats",
    "pyarrow": "parquet",
    "fsspec": "remote",
    "huggingface_hub": "remote",
    "s3fs": "remote",
}


def missing_extra(error: ModuleNotFoundError, feature: str) -> MissingExtraError | None:
    """The error that says how to install what is missing; None if no extra brings it.

    >>> print(missing_extra(ModuleNotFoundError(name="torch.nn"), "training"))
    training needs the package 'torch': pip install 'steelyard[learn]'
    """
    package = (error.name or "").partition(".")[0]
    return MissingExtraError(feature, package, EXTRAS[package]) if package in EXTRAS else None


class RecipeError(SteelyardError):
    """A recipe or a configuration does not say something that can be done."""

    def __init__(self, message: str, *, at: str = ""):
        self.at = at
        super().__init__(f"{at}: {message}" if at else message)


class ModelError(SteelyardError):
    """A model or a task is not what this operation needs."""


class VerdictError(SteelyardError):
    """A check failed or a tolerance was missed: nothing broke, but the answer is no."""

    status = 1


def suggestion(name: str, known: Iterable[str]) -> str:
    """'did you mean ...?' for a near miss, else the list of what there is, cut after a dozen.

    >>> suggestion("palete", ["palette", "affine"])
    "did you mean 'palette'?"
    >>> suggestion("x", ["b", "a"])
    'known are a, b'
    >>> suggestion("x", "abcdefghijklmn")
    'known are a, b, c, d, e, f, g, h, i, j, k, l, ...'
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    listed = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    return f"did you mean {near[0]!r}?" if near else f"known are {listed or '(none)'}"


def printable(text: str) -> str:
    """``text`` with everything escaped that could steer a terminal or break a line.

    >>> printable("a\\x1b[31mb\\n")
    'a\\\\x1b[31mb\\\\n'
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def quoted(text: str) -> str:
    """A name from a file as an error shows it: escaped once, and cut where it is endless.

    >>> print(quoted("a\\n"), quoted("b" * 10**6)[-10:])
    'a\\n' bbbbbb...'
    """
    return f"'{printable(text[:100])}{'...' * (len(text) > 100)}'"
