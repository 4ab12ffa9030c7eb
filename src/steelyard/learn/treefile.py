"""A tree of dictionaries, lists, numbers, texts and tensors as a safetensors file, and back.

Decides how a tree is told in the metadata of the file: JSON in which a tensor is its name, and a checksum of all that
there is. Nothing is pickled, and `steelyard inspect` and any safetensors reader show what is inside. Knows nothing of
what the tree means.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from steelyard.core.spec import Spec, dtype
from steelyard.core.weights import Weight, Weights
from steelyard.errors import FormatError, ModelError
from steelyard.formats.base import flat_bytes
from steelyard.formats.module import to_array, to_tensor
from steelyard.formats.safetensors import Safetensors
from steelyard.formats.source import LocalFile

KEY, SUM = "tree", "crc32"  # of the metadata


def write_tree(tree: Any, path: Path) -> int:
    """Write the tree, whole or not at all; its bytes. Raises ModelError for a value that no file can hold."""
    tensors: dict[str, Tensor] = {}
    told = json.dumps(_told(tree, "", tensors, {}))
    weights = Weights(_weight(name, tensor) for name, tensor in tensors.items())
    return Safetensors().write(weights.with_meta(**{KEY: told, SUM: _sum(told, weights)}), path)


def read_tree(path: Path) -> Any:
    """The tree in a whole file that `write_tree` wrote, its tensors on the CPU; raises FormatError for any other."""
    weights = Safetensors().open(LocalFile.of(path))
    try:
        told, meant = weights.meta[KEY], weights.meta[SUM]
        weights = weights.settle()
        if _sum(told, weights) != meant:
            raise FormatError(
                "is damaged: its checksum does not hold; put back a whole copy, or begin anew without it", path=path
            )
        return _read(json.loads(told), weights)
    except (KeyError, ValueError, TypeError) as error:
        raise FormatError(f"expected the state of a training: {error!r} in its metadata", path=path) from error


def _sum(told: str, weights: Weights) -> str:
    """The CRC-32 of the tree as it is told, and of the name, type and bytes of each tensor in the order of names."""
    crc = zlib.crc32(told.encode())
    for name in sorted(weights):
        crc = zlib.crc32(f"{name} {weights[name].spec}".encode(), crc)
        crc = zlib.crc32(flat_bytes(weights[name].array()), crc)
    return f"{crc:08x}"


def _weight(name: str, tensor: Tensor) -> Weight:
    return Weight(name, Spec(tuple(tensor.shape), dtype(str(tensor.dtype))), partial(to_array, tensor))


def _told(value: Any, path: str, tensors: dict[str, Tensor], seen: dict[int, str]) -> Any:
    """The value as JSON. Lists stand for themselves, everything else that contains others is a dict of one key."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        name = seen.setdefault(id(value), path)
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, Mapping) and all(isinstance(key, (str, int)) for key in value):
        return {"items": [[key, _told(inner, _under(path, key), tensors, seen)] for key, inner in value.items()]}
    if isinstance(value, (list, tuple)):
        listed = [_told(inner, _under(path, i), tensors, seen) for i, inner in enumerate(value)]
        return listed if isinstance(value, list) else {"tuple": listed}
    raise ModelError(f"{path} is a {type(value).__name__}: a checkpoint holds tensors, numbers, texts, lists and "
                     "dictionaries; keep that in one of them")  # fmt: skip


def _under(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def _read(told: Any, weights: Weights) -> Any:
    if isinstance(told, list):
        return [_read(inner, weights) for inner in told]
    if not isinstance(told, dict):
        return told
    ((kind, inner),) = told.items()
    if kind == "tensor":
        return to_tensor(weights[inner].array())
    if kind == "tuple":
        return tuple(_read(value, weights) for value in inner)
    if kind == "items":
        return {key: _read(value, weights) for key, value in inner}
    raise ValueError(kind)
