"""Hostile ONNX files: bombs, lies and paths that lead out, through the library and the command line; mutations."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from steelyard.cli import main
from steelyard.errors import FormatError, SteelyardError
from steelyard.formats import open

from jail import judged


def varint(n: int) -> bytes:
    n &= (1 << 64) - 1
    out = b""
    while n > 127:
        out, n = out + bytes([n & 127 | 128]), n >> 7
    return out + bytes([n])


def number(field: int, n: int) -> bytes:
    return varint(field << 3) + varint(n)


def message(field: int, *content: bytes, length: int | None = None) -> bytes:
    data = b"".join(content)
    return varint(field << 3 | 2) + varint(len(data) if length is None else length) + data


VERSION = number(1, 8)


def model(*graph: bytes, rest: bytes = b"") -> bytes:
    return VERSION + message(7, *graph) + rest


def tensor(*content: bytes, dims: tuple[int, ...] = (2,), code: int = 1, name: str = "w") -> bytes:
    """The content of a TensorProto."""
    return b"".join(number(1, n) for n in dims) + number(2, code) + b"".join(content) + message(8, name.encode())


def weight(*content: bytes, **options: object) -> bytes:
    return message(5, tensor(*content, **options))  # type: ignore[arg-type]


RAW = message(9, b"12345678")


def node(*attributes: bytes, kind: str = "Constant") -> bytes:
    return message(1, message(2, b"y"), message(4, kind.encode()), *(message(5, *a) for a in map(_listed, attributes)))


def _listed(attribute: bytes) -> tuple[bytes, bytes]:
    return message(1, b"value"), attribute


def nested(depth: int) -> bytes:
    graph = b""
    for _ in range(depth):
        graph = node(message(6, graph), kind="If")
    return graph


def external(location: str | None, **more: str) -> bytes:
    pairs = ({} if location is None else {"location": location}) | more
    entries = [message(13, message(1, k.encode()), message(2, v.encode())) for k, v in pairs.items()]
    return model(weight(*entries, number(14, 1)))


def groups(depth: int) -> bytes:
    return b"\x3b" * depth + b"\x3c" * depth


HOSTILE: dict[str, tuple[bytes, str]] = {
    "an empty message": (b"\x08", "ends inside a field"),
    "no graph": (VERSION, "expected a graph, found none"),
    "two graphs": (model() + message(7), "one graph, this one has more"),
    "graph as a number": (VERSION + number(7, 1), r"graph: expected a length \(wire type 2\), found a varint"),
    "a group": (VERSION + groups(1), r"wire type 0, 1, 2 or 5, found 3 \(a group\)"),
    "deep groups": (model(groups(100_000)), r"graph: expected .*found 3 \(a group\)"),
    "wire type 7": (model(b"\x0f"), "found 7"),
    "field 0": (model(b"\x00\x00"), "field number from 1 to"),
    "field 2^29": (model(varint(1 << 32) + b"\0"), "field number from 1 to"),
    "a varint of eleven bytes": (VERSION + b"\x28" + b"\x80" * 10 + b"\x01" + model(), "more than 10 bytes"),
    "a varint of 70 bits": (VERSION + b"\x28" + b"\xff" * 9 + b"\x7f" + model(), "more than 64 bits"),
    "a length beyond the file": (VERSION + message(7, b"", length=2**40), "takes 1099511627776 bytes, 0 are left"),
    "a length of 2^64-1": (VERSION + message(7, b"", length=2**64 - 1), "takes 18446744073709551615 bytes"),
    "a length beyond its message": (model(message(5, b"", length=5), rest=b"\x12\x06123456"), "field 5 takes 5"),
    "a cut varint": (model(weight(RAW)) + b"\x28\x80", "ends inside a varint"),
    "deep graphs": (model(nested(40)), "graphs lie more than 32 deep"),
    "very deep graphs": (model(nested(5000)), "graphs lie more than 32 deep"),
    "many nodes": (model(b"\x0a\x00" * 2_000_000), "more than 1000000 fields"),
    "many fields of a model": (VERSION + b"\x12\x00" * 2_000_000 + message(7), "more than 1000000 fields"),
    "many attributes": (model(message(1, b"\x2a\x00" * 2_000_000)), "more than 1000000 fields"),
    "many tensors of one name": (model(weight(dims=(0,)) * 300_000), "more than 1000000 fields"),
    "many packed dimensions": (model(message(5, message(1, b"\x01" * 3_000_000))), "dims: more than 1000000 fields"),
    "many lonely numbers": (model(weight(b"\x25\0\0\0\0" * 400_000, dims=(400_000,))), "more than 1000000 fields"),
    "rank 65": (model(weight(RAW, dims=(1,) * 65)), "expected up to 64 dimensions"),
    "a negative dimension": (model(weight(RAW, dims=(-2,))), r"dims: expected .* found \[-2\]"),
    "a dimension of 2^62": (model(weight(RAW, dims=(2**62,))), "takes 18446744073709551616 bytes, the field has 8"),
    "a product of 2^64": (model(weight(RAW, dims=(2**32, 2**32))), "raw_data: .* the field has 8"),
    "a product of 2^4000": (model(weight(RAW, dims=(2**62,) * 64)), r"about 2\^99\d bytes"),
    "dims as text": (model(message(5, b"\x0d1234" + tensor(RAW))), r"dims: expected a length"),
    "type 0": (model(message(5, number(1, 2), RAW)), "data_type: there is no type 0"),
    "type 99": (model(weight(RAW, code=99)), "data_type: there is no type 99"),
    "type -1": (model(weight(RAW, code=-1)), "data_type: there is no type -1"),
    "no values": (model(weight()), "float_data: .* takes 8 bytes, the field has 0"),
    "raw too short": (model(weight(message(9, b"1234567"))), "raw_data: .* takes 8 bytes, the field has 7"),
    "raw twice": (model(weight(RAW, RAW)), "raw_data: is given twice"),
    "raw as a number": (model(weight(number(9, 1))), "raw_data: expected a length"),
    "values twice": (model(weight(RAW, message(4, b"12345678"))), "given twice, as raw_data and float_data"),
    "values in another field": (
        model(weight(message(5, b"\1\2"))),
        "expected values in float_data, found .* int32_data",
    ),
    "too few varints": (model(weight(message(7, b"\x80\1"), code=7)), "takes 2 whole numbers, found 1"),
    "a varint that is cut": (model(weight(message(7, b"\1\x80"), code=7)), "whole numbers, found 1"),
    "varints of 20 bytes": (model(weight(message(7, b"\x80" * 19 + b"\1"), code=7)), "more than 10 bytes"),
    "bytes for 2^40 varints": (model(weight(message(7, b"\1\1"), dims=(2**40,), code=7)), "int64_data: .* has 2"),
    "segments": (model(weight(RAW, message(3, number(1, 0)))), "segment: a tensor in segments"),
    "a name that is no UTF-8": (model(message(5, tensor(RAW), message(8, b"\xff"))), "name: expected UTF-8"),
    "an endless name": (model(weight(RAW, name="a" * 70_000)), "name: a text of 70000 bytes, the limit is 65536"),
    "the same name twice": (model(weight(RAW), weight(RAW)), "'w' is there twice in one graph"),
    "half a sparse tensor": (model(message(15, message(1, tensor(RAW)))), "expected values and indices"),
    "an attribute with two values": (
        model(message(1, message(5, message(5, tensor(RAW)) * 2))),
        "one value is given twice",
    ),
    "external, up": (external("../secret.data"), r"external_data: .*'\.\./secret\.data' leads out of the folder"),
    "external, hidden up": (external("a/../../secret.data"), "leads out of the folder"),
    "external, absolute": (external("/etc/passwd"), "'/etc/passwd' leads out of the folder"),
    "external, drive": (external("c:\\secret"), "leads out of the folder"),
    "external, link": (external("link.data"), "link that leads out of the folder"),
    "external, pipe": (external("pipe.data"), "expected a regular file"),
    "external, folder": (external("inner"), "expected a file, found a directory"),
    "external, address": (external("*/_ORT_MEM_ADDR_/*"), "no such file"),
    "external, NUL": (external("a\0b"), "no name of a file"),
    "external, nowhere": (external(None, offset="0"), "expected a location"),
    "external, short": (external("good.data", offset="93"), r"bytes 93 to 101 of 'good\.data', which has 100"),
    "external, far": (external("good.data", offset="9" * 19), "which has 100"),
    "external, negative": (external("good.data", offset="-8"), "offset: expected a number of bytes, found '-8'"),
    "external, endless": (external("good.data", offset="9" * 5000), "offset: expected a number of bytes"),
    "external, other digits": (external("good.data", offset="\u0663"), "offset: expected a number of bytes"),
    "external, length": (external("good.data", length="4"), "takes 8 bytes, the length is 4"),
    "external and here": (model(weight(RAW, number(14, 1))), "both here and in an external file"),
    "external without a sign": (model(weight(RAW, number(14, 7))), "data_location: expected 1"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the files that the cases speak of."""
    inner = tmp_path / "root"
    (inner / "inner").mkdir(parents=True)
    (tmp_path / "secret.data").write_bytes(bytes(100))
    (inner / "good.data").write_bytes(bytes(100))
    (inner / "link.data").symlink_to(tmp_path / "secret.data")
    os.mkfifo(inner / "pipe.data")
    return inner


def test_what_the_cases_are_made_of_is_valid(folder: Path) -> None:
    path = folder / "x.onnx"
    for content in (model(weight(RAW)), external("good.data", offset="92", length="8"), model(nested(32))):
        path.write_bytes(content)
        open(path).arrays()


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_an_error_with_its_place(case: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, message = HOSTILE[case]
    path = folder / "x.onnx"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=message) as caught:
        open(path).arrays()
    assert str(caught.value).startswith(f"{path}, byte ")
    assert len(str(caught.value)) < 1500
    if "varint" not in case:  # what only the values tell is found when they are read
        assert main(["inspect", str(path)]) == 2
        assert main(["convert", str(path), str(folder / "out.safetensors")]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        first, second = captured.err.splitlines()
        assert str(caught.value).strip() in first
        assert str(caught.value).strip() in second
        assert not (folder / "out.safetensors").exists()


def test_all_of_them_take_little_time_and_memory_and_do_nothing_else(folder: Path) -> None:
    paths = {case: folder / f"{index}.onnx" for index, case in enumerate(HOSTILE)}
    for case, path in paths.items():
        path.write_bytes(HOSTILE[case][0])
    before = sorted(os.listdir(folder))
    verdicts = judged(paths.values(), memory=120_000_000)
    for case, path in paths.items():
        verdict = verdicts[path]
        assert not verdict.untyped, (case, verdict)
        assert verdict.refusal, case
        assert verdict.seconds < 1.5, (case, verdict.seconds)  # a second on a machine that is not busy
    assert sorted(os.listdir(folder)) == before


def test_hostile_names_are_escaped_where_they_are_shown(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "red\x1b[31m\n\u202e../"
    path = folder / "x.onnx"
    path.write_bytes(
        model(weight(RAW, name=name), rest=message(14, message(1, b"\x1b[31m"), message(2, b"\x1b]0;x\7")))
    )
    assert list(open(path)) == [name]
    assert main(["inspect", str(path)]) == 0
    assert not set("\x1b\u202e\7") & set(capsys.readouterr().out)
    path.write_bytes(model(weight(name=name)))
    with pytest.raises(FormatError) as caught:
        open(path)
    assert str(caught.value).isprintable()


def rich() -> bytes:
    """A model that uses every message that is looked into."""
    typed = weight(message(7, varint(5) + varint(-1)), code=7, name="typed")
    packed = weight(message(9, b"\x21"), code=22, name="nibbles")
    lonely = weight(b"\x25\0\0\x80\x3f" * 2, name="lonely")
    sparse = message(
        15, message(1, tensor(RAW, name="s")), message(2, tensor(message(7, b"\1\2"), code=7)), number(3, 9)
    )
    branch = message(6, node(message(5, tensor(RAW, name=""))), weight(RAW, name="w"))
    away = weight(
        message(13, message(1, b"location"), message(2, b"good.data")),
        message(13, message(1, b"offset"), message(2, b"16")),
        number(14, 1),
        name="away",
    )
    text = weight(message(6, b"hello"), code=8, name="text")
    graph = (node(message(5, tensor(RAW))), node(branch, kind="If"), message(2, b"g"), weight(RAW), typed, packed)
    function = message(
        25, message(1, b"f"), message(7, message(2, b"k")), node(message(5, tensor(RAW))).replace(b"\x0a", b"\x3a", 1)
    )
    rest = message(8, message(1, b""), number(2, 17)) + message(14, message(1, b"k"), message(2, b"v")) + function
    return model(*graph, lonely, sparse, away, text, rest=rest + message(20, message(1, weight(RAW, name="t"))))


def _flip(data: bytearray, rng: random.Random) -> None:
    data[rng.randrange(len(data))] = rng.randrange(256)


def _edge(data: bytearray, rng: random.Random) -> None:
    data[rng.randrange(len(data))] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, 0x0B, 0x3A, 0x2A, 0x0A, 0x12, 0x4A))


def _insert(data: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(data))
    data[at:at] = rng.choice(
        (b"\xff" * 10, b"\x80" * 9 + b"\1", varint(2**63), number(1, -1), message(9), b"\x0b", RAW)
    )


def _cut(data: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(data))
    del data[at : at + rng.randrange(1, 12)]


def _copy(data: bytearray, rng: random.Random) -> None:
    at, to, count = rng.randrange(len(data)), rng.randrange(len(data)), rng.randrange(1, 40)
    data[to:to] = data[at : at + count]


def _lengthen(data: bytearray, rng: random.Random) -> None:
    """A length that its message does not have: the byte after a tag of wire type 2 is another one."""
    places = [at for at in range(len(data) - 1) if data[at] & 7 == 2]
    data[rng.choice(places) + 1] = rng.randrange(256)


MUTATIONS: tuple[Callable[[bytearray, random.Random], None], ...] = (_flip, _edge, _insert, _cut, _copy, _lengthen)


def test_ten_thousand_mutations_are_refused_or_read(folder: Path) -> None:
    whole, path = rich(), folder / "x.onnx"
    path.write_bytes(whole)
    assert len(open(path).arrays()) == 12
    rng = random.Random(3)
    refused: list[str] = []
    for _ in range(10_000):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 1, 1, 2, 5))):
            rng.choice(MUTATIONS)(data, rng)
            data = data or bytearray(b"\0")
        path.write_bytes(data)
        try:
            open(path).arrays()
        except SteelyardError as error:
            refused.append(str(error))
    assert 2000 < len(refused) < 9900
    assert not [text for text in refused if "\n" in text or str(path) not in text]
