"""Hostile GGUF files: lies about counts, lengths, types and places, and sets with parts missing or mixed up.

Through the library and the command line; the kinds are those of the tests of llama.cpp and of published attacks.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from steelyard.cli import main
from steelyard.errors import FormatError
from steelyard.formats import open

from gguf_files import ARRAY, STRING, entry, gguf, padded, tensor, text
from jail import judged

HUGE = 2**64 - 1
DATA = padded(bytes(8))
MEMORY = 150_000_000  # the limit of a header, and what a reader needs besides


def u32(n: int) -> bytes:
    return struct.pack("<I", n)


def array(kind: int, count: int, content: bytes = b"") -> bytes:
    """An entry "a" with an array that lies about its length."""
    return text("a") + u32(ARRAY) + struct.pack("<IQ", kind, count) + content


def nested(depth: int) -> bytes:
    return text("a") + u32(ARRAY) + struct.pack("<IQ", ARRAY, 1) * depth + struct.pack("<IQ", 0, 0)


def one(*dims: int, data: bytes = DATA, entries: tuple[bytes, ...] = (), **said: int) -> bytes:
    """A file of one tensor."""
    return gguf(entries, [tensor("w", dims or (2,), **said)], data)  # type: ignore[arg-type]


def aligned(kind: int, content: object) -> bytes:
    return one(entries=(entry("general.alignment", kind, content),))


HOSTILE: dict[str, tuple[bytes, str]] = {
    # the header
    "only the magic": (b"GGUF", "the header: expected 24 bytes, the file has 4"),
    "a cut header": (gguf()[:23], "the header: expected 24 bytes"),
    "version 0": (gguf(version=u32(0)), "byte 4: expected version 2 or 3"),
    "version 1": (gguf(version=u32(1)), "byte 4: expected version 2 or 3 of GGUF, found 1"),
    "a future version": (gguf(version=u32(4)), "byte 4: expected version 2 or 3 of GGUF, found 4"),
    "big-endian": (gguf(version=struct.pack(">I", 3)), "byte 4: a big-endian file"),
    "2^64-1 tensors": (gguf(counts=(HUGE, None)), r"byte 8: 2\^64-1 tensors"),
    "2^64-1 entries": (gguf(counts=(None, HUGE)), r"byte 16: 2\^64-1 metadata entries"),
    "2^63 tensors": (gguf(counts=(2**63, None)), "byte 8: 9223372036854775808 tensors"),
    "tensors that do not fit": (gguf([], [tensor("w")], DATA, counts=(9, None)), "byte 8: 9 tensors do not fit a file"),
    "entries that do not fit": (
        gguf([entry("k", 0, 1)], counts=(None, 9)),
        "byte 16: 9 metadata entries do not fit a file",
    ),
    # metadata
    "a key of 2^64-1 bytes": (gguf([text("k", HUGE) + bytes(99)]), r"byte 24: the key of metadata entry 0 has 2\^64-1"),
    "a key of 2^16 bytes": (gguf([entry("k" * 65536, 0, 1)]), "the key of metadata entry 0 has 65536 bytes, the limit"),
    "a key beyond the file": (gguf([text("k", 999) + bytes(9)]), "the key of metadata entry 0: expected 1007 bytes"),
    "a key that is no text": (gguf([entry(b"\xff\xfe", 0, 1)]), "byte 32: the key of metadata entry 0 is not UTF-8"),
    "a key given twice": (gguf([entry("k", 0, 1), entry("k", 0, 2)]), "the metadata key 'k' is given twice"),
    "a value of type 13": (gguf([text("k") + u32(13) + bytes(9)]), "metadata 'k': there is no type of value 13"),
    "a value of type -1": (gguf([text("k") + u32(2**32 - 1) + bytes(9)]), "there is no type of value 4294967295"),
    "a truth value of 2": (gguf([text("k") + u32(7) + b"\2" + bytes(9)]), "expected 0 or 1 as a truth value, found 2"),
    "truth values of 2": (gguf([array(7, 3, b"\1\2\0")]), "expected 0 or 1 as truth values"),
    "a cut value": (gguf([entry("kkkkk", 12, 1.0)])[:44], "metadata 'kkkkk': expected 8 bytes, the file has 3"),
    "a text of 2^64-1 bytes": (
        gguf([text("k") + u32(8) + text("", HUGE)]),
        "metadata 'k': expected 18446744073709551623",
    ),
    "a text of 2^64-9 bytes": (
        gguf([text("k") + u32(8) + text("", HUGE - 8)]),
        r"metadata 'k': expected 2\^64-1 bytes",
    ),
    "a text of 2^40 bytes": (
        gguf([text("k") + u32(8) + text("", 2**40)]),
        "metadata 'k': expected 1099511627784 bytes",
    ),
    "an array of type 13": (gguf([array(13, 1, bytes(99))]), "metadata 'a': there is no type of element 13"),
    "2^64-1 elements": (gguf([array(0, HUGE)]), r"metadata 'a': 2\^64-1 elements do not fit"),
    "2^61 elements of 8 bytes": (gguf([array(10, 2**61)]), "metadata 'a': 2305843009213693952 elements do not fit"),
    "2^64-1 texts": (gguf([array(8, HUGE)]), r"metadata 'a': 2\^64-1 elements do not fit"),
    "a text in an array that wraps": (
        gguf([array(8, 2, text("", HUGE - 7) + bytes(99))]),
        "metadata 'a': expected 1844",
    ),
    "2^64-1 arrays": (gguf([array(9, HUGE)]), r"metadata 'a': 2\^64-1 elements do not fit"),
    "arrays 5 deep": (gguf([nested(5)]), "arrays lie in arrays 4 deep"),
    "arrays 5,000 deep": (gguf([nested(5000)]), "arrays lie in arrays 4 deep"),
    "four million empty texts": (
        gguf([array(8, (1 << 22) + 1, bytes(((1 << 22) + 1) * 8))]),
        "more than 4194304 texts",
    ),
    "four million empty arrays": (gguf([array(9, 1 << 23, bytes(12 << 23))]), "more than 4194304 texts"),
    # the alignment
    "alignment 0": (aligned(4, 0), "general.alignment': expected a power of two from 8 to 65536, found 0"),
    "alignment 1": (aligned(4, 1), "general.alignment': expected a power of two from 8 to 65536, found 1"),
    "alignment 13": (aligned(4, 13), "general.alignment': expected a power of two from 8 to 65536, found 13"),
    "alignment 2^31": (aligned(4, 2**31), "expected a power of two from 8 to 65536, found 2147483648"),
    "alignment as uint64": (aligned(10, 32), "general.alignment': expected a uint32, found uint64"),
    "alignment as text": (aligned(STRING, "32"), "general.alignment': expected a uint32, found string"),
    "alignment as an array": (aligned(ARRAY, (4, [32])), "general.alignment': expected a uint32, found array"),
    # tensors
    "a name of 2^64-1 bytes": (gguf([], [text("w", HUGE) + bytes(99)]), r"the name of tensor 0 has 2\^64-1 bytes"),
    "a name of 1025 bytes": (gguf([], [tensor("w" * 1025)], DATA), "the name of tensor 0 has 1025 bytes, the limit"),
    "a name that is no text": (gguf([], [tensor(b"w\xff")], DATA), "byte 33: the name of tensor 0 is not UTF-8"),
    "a name given twice": (gguf([], [tensor("w"), tensor("w", offset=32)], DATA * 2), "tensor 'w' is there twice"),
    "5 dimensions": (one(1, 1, 1, 1, 1), "tensor 'w': 5 dimensions, the limit is 4"),
    "2^32-1 dimensions": (one(2, rank=2**32 - 1), "tensor 'w': 4294967295 dimensions"),
    "more dimensions than there are": (
        gguf([], [tensor("w", (2,), rank=4)[:-4]]),
        "tensor 'w': expected 48 bytes|byte 8",
    ),
    "2^32 x 2^32": (one(2**32, 2**32), "tensor 'w': the dimensions .* have more than 2.60 elements"),
    "2^63": (one(2**63), "tensor 'w': the dimensions .* have more than 2.60 elements"),
    "2^64-1": (one(HUGE), "tensor 'w': the dimensions .* have more than 2.60 elements"),
    "2^62 beside 0": (one(0, 2**62, 2**62, 2**63), "tensor 'w': the dimensions .* have more than 2.60 elements"),
    "2^59 elements": (one(2**59), "tensor 'w': expected 2305843009213693952 bytes"),
    "type 9999": (one(code=9999), "tensor 'w': there is no type 9999"),
    "type -1": (one(code=2**32 - 1), "tensor 'w': there is no type 4294967295"),
    "type q4_2, removed": (one(code=4), r"tensor 'w': the type q4_2 \(4\) was removed"),
    "type q4_0_4_4, removed": (one(code=31), r"tensor 'w': the type q4_0_4_4 \(31\) was removed"),
    "broken blocks": (one(33, code=2, data=bytes(64)), "rows of 33 elements are not whole blocks of 32, as q4_0"),
    "broken rows": (one(16, 2, code=8, data=bytes(64)), "rows of 16 elements are not whole blocks of 32, as q8_0"),
    "one number in blocks": (gguf([], [tensor("w", (), 12)], bytes(144)), "rows of 1 elements are not whole blocks"),
    "a byte less than the tensor": (one(9, data=bytes(35)), "tensor 'w': expected 36 bytes from byte"),
    "no data": (one(data=b""), "tensor 'w': expected 8 bytes from byte"),
    "an offset beyond the file": (one(offset=64), "tensor 'w': expected 8 bytes from byte"),
    "an offset of 2^64-32": (one(offset=2**64 - 32), "tensor 'w': expected 8 bytes from byte 18446744073709551"),
    "an empty tensor far away": (one(0, offset=2**40), "tensor 'w': expected 0 bytes from byte"),
    "an offset that is not aligned": (one(offset=8), "tensor 'w': the offset 8 is no multiple of the alignment 32"),
    "overlapping": (
        gguf([], [tensor("w", (9,)), tensor("v", (8,), offset=32)], bytes(96)),
        "tensor 'v' lies on tensor 'w'",
    ),
    "the same place": (gguf([], [tensor("w"), tensor("v")], DATA), "tensor '[vw]' lies on tensor '[vw]'"),
    # what steelyard itself writes
    "a manifest that is no text": (one(entries=(entry("steelyard", 4, 1),)), "metadata 'steelyard'"),
    "a manifest with a wrong dtype": (
        one(entries=(entry("steelyard", STRING, '{"version":1,"dtypes":{"w":"uint8"}}'),)),
        "tensor 'w': float32 cannot stand for uint8",
    ),
    "a manifest with no dtype": (
        one(entries=(entry("steelyard", STRING, '{"version":1,"dtypes":{"w":[]}}'),)),
        "expected names of dtypes",
    ),
    "a manifest of another tensor": (
        one(entries=(entry("steelyard", STRING, '{"version":1,"dtypes":{"v":"uint8"}}'),)),
        "the dtype of 'v', which is not there",
    ),
    "blocks of whole numbers": (
        one(
            32,
            code=8,
            data=bytes(64),
            entries=(entry("steelyard", STRING, '{"version":1,"dtypes":{"w":"int32"}}'),),
        ),
        "tensor 'w': q8_0 cannot stand for int32",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_an_error_with_its_place(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, message = HOSTILE[case]
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=message) as caught:
        open(path)
    said = str(caught.value)
    assert said.startswith(f"{path}, byte ") or "manifest" in case
    assert said.startswith(str(path))
    assert said.isprintable()
    assert len(said) < 1000
    assert main(["inspect", str(path)]) == 2
    assert main(["convert", str(path), str(tmp_path / "out.safetensors")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert [said in line for line in captured.err.splitlines()] == [True, True]
    assert os.listdir(tmp_path) == ["x.gguf"]


def test_all_of_them_take_little_time_and_memory_and_do_nothing_else(tmp_path: Path) -> None:
    paths = {case: tmp_path / f"{index}.gguf" for index, case in enumerate(HOSTILE)}
    for case, path in paths.items():
        path.write_bytes(HOSTILE[case][0])
    for case, content in {"a huge array": array(0, 2**40), "a huge text": text("k") + u32(8) + text("", 2**40)}.items():
        paths[case] = tmp_path / f"{case}.gguf"
        paths[case].write_bytes(gguf([content]))
        os.truncate(paths[case], 2**41)  # sparse: the bytes that it speaks of are there
    verdicts = judged(paths.values(), memory=MEMORY, imports=("steelyard.codecs.ggml_k",))
    for case, path in paths.items():
        verdict = verdicts[path]
        assert not verdict.untyped, (case, verdict)
        assert verdict.refusal, case
        assert verdict.seconds < 1.5, (case, verdict.seconds)  # a second on a machine that is not busy
    assert "takes more than 100000000 bytes" in verdicts[paths["a huge array"]].refusal


def test_a_chat_template_is_text_and_nothing_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    template = "{{ ''.__class__.__mro__[1].__subclasses__() }}{% for c in [].__class__.__base__ %}\x1b[2J{% endfor %}"
    path = tmp_path / "x.gguf"
    path.write_bytes(one(entries=(entry("tokenizer.chat_template", STRING, template),)))
    assert open(path).meta["tokenizer.chat_template"] == template
    assert main(["inspect", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "{{ ''.__class__.__mro__[1].__subclasses__() }}" in shown
    assert "\x1b" not in shown


def test_hostile_names_are_escaped_where_they_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "red\x1b[31m\n\u202e../"
    path = tmp_path / "x.gguf"
    path.write_bytes(gguf([entry("\x1b[31m", STRING, "\x1b]0;x\7")], [tensor(name)], DATA))
    assert list(open(path)) == [name]
    assert main(["inspect", str(path)]) == 0
    assert not set("\x1b\u202e\7") & set(capsys.readouterr().out)
    path.write_bytes(gguf([], [tensor(name, offset=8)], DATA))
    with pytest.raises(FormatError) as caught:
        open(path)
    assert str(caught.value).isprintable()


def part(
    number: int | None, count: int | None, names: str, total: int | None = 4, *, kinds: tuple[int, int, int] = (2, 2, 5)
) -> bytes:
    """A file of a set: tensors of one letter each."""
    said = (("split.no", number), ("split.count", count), ("split.tensors.count", total))
    entries = [entry(key, kind, n) for (key, n), kind in zip(said, kinds, strict=True) if n is not None]
    return gguf(entries, [tensor(name, offset=32 * i) for i, name in enumerate(names)], DATA * len(names))


def name(number: int, count: int = 3) -> str:
    return f"m-{number:05}-of-{count:05}.gguf"


WHOLE = {name(1): part(0, 3, ""), name(2): part(1, 3, "ab"), name(3): part(2, 3, "cd")}

SETS: dict[str, tuple[dict[str, bytes | None], str, str]] = {  # what is changed, what is opened, what is said
    "a part is missing": ({name(2): None}, name(1), "part 2 of 3, 'm-00002-of-00003.gguf', is missing"),
    "the last part is missing": ({name(3): None}, name(1), "part 3 of 3, 'm-00003-of-00003.gguf', is missing"),
    "not the first": ({}, name(2), "is part 2 of 3; open the first, 'm-00001-of-00003.gguf'"),
    "reordered": ({name(2): WHOLE[name(3)], name(3): WHOLE[name(2)]}, name(1), "the header says part 3 of 3"),
    "doubled": ({name(3): WHOLE[name(2)]}, name(1), "the header says part 2 of 3; the parts are mixed up"),
    "the second as the first": ({name(1): WHOLE[name(2)]}, name(1), "the header says part 2 of 3"),
    "of another set": ({name(2): part(1, 4, "ab")}, name(1), "the header says part 2 of 4"),
    "the first of another set": ({name(1): part(0, 4, "")}, name(1), "the header says 4 parts; name them"),
    "no numbers in a part": ({name(2): part(None, None, "ab")}, name(1), r"the header says part \? of None"),
    "no numbers in the first": ({name(1): part(None, None, "")}, name(1), "the header says nothing of parts"),
    "a number as text": (
        {name(2): gguf([entry("split.no", STRING, "1"), entry("split.count", 2, 3)])},
        name(1),
        "part ?",
    ),
    "a tensor in two parts": ({name(3): part(2, 3, "bc")}, name(1), "tensor 'b' is in another part already"),
    "too few tensors": ({name(3): part(2, 3, "c")}, name(1), "expected 4 tensors in all parts, found 3"),
    "no number of tensors": ({name(1): part(0, 3, "", None)}, name(1), "expected None tensors in all parts, found 4"),
    "a negative number of tensors": ({name(1): part(0, 3, "", -1)}, name(1), "expected -1 tensors in all parts"),
    "65535 parts": ({name(1, 65535): part(0, 65535, "")}, name(1, 65535), "part 2 of 65535, .* is missing"),
    "another name": ({"m.gguf": WHOLE[name(1)]}, "m.gguf", "the header says 3 parts; name them"),
    "a cut part": ({name(3): WHOLE[name(3)][:-30]}, name(1), r"m-00003-of-00003\.gguf, byte \d+: tensor 'd': expected"),
}


def folder_of(tmp_path: Path, changes: dict[str, bytes | None]) -> Path:
    folder = tmp_path / "set"
    folder.mkdir()
    for file, content in {**WHOLE, **changes}.items():
        if content is not None:
            (folder / file).write_bytes(content)
    return folder


@pytest.mark.parametrize("case", SETS)
def test_a_hostile_set_is_an_error_that_names_the_part(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes, opened, message = SETS[case]
    path = folder_of(tmp_path, changes) / opened
    with pytest.raises(FormatError, match=message) as caught:
        open(path)
    assert str(path.parent) in str(caught.value)
    assert main(["inspect", str(path)]) == 2
    assert str(caught.value) in capsys.readouterr().err


@pytest.mark.parametrize("instead", ["link out", "pipe", "folder", "link to itself"])
def test_a_part_must_be_a_file_of_the_folder(instead: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {name(2): None})
    make: dict[str, Callable[[Path], object]] = {
        "link out": lambda path: (tmp_path / "x").write_bytes(WHOLE[name(2)]) and path.symlink_to(tmp_path / "x"),
        "pipe": os.mkfifo,
        "folder": Path.mkdir,
        "link to itself": lambda path: path.symlink_to(path),
    }
    make[instead](folder / name(2))
    with pytest.raises(FormatError, match=r"leads out|regular file|missing|symbolic links"):
        open(folder / name(1))


def test_a_whole_set_is_opened_by_its_first_file_or_its_folder(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {})
    for path in (folder, folder / name(1)):
        weights = open(path)
        assert list(weights) == ["a", "b", "c", "d"]
        assert dict(weights.meta) == {}
        assert weights["c"].origin.startswith(f"{folder / name(3)} @")
        assert all(array.tolist() == [0, 0] for array in weights.arrays().values())
