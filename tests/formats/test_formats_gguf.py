"""GGUF beyond the laws: typed metadata, axes, block types, what others write and read, and what is refused."""

from __future__ import annotations

import json
import os
import random
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from steelyard.cli import main
from steelyard.codecs import CODECS
from steelyard.core.packed import Packed, nest, pack
from steelyard.core.spec import DTYPES, Spec
from steelyard.core.weights import Weight, Weights
from steelyard.edit.pack import Pack
from steelyard.errors import CodecError, FormatError, SteelyardError
from steelyard.explain.architecture import metadata
from steelyard.formats import open, write
from steelyard.formats._gguf_header import KINDS
from steelyard.formats.gguf import codec_of

from gguf_files import ARRAY, CODES, STRING, entry, gguf, padded, seeds, spoil, tensor

LAW = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
BLOCKS = [kind for kind in KINDS.values() if kind.dtype is None]


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def again(path: Path, through: str = "") -> bytes:
    """What comes of a file that is opened and written, by way of a file of another format or none."""
    weights = open(path)
    if through:
        write(weights, path.with_suffix(through))
        weights = open(path.with_suffix(through))
    write(weights, path.with_name("again.gguf"))
    return path.with_name("again.gguf").read_bytes()


@pytest.mark.parametrize("through", ["", ".safetensors", ".npz"])
def test_a_file_that_is_read_is_written_the_same(through: str, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    architecture = entry("general.architecture", STRING, "unknown")
    for content in [*seeds()[:3], gguf([architecture]), gguf([entry("n", 0, 1), architecture])]:
        path.write_bytes(content)
        assert again(path, through) == content


def test_metadata_is_text_that_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    entries = [
        entry("general.architecture", STRING, "llama"),
        entry("n", 4, 30),
        entry("eps", 6, 1e-6),
        entry("third", 12, 1 / 3),
        entry("yes", 7, True),
        entry("tokens", ARRAY, (STRING, ["a", "é\n", b"\xff\xfe"])),
        entry("scores", ARRAY, (6, [0.1, float("inf"), -0.0])),
        entry("odd", STRING, b"\xff"),
        entry("nested", ARRAY, (ARRAY, [(0, [1]), (STRING, ["x"])])),
    ]
    path.write_bytes(gguf(entries))
    meta = dict(open(path).meta)
    types = json.loads(meta.pop("gguf.types"))
    assert meta == {
        "general.architecture": "llama",
        "n": "30",
        "eps": "1e-06",
        "third": "0.3333333333333333",
        "yes": "true",
        "tokens": '["a","é\\n","\\udcff\\udcfe"]',
        "scores": '[0.1,"Infinity",-0.0]',
        "odd": '"\\udcff"',
        "nested": '[["uint8",[1]],["string",["x"]]]',
    }
    assert types == {
        "n": "uint32",
        "eps": "float32",
        "third": "float64",
        "yes": "bool",
        "tokens": "string[]",
        "scores": "float32[]",
        "odd": "string",
        "nested": "array[]",
    }
    assert again(path) == path.read_bytes()


BITS = {kind: st.binary(min_size=struct.calcsize(code), max_size=struct.calcsize(code)) for kind, code in CODES.items()}


@LAW
@given(data=st.data())
def test_any_value_comes_back_bit_for_bit(data: st.DataObject, tmp_path: Path) -> None:
    def bare(kind: int, depth: int) -> bytes:
        if kind == STRING:
            raw = data.draw(st.binary(max_size=6))
            return struct.pack("<Q", len(raw)) + raw
        if kind == 7:
            return data.draw(st.sampled_from([b"\0", b"\1"]))
        if kind != ARRAY:
            return data.draw(BITS[kind])
        inner = data.draw(st.sampled_from([k for k in (*CODES, STRING, ARRAY) if k != ARRAY or depth < 2]))
        count = data.draw(st.integers(0, 3))
        return struct.pack("<IQ", inner, count) + b"".join(bare(inner, depth + 1) for _ in range(count))

    kinds = data.draw(st.lists(st.sampled_from([*CODES, STRING, ARRAY]), max_size=5))
    entries = [entry("general.architecture", STRING, "é")]
    for i, kind in enumerate(kinds):
        entries.append(entry(str(i), 0, 0)[:-5] + struct.pack("<I", kind) + bare(kind, 0))
    path = tmp_path / "x.gguf"
    path.write_bytes(gguf(entries))
    assert again(path) == path.read_bytes()
    assert again(path, ".safetensors") == path.read_bytes()


def test_every_float32_with_few_digits_comes_back(tmp_path: Path) -> None:
    bits = np.random.default_rng(0).integers(0, 1 << 32, 5000, np.uint32)
    bits[:6] = [1, 0x7F7FFFFF, 0x00800000, 0x7FC00000, 0x7F800001, 0x80000000]
    path = tmp_path / "x.gguf"
    raw = struct.pack("<IIQ", ARRAY, 6, bits.size) + bits.tobytes()
    path.write_bytes(gguf([entry("general.architecture", STRING, "x"), entry("f", 0, 0)[:-5] + raw]))
    assert again(path) == path.read_bytes()


def test_whatever_is_accepted_can_be_written_and_is_then_the_same(tmp_path: Path) -> None:
    rng, whole, path = random.Random(2), seeds(), tmp_path / "x.gguf"
    accepted = 0
    for _ in range(700):
        path.write_bytes(spoil(rng, rng.choice(whole), whole))
        try:
            weights = open(path)
        except SteelyardError:
            continue
        accepted += 1
        first = again(path)
        found = open(tmp_path / "again.gguf")
        assert dict(found.meta) == dict(weights.meta)
        for name, item in weights.items():
            assert (found[name].spec, found[name].scheme) == (item.spec, item.scheme)
        path.write_bytes(first)
        assert again(path) == first
    assert accepted > 50


def test_metadata_is_made_when_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from steelyard.formats import _gguf_meta

    path = tmp_path / "x.gguf"
    path.write_bytes(gguf([entry("t", ARRAY, (STRING, ["a"]))], [tensor("w")], padded(bytes(8))))
    asked: list[int] = []
    right = _gguf_meta._read_array
    monkeypatch.setattr(_gguf_meta, "_read_array", lambda *args: (asked.append(args[1]), right(*args))[1])
    weights = open(path)
    assert len(list(weights.values())) == 1
    assert "t" in weights.select(lambda item: True).meta
    assert weights.with_meta(more="x", t="y").meta["t"] == "y"
    assert not asked
    assert weights.with_meta(more="x").meta["more"] == "x"
    assert weights.meta["t"] == '["a"]'
    assert asked


def test_the_beginning_of_a_long_text_is_made_of_the_first_elements(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    tokens = [("é", "", '"', b"\xff")[i % 4] for i in range(40)]
    path.write_bytes(gguf([entry("t", ARRAY, (STRING, tokens)), entry("n", 4, 30), entry("s", STRING, "text")]))
    meta = open(path).meta
    for key in meta:
        for count in (0, 1, 2, 3, 7, 30, 1000):
            assert meta.beginning(key, count) == meta[key][:count]
    assert len(meta._made["t"](5)) < len(meta["t"]) / 3
    shown = {row["key"]: row["value"] for row in metadata(open(path), 6).rows}
    assert shown == {"t": '["é","…', "n": "30", "s": "text", "gguf.types": '{"t":"…'}
    assert {row["key"]: row["value"] for row in metadata(open(path)).rows} == dict(meta)


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({"n": "30", "gguf.types": '{"n":"uint8"}'}, None),
        ({"n": "300", "gguf.types": '{"n":"uint8"}'}, "metadata 'n': expected uint8, .* found '300'"),
        ({"n": "true", "gguf.types": '{"n":"uint8"}'}, "metadata 'n': expected uint8"),
        ({"n": "1", "gguf.types": '{"n":"bool"}'}, "metadata 'n': expected bool"),
        ({"n": "x", "gguf.types": '{"n":"float32"}'}, "metadata 'n': expected float32"),
        ({"n": '"x"', "gguf.types": '{"n":"float32"}'}, "metadata 'n': expected float32"),
        ({"n": '"NaN:00000000"', "gguf.types": '{"n":"float32"}'}, "metadata 'n': expected float32"),
        ({"n": "1e39", "gguf.types": '{"n":"float32"}'}, "metadata 'n': expected float32"),
        ({"n": "[1", "gguf.types": '{"n":"uint8[]"}'}, r"metadata 'n': expected uint8\[\]"),
        ({"n": "1", "gguf.types": '{"n":"uint8[]"}'}, r"metadata 'n': expected uint8\[\]"),
        ({"n": "[[1,2]]", "gguf.types": '{"n":"array[]"}'}, r"metadata 'n': expected array\[\]"),
        ({"n": "1", "gguf.types": '{"n":"array"}'}, "metadata 'n': expected array"),
        ({"n": "1", "gguf.types": '{"n":"int1"}'}, "metadata 'n': expected int1"),
        ({"n": "1", "gguf.types": '{"n":1}'}, "metadata 'gguf.types': expected an object"),
        ({"gguf.types": "["}, "JSON"),
        (
            {"general.alignment": "64"},
            "general.alignment': expected a power of two as uint32, found '64' of type 'string'",
        ),
        ({"general.alignment": "13", "gguf.types": '{"general.alignment":"uint32"}'}, "expected a power of two"),
        ({"general.alignment": "64", "gguf.types": '{"general.alignment":"uint32"}'}, None),
        ({"steelyard": "x"}, "reserved"),
        ({"k" * 70_000: "x"}, "more than 65535 bytes"),
    ],
    ids=lambda value: None,
)
def test_metadata_that_its_types_do_not_fit_is_refused(
    meta: dict[str, str], message: str | None, tmp_path: Path
) -> None:
    weights = Weights.of({"w": normal(3)}, meta=meta)
    if message is None:
        write(weights, tmp_path / "x.gguf")
        assert dict(open(tmp_path / "x.gguf").meta) == meta
        return
    with pytest.raises(FormatError, match=message):
        write(weights, tmp_path / "x.gguf")
    assert os.listdir(tmp_path) == []


def test_the_alignment_that_is_said_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    meta = {"general.alignment": "128", "gguf.types": '{"general.alignment":"uint32"}'}
    write(Weights.of({"a": normal(3), "b": normal(3)}, meta=meta), path)
    assert [int(item.origin.rpartition("@")[2]) % 128 for item in open(path).values()] == [0, 0]
    assert path.stat().st_size % 128 == 0


def test_an_architecture_is_written_where_none_is_said(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    write(Weights.of({"w": normal(3)}), path)
    assert entry("general.architecture", STRING, "unknown") in path.read_bytes()
    assert dict(open(path).meta) == {}
    write(Weights.of({"w": normal(3)}, meta={"k": "v", "general.architecture": "llama"}), path)
    assert b"unknown" not in path.read_bytes()
    assert list(open(path).meta) == ["k", "general.architecture"]


def test_axes_are_turned_round(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(gguf([], [tensor("w", (4, 3, 2))], np.arange(24, dtype=np.float32).tobytes() + bytes(32)))
    assert open(path)["w"].spec.shape == (2, 3, 4)
    assert open(path)["w"].array()[1, 2].tolist() == [20, 21, 22, 23]


@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.name)
def test_every_block_type_is_opened_and_carried(kind: object, tmp_path: Path) -> None:
    path, rows = tmp_path / "x.gguf", 3
    raw = np.random.default_rng(0).integers(0, 256, rows * 2 * kind.width, np.uint8).tobytes()
    head = [entry("general.architecture", STRING, "x")]
    path.write_bytes(gguf(head, [tensor("w", (2 * kind.block, rows), kind.code)], padded(raw)))
    weights = open(path)
    codec = codec_of(kind)
    assert (codec.block, codec.width) == (kind.block, kind.width)
    assert weights["w"].spec == Spec.of((rows, 2 * kind.block), "float32")
    assert weights["w"].stored == len(raw)
    assert weights["w"].scheme.codec == codec
    assert again(path) == again(path, ".safetensors") == path.read_bytes()
    if codec.name == "ggml":
        with pytest.raises(CodecError, match=rf"x.gguf @\d+: 'w': {kind.name}: is carried and not decoded"):
            weights["w"].array()
        with pytest.raises(CodecError, match="'w'"):
            list(weights["w"].blocks(100))
    else:
        whole = weights["w"].array()
        assert np.concatenate([b.copy() for b in weights["w"].blocks(97)]).tobytes() == whole.tobytes()


@pytest.mark.parametrize("codec", ["q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q4_k", "q5_k", "q6_k"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_blocks_are_written_as_they_are_held(codec: str, dtype: str, tmp_path: Path) -> None:
    x = (normal(4, 512) / 50).astype(DTYPES[dtype].numpy)
    path = tmp_path / "x.gguf"
    write(Pack(CODECS[codec]())(Weights.of({"w": x, "v": x})), path)
    found = open(path)
    held = CODECS[codec]().encode(x)["blocks"]
    assert found["w"].spec == Spec.like(x)
    assert found["w"].scheme.codec.name == codec
    assert found["w"].read().parts["blocks"].tobytes() == held.tobytes()
    assert (b"steelyard" in path.read_bytes()) == (dtype != "float32")
    worst = {"q8": 0.01, "q6": 0.03, "q5": 0.06, "q4": 0.12}[codec[:2]]
    y = found["w"].array().astype(np.float64)
    assert np.linalg.norm(y - x.astype(np.float64)) < worst * np.linalg.norm(x.astype(np.float64))


@pytest.mark.parametrize(("codec", "most"), [("q4_k", 0.074), ("q5_k", 0.037), ("q6_k", 0.018)])
def test_the_search_for_scales_is_worth_it(codec: str, most: float) -> None:
    x, found = normal(16, 1024), CODECS[codec]()
    lost = np.linalg.norm(found.decode(found.encode(x), Spec.like(x)) - x) / np.linalg.norm(x)
    assert lost < most  # scales from the largest and the smallest element alone: 0.078, 0.038 and 0.0184


def test_blocks_that_are_encoded_in_turn_or_lie_are_parts_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    x = normal(2, 256)
    q8 = CODECS["q8_0"]()
    nested = pack(x, nest(q8, blocks=CODECS["entropy"]()))
    surprise = Weight("s", Spec.like(x), lambda: pack(x, q8))
    weights = Weights([Weight.of("n", nested), surprise, Weight.of("p", x)])
    write(weights, path)
    assert open(path)["n"].scheme == nested.scheme
    assert open(path)["s"].scheme.codec == q8
    assert open(path)["s"].array().tobytes() == open(path)["n"].array().tobytes()
    wrong = Packed(Spec.like(x), q8, {"blocks": np.zeros((1, 34), np.uint8)})
    with pytest.raises(CodecError, match="'w': expected blocks of the shape"):
        write(Weights.of({"w": wrong}), path)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("w" * 65, (1,), "at most 64 bytes; rename it"),
        ("é" * 33, (1,), "at most 64 bytes"),
        ("w", (1, 1, 1, 1, 1), "at most 4 dimensions, this one 5"),
    ],
)
def test_what_ggml_does_not_hold_is_refused(name: str, shape: tuple[int, ...], message: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=message):
        write(Weights.of({name: np.zeros(shape, np.float32)}), tmp_path / "x.gguf")
    assert os.listdir(tmp_path) == []


def test_a_file_may_end_with_its_last_tensor(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(gguf([], [tensor("w")], struct.pack("<2f", 1, 2)))
    assert open(path)["w"].array().tolist() == [1, 2]


def test_convert_to_and_from_gguf(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "x.safetensors", tmp_path / "x.gguf"
    values = {"a.weight": normal(8, 64), "a.bias": normal(8, seed=1)}
    write(Weights.of(values, meta={"general.architecture": "llama"}), source)
    assert main(["convert", str(source), str(target), "--codec", "q8_0", "--where", "*.weight", "--verify"]) == 0
    found = open(target)
    assert found["a.weight"].scheme.codec.name == "q8_0"
    assert found["a.bias"].array().tobytes() == values["a.bias"].tobytes()
    assert found.meta["general.architecture"] == "llama"
    assert main(["inspect", str(target)]) == 0
    assert "q8_0" in capsys.readouterr().out
    held, plain, other = (tmp_path / f"{name}.safetensors" for name in ("held", "plain", "other"))
    assert main(["convert", str(target), str(held)]) == 0
    assert open(held)["a.weight"].scheme.codec.name == "q8_0"
    assert main(["convert", str(target), str(plain), "--codec", "plain"]) == 0
    assert open(plain)["a.weight"].scheme is None
    assert open(plain)["a.weight"].array().tobytes() == found["a.weight"].array().tobytes()
    assert main(["convert", str(target), str(other), "--codec", "entropy"]) == 0
    assert open(other)["a.weight"].array().tobytes() == found["a.weight"].array().tobytes()


def test_a_codec_that_does_not_fit_says_which_tensor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "x.safetensors"
    write(Weights.of({"odd": normal(8, 30)}), source)
    assert main(["convert", str(source), str(tmp_path / "x.gguf"), "--codec", "q8_0"]) == 2
    said = capsys.readouterr().err
    assert "'odd'" in said
    assert "multiple of 32, found 30" in said
    assert os.listdir(tmp_path) == ["x.safetensors"]


# What gguf-py, the library of llama.cpp, writes and reads


@pytest.fixture
def peer() -> object:
    return pytest.importorskip("gguf", reason="gguf-py is not installed")


@pytest.mark.parametrize("type", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_the_whole_file_is_that_of_the_peer(type: str, peer: object, tmp_path: Path) -> None:
    theirs, ours = tmp_path / "theirs.gguf", tmp_path / "ours.gguf"
    values = {"a.weight": normal(16, 256), "b.weight": normal(3, 32, seed=1) * np.float32(1e-3)}
    kind = peer.GGMLQuantizationType[type]
    writer = peer.GGUFWriter(theirs, "llama")
    writer.add_uint32("llama.block_count", 2)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    for name, x in values.items():
        writer.add_tensor(name, peer.quants.quantize(x, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert again(theirs) == theirs.read_bytes()
    plain = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    meta = dict(open(theirs).meta)
    if type in plain:
        weights = Weights.of({n: x.astype(DTYPES[plain[type]].numpy) for n, x in values.items()}, meta=meta)
    else:
        weights = Pack(CODECS[type.lower()]())(Weights.of(values, meta=meta))
    write(weights, ours)
    assert ours.read_bytes() == theirs.read_bytes()
    for tensor_of in peer.GGUFReader(ours).tensors:
        assert tuple(reversed(tensor_of.shape.tolist())) == values[tensor_of.name].shape


@pytest.mark.parametrize("kind", [kind for kind in BLOCKS if codec_of(kind).name != "ggml"], ids=lambda kind: kind.name)
def test_blocks_are_decoded_as_the_peer_does(kind: object, peer: object) -> None:
    raw = np.random.default_rng(3).integers(0, 256, (999, kind.width), np.uint8)
    ours = codec_of(kind).decode({"blocks": raw}, Spec.of((999, kind.block), "float32")).reshape(-1)
    with np.errstate(all="ignore"):
        theirs = peer.quants.dequantize(raw.reshape(-1), peer.GGMLQuantizationType(kind.code))
    same = ours.view(np.uint32) == theirs.view(np.uint32)
    assert (same | (np.isnan(ours) & np.isnan(theirs))).all()
    assert np.isfinite(ours).mean() > 0.8


def test_a_language_model_of_a_package_is_decoded_as_the_peer_does(peer: object) -> None:
    folder = os.environ.get("STEELYARD_GGUF")
    if not folder:
        pytest.skip("STEELYARD_GGUF names no .gguf file of a language model")
    weights = open(folder)
    for found in peer.GGUFReader(folder).tensors:
        expected = peer.quants.dequantize(found.data, found.tensor_type)
        assert weights[found.name].array().tobytes() == np.ascontiguousarray(expected).tobytes()
