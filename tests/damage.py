"""Files that are made wrong in one thing: a bit, a scale, tensors swapped, a tensor shifted, the end cut off."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np

from steelyard.formats._folded import folded, unfold


def damaged_safetensors(raw: bytes, seed: int) -> bytes:
    """The bytes of a safetensors file with one thing wrong in its tensors; which one goes round with the seed."""
    random, size = np.random.default_rng(seed), int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + size]), bytearray(raw[8 + size :])
    inner = folded(header["__metadata__"].get("steelyard"), "a file")
    if inner is not None:  # it is damaged as the plain file that it stands for
        header, data = json.loads(unfold(bytes(data[:inner]))), data[inner:]
    names = [name for name in header if name != "__metadata__" and len(set(header[name]["data_offsets"])) == 2]
    name = str(random.choice(names))
    start, end = header[name]["data_offsets"]
    kind = seed % 5
    if kind == 0:
        data[start + int(random.integers(end - start))] ^= 1 << int(random.integers(8))
    elif kind == 1:
        start, end, dtype = _scale(header, random)
        values = np.frombuffer(bytes(data[start:end]), dtype)
        data[start:end] = (values * values.dtype.type(1 + 2.0 ** -int(random.integers(1, 8)))).tobytes()
    elif kind == 2:
        _exchange(header, names, random)
    elif kind == 3:
        moved = data[end - 1 : end] + data[start : end - 1]
        data[start:end] = moved if moved != data[start:end] else bytes(255 - b for b in data[start:end])
    else:
        del data[len(data) - 1 - int(random.integers(len(data) - 1)) :]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + bytes(data)


def _joined(header: dict[str, Any]) -> dict[str, Any]:
    """The codec, dtype, part and pieces of every array in which the streams of several tensors lie."""
    found: dict[str, Any] = json.loads(header["__metadata__"]["steelyard"]).get("joined", {})
    return found


def _scale(header: dict[str, Any], random: np.random.Generator) -> tuple[int, int, str]:
    """Where a scale lies, and its type: an array of floats, or the step of a tensor's stream (see codecs.trellis)."""
    floats = {"F16": "<f2", "F32": "<f4"}
    found = [(*entry["data_offsets"], floats[entry["dtype"]]) for name, entry in header.items()
             if name != "__metadata__" and entry["dtype"] in floats]  # fmt: skip
    for key, (codec, _dtype, _part, pieces) in _joined(header).items():
        at = header[key]["data_offsets"][0]
        for size, *_shape in pieces.values():
            found += [(at + 1, at + 5, "<f4")] * (codec == "trellis")
            at += size
    return found[int(random.integers(len(found)))]


def _exchange(header: dict[str, Any], names: list[str], random: np.random.Generator) -> None:
    """Two arrays take each other's place, or two tensors in one array each other's name."""
    pieces = [key for key, (*_, inside) in _joined(header).items() if len(inside) > 1]
    if not pieces or (len(names) > 1 and random.random() < 0.5):
        a, b = random.choice(names, 2, replace=False)
        header[a], header[b] = header[b], header[a]
        return
    manifest = json.loads(header["__metadata__"]["steelyard"])
    inside = manifest["joined"][pieces[0]][3]
    a, b = random.choice(list(inside), 2, replace=False)
    renamed = {a: b, b: a}
    manifest["joined"][pieces[0]][3] = {renamed.get(name, name): size for name, size in inside.items()}
    header["__metadata__"]["steelyard"] = json.dumps(manifest)


def damaged_onnx(raw: bytes, seed: int) -> bytes:
    """The bytes of an ONNX file with one thing wrong in its tensors or its graph; which one goes round with the seed."""
    import onnx

    random, kind = np.random.default_rng(seed), seed % 7
    if kind == 0:
        place, data = int(random.integers(len(raw))), bytearray(raw)
        data[place] ^= 1 << int(random.integers(8))
        return bytes(data)
    if kind == 1:
        return raw[: int(random.integers(len(raw)))]
    model = onnx.load_from_string(raw)
    if kind == 2:
        twice = [node for node in model.graph.node if len(set(node.input)) > 1]
        node = twice[int(random.integers(len(twice)))]
        node.input[0], node.input[1] = node.input[1], node.input[0]
        return bytes(model.SerializeToString())
    tensors = {tensor.name: onnx.numpy_helper.to_array(tensor).copy() for tensor in model.graph.initializer}
    changes: list[Callable[[dict[str, np.ndarray], np.random.Generator], None]]
    changes = [_scaled, _swapped, _shifted, _cleared]
    changes[kind - 3](tensors, random)
    for tensor in model.graph.initializer:
        tensor.CopyFrom(onnx.numpy_helper.from_array(tensors[tensor.name], name=tensor.name))
    return bytes(model.SerializeToString())


def _scaled(tensors: dict[str, np.ndarray], random: np.random.Generator) -> None:
    """A scale where there is one, any floats otherwise, by up to a half too large."""
    floats = [name for name, x in tensors.items() if x.dtype.kind == "f" and x.any()]
    name = str(random.choice([name for name in floats if "scale" in name] or floats))
    tensors[name] = tensors[name] * tensors[name].dtype.type(1 + 2.0 ** -int(random.integers(1, 8)))


def _swapped(tensors: dict[str, np.ndarray], random: np.random.Generator) -> None:
    """Two tensors of one type and shape that differ; the halves of one where there are none."""
    pairs = [(a, b) for a in tensors for b in tensors if a < b and tensors[a].dtype == tensors[b].dtype
             and tensors[a].shape == tensors[b].shape and tensors[a].tobytes() != tensors[b].tobytes()]  # fmt: skip
    if pairs:
        a, b = pairs[int(random.integers(len(pairs)))]
        tensors[a], tensors[b] = tensors[b], tensors[a]
    else:
        name = max(tensors, key=lambda name: tensors[name].size)
        tensors[name] = np.roll(tensors[name], tensors[name].size // 2)


def _shifted(tensors: dict[str, np.ndarray], random: np.random.Generator) -> None:
    """By one element."""
    name = str(random.choice([n for n, x in tensors.items() if np.roll(x, 1).tobytes() != x.tobytes()]))
    tensors[name] = np.roll(tensors[name], 1)


def _cleared(tensors: dict[str, np.ndarray], random: np.random.Generator) -> None:
    """One element is the least that its type holds, or zero of floats."""
    name = str(random.choice([name for name, x in tensors.items() if x.size > 1 and x.dtype.kind in "fiu"]))
    x, place = tensors[name].ravel(), int(random.integers(tensors[name].size))
    empty = 0 if x.dtype.kind == "f" else np.iinfo(x.dtype).min
    x[place] = empty if x[place] != empty else 1
    tensors[name] = x.reshape(tensors[name].shape)
