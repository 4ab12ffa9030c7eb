"""The built-in tasks, and `task`, which makes a Task from its name.

Decides how a task is named: ``digits``, ``text:FILE``, ``csv:FILE:TARGET``, ``adding:LENGTH``, ``copying:LENGTH`` or
``package.module:attribute``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from steelyard.errors import ModelError, RecipeError, UnknownNameError, quoted
from steelyard.learn import TASKS
from steelyard.learn.calling import calling
from steelyard.learn.locate import check_options, locate

if TYPE_CHECKING:
    from steelyard.learn.task import Task

__all__ = ["TASKS", "task"]


def task(name: str, /, **options: Any) -> Task:
    """The task of that name; the options are those of its factory.

    Raises UnknownNameError for a name that is not there, RecipeError for an option that the factory does not
    have, ModelError for data or code that cannot be used.

    >>> task("breast-cancer").classes
    ('malignant', 'benign')
    """
    kind, _, rest = name.partition(":")
    if kind == "text":
        return _made(name, {**options, "path": _given(rest, "text:FILE", name)} if ":" in name else options)
    if kind in ("adding", "copying") and rest:
        if not rest.isdecimal():
            raise ModelError(f"the task {quoted(name)}: expected the number of steps, as in {kind}:100")
        return _made(name, {**options, "length": int(rest)})
    if kind == "csv":
        path, _, target = rest.rpartition(":")
        _given(path and target, "csv:FILE:TARGET", name)
        return _made(name, {**options, "path": path, "target": target})
    if rest:
        return _users(name, options)
    if name not in TASKS:
        hint = "its options are arguments: task('mnist', path='/data')" if "(" in name else ""
        raise UnknownNameError("task", name, TASKS, hint)
    return _made(name, options)


def _made(name: str, options: dict[str, Any]) -> Task:
    factory = TASKS[name.partition(":")[0]]
    check_options(factory, options, name)
    made: Task = factory(**options)
    return made


def _users(name: str, options: dict[str, Any]) -> Task:
    from steelyard.learn.task import Task

    found = locate(name)
    if not isinstance(found, Task):
        if not callable(found):
            raise ModelError(f"{name} is a {type(found).__name__}, expected a Task or a function that returns one")
        check_options(found, options, name)
        with calling(name):
            found = found(**options)
    elif options:
        raise RecipeError(f"{name} is a finished Task and takes no options: make it a function that returns one")
    if not isinstance(found, Task):
        raise ModelError(f"{name} returns a {type(found).__name__}, expected a Task")
    return found


def _given(text: str, form: str, name: str) -> str:
    if not text:
        raise ModelError(f"the task {name!r} is incomplete: write {form}")
    return text
