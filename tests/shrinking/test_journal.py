"""What a search has found so far: whole again after a kill, and never less than it was without a word."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steelyard.core.weights import Weights
from steelyard.errors import ModelError
from steelyard.shrinking import looks
from steelyard.shrinking.journal import Journal

ABOUT = {"model": "m", "seed": 0}
REMEDY = "put back a whole copy of the folder"


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """A folder with an answer, weights, and two looks."""
    journal = Journal(tmp_path / "kept", ABOUT)
    journal.of("losses", lambda: [0.1, float("nan"), 1e-300])
    journal.weights("8 bits", lambda: Weights.of({"w": np.arange(6.0)}))
    looks.taken(journal, {"tolerance": 0.02})
    looks.taken(journal, {"tolerance": 0.03})
    return tmp_path / "kept"


def unasked() -> Any:
    raise AssertionError("was asked again")


def test_all_that_was_found_is_there_again(kept: Path) -> None:
    journal = Journal(kept, ABOUT)
    assert repr(journal.of("losses", unasked)) == "[0.1, nan, 1e-300]"
    assert journal.weights("8 bits", unasked)["w"].array().tolist() == list(range(6))
    assert looks.number(journal, {"tolerance": 0.04}) == 3
    journal.of("more", lambda: 1)
    assert Journal(kept, ABOUT).of("more", unasked) == 1


def test_every_bit_of_a_line_counts(kept: Path) -> None:
    """But for those that leave the same JSON; the newline at the very end is what a kill may leave out."""
    file = kept / "journal.jsonl"
    whole, answers = file.read_bytes(), Journal(kept, ABOUT).known("")
    refused = 0
    for at in range(len(whole)):
        for bit in (0, 3, 6):
            file.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
            try:
                found = Journal(kept, ABOUT).known("")
            except ModelError:
                refused += 1
            else:
                assert repr(found) == repr(answers), (at, bit)
    assert refused > 2.9 * len(whole)


def test_every_cut_is_told_and_so_is_every_line_that_is_gone(kept: Path) -> None:
    file = kept / "journal.jsonl"
    whole = file.read_bytes()
    lines = whole.splitlines(keepends=True)
    for end in range(len(whole)):
        file.write_bytes(whole[:end])
        with pytest.raises(ModelError, match=r"journal.jsonl has \d of the 5 lines that were written; " + REMEDY):
            Journal(kept, ABOUT)
        assert file.read_bytes() == whole[:end], "it is left as it was"
    for gone in range(len(lines) - 1):
        file.write_bytes(b"".join(lines[:gone] + lines[gone + 1 :]))
        with pytest.raises(ModelError, match=rf"line {gone + 1} is damaged, or one before it is gone: its checksum"):
            Journal(kept, ABOUT)
    file.write_bytes(b"".join([*lines[:1], lines[2], lines[1], *lines[3:]]))
    with pytest.raises(ModelError, match="line 2 is damaged"):
        Journal(kept, ABOUT)
    file.unlink()
    with pytest.raises(ModelError, match="has 0 of the 5 lines"):
        Journal(kept, ABOUT)


@pytest.mark.parametrize("written", [0, 1, 20, -2, -1])
def test_a_line_that_a_kill_broke_off_is_no_loss(kept: Path, written: int) -> None:
    """What a process writes before it is killed: a part of the line, or all of it and not yet where the journal ends."""
    file, end = kept / "journal.jsonl", (kept / "journal.end").read_bytes()
    before = file.read_bytes()
    Journal(kept, ABOUT).of("next", lambda: [1] * 30)
    line = file.read_bytes()[len(before) :]
    (kept / "journal.end").write_bytes(end)
    file.write_bytes(before + line[: written if written >= 0 else len(line) + written + 1])
    journal = Journal(kept, ABOUT)
    assert journal.known("next") == ({"next": [1] * 30} if written == -1 else {})
    assert looks.number(journal, {"tolerance": 0.04}) == 3
    journal.of("after", lambda: 2)
    assert Journal(kept, ABOUT).of("after", unasked) == 2


def test_other_lines_in_its_place_are_told(kept: Path, tmp_path: Path) -> None:
    """A journal that is whole in itself, and is not the one that ended there."""
    other = Journal(tmp_path / "other", ABOUT)
    for i in range(6):
        other.of(f"question {i}", lambda: 1)
    (kept / "journal.jsonl").write_bytes((tmp_path / "other" / "journal.jsonl").read_bytes())
    with pytest.raises(ModelError, match="line 5 is not the one that was written last"):
        Journal(kept, ABOUT)


@pytest.mark.parametrize("text", [b"", b"{}", b"7", b'{"lines":"x","crc":"0"}', b"\xff"])
def test_an_end_that_is_damaged_is_told(kept: Path, text: bytes) -> None:
    (kept / "journal.end").write_bytes(text)
    with pytest.raises(ModelError, match=f"journal.end is damaged; {REMEDY}"):
        Journal(kept, ABOUT)


def test_an_end_that_is_gone_is_told_but_for_a_first_line_that_was_alone(kept: Path) -> None:
    (kept / "journal.end").unlink()
    with pytest.raises(ModelError, match=f"journal.end is gone; {REMEDY}"):
        Journal(kept, ABOUT)
    assert not (kept / "journal.end").exists()
    first, _, _ = (kept / "journal.jsonl").read_bytes().partition(b"\n")
    (kept / "journal.jsonl").write_bytes(first + b"\n")  # killed between the two
    Journal(kept, ABOUT).of("next", lambda: 1)
    assert Journal(kept, ABOUT).of("next", unasked) == 1


def test_files_of_weights_that_are_gone_or_damaged_are_named(kept: Path) -> None:
    file = kept / "8-bits.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ModelError, match=f"8-bits.safetensors is damaged: .*; {REMEDY}"):
        Journal(kept, ABOUT).weights("8 bits", unasked)
    file.unlink()
    with pytest.raises(ModelError, match=f"8-bits.safetensors is gone; {REMEDY}"):
        Journal(kept, ABOUT).weights("8 bits", unasked)


def test_looks_of_others_count_as_soon_as_they_are_taken(kept: Path) -> None:
    """Of a choice in another process, say, while a search goes on."""
    first, second = Journal(kept, ABOUT), Journal(kept, ABOUT)
    for i, journal in enumerate((first, second, first, first, second)):
        asked = {"tolerance": 0.1 + i}
        assert looks.number(journal, asked) == 3 + i
        looks.taken(journal, asked)
        journal.of(f"answer {i}", lambda: 1)
    with (kept / "journal.jsonl").open("ab") as file:
        file.write(b'{"crc":"01')
    first.of("answer 5", lambda: 1)
    assert len(Journal(kept, ABOUT).known("answer")) == 6
    assert list(first.known("look")) == list(second.known("look")) == list(Journal(kept, ABOUT).known("look"))


def test_a_journal_that_goes_while_it_is_used_is_told(kept: Path) -> None:
    journal = Journal(kept, ABOUT)
    (kept / "journal.jsonl").unlink()
    with pytest.raises(ModelError, match=f"has 0 of the 5 lines that were written; {REMEDY}"):
        journal.of("next", lambda: 1)
    (kept / "journal.end").unlink()
    with pytest.raises(ModelError, match=f"journal.jsonl is gone; {REMEDY}"):
        looks.number(journal, {})


def test_another_search_is_told_and_its_folder_left_as_it_is(kept: Path) -> None:
    before = {path.name: path.read_bytes() for path in kept.iterdir()}
    with pytest.raises(ModelError, match="another search, which differs in its seed"):
        Journal(kept, ABOUT | {"seed": 1})
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == before
    assert json.loads(before["journal.jsonl"].splitlines()[0])["model"] == "m"


def test_two_searches_in_one_folder_are_kept_apart(kept: Path) -> None:
    first, second = (Journal(kept, ABOUT) for _ in range(2))
    with first.alone():
        with (
            pytest.raises(ModelError, match="another search is at work in this folder: wait for that one to end"),
            second.alone(),
        ):
            pass
        first.of("more", lambda: 1)
    with second.alone():
        assert second.of("more", lambda: 2) == 1


def test_a_folder_of_other_files_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "sensitivity.safetensors").write_bytes(b"mine")
    with pytest.raises(ModelError, match=r"holds files that are no search's, such as 'sensitivity\.safetensors'"):
        Journal(tmp_path, ABOUT)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("sensitivity.safetensors", b"mine")]


@pytest.mark.parametrize("folder", ["", 3])
def test_what_is_no_folder_is_named(folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="checkpoint: expected the path of a folder, found"):
        Journal(folder, ABOUT)
    assert not list(tmp_path.iterdir())
