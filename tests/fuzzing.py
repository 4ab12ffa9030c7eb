"""Structure-aware mutations of files of weights: a table with a row for each format, for the tests and the bench.

A row says how to make whole files of a format (`seeds`) and how to spoil one (`mutate`): safetensors through its JSON,
the others through their bytes, their numbers and pieces of other files. `judge` opens and reads what came out, in memory.
"""

from __future__ import annotations

import io
import json
import random
import re
import tempfile
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from steelyard.core.weights import Weights
from steelyard.errors import SteelyardError
from steelyard.formats import FORMATS, write
from steelyard.formats.source import InMemory

import gguf_files
import pickles
from hostile_safetensors import LAXER_SAYS

Seeds = Callable[[], list[bytes]]
Mutate = Callable[[random.Random, bytes, Sequence[bytes]], bytes]

NUMBERS = (
    0,
    1,
    2,
    3,
    7,
    8,
    127,
    128,
    255,
    256,
    2**15,
    2**16,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**32,
    2**62,
    2**63 - 1,
    2**63,
    2**64 - 1,
)
VALUES: tuple[Any, ...] = (
    *NUMBERS, 2**64, 10**30, -1, -(2**63), 0.0, 1.5, 1e300, float("nan"), float("inf"), True, False, None, "", "F32", "BF16", "F4", "U8",
    "I64", "f32", "F32\0", "a", "__metadata__", "dtype", "\ud800", "\x1b[2J", "é", [], [0], [1, 1], [0, 4], [4, 0], [[1]], {}, {"a": 1},
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """How one format is fuzzed."""

    seeds: Seeds
    mutate: Mutate


def judge(format: str, content: bytes) -> str | None:
    """What a refusal says, None for a file that is opened and read; any exception that is not ours comes through."""
    try:
        for item in FORMATS[format]().open(InMemory(content, "x")).values():
            item.array()
    except SteelyardError as error:
        return str(error)
    return None


def disagreement(content: bytes, said: str | None) -> str:
    """What speaks against the verdict `said` on a safetensors file, if the reference library is asked; '' for nothing."""
    try:
        safetensors.deserialize(content)
    except safetensors.SafetensorError as error:
        return "" if said is not None else f"opened here, and refused by the reference library: {error}"
    if said is None or any(reason in said for reason in LAXER_SAYS) or _twice_given(content):
        return ""
    return f"opened by the reference library, and refused here: {said}"


def _twice_given(content: bytes) -> bool:
    """Whether a key is given twice anywhere in the header: of two entries, the library looks at the last alone."""
    doubled = False

    def pairs(found: list[tuple[str, Any]]) -> None:
        nonlocal doubled
        doubled = doubled or len(dict(found)) != len(found)

    json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")], object_pairs_hook=pairs)
    return doubled


def written(format: str) -> Seeds:
    """Files of a format that is written here: several types and shapes, and metadata."""

    def seeds() -> list[bytes]:
        suffix = FORMATS[format].suffixes[0]
        small = {"sample": np.arange(6, dtype=np.float32).reshape(2, 3)}
        more = {
            "a.weight": np.arange(4, dtype=np.float16),
            "b": np.zeros((0, 3), np.int64),
            "c.0": np.array(True),
            "é": np.ones((2, 1, 2), np.uint8),
        }
        found = []
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"sample{suffix}"
            for values in (small,) if format == "npy" else (small, more):
                write(Weights.of(values, meta={"k": "v"} if len(values) > 1 else {}), path, format)
                found.append(path.read_bytes())
        return found

    return seeds


def spoil_bytes(rng: random.Random, content: bytes, others: Sequence[bytes]) -> bytes:
    """One to three changes of bytes: flipped, numbers put in, cut off, cut out, doubled, or of another file."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = rng.randrange(len(content) + 1)
        content = rng.choice(_CHANGES)(rng, content, at, others)
    return content


def _flip(rng: random.Random, content: bytes, at: int, others: Sequence[bytes]) -> bytes:
    return content[:at] + bytes([rng.randrange(256)]) + content[at + 1 :]


def _number(rng: random.Random, content: bytes, at: int, others: Sequence[bytes]) -> bytes:
    width = rng.choice((1, 2, 4, 8))
    raw = (rng.choice(NUMBERS) % (1 << 8 * width)).to_bytes(width, rng.choice(("little", "big")))
    return content[:at] + raw + content[at + width :]


def _digits(rng: random.Random, content: bytes, at: int, others: Sequence[bytes]) -> bytes:
    found = re.compile(rb"[0-9]+").search(content, at)
    return content if found is None else content[: found.start()] + b"%d" % rng.choice(NUMBERS) + content[found.end() :]


def _cut_off(rng: random.Random, content: bytes, at: int, others: Sequence[bytes]) -> bytes:
    return content[:at]


def _cut_out(rng: random.Random, content: bytes, at: int, others: Sequence[bytes]) -> bytes:
    return content[:at] + content[at + rng.choice((1, 2, 8, 32)) :]


def _double(rng: random.Random, content: bytes, at: int, others: Sequence[bytes]) -> bytes:
    piece = content[at : at + rng.choice((1, 8, 64))]
    return content[:at] + piece + content[at:]


def _splice(rng: random.Random, content: bytes, at: int, others: Sequence[bytes]) -> bytes:
    other = rng.choice(others)
    return content[:at] + other[rng.randrange(len(other)) :]


_CHANGES = (_flip, _flip, _number, _number, _digits, _cut_off, _cut_out, _double, _splice)


def spoil_safetensors(rng: random.Random, content: bytes, others: Sequence[bytes]) -> bytes:
    """One to three changes of the header as JSON, then now and then of its text, its length, the data, or any bytes."""
    count = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + count]), content[8 + count :]
    for _ in range(rng.choice((0, 1, 1, 2, 3))):
        _spoil_json(rng, header)
    text = json.dumps(header, separators=rng.choice(((",", ":"), (",", ":"), (", ", ": ")))).encode(
        "utf-8", "surrogatepass"
    )
    if rng.random() < 0.3:
        text = rng.choice(_TEXTS)(rng, text)
    if rng.random() < 0.2:
        text = spoil_bytes(rng, text, others)
    if rng.random() < 0.2:
        data = data[: rng.randrange(len(data) + 1)] + bytes(rng.choice((0, 1, 4)))
    length = len(text) if rng.random() < 0.9 else rng.choice((len(text) - 1, len(text) + 1, *NUMBERS))
    return (length % 2**64).to_bytes(8, "little") + text + data


def _spoil_json(rng: random.Random, header: dict[str, Any]) -> None:
    """Change something somewhere in a JSON tree."""
    at: Any = header
    while True:
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        if not keys:
            break
        key = rng.choice(keys)
        if isinstance(at[key], (dict, list)) and rng.random() < 0.85:
            at = at[key]
            continue
        change = rng.randrange(5)
        if change == 0:
            del at[key]
        elif change == 1 and isinstance(at, dict):
            at[rng.choice(("dtype", "shape", "data_offsets", "__metadata__", "a.weight", "more", "\x1b", ""))] = at.pop(
                key
            )
        elif change == 2 and isinstance(at[key], int):
            at[key] += rng.choice((-4, -1, 1, 2, 4, 8))
        elif change == 3:
            other = rng.choice(keys)
            at[key], at[other] = at[other], at[key]
        else:
            at[key] = deepcopy(rng.choice(VALUES))
        return
    if isinstance(at, dict):
        at[rng.choice(("dtype", "shape", "", "more"))] = deepcopy(rng.choice(VALUES))
    else:
        at.append(rng.choice(NUMBERS))


def _twice(rng: random.Random, text: bytes) -> bytes:
    """A member given twice."""
    found = re.findall(rb'"[^"]*": ?(?:"[^"]*"|\[[^\[\]{}]*\]|\{[^{}]*\})', text)
    return text if not found else text[:1] + rng.choice(found) + b"," + text[1:]


def _spaced(rng: random.Random, text: bytes) -> bytes:
    """Space where it may be, and where it may not."""
    at = rng.randrange(len(text) + 1)
    return text[:at] + rng.choice((b" ", b"\n", b"\t", b"\x0c", b"\xc2\xa0", b" " * 100)) + text[at:]


def _respelled(rng: random.Random, text: bytes) -> bytes:
    """A number or a letter spelled otherwise."""
    return rng.choice(
        (
            lambda: re.sub(
                rb"([\[,])([0-9])",
                rng.choice((rb"\g<1>0\2", rb"\1+\2", rb"\1-\2", rb"\1\2.0", rb"\1\2e0")),
                text,
                count=1,
            ),
            lambda: text.replace(b"a", b"\\u0061", 1),
            lambda: text.replace(b"dtype", b"d\\u0074ype", 1),
            lambda: text.replace(b'"', b"'", 2),
            lambda: text[:-1] + rng.choice((b",}", b"}}", b"]", b"}\0", b"} ")),
            lambda: rng.choice((b" ", b"\xef\xbb\xbf", b"\n", b"[")) + text,
        )
    )()


_TEXTS = (_twice, _spaced, _respelled)


def checkpoints() -> list[bytes]:
    """A PyTorch checkpoint of each kind."""
    pickled = b"\x80\x02}" + pickles.text("a") + pickles.tensor() + b"s."
    return [pickles.zipped(pickled), pickles.legacy(pickled)]


def spoil_checkpoint(rng: random.Random, content: bytes, others: Sequence[bytes]) -> bytes:
    """Opcodes put in, left out, doubled or changed; or bytes of the whole file."""
    return pickles.mutant(rng) if rng.random() < 0.7 else spoil_bytes(rng, content, others)


def of_onnx() -> list[bytes]:
    """A graph of two initialisers and a constant."""
    from onnx import TensorProto, helper, numpy_helper

    initial = [
        numpy_helper.from_array(np.ones((2, 3), np.float32), "w"),
        numpy_helper.from_array(np.int64([1, 2]), "i"),
    ]
    constant = helper.make_node(
        "Constant", [], ["c"], value=helper.make_tensor("c", TensorProto.FLOAT, [2], [1.0, 2.0])
    )
    return [helper.make_model(helper.make_graph([constant], "g", [], [], initial)).SerializeToString()]


def of_hdf5() -> list[bytes]:
    """Datasets in groups, one in chunks, and attributes."""
    import h5py

    file = io.BytesIO()
    with h5py.File(file, "w") as made:
        made.attrs["k"] = "v"
        made.create_dataset("a/kernel", data=np.ones((2, 3), np.float32))
        made.create_dataset("a/bias", data=np.zeros(3, np.float16), chunks=(2,), compression="gzip")
    return [file.getvalue()]


ROWS = {
    "safetensors": Row(written("safetensors"), spoil_safetensors),
    "npz": Row(written("npz"), spoil_bytes),
    "npy": Row(written("npy"), spoil_bytes),
    "gguf": Row(lambda: [*written("gguf")(), *gguf_files.seeds()[:2], gguf_files.seeds()[3]], gguf_files.spoil),
    "torch": Row(checkpoints, spoil_checkpoint),
    "onnx": Row(of_onnx, spoil_bytes),
    "hdf5": Row(of_hdf5, spoil_bytes),
}
