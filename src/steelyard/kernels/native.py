"""Loops over raw memory whose machine code is kept as an object file, and called without importing numba.

Loading numba and a kernel of its cache takes some 0.4 s and 130 MB; the object is loaded without it, and without LLVM
where it is simple enough. Decides where the objects lie, and that one is used only by the processor, the compiler and
the source that made it. Such a loop takes pointers and numbers, allocates nothing and raises nothing; whoever calls it
vouches for the lengths. Knows nothing of what it computes.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any

import llvmlite
from platformdirs import user_cache_dir

from steelyard.kernels import elf

_LABEL = "steelyard_native"
_KEPT: list[Any] = []  # the engines: machine code lives as long as the process


@dataclass(frozen=True)
class Native:
    """One loop. `build` gets numba and returns the function; `arguments` name numba's types, '*' for a pointer.

    >>> import numpy as np
    >>> def build(numba):
    ...     def double(values, n):
    ...         for i in range(n):
    ...             values[i] = 2 * values[i]
    ...     return double
    >>> x = np.arange(3.0)
    >>> Native("double", build, ("float64*", "int64"), "an example")(x, 3)
    >>> x.tolist()
    [0.0, 2.0, 4.0]
    """

    name: str
    build: Callable[[Any], Callable[..., None]]
    arguments: tuple[str, ...]  # "float32*" for an array, "float32**" for an array of addresses of such arrays
    source: str  # the text that the loop is made of: another text, another object
    reordered: bool = False  # whether the terms of a sum may be added in any order, several at a time

    def __call__(self, *values: Any) -> None:
        """Run it: arrays where the arguments are pointers, numbers elsewhere."""
        pairs = zip(self.arguments, values, strict=True)
        given = [value.ctypes.data if kind.endswith("*") else value for kind, value in pairs]
        room = (ctypes.c_int64 * 4)()  # numba's functions begin with room for a result and for an error
        self._entry(ctypes.addressof(room), ctypes.addressof(room) + 16, *given)

    @cached_property
    def _entry(self) -> Any:
        path = self._path
        kept = _read(path)
        symbol, code = kept or self._compile()
        if kept is None:
            _keep(path, symbol, code)
        kinds = [ctypes.c_void_p if a.endswith("*") else ctypes.c_int64 for a in self.arguments]
        prototype = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, *kinds)
        return prototype(elf.load(code, symbol) or _load(code, symbol))

    @property
    def _path(self) -> Path:
        folder = os.environ.get("NUMBA_CACHE_DIR") or user_cache_dir("steelyard", appauthor=False)
        machine = (_processor(), llvmlite.__version__)
        key = hashlib.sha256(
            repr((self.name, self.source, self.arguments, self.reordered, machine)).encode()
        ).hexdigest()[:32]
        return Path(folder) / f"{_LABEL}_{self.name}_{key}.o"

    def _compile(self) -> tuple[str, bytes]:
        import numba

        signature = []
        for argument in self.arguments:
            kind = getattr(numba.types, argument.rstrip("*"))
            for _ in range(argument.count("*")):
                kind = numba.types.CPointer(kind)
            signature.append(kind)
        options: dict[str, Any] = {"error_model": "numpy", "no_cfunc_wrapper": True, "no_cpython_wrapper": True}
        if self.reordered:
            options["fastmath"] = {"reassoc", "nsz"}
        made = numba.njit(tuple(signature), **options)(self.build(numba))
        (result,) = made.overloads.values()
        return result.fndesc.llvm_func_name, result.library._get_compiled_object()


def _load(code: bytes, symbol: str) -> int:
    """The address of a function that LLVM has put into memory."""
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine()
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _KEPT.append(engine)
    return int(engine.get_function_address(symbol))


@cache
def _processor() -> str:
    """What the processor is called and what it can do, in the words of the system, or of LLVM where it has none."""
    described = {}
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        for line in takewhile(str.strip, file):  # of the first one
            key, _, value = line.partition(":")
            described[key.strip()] = value.strip()
    said = [described[key] for key in ("vendor_id", "cpu family", "model", "model name", "flags") if key in described]
    if "flags" in described:
        return " ".join(said)
    import llvmlite.binding as llvm

    return f"{llvm.get_host_cpu_name()} {llvm.get_host_cpu_features().flatten()}"


def _read(path: Path) -> tuple[str, bytes] | None:
    """The symbol and the code of a kept object; None where there is none that is whole."""
    try:
        digest, symbol, code = path.read_bytes().split(b"\n", 2)
    except (OSError, ValueError):
        return None
    whole = hashlib.sha256(symbol + b"\n" + code).hexdigest().encode() == digest
    return (symbol.decode(), code) if whole else None


def _keep(path: Path, symbol: str, code: bytes) -> None:
    """Put the object where the next process finds it; where that cannot be written, each compiles for itself."""
    content = symbol.encode() + b"\n" + code
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(hashlib.sha256(content).hexdigest().encode() + b"\n" + content)
        temporary.replace(path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
