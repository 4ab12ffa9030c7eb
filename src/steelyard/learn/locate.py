"""Finding the user's own code by 'package.module:attribute', and checking options against a signature.

Decides that the current folder is importable while a name is looked up. Knows nothing of models or tasks.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from steelyard.errors import ModelError, RecipeError, printable, quoted, suggestion


def locate(path: str) -> Any:
    """The object at ``package.module:attribute``; attributes may be dotted.

    >>> locate("math:pi")
    3.141592653589793

    Raises ModelError, in one line, if the module is not there, fails when it is imported, or lacks the attribute.
    """
    name, _, attributes = path.partition(":")
    if not name or not attributes:
        raise ModelError(f"{quoted(path)} is no 'package.module:attribute'")
    found: Any = _module(name)
    for attribute in attributes.split("."):
        if attribute not in dir(found):
            raise ModelError(f"{printable(path)}: no {attribute!r} in it; {suggestion(attribute, _public(found))}")
        found = getattr(found, attribute)
    return found


def check_options(function: Callable[..., Any], options: Mapping[str, Any], name: str) -> None:
    """Raise RecipeError, with the nearest right name, for an option that ``function`` does not take by keyword."""
    parameters = inspect.signature(function).parameters.values()
    known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY or p.default is not p.empty]
    for option in options:
        if option not in known and all(p.kind is not p.VAR_KEYWORD for p in parameters):
            raise RecipeError(f"{name} has no option {quoted(option)}; {suggestion(option, known)}")


def _module(name: str) -> Any:
    with _importable_folder(os.getcwd()):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
                raise ModelError(f"{name} imports {error.name!r}, which is not installed") from error
            raise ModelError(
                f"there is no module {quoted(name)}: looked in the current folder and the installed packages"
            ) from error
        except Exception as error:  # the user's own code may raise anything
            last = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{last.filename}:{last.lineno}"
            raise ModelError(f"{name} fails when imported, {where}: {type(error).__name__}: {error}") from error


@contextmanager
def _importable_folder(folder: str) -> Iterator[None]:
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def _public(found: Any) -> list[str]:
    return [name for name in dir(found) if not name.startswith("_")]
