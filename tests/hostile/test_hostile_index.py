"""Hostile indexes and folders: ways out, devices, lies and bombs, through the library and the command line."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from steelyard.cli import main
from steelyard.core.weights import Weights
from steelyard.errors import FormatError, SteelyardError
from steelyard.formats import open, write
from steelyard.formats._index import INDEX_LIMIT
from steelyard.formats.sharded import Sharded

from jail import judged

INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
MEMORY = 50_000_000 + 6 * INDEX_LIMIT

Make = Callable[[Path], object]


def made(folder: Path) -> Path:
    """A folder of two files of two tensors, and a file outside that nobody is to read."""
    folder.mkdir()
    weights = Weights.of({name: np.full((2, 3), ord(name), np.float32) for name in "abcd"})
    write(weights, folder / INDEX, Sharded(shard_size=50))
    write(Weights.of({"a": np.zeros((2, 3), np.float32)}), folder.parent / f"{folder.name}-secret.safetensors")
    return folder


def mapped(**names: object) -> Make:
    """The index with other entries; None takes one away."""

    def make(folder: Path) -> None:
        data = json.loads((folder / INDEX).read_text())
        found = {**data["weight_map"], **names}
        data["weight_map"] = {name: file for name, file in found.items() if file is not None}
        (folder / INDEX).write_text(json.dumps(data))

    return make


def said(text: str | bytes) -> Make:
    return lambda folder: (folder / INDEX).write_bytes(text if isinstance(text, bytes) else text.encode())


def metadata(text: str) -> Make:
    def make(folder: Path) -> None:
        files = json.dumps(json.loads((folder / INDEX).read_text())["weight_map"])
        (folder / INDEX).write_text(f'{{"weight_map": {files}, "metadata": {text}}}')

    return make


def instead(file: str, make: Make) -> Make:
    """Something else in the place of a file."""

    def changed(folder: Path) -> None:
        (folder / file).unlink()
        make(folder / file)

    return changed


def outside(folder: Path) -> str:
    return str(folder.parent / f"{folder.name}-secret.safetensors")


def two_owners(folder: Path) -> None:
    write(Weights.of({name: np.zeros((2, 3), np.float32) for name in "bcd"}), folder / SECOND)


def sparse(path: Path, size: int) -> None:
    with path.open("wb") as file:
        file.write(b'{"weight_map": {')
        file.truncate(size)


def loop(folder: Path) -> None:
    (folder / SECOND).unlink()
    (folder / SECOND).symlink_to(folder / "x")
    (folder / "x").symlink_to(folder / SECOND)


CASES: dict[str, tuple[Make, str]] = {
    "upwards": (lambda f: mapped(a=f"../{f.name}-secret.safetensors")(f), "leads out of the folder"),
    "upwards from within": (mapped(a=f"x/../../{FIRST}"), "leads out of the folder"),
    "absolute": (lambda f: mapped(a=outside(f))(f), "leads out of the folder"),
    "of another system": (mapped(a="C:\\x.safetensors"), "leads out of the folder"),
    "backslashes": (mapped(a="..\\x.safetensors"), "leads out of the folder"),
    "the web": (mapped(a="https://example.org/x.safetensors"), "leads out of the folder"),
    "no name": (mapped(a=""), "no name of a file"),
    "NUL": (mapped(a="a\0b"), "no name of a file"),
    "too long a name": (mapped(a="x" * 5000), "no name of a file"),
    "half a character": (mapped(a="\ud800"), "no name of a file"),
    "a link out": (lambda f: instead(SECOND, lambda p: p.symlink_to(outside(f)))(f), "link that leads out"),
    "a folder that is a link out": (
        lambda f: ((f / "sub").symlink_to(f.parent), mapped(a=f"sub/{f.name}-secret.safetensors")(f)),
        "link that leads out",
    ),
    "a loop of links": (loop, "symbolic links|leads out"),
    "a link to itself": (instead(SECOND, lambda p: p.symlink_to(p)), "symbolic links"),
    "a pipe": (instead(SECOND, os.mkfifo), "expected a regular file"),
    "a device": (instead(SECOND, lambda p: p.symlink_to("/dev/zero")), "link that leads out"),
    "a folder as a file": (instead(SECOND, Path.mkdir), "found a directory"),
    "the folder itself": (mapped(a="."), "found a directory"),
    "an empty file": (instead(SECOND, Path.touch), "empty file"),
    "a missing file": (instead(SECOND, lambda p: None), f"{SECOND}.*no such file"),
    "a file of another kind": (instead(SECOND, lambda p: p.write_text("hello, no weights")), "data_offsets|header"),
    "a cut file": (instead(SECOND, lambda p: p.write_bytes(p.with_name(FIRST).read_bytes()[:-1])), "fetch it again"),
    "the index as a file": (mapped(a=INDEX), "names others"),
    "a pipe as the index": (instead(INDEX, os.mkfifo), "expected a regular file"),
    "two owners": (two_owners, f"'b' lies in '{SECOND}' and is said to lie in '{FIRST}'"),
    "more than there is": (mapped(e=FIRST), "'e' is said to lie in .* does not have it"),
    "less than there is": (mapped(a=None), "'a' lies in .* the index does not name it"),
    "another file": (mapped(a=SECOND), f"'a' is said to lie in '{SECOND}', which does not have it"),
    "one file under two names": (mapped(a=f"./{FIRST}"), "said to lie in"),
    "case": (mapped(a=FIRST.upper()), "differ by case only"),
    "200,000 files": (mapped(**{f"w{i}": f"{i}.safetensors" for i in range(200_000)}), "the limit is 10000"),
    "200,000 tensors": (mapped(**{f"w{i}": FIRST for i in range(200_000)}), "does not have it"),
    "a false total": (metadata('{"total_size": 95}'), "total_size is 95, the tensors take 96 bytes"),
    "no total": (metadata('{"total_size": -1}'), "expected a number of bytes"),
    "an endless total": (metadata('{"total_size": 1e999}'), "expected a number of bytes"),
    "a total of many digits": (metadata(f'{{"total_size": {"9" * 5000}}}'), "index: expected JSON"),
    "a total of some digits": (metadata(f'{{"total_size": {"9" * 4000}}}'), "expected a number of bytes"),
    "a total that is true": (metadata('{"total_size": true}'), "expected a number of bytes"),
    "metadata that is text": (metadata('"x"'), "expected an object as 'metadata'"),
    "metadata that is endless": (metadata('{"x": 1e999}'), "no number"),
    "a foreign manifest": (metadata('{"steelyard": "{}"}'), "version 1"),
    "a deep manifest": (metadata(json.dumps({"steelyard": "[" * 100_000})), "steelyard"),
    "half a character in the metadata": (metadata('{"x": "\\ud800"}'), "Unicode"),
    "half a character in a name": (said('{"weight_map": {"\\ud800": "x"}}'), "Unicode"),
    "1 GB": (instead(INDEX, lambda p: sparse(p, 1_000_000_000)), f"the limit is {INDEX_LIMIT}"),
    "30 MB of NUL": (instead(INDEX, lambda p: sparse(p, INDEX_LIMIT)), "expected JSON"),
    "deep": (said('{"weight_map": ' + "[" * 100_000), "nested too deep"),
    "very deep": (said('{"weight_map": ' + "[" * 29_000_000), "objects and lists"),
    "many objects": (metadata('{"x": [' + "{}," * 9_000_000 + "{}]}"), "objects and lists"),
    "spaces": (said(b'{"weight_map":' + b" " * 29_000_000), "expected JSON"),
    "a long name": (said('{"weight_map": {"' + "a" * 29_000_000 + '": "x"}}'), "no such file"),
    "no UTF-8": (said(b'{"weight_map": {"\xff": "x"}}'), "not UTF-8"),
    "UTF-16": (said('{"weight_map": {}}'.encode("utf-16")), "not UTF-8|expected JSON"),
    "a mark in front": (said('\ufeff{"weight_map": {}}'), "expected JSON"),
    "twice the same name": (said(f'{{"weight_map": {{"a": "{FIRST}", "a": "{SECOND}"}}}}'), "'a' is given twice"),
    "twice the map": (said('{"weight_map": {}, "weight_map": {}}'), "'weight_map' is given twice"),
    "no map": (said("{}"), "expected an object with a 'weight_map'"),
    "a list": (said("[]"), "expected a JSON object"),
    "a list of files": (said('{"weight_map": ["x"]}'), "expected an object with a 'weight_map'"),
    "files that are numbers": (said('{"weight_map": {"a": 1}}'), "expected an object with a 'weight_map'"),
    "files that are lists": (said('{"weight_map": {"a": ["x"]}}'), "expected an object with a 'weight_map'"),
    "nothing": (said(""), "empty file"),
    "half": (said('{"weight_map": {"a": '), "expected JSON"),
    "NaN": (said('{"weight_map": NaN}'), "NaN is no JSON"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for number, (case, (make, _)) in enumerate(CASES.items()):
        found[case] = made(tmp_path_factory.mktemp("hostile") / f"{number}")
        make(found[case])
    return found


def test_the_folder_that_is_made_hostile_is_a_good_one(tmp_path: Path) -> None:
    assert list(open(made(tmp_path / "x")).arrays()) == list("abcd")


@pytest.mark.parametrize("case", CASES)
def test_each_is_refused_in_one_line_that_names_the_file(case: str, folders: dict[str, Path], capsys) -> None:
    folder, message = folders[case], CASES[case][1]
    before = sorted(os.walk(folder))
    with pytest.raises(FormatError, match=message) as caught:
        open(folder)
    assert main(["inspect", str(folder)]) == 2
    for text in (str(caught.value), capsys.readouterr().err.removesuffix("\n").removeprefix("steelyard: ")):
        assert str(folder) in text
        assert "\n" not in text
        assert text.isprintable()
        assert len(text) < 1000
    assert sorted(os.walk(folder)) == before


def test_each_takes_little_time_and_memory_and_does_nothing_but_read(folders: dict[str, Path]) -> None:
    verdicts = judged(folders.values(), MEMORY, ("steelyard.formats.config", "steelyard.formats.manifest"))
    for case, folder in folders.items():
        verdict = verdicts[folder]
        assert not verdict.untyped, (case, verdict)
        assert verdict.refusal, case
        assert verdict.seconds < 1.5, (case, verdict.seconds)  # a second on a machine that is not busy


def test_a_pipe_is_not_waited_for(folders: dict[str, Path]) -> None:
    start = time.monotonic()
    for case in ("a pipe", "a pipe as the index"):
        with pytest.raises(FormatError):
            open(folders[case])
    assert time.monotonic() - start < 5


def test_names_are_escaped_where_they_are_shown(tmp_path: Path, capsys) -> None:
    folder = made(tmp_path / "x")
    mapped(a="red\x1b[31m\n\u202e.safetensors")(folder)
    assert main(["inspect", str(folder)]) == 2
    assert r"red\x1b[31m\n\u202e.safetensors" in capsys.readouterr().err


@pytest.mark.parametrize("file", ["config.json", "adapter_config.json"])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (os.mkfifo, "regular file"),
        (lambda p: p.symlink_to("/dev/zero"), "link that leads out"),
        (lambda p: p.symlink_to(p), "symbolic links"),
        (lambda p: p.write_text("[" * 100_000), "nested too deep"),
        (lambda p: p.write_text("{" + '"a":{},' * 200_000 + '"b":{}}'), "objects and lists"),
        (lambda p: p.write_text('{"model_type": 1, "model_type": 2}'), "given twice"),
        (lambda p: sparse(p, 1_000_000_000), "the limit is"),
        (lambda p: p.write_text('{"r": "\\ud800", "model_type": "\\ud800"}'), "Unicode"),
    ],
    ids=["pipe", "device", "loop", "deep", "many", "twice", "1 GB", "surrogate"],
)
def test_a_hostile_config_is_refused(tmp_path: Path, file: str, make: Make, message: str, capsys) -> None:
    model = "model.safetensors" if file == "config.json" else "adapter_model.safetensors"
    write(Weights.of({"a": np.zeros(1)}), tmp_path / model)
    make(tmp_path / file)
    if file == "adapter_config.json" and message == "nested too deep":
        message = "unknown format"  # a list is no config of an adapter
    start = time.process_time()
    with pytest.raises(FormatError, match=message) as caught:
        open(tmp_path)
    assert time.process_time() - start < 1.5
    assert str(tmp_path) in str(caught.value)
    assert main(["inspect", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_batch_goes_on_after_a_hostile_folder(folders: dict[str, Path], tmp_path: Path, capsys) -> None:
    good = made(tmp_path / "good")
    assert main(["inspect", str(folders["upwards"]), str(good), "--json"]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert {row["name"] for row in json.loads(captured.out.splitlines()[0])["rows"]} >= set("abcd")


def test_mutations_raise_nothing_untyped(tmp_path: Path) -> None:
    folder = made(tmp_path / "x")
    whole = {name: (folder / name).read_bytes() for name in (INDEX, FIRST, SECOND)}
    pieces = [
        b'"',
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b":",
        b"../",
        b"\0",
        b"\xff",
        b"1e999",
        b"null",
        b"-1",
        b"\\ud800",
        b"a",
    ]
    rng, refused = random.Random(0), 0
    for _ in range(1500):
        name = rng.choice([INDEX, INDEX, FIRST])
        data = bytearray(whole[name])
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(data))
            data[at : at + rng.choice([0, 1, 1, 2, 9])] = rng.choice(pieces)
        (folder / name).write_bytes(data)
        try:
            open(folder).arrays()
        except SteelyardError as error:
            refused += "\n" not in str(error)
        (folder / name).write_bytes(whole[name])
    assert refused > 1000
