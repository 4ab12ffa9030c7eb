"""What is left of a pickle that is read and not run: plain records, none of which can do anything.

Dicts are lists of pairs, because the hash of a key out of a file can be made to collide or to take for ever.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from steelyard.errors import FormatError, quoted

LARGEST = 2**63 - 1


class TooShortError(FormatError):
    """The pickle goes on after the bytes that were given."""


@dataclass(eq=False, slots=True)
class Dict:
    """A dict, as the pairs that were put into it; for a key that is there twice the last one holds."""

    pairs: list[tuple[object, object]] = field(default_factory=list)

    def get(self, key: str) -> object:
        """The value under a key that is text, or None."""
        return next((value for name, value in reversed(self.pairs) if isinstance(name, str) and name == key), None)


@dataclass(frozen=True, eq=False, slots=True)
class Global:
    """A name that the pickle wanted to import, and the byte where it stands."""

    name: str
    at: int


@dataclass(eq=False, slots=True)
class Foreign:
    """What would have been an object of a foreign class or the result of a foreign call: only its data."""

    name: str
    at: int
    args: object = ()
    state: list[object] = field(default_factory=list)  # what BUILD and SETITEM would have given it
    items: list[object] = field(default_factory=list)  # what APPEND would have


def called(target: object) -> str:
    """The name of what was called, or of the type of what cannot be."""
    return target.name if isinstance(target, (Global, Foreign)) else type(target).__name__


def kind(value: object) -> str:
    """What a value is, for errors."""
    return quoted(value.name) if isinstance(value, (Global, Foreign)) else type(value).__name__
