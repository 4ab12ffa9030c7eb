"""ONNX: the onnx package as oracle, names in subgraphs and functions, external data, and what is left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steelyard.core.weights import Weights
from steelyard.errors import FormatError
from steelyard.formats import detect, locate, open

onnx = pytest.importorskip("onnx", reason="the oracle is the onnx package: pip install 'steelyard[deploy]'")
helper, numpy_helper, TensorProto = onnx.helper, onnx.numpy_helper, onnx.TensorProto
TYPES = [code for code in range(1, 27) if code != TensorProto.STRING]


def tensor(name: str, values: object = (1.0, 2.0), dtype: type = np.float32) -> Any:
    return numpy_helper.from_array(np.array(values, dtype), name)


def saved(path: Path, initializers: list = [], nodes: list = [], sparse: list = [], **fields: object) -> Path:  # noqa: B006
    graph = helper.make_graph(nodes, "g", [], [], initializers, sparse_initializer=sparse)
    path.write_bytes(helper.make_model(graph, **fields).SerializeToString())
    return path


def constant(name: str, values: object = (1.0, 2.0)) -> Any:
    return helper.make_node("Constant", [], [name], value=tensor("ignored", values))


def subgraph(*nodes: Any, initializers: tuple = ()) -> Any:
    return helper.make_graph(nodes, "below", [], [], initializers)


def equal(found: np.ndarray, expected: np.ndarray) -> None:
    assert (found.shape, found.dtype, found.tobytes()) == (expected.shape, expected.dtype, expected.tobytes())


@pytest.mark.parametrize("raw", [True, False], ids=["raw", "typed"])
@pytest.mark.parametrize("code", TYPES)
def test_every_type_is_what_the_onnx_package_reads(code: int, raw: bool, tmp_path: Path) -> None:
    dtype = helper.tensor_dtype_to_np_dtype(code)
    rng = np.random.default_rng(code)
    values = rng.integers(0, 2, 15) if dtype.kind == "b" else rng.normal(0, 30, 15) if dtype.kind in "fcV" else None
    if values is None:
        bits = {21: 4, 22: 4, 25: 2, 26: 2}.get(code, 8 * dtype.itemsize)
        signed = dtype.kind == "i" or code in (22, 26)
        low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if signed else (0, 2**bits)
        values = rng.integers(low, high, 15, np.int64 if signed else np.uint64)
    array = np.asarray(values).astype(dtype).reshape(3, 5)
    if raw:
        proto = numpy_helper.from_array(array, "w")
    else:
        flat = array.reshape(-1)
        proto = helper.make_tensor("w", code, (3, 5), flat.tolist() if code in (14, 15) else flat)
    if proto.HasField("raw_data") != raw:
        pytest.skip("the onnx package writes this type in the other way only")
    item = open(saved(tmp_path / "x.onnx", [proto]))["w"]
    equal(item.array(), numpy_helper.to_array(proto))
    equal(item.array(), array)
    assert (item.fill is not None) == (raw and item.spec.dtype.bits >= 8)
    assert np.concatenate([block.copy() for block in item.blocks(4)]).tobytes() == array.tobytes()


def test_every_model_of_the_onnx_package_opens_with_the_same_values() -> None:
    files = sorted((Path(onnx.__file__).parent / "backend" / "test" / "data").rglob("*.onnx"))
    if len(files) < 100:
        pytest.skip(f"this onnx package comes with {len(files)} models only")
    count = 0
    for path in files:
        weights, model = open(path), onnx.load(path)
        named = {proto.name: proto for proto in model.graph.initializer}
        named |= {
            node.output[0]: attribute.t
            for node in model.graph.node
            for attribute in node.attribute
            if node.op_type == "Constant" and attribute.name == "value"
        }
        for name, proto in named.items():
            if proto.data_type != TensorProto.STRING:
                equal(weights[name].array(), numpy_helper.to_array(proto))
                count += 1
        assert detect(path) == "onnx"
    assert count > 1000


def test_constants_have_the_name_of_their_output_and_other_tensors_that_of_their_attribute(tmp_path: Path) -> None:
    nodes = [
        constant("c", [3.0]),
        helper.make_node("Constant", [], ["number"], value_float=1.0),
        helper.make_node("ConstantOfShape", ["c"], ["filled"], value=tensor("v", [7.0])),
        helper.make_node("Trees", ["c"], ["y"], "forest", domain="d", values_as_tensor=tensor("", [5.0])),
    ]
    weights = open(saved(tmp_path / "x.onnx", [tensor("w")], nodes))
    assert {name: item.array().tolist() for name, item in weights.items()} == {
        "c": [3],
        "filled.value": [7],
        "forest.values_as_tensor": [5],
        "w": [1, 2],
    }


def test_names_of_subgraphs_get_a_path_only_where_they_are_there_twice(tmp_path: Path) -> None:
    deep = helper.make_node("Loop", [], ["z"], "loop", body=subgraph(constant("w", [5.0])))
    then = subgraph(constant("w", [3.0]), constant("own", [4.0]), deep)
    other = subgraph(initializers=(tensor("w", [6.0]), tensor("only", [7.0])))
    choice = [helper.make_node("If", ["c"], ["y"], "choice", then_branch=then, else_branch=other)]
    weights = open(saved(tmp_path / "x.onnx", [tensor("w", [1.0])], choice))
    assert {name: item.array().tolist() for name, item in weights.items()} == {
        "choice.else_branch/w": [6],
        "only": [7],
        "choice.then_branch/w": [3],
        "own": [4],
        "choice.then_branch/loop.body/w": [5],
        "w": [1],
    }
    twice = choice * 2
    weights = open(saved(tmp_path / "y.onnx", [], twice))
    assert len(weights) == 10
    assert "choice.then_branch/own~2" in weights
    with pytest.raises(FormatError, match="'w' is there twice in one graph"):
        open(saved(tmp_path / "z.onnx", [tensor("w"), tensor("w")]))


def test_functions_and_training_graphs_hold_weights_too(tmp_path: Path) -> None:
    body = [constant("w", [2.0])]
    function = helper.make_function("my", "Layer", [], ["w"], body, [helper.make_opsetid("", 17)])
    graph = helper.make_graph([constant("w", [1.0])], "g", [], [])
    model = helper.make_model(graph, functions=[function])
    model.training_info.add().initialization.CopyFrom(helper.make_graph([constant("start", [3.0])], "t", [], []))
    path = tmp_path / "x.onnx"
    path.write_bytes(model.SerializeToString())
    found = {name: item.array().tolist() for name, item in open(path).items()}
    assert found == {"w": [1], "Layer/w": [2], "start": [3]}


def test_sparse_initialisers_are_two_parts_and_text_is_named_and_left_out(tmp_path: Path) -> None:
    sparse = helper.make_sparse_tensor(tensor("s", [1.5, 2.5]), tensor("i", [2, 5], np.int64), [3, 4])
    words = helper.make_tensor("words", TensorProto.STRING, [2], [b"a", b"b"])
    weights = open(saved(tmp_path / "x.onnx", [words], sparse=[sparse]))
    assert {name: item.array().tolist() for name, item in weights.items()} == {
        "s.values": [1.5, 2.5],
        "s.indices": [2, 5],
    }
    assert weights.meta["sparse.s"] == "[3, 4]"
    assert weights.meta["skipped"] == "'words' [2]: text is no weight"


def test_metadata(tmp_path: Path) -> None:
    graph = helper.make_graph([], "graph name", [], [])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.example", 2)]
    model = helper.make_model(graph, producer_name="me", model_version=3, opset_imports=opsets, ir_version=9)
    helper.set_model_props(model, {"author": "É"})
    path = tmp_path / "x.onnx"
    path.write_bytes(model.SerializeToString())
    assert dict(open(path).meta) == {
        "ir_version": "9",
        "producer_name": "me",
        "graph.name": "graph name",
        "model_version": "3",
        "opset_import": "ai.onnx 17, com.example 2",
        "metadata_props.author": "É",
    }


def test_external_data_are_read_from_the_folder_and_shared_bytes_are_tied(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(40, 50)).astype(np.float32)
    graph = helper.make_graph([], "g", [], [], [tensor("a", values), tensor("b", values + 1)])
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph), path, save_as_external_data=True, location="model.data", size_threshold=0)
    assert locate(tmp_path).path == path
    weights = open(path)
    equal(weights["a"].array(), values)
    equal(weights["b"].array(), values + 1)
    assert str(tmp_path / "model.data") in weights["b"].origin
    assert np.concatenate([block.copy() for block in weights["b"].blocks(77)]).tobytes() == (values + 1).tobytes()
    model = onnx.load(path, load_external_data=False)
    shared = model.graph.initializer.add()
    shared.CopyFrom(model.graph.initializer[0])
    shared.name = "tied"
    path.write_bytes(model.SerializeToString())
    assert dict(open(path).ties) == {"tied": "a"}
    (tmp_path / "model.data").unlink()
    with pytest.raises(FormatError, match=r"initializer\[0\] 'a'\.external_data: .*model.data: there is no such file"):
        open(path)


def test_opening_reads_no_values(tmp_path: Path) -> None:
    counter = Path("/proc/self/io")
    if not counter.exists():
        pytest.skip("this system does not count the bytes that a process reads")
    big = np.zeros(1 << 20, np.float32)
    typed = helper.make_tensor("typed", TensorProto.INT64, [1 << 20], np.ones(1 << 20, np.int64))
    path = saved(tmp_path / "x.onnx", [tensor("a", big), typed], [constant("c", big)])
    open(path)

    def read_so_far() -> int:
        return int(counter.read_text().split()[1])

    nothing = -read_so_far() + read_so_far()
    before = read_so_far()
    open(path)
    assert read_so_far() - before - nothing < 10_000


def test_the_content_tells_the_format_and_other_messages_are_not_claimed(tmp_path: Path) -> None:
    path = saved(tmp_path / "model.bin", [tensor("a")])
    assert detect(path) == "onnx"
    assert isinstance(open(path), Weights)
    (tmp_path / "saved_model.pb").write_bytes(b"\x08\x01\x12\x05hello")
    with pytest.raises(FormatError, match="unknown format"):
        detect(tmp_path / "saved_model.pb")
