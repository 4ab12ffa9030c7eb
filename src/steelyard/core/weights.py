"""Weights: a lazy, ordered, immutable collection of named tensors. The noun that both flows share.

A gradient, a mask, a score or a difference has the names of the weights it speaks of, so it is
Weights, too. Nothing here reads a byte before somebody calls ``read()``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, ItemsView, Iterable, Iterator, Mapping, ValuesView
from dataclasses import dataclass, field, replace
from functools import partial
from os import PathLike
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, SupportsIndex

from steelyard.core.packed import Packed, Plan
from steelyard.core.spec import Spec
from steelyard.core.where import Where
from steelyard.errors import CodecError, DamageError, UnknownNameError, WeightsError, quoted

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Weight:
    """One named tensor: what it is, and how to get it."""

    name: str
    spec: Spec
    read: Callable[[], np.ndarray | Packed] = field(repr=False)  # the only place where bytes move
    stored: int | None = None  # bytes in the file it was opened from; None until written
    origin: str = "memory"  # for errors: "model-00002.safetensors @81920"
    scheme: Plan = None  # how read() holds it, as far as that is known before: None = a plain array
    fill: Callable[[int, np.ndarray], None] | None = field(default=None, repr=False)  # puts the elements from an index
    # on, in C order, into a flat array: a part of a tensor that is larger than memory; None: only the whole can be read

    @staticmethod
    def of(name: str, value: np.ndarray | Packed, origin: str = "memory") -> Weight:
        """A weight that is already in memory; raises WeightsError for what is no array, or no name.

        >>> Weight.of("w", [1.0, 2.0])
        Traceback (most recent call last):
        ...
        steelyard.errors.WeightsError: memory: 'w': expected a numpy array, got list: numpy.asarray makes one
        """
        if not isinstance(name, str):
            raise WeightsError(f"{origin}: expected a name, got {type(name).__name__}: names are text")
        if isinstance(value, Packed):
            return Weight(name, value.spec, lambda: value, origin=origin, scheme=value.scheme)
        import numpy as np

        if not isinstance(value, (np.ndarray, np.generic)):
            what = f"expected a numpy array, got {type(value).__name__}"
            raise WeightsError(f"{origin}: {quoted(name)}: {what}: numpy.asarray makes one")
        if not value.dtype.isnative:
            value = value.astype(value.dtype.newbyteorder("="))
        return Weight(name, Spec.like(value), lambda: value, origin=origin)

    def array(self) -> np.ndarray:
        """The values, decoded if they are packed; raises WeightsError if they are not what `spec` says."""
        value = self.read()
        try:
            array = value.array() if isinstance(value, Packed) else value
        except CodecError as error:
            raise DamageError(f"{self.origin}: {quoted(self.name)}: {error}") from error
        if array.shape != self.spec.shape or array.dtype != self.spec.dtype.numpy:
            raise WeightsError(
                f"{self.origin}: {quoted(self.name)} was announced as {self.spec} and "
                f"read as {array.dtype}[{', '.join(map(str, array.shape))}]"
            )
        return array

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """For numpy: ``np.asarray(weight)`` reads the values."""
        import numpy as np

        return np.array(self.array(), dtype=dtype, copy=copy)

    def __getitem__(self, index: slice | SupportsIndex) -> np.ndarray:
        """Rows of the first axis: ``weight[2:4]`` reads these alone where the file allows it.

        >>> import numpy as np
        >>> Weight.of("w", np.arange(6).reshape(3, 2))[1:].tolist()
        [[2, 3], [4, 5]]

        Raises WeightsError for a step, for a tensor without axes and for a row that is not there.
        """
        shape = self.spec.shape
        index = int(index) if isinstance(index, SupportsIndex) else index  # numpy's, too
        if (
            not shape
            or not isinstance(index, (slice, int))
            or (isinstance(index, slice) and index.step not in (None, 1))
        ):
            text = "expected rows of the first axis, such as [3] or [2:4]; read .array() for any other part"
            raise WeightsError(f"{self.origin}: {quoted(self.name)} of shape {shape}: {text}")
        if isinstance(index, int) and not -shape[0] <= index < shape[0]:
            raise WeightsError(f"{self.origin}: {quoted(self.name)} has {shape[0]} rows, and no row {index}")
        window = slice(index, index + 1 or None) if isinstance(index, int) else index
        first, last, _ = window.indices(shape[0])
        count, row = max(last - first, 0), self.spec.size // max(shape[0], 1)
        if self.fill is None:
            part = self.array()[first : first + count]
        else:
            import numpy as np

            part = np.empty((count, *shape[1:]), self.spec.dtype.numpy)
            if part.size:
                self.fill(first * row, part.reshape(-1))
        return part[0] if isinstance(index, int) else part

    def blocks(self, elements: int, first: int = 0) -> Iterator[np.ndarray]:
        """The values from the element `first` on, in C order, as flat arrays of `elements`, the last one shorter.

        Where the file allows it, no more than one block is in memory, and each block is valid only until the
        next is asked for. Otherwise the tensor is read whole.

        >>> import numpy as np
        >>> [block.tolist() for block in Weight.of("w", np.arange(5)).blocks(2)]
        [[0, 1], [2, 3], [4]]
        """
        if self.fill is None:
            flat = self.array().reshape(-1)
            yield from (flat[at : at + elements] for at in range(first, flat.size, elements))
            return
        import numpy as np

        buffer = np.empty(min(elements, self.spec.size), self.spec.dtype.numpy)
        for at in range(first, self.spec.size, elements):
            block = buffer[: min(elements, self.spec.size - at)]
            self.fill(at, block)
            yield block

    def then(
        self, function: Callable[[np.ndarray], np.ndarray | Packed], *, elementwise: bool = False, **changes: Any
    ) -> Weight:
        """This weight with `function` applied to its values at each read; `changes` are its new fields.

        `elementwise` promises that each element of the result, an array of the same shape, depends on the one
        element at its place alone: then a tensor larger than memory can still be read in blocks.

        >>> import numpy as np
        >>> w = Weight.of("w", np.arange(4)).then(lambda x: -x, elementwise=True)
        >>> [block.tolist() for block in w.blocks(3)]
        [[0, -1, -2], [-3]]
        """
        fill = None
        if elementwise and self.fill is not None:
            fill = partial(_fill_after, self.fill, self.spec, function)
        changes = {"stored": None, "scheme": None, "fill": fill, **changes}
        return replace(self, read=lambda: function(self.array()), **changes)


def _fill_after(
    fill: Callable[[int, np.ndarray], None], spec: Spec, function: Callable[[np.ndarray], Any], first: int, flat: Any
) -> None:
    """Fill `flat` with what `function` makes of the elements, of the dtype of `spec`, that `fill` reads."""
    import numpy as np

    before = np.empty(flat.size, spec.dtype.numpy)
    fill(first, before)
    flat[:] = function(before)


class Texts(Mapping[str, str]):
    """Texts by key, each made when it is asked for: metadata that would be long and is seldom wanted.

    Each is made by a function of the number of its first characters that are enough, or of None for all.

    >>> texts = Texts({"a": lambda enough: "12345"})
    >>> texts["a"], texts.beginning("a", 2)
    ('12345', '12')
    """

    __slots__ = ("_made",)

    def __init__(self, made: Mapping[str, Callable[[int | None], str]]):
        self._made = dict(made)

    def __getitem__(self, key: str) -> str:
        return self._made[key](None)

    def replaced(self, others: Mapping[str, str]) -> Texts:
        """These texts with others added or in their place; none is made for that."""
        return Texts({**self._made, **{key: partial(_said, text) for key, text in others.items()}})

    def beginning(self, key: str, count: int) -> str:
        """The first `count` characters of a text, without those that follow."""
        return self._made[key](count)[:count]

    def __contains__(self, key: object) -> bool:
        return key in self._made

    def __iter__(self) -> Iterator[str]:
        return iter(self._made)

    def __len__(self) -> int:
        return len(self._made)


def _texts(meta: Mapping[str, str]) -> dict[str, str]:
    """A copy of metadata; raises WeightsError for what is no text."""
    for key, text in meta.items():
        if not (isinstance(key, str) and isinstance(text, str)):
            what = f"{quoted(str(key))}: {type(text).__name__}"
            raise WeightsError(f"metadata are text under text, got {what}; json.dumps makes text of other values")
    return dict(meta)


def _said(text: str, _enough: int | None) -> str:
    return text


class Weights(Mapping[str, Weight]):
    """Named tensors in order, with ties and metadata.

    Iteration, length and totals are over the tensors that exist: a tied tensor counts once.
    ``ties`` maps each further name of a tensor to the name under which it exists, and
    ``weights[alias]`` finds it.

    >>> import numpy as np
    >>> w = Weights.of({"embed": np.ones((4, 2), np.float32)}, ties={"head": "embed"})
    >>> w
    Weights(1 tensor, 8 elements, 1 tie)
    >>> w["head"].name
    'embed'

    Raises WeightsError for a name that is given twice or a tie that leads nowhere.
    """

    __slots__ = ("_items", "_specs", "meta", "ties")

    def __init__(
        self, items: Iterable[Weight], ties: Mapping[str, str] | None = None, meta: Mapping[str, str] | None = None
    ):
        found: dict[str, Weight] = {}
        for item in items:
            if item.name in found:
                raise WeightsError(f"{item.origin}: the name {quoted(item.name)} is given twice")
            found[item.name] = item
        self._settle(found, ties, meta)

    @staticmethod
    def over(
        items: Mapping[str, Weight],
        ties: Mapping[str, str] | None = None,
        meta: Mapping[str, str] | None = None,
        specs: Callable[[], Iterable[Spec]] | None = None,
    ) -> Weights:
        """Weights whose items stay in a mapping by their names, which may make each one when it is asked for.

        A file of a million tensors then needs no million objects. The mapping must not change. `specs` gives the
        Spec of every item, in order, where that is quicker than making the items.
        """
        weights = Weights.__new__(Weights)
        weights._settle(items, ties, meta, specs)
        return weights

    def _settle(
        self,
        items: Mapping[str, Weight],
        ties: Mapping[str, str] | None,
        meta: Mapping[str, str] | None,
        specs: Callable[[], Iterable[Spec]] | None = None,
    ) -> None:
        self._items, self._specs = items, specs
        self.ties: Mapping[str, str] = MappingProxyType(dict(ties or {}))
        self.meta: Mapping[str, str] = meta if isinstance(meta, Texts) else MappingProxyType(_texts(meta or {}))
        for alias, name in self.ties.items():
            if alias in self._items or name not in self._items:
                raise WeightsError(f"the tie {quoted(alias)} -> {quoted(name)} must lead from a free name to a tensor")

    @staticmethod
    def of(
        values: Mapping[str, np.ndarray | Packed],
        ties: Mapping[str, str] | None = None,
        meta: Mapping[str, str] | None = None,
    ) -> Weights:
        """Weights that are already in memory: arrays, or Packed values."""
        return Weights([Weight.of(name, value) for name, value in values.items()], ties, meta)

    def __getitem__(self, name: str) -> Weight:
        found = self._items.get(self.ties.get(name, name))
        if found is None:
            raise KeyError(name)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def values(self) -> ValuesView[Weight]:
        """The weights, in order."""
        return self._items.values()

    def items(self) -> ItemsView[str, Weight]:
        """The names and the weights, in order."""
        return self._items.items()

    def find(self, name: str) -> Weight:
        """Like ``weights[name]``, but a wrong name raises UnknownNameError with the nearest right one."""
        try:
            return self[name]
        except KeyError:
            raise UnknownNameError("weight", name, [*self, *self.ties]) from None

    def with_items(self, items: Iterable[Weight]) -> Weights:
        """The same metadata and ties over other items, given in order.

        A tie whose tensor is gone makes way: its first alias is no longer a name of anything.
        """
        new = list(items)
        names = {item.name for item in new}
        kept = {alias: name for alias, name in self.ties.items() if name in names and alias not in names}
        return Weights(new, kept, self.meta)

    def with_meta(self, **meta: str) -> Weights:
        """The same weights with metadata added or replaced."""
        every = self.meta.replaced(meta) if isinstance(self.meta, Texts) else {**self.meta, **meta}
        return Weights.over(self._items, self.ties, every, self._specs)

    def with_ties(self, ties: Mapping[str, str]) -> Weights:
        """The same weights with further names: free name -> name of a tensor. Raises WeightsError for others."""
        return Weights.over(self._items, {**self.ties, **ties}, self.meta, self._specs)

    def select(self, where: Where | Callable[[Weight], bool]) -> Weights:
        """The weights for which `where` holds, under their own or a further name, in order, with their ties.

        A function that is no `Where` is asked of each weight under its own name alone.

        >>> import numpy as np
        >>> from steelyard.core.where import where
        >>> Weights.of({"embed": np.ones(2)}, ties={"head": "embed"}).select(where("head"))
        Weights(1 tensor, 2 elements, 1 tie)
        """
        if not self.ties or not isinstance(where, Where):
            return self.with_items(item for item in self.values() if where(item))
        tied = {name for alias, name in self.ties.items() if where.under(self[name], alias)}
        return self.with_items(item for item in self.values() if item.name in tied or where(item))

    def choose(self, where: Where | None) -> Weights:
        """Like `select`; raises WeightsError if there are tensors and none matches. None chooses all."""
        chosen = self if where is None else self.select(where)
        if self and not chosen:
            first = ", ".join(quoted(name) for name in list(self)[:3])
            raise WeightsError(f"none of the {len(self)} tensors matches; the names begin with {first}")
        return chosen

    def arrays(self) -> dict[str, np.ndarray]:
        """Every tensor, read and decoded, by as many threads as there are processors where tensors are packed.

        The whole collection is in memory after this.
        """
        if all(item.scheme is None for item in self.values()):
            return {name: item.array() for name, item in self.items()}
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return dict(zip(self, pool.map(Weight.array, self.values()), strict=True))

    def settle(self) -> Weights:
        """Read everything once and keep it in memory: the transforms behind it run no more."""
        return Weights([Weight.of(i.name, i.read(), i.origin) for i in self.values()], self.ties, self.meta)

    def specs(self) -> Iterable[Spec]:
        """The Spec of each weight, in order: quicker than to go through `values` where there are very many."""
        return (item.spec for item in self.values()) if self._specs is None else self._specs()

    @property
    def size(self) -> int:
        """The number of elements; tied tensors count once."""
        return sum(spec.size for spec in self.specs())

    @property
    def nbytes(self) -> int:
        """The bytes of all plain values; what a file takes is known when it is written."""
        return sum(spec.nbytes for spec in self.specs())

    def __repr__(self) -> str:
        counts = [(len(self), "tensor"), (self.size, "element"), (len(self.ties), "tie")]
        return "Weights(" + ", ".join(f"{n} {word}{'s' * (n != 1)}" for n, word in counts if n or word != "tie") + ")"


def given(weights: object) -> Weights:
    """`weights` if they are Weights; raises WeightsError that says how to get some from what was given instead.

    >>> given("a.safetensors")
    Traceback (most recent call last):
    ...
    steelyard.errors.WeightsError: expected Weights, got str: open the file first with sy.open(...)
    """
    if isinstance(weights, Weights):
        return weights
    if isinstance(weights, (str, PathLike)):
        remedy = "open the file first with sy.open(...)"
    elif isinstance(weights, Mapping):
        remedy = "make them of arrays by name with sy.Weights.of(...)"
    else:
        remedy = "sy.open(...) gives those of a file, sy.from_module(...) those of a module"
    raise WeightsError(f"expected Weights, got {type(weights).__name__}: {remedy}")
