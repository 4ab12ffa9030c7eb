"""The graph of an ONNX file with other weights of the same names: what runs them where ONNX runs.

Decides that every floating-point tensor of the weights has to find its place. Needs the extra ``deploy``.
"""

from __future__ import annotations

from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any

from steelyard.core.weights import Weights, given
from steelyard.deploy.onnx import require
from steelyard.errors import FormatError, ModelError, quoted
from steelyard.formats.base import check_target, replacing
from steelyard.learn.calling import calling
from steelyard.learn.options import check_kind


def with_weights(graph: str | Path, weights: Weights, target: str | Path) -> None:
    """Write the ONNX file `graph` to `target` with the values of `weights` in place of its own.

    Initialisers and constants of the main graph are found by name, as `sy.open` names them. The values are plain, of
    the dtype that the graph has: the file is as large as it was. Raises ModelError for a tensor of `weights` that the
    graph does not have, or has in another shape, and for a graph that cannot be read; FormatError for a target that is
    the graph itself or cannot be written. The target is replaced whole, or left as it was.

    ::

        steelyard shrink model.onnx small.safetensors        # small; and where model.onnx is, too:
        sy.with_weights("model.onnx", sy.open("small.safetensors"), "restored.onnx")
    """
    require()
    import onnx

    for what, path in (("graph", graph), ("target", target)):
        check_kind(what, path, (str, PathLike), "the path of an ONNX file")
    given(weights)
    if Path(target).suffix != ".onnx":  # the values of a graph may lie in files of other names beside it
        raise FormatError("expected a name that ends in .onnx", path=Path(target))
    check_target(Path(target), Path(graph), force=True)
    with calling(f"onnx, reading {Path(graph).name},"):
        model = onnx.load(str(graph))
    places = dict(_tensors(model.graph))
    for name, weight in weights.items():
        if weight.spec.dtype.kind != "float":
            continue
        place = places.get(name)
        if place is None:
            raise ModelError(f"{Path(graph).name} has no tensor {quoted(name)} in its main graph to take these values")
        if tuple(place.dims) != weight.spec.shape:
            raise ModelError(f"{quoted(name)} is {list(place.dims)} in {Path(graph).name}, and the weights have "
                             f"{list(weight.spec.shape)}")  # fmt: skip
        with calling(f"onnx, given {quoted(name)},"):
            dtype = onnx.helper.tensor_dtype_to_np_dtype(place.data_type)
            place.CopyFrom(onnx.numpy_helper.from_array(weight.array().astype(dtype), name=place.name))
    with calling(f"onnx, writing {Path(target).name},"):
        content = model.SerializeToString()
    with replacing(Path(target)) as file:
        file.write(content)


def same_but_values(a: str | Path, b: str | Path) -> bool:
    """Whether two ONNX files have the same graph, with tensors of the same names, shapes and types."""
    require()
    import onnx

    found = []
    for path in (a, b):
        with calling(f"onnx, reading {Path(path).name},"):
            model = onnx.load(str(path))
        for _, tensor in _tensors(model.graph):
            kept = onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
            tensor.CopyFrom(kept)
        found.append(model.SerializeToString(deterministic=True))
    return bool(found[0] == found[1])


def _tensors(graph: Any) -> Iterator[tuple[str, Any]]:
    """The tensors of a graph under their names; a constant has the name of its output."""
    for tensor in graph.initializer:
        yield tensor.name, tensor
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.name == "value":
                yield node.output[0], attribute.t
