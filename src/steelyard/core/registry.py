"""Tables of what there is: a name, where it lives, what it needs. Nothing is imported before it is used.

Third parties add rows through entry points of the group ``steelyard.<plural>``, for example::

    [project.entry-points."steelyard.codecs"]
    mycodec = "mypackage.mycodec:MyCodec"
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import Generic, TypeVar

from steelyard.errors import MissingExtraError, UnknownNameError

T = TypeVar("T")


@dataclass(frozen=True)
class Row:
    """Where one entry lives ('package.module:attribute'), in one line what it is, and its extra."""

    path: str
    about: str = ""
    extra: str = ""  # the extra of steelyard that brings what it imports; '' = the base install


class Registry(Mapping[str, T], Generic[T]):
    """An ordered table of lazily imported things of one kind.

    >>> codecs = Registry("codec", "codecs", {"json": Row("json:JSONEncoder", "an example")})
    >>> codecs["json"].__name__
    'JSONEncoder'
    >>> codecs["jsom"]
    Traceback (most recent call last):
    ...
    steelyard.errors.UnknownNameError: there is no codec 'jsom'; did you mean 'json'?
    """

    def __init__(self, kind: str, plural: str, rows: Mapping[str, Row]):
        self.kind, self.plural, self._own = kind, plural, dict(rows)

    @cached_property
    def rows(self) -> Mapping[str, Row]:
        """Every row: ours, then those of installed packages, which cannot replace ours."""
        from importlib.metadata import entry_points

        found = entry_points(group=f"steelyard.{self.plural}")
        others = {e.name: Row(e.value, f"from {e.dist.name}" if e.dist else "") for e in found}
        return {**self._own, **{name: row for name, row in others.items() if name not in self._own}}

    def __getitem__(self, name: str) -> T:
        row = self._own.get(name) or self.rows.get(name)
        if row is None:
            raise UnknownNameError(self.kind, name, self.rows)
        module, _, attribute = row.path.partition(":")
        try:
            found: T = getattr(import_module(module), attribute)
        except ModuleNotFoundError as error:
            if not row.extra or (error.name or "").startswith("steelyard"):
                raise
            raise MissingExtraError(f"the {self.kind} {name!r}", error.name or "?", row.extra) from error
        return found

    def __contains__(self, name: object) -> bool:
        return name in self._own or name in self.rows

    def __iter__(self) -> Iterator[str]:
        yield from self._own  # so that a search that ends here never looks at what else is installed
        yield from (name for name in self.rows if name not in self._own)

    def __len__(self) -> int:
        return len(self.rows)
