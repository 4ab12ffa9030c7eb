"""Choosing weights by name, rank, dtype and size: ``where("*.weight", ndim=2) & ~where("lm_head*")``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, get_args

from steelyard.core.spec import Kind
from steelyard.core.spec import dtype as find_dtype
from steelyard.errors import RecipeError, UnknownNameError

if TYPE_CHECKING:
    from steelyard.core.weights import Weight


class Where(ABC):
    """A condition on one weight. Combine with ``&``, ``|`` and ``~``."""

    @abstractmethod
    def __call__(self, weight: Weight) -> bool: ...

    @abstractmethod
    def under(self, weight: Weight, alias: str) -> bool:
        """Whether it holds for `weight` under a further name; what excludes its own name excludes it still."""

    def __and__(self, other: Where) -> Where:
        return Both(self, other)

    def __or__(self, other: Where) -> Where:
        return Either(self, other)

    def __invert__(self) -> Where:
        return Not(self)


@dataclass(frozen=True)
class Match(Where):
    """True where every stated condition holds; a condition left at None is not asked.

    ``pattern`` is one glob, or several separated by commas of which one must match; '!' before a
    glob excludes what it matches. Of a tied tensor, any name may match; one that only has a further name that is
    excluded stays. ``ndim`` and ``min_ndim`` count axes, ``min_size`` elements; ``kind`` is
    the family of the dtype: float, int, uint, bool or complex.
    """

    pattern: str = "*"
    ndim: int | None = None
    dtype: str | None = None
    min_size: int = 0
    min_ndim: int = 0
    kind: Kind | None = None

    def __call__(self, weight: Weight) -> bool:
        return self._holds(weight, weight.name)

    def under(self, weight: Weight, alias: str) -> bool:
        return self._holds(weight, alias)

    def _holds(self, weight: Weight, name: str) -> bool:
        globs = [g.strip() for g in self.pattern.split(",") if g.strip()]
        wanted = [g for g in globs if not g.startswith("!")] or ["*"]
        unwanted = [g[1:] for g in globs if g.startswith("!")]
        return (
            any(fnmatchcase(name, g) for g in wanted)
            and not any(fnmatchcase(n, g) for n in {name, weight.name} for g in unwanted)
            and (self.ndim is None or len(weight.spec.shape) == self.ndim)
            and (self.dtype is None or weight.spec.dtype == find_dtype(self.dtype))
            and weight.spec.size >= self.min_size
            and len(weight.spec.shape) >= self.min_ndim
            and (self.kind is None or weight.spec.dtype.kind == self.kind)
        )


@dataclass(frozen=True)
class Both(Where):
    a: Where
    b: Where

    def __call__(self, weight: Weight) -> bool:
        return self.a(weight) and self.b(weight)

    def under(self, weight: Weight, alias: str) -> bool:
        return self.a.under(weight, alias) and self.b.under(weight, alias)


@dataclass(frozen=True)
class Either(Where):
    a: Where
    b: Where

    def __call__(self, weight: Weight) -> bool:
        return self.a(weight) or self.b(weight)

    def under(self, weight: Weight, alias: str) -> bool:
        return self.a.under(weight, alias) or self.b.under(weight, alias)


@dataclass(frozen=True)
class Not(Where):
    a: Where

    def __call__(self, weight: Weight) -> bool:
        return not self.a(weight)

    def under(self, weight: Weight, alias: str) -> bool:
        return not self.a(weight) and not self.a.under(weight, alias)


def where(
    pattern: str = "*",
    *,
    ndim: int | None = None,
    dtype: str | None = None,
    min_size: int = 0,
    min_ndim: int = 0,
    kind: Kind | None = None,
) -> Where:
    """Choose weights by glob and by what they are.

    >>> import numpy as np
    >>> from steelyard.core.weights import Weights
    >>> w = Weights.of({"a.weight": np.zeros((2, 2)), "a.bias": np.zeros(2)})
    >>> list(w.select(where("*.weight", ndim=2)))
    ['a.weight']
    >>> list(w.select(~where("!*.bias")))
    ['a.bias']

    Raises RecipeError for an empty pattern and UnknownNameError for a dtype or a kind that does not exist.
    """
    if not isinstance(pattern, str):
        raise RecipeError(f"expected a pattern such as '*.weight', got {type(pattern).__name__}")
    if not pattern.strip():
        raise RecipeError("a pattern must not be empty; '*' chooses everything")
    if dtype is not None:
        find_dtype(dtype)
    if kind is not None and kind not in get_args(Kind):
        raise UnknownNameError("kind of dtype", kind, get_args(Kind))
    return Match(pattern, ndim, dtype, min_size, min_ndim, kind)
