"""Checks of the options that models and runs take. Knows nothing of models and runs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Integral, Real

from steelyard.errors import ModelError, RecipeError, UnknownNameError, quoted


def check_counts(**options: object) -> None:
    """Raise RecipeError, naming the option, for a value that is no positive whole number.

    >>> check_counts(layers=0)
    Traceback (most recent call last):
    steelyard.errors.RecipeError: layers=0: expected a positive whole number
    """
    for name, value in options.items():
        if not _is_count(value):
            raise RecipeError(f"{name}={_shown(value)}: expected a positive whole number")


def check_lists_of_counts(**options: object) -> None:
    """Raise RecipeError, naming the option, for a value that is no list of positive whole numbers."""
    for name, value in options.items():
        if isinstance(value, str) or not isinstance(value, Sequence) or not all(map(_is_count, value)):
            raise RecipeError(f"{name}={_shown(value)}: expected a list of positive whole numbers, say [64, 32]")


def check_dropout(value: object) -> None:
    """Raise RecipeError for a probability outside [0, 1)."""
    if not isinstance(value, Real) or isinstance(value, bool) or not 0 <= float(value) < 1:
        raise RecipeError(f"dropout={_shown(value)}: expected a probability, 0 or more and less than 1")


def check_whole(**options: object) -> None:
    """Raise ModelError, naming the option, for a value that is neither None nor a whole number, at least 1."""
    for name, value in options.items():
        if value is not None and not _is_count(value):
            raise ModelError(f"{name}={_shown(value)}: expected a whole number, at least one")


def check_positive(**options: object) -> None:
    """Raise ModelError, naming the option, for a value that is neither None nor a finite number above 0."""
    for name, value in options.items():
        if value is not None and (not _is_number(value) or value == 0):
            raise ModelError(f"{name}={_shown(value)}: expected a positive {name}, a finite number")


def check_not_negative(**options: object) -> None:
    """Raise ModelError, naming the option, for a value that is no finite number, 0 or more."""
    for name, value in options.items():
        if not _is_number(value):
            raise ModelError(f"{name}={_shown(value)}: expected a finite number, 0 or more")


def check_choice(kind: str, value: str, known: Iterable[str]) -> None:
    """Raise UnknownNameError for a value that is none of the known ones."""
    if value not in known:
        raise UnknownNameError(kind, str(value), known)


def check_kind(what: str, value: object, kind: type | tuple[type, ...], expected: str) -> None:
    """Raise ModelError for a value that is none of that kind; a class in the place of an object of it is told as such.

    >>> check_kind("model", 3, str, "a torch.nn.Module")
    Traceback (most recent call last):
    steelyard.errors.ModelError: model: expected a torch.nn.Module, found 3
    """
    if isinstance(value, kind):
        return
    if isinstance(value, type):
        found = f"the class {value.__name__}: call it, to make one" if issubclass(value, kind) else value.__name__
    else:
        found = _shown(value) if isinstance(value, (str, Real, type(None))) else f"a {type(value).__name__}"
    raise ModelError(f"{what}: expected {expected}, found {found}")


def check_lists(**options: object) -> None:
    """Raise ModelError, naming the option, for a value that is no list; a single thing belongs into one."""
    for name, value in options.items():
        if isinstance(value, str) or not isinstance(value, Sequence):
            found = quoted(value) if isinstance(value, str) else f"a {type(value).__name__}"
            raise ModelError(f"{name}: expected a list, found {found}: put it into brackets, {name}=[...]")


def check_fraction(**options: object) -> None:
    """Raise ModelError, naming the option, for a value that is no number from 0 to below 1."""
    for name, value in options.items():
        if not _is_number(value) or float(value) >= 1:  # type: ignore[arg-type]
            raise ModelError(f"{name}={_shown(value)}: expected a number from 0 to below 1")


def to_number(text: str) -> float | None:
    """The number that a text is; None if it is none."""
    try:
        return float(text)
    except ValueError:
        return None


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and 0 <= float(value) < math.inf


def _is_count(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) > 0


def _shown(value: object) -> str:
    return quoted(value) if isinstance(value, str) else repr(value)[:100]
