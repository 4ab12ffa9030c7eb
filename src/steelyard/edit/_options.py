"""Options of steps, looked at before anything is compared with them."""

from __future__ import annotations

from dataclasses import fields
from numbers import Real
from typing import Any

from steelyard.core.weights import given
from steelyard.errors import RecipeError, quoted

_KINDS = ("float", "int", "float | None", "int | None")


def check_options(step: Any) -> None:
    """Raise RecipeError for a field of a step that is to be a number and is something else, WeightsError for evidence.

    A recipe is checked where it is read; this is for who makes a step in Python.

    step: a dataclass of a module whose annotations are text (``from __future__ import annotations``).
    """
    for field in fields(step):
        value = getattr(step, field.name)
        if field.type == "Weights | None" and value is not None:
            given(value)
        if field.type not in _KINDS or (value is None and str(field.type).endswith("None")):
            continue
        if isinstance(value, bool) or not isinstance(value, Real):
            found = (
                quoted(value) if isinstance(value, str) else "None" if value is None else f"a {type(value).__name__}"
            )
            raise RecipeError(f"{type(step).__name__}: {field.name}: expected a number, found {found}")
