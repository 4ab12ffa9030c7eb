"""Other names for the same tensors. Decides how a pattern's wildcards reach the new name; reads no values."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import ClassVar

from steelyard.core.transform import Step
from steelyard.core.weights import Weights
from steelyard.errors import RecipeError, WeightsError, quoted


@dataclass(frozen=True)
class Rename(Step):
    r"""Rename the tensors and ties that a pattern matches; the others keep their names.

    `pattern` is a glob for the whole name: each ``*`` (any text) and ``?`` (one character) is put in place
    of the ``*`` at the same position in `to`; what has no ``*`` in `to` is dropped. With `regex`, every match
    of a regular expression inside the name is replaced by `to`, in which ``\1`` is the first group.

    Raises RecipeError for a pattern or replacement that cannot be read, and WeightsError, naming both,
    where the pattern matches no name, two names would become the same one or a name would become empty.

    >>> import numpy as np
    >>> w = Weights.of({"module.a.w": np.zeros(1), "module.b.w": np.zeros(1)})
    >>> list(Rename("module.*", "*")(w))
    ['a.w', 'b.w']
    >>> list(Rename(r"\.w$", ".weight", regex=True)(w))
    ['module.a.weight', 'module.b.weight']
    """

    name: ClassVar[str] = "rename"
    pattern: str
    to: str
    regex: bool = False

    def __post_init__(self) -> None:
        try:
            rule, to = self._rule()
            rule.sub(to, "")  # reads the replacement even where nothing matches
        except (re.error, IndexError) as error:
            raise RecipeError(f"cannot rename {self.pattern!r} to {self.to!r}: {error}") from None

    def _rule(self) -> tuple[re.Pattern[str], str]:
        """The regular expression and its replacement."""
        if self.regex:
            return re.compile(self.pattern), self.to
        body = "".join({"*": "(.*)", "?": "(.)"}.get(c, re.escape(c)) for c in self.pattern)
        pieces = self.to.replace("\\", r"\\").split("*")
        to = pieces[0] + "".join(rf"\g<{i}>{piece}" for i, piece in enumerate(pieces[1:], 1))
        return re.compile(rf"\A{body}\Z", re.DOTALL), to

    def __call__(self, weights: Weights) -> Weights:
        rule, to = self._rule()
        names = [*weights, *weights.ties]
        if names and not any(map(rule.search, names)):
            raise WeightsError(
                f"renaming {self.pattern!r} to {self.to!r} changes nothing: no name matches; {self._advice(names)}"
            )
        new = {old: rule.sub(to, old) for old in names}
        taken: dict[str, str] = {}
        for old, name in new.items():
            if not name:
                raise WeightsError(f"renaming {self.pattern!r} to {self.to!r} leaves {quoted(old)} without a name")
            if name in taken:
                raise WeightsError(
                    f"renaming {self.pattern!r} to {self.to!r} gives {quoted(taken[name])} and "
                    f"{quoted(old)} the same name {quoted(name)}; choose another replacement"
                )
            taken[name] = old
        items = [replace(item, name=new[name]) for name, item in weights.items()]
        return Weights(items, {new[alias]: new[name] for alias, name in weights.ties.items()}, weights.meta)

    def _advice(self, names: list[str]) -> str:
        kind = "a regular expression is sought inside the name" if self.regex else "a glob is for the whole name"
        return f"{kind}, and the names begin with {', '.join(map(quoted, names[:3]))}"
