"""nn.Module to Weights and back: parameters and persistent buffers under the names of ``state_dict``.

Decides which tensor of a collection goes into which one of a module, and gives a full account of it.
Ties are parameters that are one object; they stay one. Knows nothing of files, of what a module computes,
or of extra state that is not a tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from steelyard.core.spec import DType, Spec
from steelyard.core.spec import dtype as find_dtype
from steelyard.core.table import Table
from steelyard.core.weights import Weight, Weights
from steelyard.errors import ModelError, quoted
from steelyard.formats._sharded import is_sharded, like, whole

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

WRAPPERS = ("module.", "_orig_mod.")  # what DataParallel and torch.compile put before every name
COLUMNS = {"name": "", "status": "", "expected": "", "found": "", "note": ""}
SHOWN = 5  # names in an error message


@dataclass(frozen=True)
class _Slot:
    """One name of a module and the place of its tensor, which a move to another device may replace."""

    name: str
    owner: nn.Module
    leaf: str
    buffer: bool

    def tensor(self) -> Tensor:
        """The tensor that is there now; raises ModelError where there are no values to take or replace."""
        import torch

        value = getattr(self.owner, self.leaf)
        if isinstance(value, torch.nn.parameter.UninitializedTensorMixin):
            raise ModelError(f"{self.name!r} has no shape yet; run the model once on a batch before this")
        if value.is_meta:
            raise ModelError(f"{self.name!r} is on the meta device and has no values; build the model on a real device")
        if value.layout != torch.strided:
            raise ModelError(f"{self.name!r} is a sparse tensor ({value.layout}); make it dense first")
        return value

    def spec(self) -> Spec:
        """What the tensor is."""
        tensor = self.tensor()
        return Spec(tuple(tensor.shape), find_dtype(str(tensor.dtype)))

    def reader(self) -> Callable[[], np.ndarray]:
        """A copy of the values as they are when it is called; of a sharded tensor as they are now."""
        if is_sharded(tensor := self.tensor()):
            gathered = whole(tensor)
            return lambda: to_array(gathered)
        return lambda: to_array(self.tensor())


def from_module(module: nn.Module, *, buffers: bool = True) -> Weights:
    """The parameters and, with `buffers`, the persistent buffers of a module, in the order of its state_dict.

    Nothing is copied before it is read; each read is a copy of the values at that time. A parameter with
    several names exists under the first, and the others are ties. What is sharded among processes is put together at
    once, so that every process has to call this. Raises ModelError for a module without
    values (lazy layers that never ran, the meta device).

    >>> from torch import nn
    >>> from_module(nn.Linear(3, 2))
    Weights(2 tensors, 8 elements)
    """
    items: list[Weight] = []
    ties: dict[str, str] = {}
    for group in _groups(_slots(module, buffers)):
        first, *aliases = group
        origin = f"{type(module).__name__}.{first.name}"
        items.append(Weight(first.name, first.spec(), first.reader(), origin=origin))
        ties.update({alias.name: first.name for alias in aliases})
    return Weights(items, ties, {"format": "pt", **_without(module)})


def _without(module: nn.Module) -> dict[str, str]:
    """The blocks that were taken out, as metadata."""
    from steelyard.graph.skip import DROPPED, dropped

    names = dropped(module)
    return {DROPPED: ",".join(names)} if names else {}


def into_module(
    weights: Weights,
    module: nn.Module,
    *,
    partial: bool = False,
    rename: Mapping[str, str] | None = None,
    resize: bool = False,
) -> Table:
    """Load `weights` into `module`, all or nothing, and account for every name on either side.

    Names match after `rename`, which maps a name, or a prefix of names that ends in a dot, to the
    module's; a prefix ``module.`` or ``_orig_mod.`` that all names of one side have is set aside.
    Values are cast to the module's dtype. With `partial`, what does not match stays as the module had it. With
    `resize`, layers take the widths of `weights`, as those of a structurally pruned model have (`resize_`): the file
    of a smaller model and the code of the original one are enough.

    Returns a table of name, status (loaded, tied, missing, unexpected, wrong shape), expected, found, note.

    Raises ModelError, with the module untouched, if a name or a shape does not match (unless `partial`),
    if two names of one parameter come with different values, or if a cast would destroy values.
    """
    if not resize:
        return _into(weights, module, partial, rename or {}, resize=False)
    whole = _dropped(weights, module)
    try:
        return _into(weights, module, partial, rename or {}, resize=True)
    except BaseException:
        for parent, leaf, block in whole:
            parent._modules[leaf] = block
        raise


def _into(weights: Weights, module: nn.Module, partial: bool, rename: Mapping[str, str], *, resize: bool) -> Table:
    slots = _slots(module, buffers=True)
    sources, prefix = _matched(weights, [slot.name for slot in slots], rename)
    plan = _Plan(sources, prefix, partial, resize)
    for group in _groups(slots):
        plan.place(group)
    plan.leftovers(weights)
    if not partial:
        plan.complain(type(module).__name__)
    staged = [(slot, _staged(slot, item)) for slot, item in plan.copies]
    if resize:
        from steelyard.graph.resize import resize_

        resize_(module, {slot.name: tuple(values.shape) for slot, values in staged})
    _copy([(slot.tensor(), values) for slot, values in staged])
    counts = {status: plan.statuses().count(status) for status in dict.fromkeys(plan.statuses())}
    return Table.of(f"weights into {type(module).__name__}", COLUMNS, [vars(row) for row in plan.rows], counts)


def _dropped(weights: Weights, module: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """Take the blocks out of the module that the weights say are gone; where each was, and what it was."""
    from steelyard.graph.skip import DROPPED, drop_, dropped

    there = set(dropped(module))
    names = [name for name in weights.meta.get(DROPPED, "").split(",") if name and name not in there]
    modules = dict(module.named_modules())
    kept = []
    for name in names:
        parent, _, leaf = name.rpartition(".")
        if name in modules:
            kept.append((modules[parent], leaf, modules[name]))
    drop_(module, names)
    return kept


def to_array(tensor: Tensor) -> np.ndarray:
    """A copy of a tensor as a numpy array, bit for bit; types that numpy lacks come from ml_dtypes."""
    import torch

    found = find_dtype(str(tensor.dtype))
    copy = tensor.detach().to("cpu", copy=True).contiguous()
    if not _foreign(found):
        plain: np.ndarray = copy.numpy()
        return plain
    raw: np.ndarray = copy.view(torch.uint8 if found.bits <= 8 else torch.int16).numpy()
    return raw.view(found.numpy)


def to_tensor(array: np.ndarray) -> Tensor:
    """A copy of an array as a tensor, bit for bit; a dtype that torch lacks becomes float32 or (u)int8."""
    import numpy as np
    import torch

    found = find_dtype(array.dtype)
    if found.torch is None:
        wider = {"float": np.float32, "int": np.int8, "uint": np.uint8}[found.kind]
        return torch.from_numpy(array.astype(wider))
    array = np.array(array, order="C")
    if not _foreign(found):
        return torch.from_numpy(array)
    return torch.from_numpy(array.view(np.uint8 if found.bits <= 8 else np.int16)).view(getattr(torch, found.torch))


def _foreign(dtype: DType) -> bool:
    return dtype.kind == "float" and (dtype.bits <= 8 or dtype.name == "bfloat16")


def _slots(module: nn.Module, buffers: bool) -> list[_Slot]:
    """Every name of `module.state_dict()` that is a tensor, in its order, second names included."""
    slots: list[_Slot] = []
    for path, owner in module.named_modules(remove_duplicate=False):
        before = f"{path}." if path else ""
        own = [(leaf, value, False) for leaf, value in owner._parameters.items()]
        if buffers:
            left_out = owner._non_persistent_buffers_set
            own += [(leaf, value, True) for leaf, value in owner._buffers.items() if leaf not in left_out]
        slots += [_Slot(before + leaf, owner, leaf, buffer) for leaf, value, buffer in own if value is not None]
    return slots


def _groups(slots: list[_Slot]) -> list[list[_Slot]]:
    """The names of one tensor together, in order of the first."""
    groups: dict[int, list[_Slot]] = {}
    for slot in slots:
        groups.setdefault(id(slot.tensor()), []).append(slot)
    return list(groups.values())


@dataclass(frozen=True)
class _Row:
    name: str
    status: str
    expected: str = ""
    found: str = ""
    note: str = ""


@dataclass(frozen=True)
class _Found:
    """What the collection has for a name of the module, and under which name."""

    given: str
    item: Weight


@dataclass
class _Plan:
    """What will be copied where, and one row for each name."""

    sources: Mapping[str, _Found]  # by name of the module
    prefix: str
    partial: bool
    resize: bool = False
    rows: list[_Row] = field(default_factory=list)
    copies: list[tuple[_Slot, Weight]] = field(default_factory=list)

    def statuses(self) -> list[str]:
        return [row.status for row in self.rows]

    def place(self, group: list[_Slot]) -> None:
        """Decide on one tensor of the module, which may have several names."""
        spec = group[0].spec()
        fits = [s for s in group if s.name in self.sources and self._fits(self.sources[s.name].item.spec, spec)]
        chosen = self.sources[fits[0].name] if fits else None
        if chosen is not None:
            self.copies.append((group[0], chosen.item))
            for other in fits[1:]:
                _check_same(group[0].name, chosen, self.sources[other.name])
        for slot in group:
            first = fits[0].name if fits else ""
            self.rows.append(self._row(slot.name, spec, first))

    def _fits(self, given: Spec, spec: Spec) -> bool:
        return given.shape == spec.shape or (self.resize and len(given.shape) == len(spec.shape))

    def _row(self, name: str, spec: Spec, first: str) -> _Row:
        found = self.sources.get(name)
        kept = "kept as the module had it" if self.partial and not first else ""
        if found is None:
            if first:
                return _Row(name, "tied", str(spec), note=f"one with {first!r}")
            return _Row(name, "missing", str(spec), note=kept)
        notes = [f"given as {found.given!r}" if found.given != name else "", self.prefix, kept]
        given = found.item.spec
        if not self._fits(given, spec):
            return _Row(name, "wrong shape", str(spec), str(given), _joined(notes))
        if given.shape != spec.shape:
            notes.append("resized")
        if given.dtype != spec.dtype:
            notes.append(f"cast {given.dtype} to {spec.dtype}")
        if name != first:
            notes.append(f"one with {first!r}")
        return _Row(name, "loaded" if name == first else "tied", str(spec), str(given), _joined(notes))

    def leftovers(self, weights: Weights) -> None:
        """The names of the collection that the module does not have."""
        used = {found.given for found in self.sources.values()} - _unknown(self)
        for name in (*weights, *weights.ties):
            if name not in used:
                self.rows.append(_Row(name, "unexpected", found=str(weights[name].spec)))

    def complain(self, model: str) -> None:
        """Raise ModelError if anything was not matched."""
        bad = [row for row in self.rows if row.status not in ("loaded", "tied")]
        if bad:
            shown = "; ".join(map(_sentence, bad[:SHOWN])) + ("; ..." if len(bad) > SHOWN else "")
            raise ModelError(
                f"{len(bad)} of {len(self.rows)} names do not match {model}: {shown}; "
                "map the names (rename=, or steelyard convert --rename), load what fits "
                "(partial=True, or steelyard finetune), or resize the layers (resize=True)"
            )


def _unknown(plan: _Plan) -> set[str]:
    known = {row.name for row in plan.rows}
    return {found.given for name, found in plan.sources.items() if name not in known}


def _sentence(row: _Row) -> str:
    detail = f" (expected {row.expected}, found {row.found})" if row.status == "wrong shape" else ""
    return f"{row.status} {quoted(row.name)}{detail}"


def _joined(notes: list[str]) -> str:
    return "; ".join(note for note in notes if note)


def _matched(weights: Weights, names: list[str], rename: Mapping[str, str]) -> tuple[dict[str, _Found], str]:
    """The collection by names of the module, and a sentence on the prefix that was set aside."""
    given = {name: _renamed(name, rename) for name in (*weights, *weights.ties)}
    ours, theirs = _wrapper(given.values()), _wrapper(names)
    found: dict[str, _Found] = {}
    for name, new in given.items():
        new = new if ours == theirs else theirs + new.removeprefix(ours)
        if new in found:
            raise ModelError(f"{quoted(found[new].given)} and {quoted(name)} both become {quoted(new)}")
        found[new] = _Found(name, weights[name])
    where = f"prefix {ours!r} of the weights" if ours else f"prefix {theirs!r} of the module"
    return found, "" if ours == theirs else f"{where} set aside"


def _renamed(name: str, rename: Mapping[str, str]) -> str:
    if name in rename:
        return rename[name]
    prefixes = sorted((old for old in rename if old.endswith(".") and name.startswith(old)), key=len)
    return rename[prefixes[-1]] + name.removeprefix(prefixes[-1]) if prefixes else name


def _wrapper(names: Iterable[str]) -> str:
    """The prefix of wrappers that every name has."""
    rest, prefix = list(names), ""
    while rest:
        common = next((w for w in WRAPPERS if all(name.startswith(w) for name in rest)), None)
        if common is None:
            return prefix
        rest, prefix = [name.removeprefix(common) for name in rest], prefix + common
    return prefix


def _check_same(name: str, a: _Found, b: _Found) -> None:
    if a.item.name == b.item.name:
        return
    one, two = a.item.array(), b.item.array()
    if one.dtype != two.dtype or one.tobytes() != two.tobytes():
        raise ModelError(
            f"{name!r} is one parameter of the module, but {quoted(a.given)} and {quoted(b.given)} "
            "have different values; drop one of them, or untie the module"
        )


def _staged(slot: _Slot, item: Weight) -> Tensor:
    """The values of `item` as the module will hold them; raises ModelError if the cast destroys them."""
    given, target = to_tensor(item.array()), slot.tensor()
    if given.dtype == target.dtype:
        return given.to(target.device)
    if not (given.is_complex() and not target.is_complex()):
        cast = given.to(target.dtype)
        if _survives(given, cast):
            return cast.to(target.device)
    raise ModelError(
        f"{slot.name!r}: the values of {quoted(item.name)}, {item.spec}, do not survive the cast to "
        f"{slot.spec().dtype}; cast the weights or the module first"
    )


def _survives(given: Tensor, cast: Tensor) -> bool:
    """Whether a cast between float types overflowed nowhere, and any other cast is exact."""
    import torch

    if (given.is_floating_point() or given.is_complex()) and (cast.is_floating_point() or cast.is_complex()):
        wide = torch.complex128 if cast.is_complex() else torch.float64
        return bool((cast.to(wide).isfinite() | ~given.to(wide).isfinite()).all())
    return to_array(cast.to(given.dtype)).tobytes() == to_array(given).tobytes()


def _copy(staged: list[tuple[Tensor, Tensor]]) -> None:
    import torch

    with torch.no_grad():
        for target, values in staged:
            target.copy_(like(target, values))
