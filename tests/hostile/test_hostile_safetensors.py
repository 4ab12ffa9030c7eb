"""Hostile safetensors files through Python and the command line: one typed line each, little memory, and a batch goes on."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from steelyard.errors import printable

from hostile_safetensors import HOSTILE, LARGE, ODD_NAMES, VALID
from jail import judged

UNPLACED = {"reserved key"}  # the place is in the text of the metadata, whose own spelling hides it
CLI = """
import resource, sys
from steelyard.cli import main
import steelyard.formats.safetensors, steelyard.explain.inventory, steelyard.explain.repeats, steelyard.report.text
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + int(sys.argv[1]),) * 2)
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
sys.exit(main(["inspect", *sys.argv[2:]]))
"""


def inspect(paths: Sequence[Path], memory: int, *words: str) -> subprocess.CompletedProcess[str]:
    """`steelyard inspect` of some files in a process that may take `memory` bytes and write no file."""
    command = [sys.executable, "-c", CLI, str(memory), *map(str, paths), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every small case as a file."""
    folder = tmp_path_factory.mktemp("hostile")
    found = {}
    for i, (case, content) in enumerate([*((c, b) for c, (b, _) in HOSTILE.items()), *VALID.items()]):
        found[case] = folder / f"{i:03}.safetensors"
        found[case].write_bytes(content)
    return found


@pytest.fixture(scope="module")
def refusals(files: dict[str, Path]) -> dict[str, object]:
    """What Python says of every small case, by its name."""
    found = judged(files.values(), 50_000_000)
    return {case: found[path] for case, path in files.items()}


@pytest.mark.parametrize("case", HOSTILE)
def test_python_refuses_with_one_typed_line_that_names_file_and_place(case, files, refusals) -> None:
    verdict = refusals[case]
    assert verdict.untyped == ""
    assert verdict.refusal.startswith(f"{files[case]}{'' if case in UNPLACED else ', byte '}")
    assert "\n" not in verdict.refusal
    assert verdict.refusal.isprintable()


@pytest.mark.parametrize("case", VALID)
def test_python_opens_what_is_odd_and_in_order(case, files, refusals) -> None:
    verdict = refusals[case]
    assert verdict.untyped == ""
    assert verdict.refusal == "" or "does not fit into memory" in verdict.refusal


@pytest.mark.parametrize("words", [(), ("--json",)], ids=str)
def test_the_command_line_names_each_and_goes_on(words: tuple[str, ...], files: dict[str, Path]) -> None:
    before = {path: path.read_bytes() for path in files.values()}
    done = inspect(list(files.values()), 100_000_000, *words)
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert [line.partition(".safetensors")[0] for line in lines] == [
        f"steelyard: {files[case]}".removesuffix(".safetensors") for case in HOSTILE
    ]
    assert all(line.isprintable() and len(line) < 700 for line in lines)
    assert {path: path.read_bytes() for path in files.values()} == before
    if words:
        shown = {json.loads(line)["meta"]["source"] for line in done.stdout.strip().split("\n")}
        assert shown == {str(files[case]) for case in VALID}
    else:
        assert all(line.isprintable() and len(line) < 5000 for line in done.stdout.splitlines())
        for name in ODD_NAMES:
            assert printable(name) in done.stdout


@pytest.mark.parametrize("case", LARGE)
def test_a_large_file_is_refused_in_bounded_memory(case: str, tmp_path: Path) -> None:
    path = tmp_path / "large.safetensors"
    header = LARGE[case].make(path)
    memory = 50_000_000 + 6 * min(header, 100_000_000)
    verdict = judged([path], memory)[path]
    assert verdict.untyped == ""
    assert verdict.refusal.startswith(f"{path}, byte ")
    assert LARGE[case].message in verdict.refusal
    assert len(verdict.refusal) < 1000
    assert verdict.seconds < 10  # a guard against what grows with the square; how long it takes is in bench/header
    done = inspect([path], memory)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"steelyard: {verdict.refusal}\n")
    path.unlink()


def test_a_terabyte_that_is_a_hole_is_listed(tmp_path: Path) -> None:
    path = tmp_path / "sparse.safetensors"
    entries = {
        f"layers.{i}.weight": {"dtype": "U8", "shape": [2**30], "data_offsets": [i << 30, i + 1 << 30]}
        for i in range(1024)
    }
    raw = json.dumps(entries).encode()
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        try:
            file.truncate(8 + len(raw) + 2**40)
        except OSError as error:
            pytest.skip(f"the disk holds no sparse file of this size: {error}")
    done = inspect([path], 50_000_000)
    assert done.returncode == 0
    assert "layers.{0..1023}.weight" in done.stdout
    assert f"{2**40:,}" in done.stdout


def test_a_file_cut_off_or_replaced_after_it_was_opened_is_an_error(tmp_path: Path) -> None:
    import numpy as np

    import steelyard as sy

    path = tmp_path / "x.safetensors"
    for change in (lambda: os.truncate(path, path.stat().st_size - 1), lambda: path.write_bytes(b"")):
        sy.write(sy.Weights.of({"a": np.zeros(1000)}), path)
        found = sy.open(path)
        change()
        with pytest.raises(sy.errors.FormatError, match="changed since it was opened"):
            found["a"].array()


def test_no_limit_of_this_process_is_left_behind() -> None:
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 0
