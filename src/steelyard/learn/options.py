"""Checks of the options that the built-in models take. Knows nothing of the models."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real

from steelyard.errors import RecipeError, quoted


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


def _is_count(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) > 0


def _shown(value: object) -> str:
    return quoted(value) if isinstance(value, str) else repr(value)[:100]
