"""What the functions mean by which PyTorch rebuilds tensors: storages, views of them, and harmless things beside.

``BUILDERS`` is the whole list of globals that a pickle of torch may call here; each is a few lines of this file that
make plain data. Nothing of a view is checked before it has a name. Knows neither containers nor how objects nest.

Source: https://github.com/pytorch/pytorch/blob/main/torch/_utils.py
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from steelyard.core.spec import DTYPES
from steelyard.formats._inert import LARGEST, Dict, Foreign, Global
from steelyard.formats._pickle import Builder, Machine

STORAGES: dict[str, tuple[str, int]] = {  # class -> dtype ('' = none that is held here), bytes of an element
    "DoubleStorage": ("float64", 8),
    "FloatStorage": ("float32", 4),
    "HalfStorage": ("float16", 2),
    "BFloat16Storage": ("bfloat16", 2),
    "LongStorage": ("int64", 8),
    "IntStorage": ("int32", 4),
    "ShortStorage": ("int16", 2),
    "CharStorage": ("int8", 1),
    "ByteStorage": ("uint8", 1),
    "BoolStorage": ("bool", 1),
    "ComplexDoubleStorage": ("complex128", 16),
    "ComplexFloatStorage": ("complex64", 8),
    "UntypedStorage": ("uint8", 1),
    "_UntypedStorage": ("uint8", 1),
    "QInt8Storage": ("", 1),
    "QUInt8Storage": ("", 1),
    "QInt32Storage": ("", 4),
    "QUInt4x2Storage": ("", 1),
    "QUInt2x4Storage": ("", 1),
}
HOLDERS = ("torch.", "torch.cuda.", "torch.storage.")
TORCH = {row.torch: row for row in DTYPES.values() if row.torch and row.bits >= 8}
UNHELD = ("complex32", "float4_e2m1fn_x2", "qint8", "quint8", "qint32", "quint4x2", "quint2x4", "bits8", "bits16")


@dataclass(frozen=True, eq=False)
class Storage:
    """A run of elements, by the key under which the container has it."""

    key: str
    kind: str  # the class that torch calls it
    count: object  # elements
    part: tuple[object, object] | None = None  # (offset, count) in elements: a view of the storage under `key`

    @property
    def item(self) -> int:
        """Bytes of an element."""
        return STORAGES[self.kind][1]


@dataclass(frozen=True, eq=False)
class View:
    """A tensor: elements of a storage. Nothing of it is checked before `Found` gives it a name."""

    storage: object
    offset: object
    size: object
    stride: object
    dtype: object  # None: that of the storage
    flags: object
    at: int


@dataclass(frozen=True, eq=False)
class Unheld:
    """A tensor that is not held here, and why."""

    why: str
    parts: object = ()


def _tensor(_: Machine, at: int, args: tuple[Any, ...]) -> View:
    storage, offset, size, stride, *rest = (*args, *(None,) * 4)[: max(len(args), 4)]
    return View(storage, offset, size, stride, None, rest[2] if len(rest) > 2 else None, at)


def _tensor_v3(_: Machine, at: int, args: tuple[Any, ...]) -> View:
    storage, offset, size, stride, _, _, dtype, *rest = (*args, *(None,) * 8)[: max(len(args), 8)]
    return View(storage, offset, size, stride, dtype, rest[0], at)


def _first(_: Machine, at: int, args: tuple[Any, ...]) -> object:
    return args[0] if args else Foreign("nothing", at)


def _from_type(m: Machine, at: int, args: tuple[Any, ...]) -> object:
    """A tensor of a subclass: what its function makes."""
    return m.call(args[0], args[2]) if len(args) > 2 else Foreign("nothing", at)


def _unheld(why: str) -> Builder:
    return lambda _m, _at, args: Unheld(why, args)


def _ordered(m: Machine, at: int, args: tuple[Any, ...]) -> object:
    """An OrderedDict, from nothing or from pairs."""
    made = Dict()
    for pair in args[0] if args and isinstance(args[0], (list, tuple)) else ():
        m.charge(1)
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            return Foreign("collections.OrderedDict", at, args)
        made.pairs.append((pair[0], pair[1]))
    if args and isinstance(args[0], Dict):
        m.charge(len(args[0].pairs))
        made.pairs.extend(args[0].pairs)
    return made


def _default(_m: Machine, _at: int, _args: tuple[Any, ...]) -> object:
    return Dict()


def _set(m: Machine, _at: int, args: tuple[Any, ...]) -> object:
    values = args[0] if args and isinstance(args[0], (list, tuple)) else ()
    m.charge(len(values))
    return Dict([(value, None) for value in values])


def _size(_: Machine, at: int, args: tuple[Any, ...]) -> object:
    return args[0] if args and isinstance(args[0], (list, tuple)) else Foreign("torch.Size", at, args)


def _device(_: Machine, _at: int, args: tuple[Any, ...]) -> object:
    return ":".join(str(arg) for arg in args[:2] if isinstance(arg, (str, int)))[:100]


def _encoded(m: Machine, at: int, args: tuple[Any, ...]) -> object:
    """Bytes as protocols before 3 write them: text of which each character is a byte."""
    text = args[0] if args else None
    if not isinstance(text, str) or (not text.isascii() and max(text) > "\xff"):
        return Foreign("_codecs.encode", at, args)
    m.charge(len(text) >> 6)
    return text.encode("latin-1")


def _scalar(m: Machine, at: int, args: tuple[Any, ...]) -> object:
    """A scalar of numpy: its dtype and its bytes."""
    kind, raw = (*args, None, None)[:2]
    code = kind.args[0] if isinstance(kind, Foreign) and isinstance(kind.args, tuple) and kind.args else None
    form = {"f8": "<d", "f4": "<f", "f2": "<e", "i8": "<q", "i4": "<i", "i2": "<h", "i1": "<b", "b1": "<?"}
    form |= {"u8": "<Q", "u4": "<I", "u2": "<H", "u1": "<B"}
    if not isinstance(code, str) or code not in form or not isinstance(raw, bytes):
        return Foreign("numpy.scalar", at, args)
    if len(raw) != struct.calcsize(form[code]):
        raise m.wrong(f"a scalar of {code} cannot have {len(raw)} bytes")
    return struct.unpack(form[code], raw)[0]


def named(name: str) -> Builder:
    """What is harmless and says nothing: an inert record that is not reported."""
    return lambda _m, at, args: Foreign(name, at, args)


BUILDERS: dict[str, Builder] = {
    **{name: named(name) for holder in HOLDERS for name in (holder + kind for kind in STORAGES)},
    **{f"torch.{name}": named(name) for name in (*TORCH, *UNHELD)},
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._tensor._rebuild_from_type_v2": _from_type,
    "torch._utils._rebuild_qtensor": _unheld("quantised"),
    "torch._utils._rebuild_meta_tensor_no_storage": _unheld("on the meta device, without values"),
    "torch._utils._rebuild_sparse_tensor": _unheld("sparse"),
    "torch._utils._rebuild_nested_tensor": _unheld("nested"),
    "torch._utils._rebuild_device_tensor_from_numpy": _unheld("of another device, held as an array of numpy"),
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _first,
    "torch.serialization._get_layout": named("layout"),
    "torch.nn.parameter.Parameter": _first,
    "torch.Tensor": named("torch.Tensor"),
    "torch.Size": _size,
    "torch.device": _device,
    "collections.OrderedDict": _ordered,
    "collections.defaultdict": _default,
    **{f"{module}.{name}": _set for module in ("builtins", "__builtin__") for name in ("set", "frozenset")},
    **{f"{module}.{name}": named(name) for module in ("builtins", "__builtin__") for name in ("dict", "list", "int")},
    **{f"torch.jit._pickle.build_{kind}list": _first for kind in ("int", "double", "bool", "tensor")},
    "torch.jit._pickle.restore_type_tag": _first,
    "_codecs.encode": _encoded,
    **{f"numpy.{module}.multiarray.scalar": _scalar for module in ("core", "_core")},
    "numpy.dtype": named("numpy.dtype"),
}


def storages(seen: dict[str, Storage], folder: str = "") -> Callable[[Machine, object, int], object]:
    """What makes storages of persistent ids, and None of others; `seen` receives them by key, behind `folder`."""

    def persistent(_m: Machine, ident: object, _at: int) -> object:
        found = _storage(ident, folder)
        if isinstance(found, Storage):
            seen.setdefault(found.key, found)
        return found

    return persistent


def _storage(key: object, folder: str) -> object:
    """The storage that a persistent id means; a class where it is that of a module."""
    if not isinstance(key, tuple) or len(key) < 2:
        return None
    if key[0] == "module" and isinstance(key[1], Global):
        return key[1]  # a class, with its source text, which nobody needs
    if key[0] != "storage" or len(key) not in (5, 6) or not isinstance(key[1], Global):
        return None
    kind = key[1].name.rpartition(".")[2]
    if not isinstance(key[2], (str, int)) or kind not in STORAGES or not key[1].name.startswith("torch."):
        return None
    view = key[5] if len(key) == 6 else None
    if view is None:
        return Storage(folder + _key(key[2]), kind, key[4])
    if not isinstance(view, tuple) or len(view) != 3 or not isinstance(view[0], (str, int)):
        return None
    return Storage(folder + _key(key[2]), kind, key[4], part=(view[1], view[2]))


def _key(key: str | int) -> str:
    return key[:100] if isinstance(key, str) else f"{key:#x}" if abs(key) > LARGEST else str(key)
