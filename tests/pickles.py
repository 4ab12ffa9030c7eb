"""Pickles by hand, for the tests: opcodes, the payload kinds of the published corpora, and files that hold them.

Nothing here is loaded by an unpickler except where a test proves, in a process of its own, that a payload is real.
"""

from __future__ import annotations

import io
import random
import struct
import zipfile
from collections.abc import Callable

import numpy as np

MAGIC = (
    b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.\x80\x02M\xe9\x03.\x80\x02}."  # magic, protocol, system
)
VALUES = np.arange(6, dtype=np.float32)


def text(value: str) -> bytes:
    """BINUNICODE."""
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def named(name: str) -> bytes:
    """GLOBAL of a dotted name; the module is what is before the last dot."""
    module, _, attribute = name.rpartition(".")
    return b"c" + module.encode() + b"\n" + attribute.encode() + b"\n"


def called(name: str, *args: bytes) -> bytes:
    """GLOBAL and REDUCE."""
    return named(name) + b"(" + b"".join(args) + b"tR"


def tensor(key: str = "0", count: int = 6) -> bytes:
    """Six float32 of storage `key`."""
    storage = (
        b"(" + text("storage") + named("torch.FloatStorage") + text(key) + text("cpu") + bytes([75, count]) + b"tQ"
    )
    rest = b"K\x00K\x06\x85K\x01\x85\x89" + called("collections.OrderedDict")
    return called("torch._utils._rebuild_tensor_v2", storage, rest)


# One call in each of the ways in which opcodes can make it. `name` is dotted, `arg` the one argument, as opcodes.
WAYS: dict[str, Callable[[str, bytes], bytes]] = {
    "GLOBAL": called,
    "GLOBAL with a tuple of one": lambda name, arg: named(name) + arg + b"\x85R",
    "STACK_GLOBAL": lambda name, arg: _stacked(name) + arg + b"\x85R",
    "STACK_GLOBAL from memo": lambda name, arg: _from_memo(name) + arg + b"\x85R",
    "INST": lambda name, arg: b"(" + arg + b"i" + named(name)[1:],
    "OBJ": lambda name, arg: b"(" + named(name) + arg + b"o",
    "memoised call": lambda name, arg: named(name) + b"p7\n0g7\n" + arg + b"\x85R",
    "getattr": lambda name, arg: called(
        "builtins.getattr", called("builtins.__import__", text(name.rpartition(".")[0])), text(name.rpartition(".")[2])
    ) + arg + b"\x85R",
    "BUILD with __setstate__": lambda name, arg: named("types.SimpleNamespace") + b")R}" + text("__setstate__")
    + named(name) + b"sb" + arg + b"b",
    "nested": lambda name, arg: called("builtins.list", called("builtins.map", named(name), arg + b"\x85")),
    "partial": lambda name, arg: b"(" + called("functools.partial", named(name), arg) + b"o",
    "behind a DUP": lambda name, arg: named(name) + b"2" + arg + b"\x85R0" + arg + b"\x85R",
    "in a frame": lambda name, arg: b"\x80\x04\x95" + struct.pack("<Q", len(called(name, arg))) + called(name, arg),
    "after a broken opcode": lambda name, arg: called(name, arg) + b"\xff",
    "before a POP": lambda name, arg: called(name, arg) + b"0N",
    "in text of protocol 0": lambda name, arg: b"c" + named(name)[1:] + b"(" + arg + b"tR",
}  # fmt: skip
# Ways that an unpickler refuses, or that need a registry, a loader of persistent ids or a buffer to do anything.
QUIET_WAYS: dict[str, Callable[[str, bytes], bytes]] = {
    "NEWOBJ": lambda name, arg: named(name) + arg + b"\x85\x81",
    "NEWOBJ_EX": lambda name, arg: named(name) + arg + b"\x85}\x92",
    "EXT1": lambda name, arg: b"\x82\x01" + arg + b"\x85R",
    "EXT2": lambda name, arg: b"\x83\x01\x02" + arg + b"\x85R",
    "EXT4": lambda name, arg: b"\x84\x01\x02\x03\x04" + arg + b"\x85R",
    "PERSID": lambda name, arg: b"P" + name.encode() + b"\n" + arg + b"\x85R",
    "BINPERSID": lambda name, arg: called(name, arg) + b"Q",
    "persistent id of a module": lambda name, arg: b"(" + text("module") + named(name) + arg + arg + b"tQ" + arg + b"\x85R",
    "storage of a foreign class": lambda name, arg: b"(" + text("storage") + named(name) + arg + arg + b"K\x01tQ",
    "NEXT_BUFFER": lambda name, arg: b"\x97\x98" + arg + b"\x85R",
    "function of a tensor subclass": lambda name, arg: called(
        "torch._tensor._rebuild_from_type_v2", named(name), named("torch.Tensor"), arg + b"\x85", b"}"
    ),
    "factory of a defaultdict": lambda name, arg: called("collections.defaultdict", named(name)),
    "hooks of a tensor": lambda name, arg: called("torch._utils._rebuild_parameter", arg, b"\x88", called(name, arg)),
    "state of a dict": lambda name, arg: b"}" + called(name, arg) + b"b",
    "key of a dict": lambda name, arg: b"}" + called(name, arg) + b"Ns",
    "codec": lambda name, arg: called("_codecs.encode", arg, called(name, arg)),
}  # fmt: skip


def _stacked(name: str) -> bytes:
    module, _, attribute = name.rpartition(".")
    return text(module) + text(attribute) + b"\x93"


def _from_memo(name: str) -> bytes:
    module, _, attribute = name.rpartition(".")
    return text(module) + b"\x940" + text(attribute) + b"q\x090" + b"h\x00h\x09\x93"


def zipped(pickled: bytes, extra: dict[str, bytes] | None = None) -> bytes:
    """A zip checkpoint with six float32 as storage 0."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for name, data in {"data.pkl": pickled, "data/0": VALUES.tobytes(), "version": b"3\n", **(extra or {})}.items():
            archive.writestr(f"archive/{name}", data)
    return made.getvalue()


def legacy(pickled: bytes) -> bytes:
    """A checkpoint of pickles with six float32 as storage 0."""
    return MAGIC + pickled + b"\x80\x02]" + text("0") + b"a." + struct.pack("<q", 6) + VALUES.tobytes()


def bare(pickled: bytes) -> bytes:
    """Only the pickle."""
    return pickled if pickled[:1] == b"\x80" else b"\x80\x04" + pickled


CONTAINERS = {"zip": zipped, "legacy": legacy, "bare": bare}


def beside(payload: bytes) -> bytes:
    """A dict of a tensor, the payload, and the tensor once more."""
    return b"\x80\x04}" + text("a") + tensor() + b"s" + text("x") + payload + b"s" + text("b") + tensor() + b"s."


PIECES = [
    tensor(), text("a"), b"(", b".", b"0", b"2", b"}", b"]", b")", b"s", b"u", b"a", b"e", b"t", b"\x85", b"\x86", b"\x87", b"R",
    b"b", b"\x81", b"\x92", b"\x93", b"Q", b"q\x00", b"h\x00", b"\x94", b"\x8a\x01\xff", b"\x8a\x09\xff\xff\xff\xff\xff\xff\xff\xff\x7f",
    b"K\x00", b"J\xff\xff\xff\xff", b"G\x7f\xf8\x00\x00\x00\x00\x00\x00", b"\x95\x05\x00\x00\x00\x00\x00\x00\x00", b"N", b"\x88",
    named("torch.FloatStorage"), named("torch.HalfStorage"), named("torch._utils._rebuild_tensor_v3"), named("torch.float8_e4m3fn"),
    named("collections.OrderedDict"), named("torch._tensor._rebuild_from_type_v2"), named("torch.Size"), named("posix.system"),
    named("numpy.core.multiarray.scalar"), named("_codecs.encode"), named("builtins.set"), named("torch.device"), b"\x8f", b"\x90",
]  # fmt: skip


def mutant(rng: random.Random) -> bytes:
    """A checkpoint of which pieces were put in, left out, doubled or swapped, or bytes or numbers changed."""
    parts = [b"\x80\x02", b"}", b"(", text("a"), tensor(), text("b"), b"]", b"(", tensor(), text("c"), b"e", b"u", b"."]
    for _ in range(rng.randint(1, 3)):
        at, kind = rng.randrange(len(parts)), rng.randrange(5)
        if kind == 0:
            parts.insert(at, rng.choice(PIECES))
        elif kind == 1:
            parts[at] = rng.choice(PIECES)
        elif kind == 2:
            parts.insert(at, parts[rng.randrange(len(parts))])
        elif parts[at]:
            byte = rng.randrange(len(parts[at]))
            value = rng.choice((0, 1, 127, 128, 255, rng.randrange(256), *b"()RQ.}]tbs\x85\x93"))
            parts[at] = parts[at][:byte] + bytes([value]) + parts[at][byte + (kind == 3) :]
    data = CONTAINERS[rng.choice(("zip", "legacy"))](b"".join(parts))
    if rng.random() < 0.3:
        at = rng.randrange(len(data))
        data = data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
    return data
