"""The mechanism: what passes, what fails, and that a crash of a check is a result."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from steelyard.claims import CHAPTERS, CLAIMS
from steelyard.claims.check import Bar, Check, Outcome, run_check
from steelyard.claims.run import _table, _uninterrupted, by_claim, choose, run_claims, verdicts
from steelyard.cli import main
from steelyard.errors import RecipeError, UnknownNameError
from steelyard.report.text import cells, text


def _raise() -> dict[str, float]:
    raise ValueError("the layer is gone")


@pytest.mark.parametrize(
    ("direction", "value", "holds"),
    [
        ("<=", 1.0, True),
        ("<=", 1.1, False),
        (">=", 0.9, False),
        ("<", 1.0, False),
        ("==", 1.0, True),
        ("==", 2.0, False),
    ],
)
def test_a_bar_is_held_against_a_number(direction: str, value: float, holds: bool) -> None:
    assert Bar("x", direction, 1.0).holds(value) is holds  # type: ignore[arg-type]


@pytest.mark.parametrize("direction", ["<=", ">=", "<", "=="])
def test_nan_passes_no_bar(direction: str) -> None:
    assert not Bar("x", direction, float("nan")).holds(float("nan"))  # type: ignore[arg-type]
    assert not Bar("x", direction, 1.0).holds(float("nan"))  # type: ignore[arg-type]


def test_a_check_that_raises_has_failed_and_says_why() -> None:
    outcome = run_check(Check("A1", "c", "m", (Bar("x", "<=", 1),), _raise))
    assert not outcome.passed
    assert outcome.evidence == "ValueError: the layer is gone"


def test_every_number_that_has_a_bar_is_shown_first() -> None:
    """Eight bars; the measurement names their numbers last."""
    bars = tuple(Bar(f"barred {i}", "<=", 9) for i in range(8))
    measured = {f"further {i}": 0.0 for i in range(9)} | {bar.what: 1.0 for bar in reversed(bars)}
    outcome = run_check(Check("A1", "c", "m", bars, lambda: measured))
    assert outcome.evidence == "; ".join(f"barred {i} 1" for i in range(8))
    assert set(outcome.measured) == set(measured)
    assert run_check(Check("A1", "c", "m", bars[:1], lambda: measured)).evidence.count(";") == 5


def test_a_check_that_lacks_a_number_has_failed() -> None:
    outcome = run_check(Check("A1", "c", "m", (Bar("x", "<=", 1), Bar("y", "<=", 1)), lambda: {"x": 0.0}))
    assert not outcome.passed
    assert "'y'" in outcome.evidence


def test_every_bar_must_hold() -> None:
    bars = (Bar("x", "<=", 1), Bar("y", ">=", 1))
    assert run_check(Check("A1", "c", "m", bars, lambda: {"x": 0.0, "y": 1.0})).passed
    assert not run_check(Check("A1", "c", "m", bars, lambda: {"x": 0.0, "y": 0.0})).passed


@pytest.mark.parametrize("name", list(CLAIMS))
def test_each_row_is_a_check_of_its_name(name: str) -> None:
    check = CLAIMS[name]
    assert (check.id, check.claim) == (name, CLAIMS.rows[name].about)
    assert check.chapter in CHAPTERS
    assert check.bars
    assert check.method


def test_choosing() -> None:
    assert choose(["b1", "A2"], None) == ["A2", "B1"]
    assert choose(None, ["g"]) == ["G1"]
    assert choose(None, None) == list(CLAIMS)
    with pytest.raises(UnknownNameError, match="claim 'A99'"):
        choose(["A99"], None)
    with pytest.raises(UnknownNameError, match="chapter 'Z'"):
        choose(None, ["Z"])
    with pytest.raises(RecipeError, match="processes"):
        run_claims(["A3"], processes=-1)


def test_spawned_processes_give_the_table_in_order() -> None:
    told: list[tuple[int, int]] = []
    here = os.getpid()
    table = run_claims(["G1", "A3"], processes=2, progress=lambda done, total, name: told.append((done, total)))
    assert os.getpid() == here
    assert [c.name for c in table.columns] == ["chapter", "id", "claim", "measured", "bar", "verdict", "seconds"]
    assert table.column("id") == ["A3", "G1"]
    assert table.column("verdict") == ["pass", "pass"]
    assert told == [(1, 2), (2, 2)]
    assert (table.meta["passed"], table.meta["failed"]) == (2, 0)
    assert table.meta["measured"]["A3"]["recall"] == 1
    json.loads(table.to_json())


def test_a_claim_that_cannot_be_imported_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("steelyard.claims.g_moving.G1")
    table = run_claims(["G1"], processes=0)
    assert table.column("verdict") == ["FAIL"]
    assert "AttributeError" in table.rows[0]["measured"]  # type: ignore[operator]


@pytest.mark.parametrize(("verdict", "status"), [("pass", 0), ("FAIL", 1)])
def test_the_verb_exits_by_the_verdict(
    verdict: str, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = _table([Outcome("A1", "c", "m", (), passed=verdict == "pass", seconds=0.1)], 0.1)
    monkeypatch.setattr("steelyard.claims.run.run_claims", lambda *_, **__: table)
    assert main(["claims", "--json"]) == status
    printed = capsys.readouterr()
    assert json.loads(printed.out)["rows"][0]["verdict"] == verdict
    assert ("1 of 1 claims failed: A1" in printed.err) is (status == 1)


def _found() -> list[Outcome]:
    """One that passes, one that fails, one that could not be measured and one that could not be imported."""
    bars = (Bar("lost at 50 %", "<=", 0.01), Bar("zeros", "==", 0.5))
    checks = [
        Check("A1", "this passes", "as it is", bars, lambda: {"bytes": 6023, "lost at 50 %": 0.0066667, "zeros": 0.5}),
        Check("A2", "this does not", "too much", bars, lambda: {"lost at 50 %": 0.02, "zeros": float("nan")}),
        Check("A3", "nobody knows", "broken", bars, _raise),
    ]
    lost = Outcome("B1", "nobody began", "", (), passed=False, seconds=0, failure="AttributeError: no B1")
    return [replace(run_check(check), seconds=0.25) for check in checks] + [lost]


def test_each_figure_stands_beside_its_bar(golden: Callable[[str], None]) -> None:
    table = _table(_found(), 1.0)
    golden("\n".join(text(shown) for shown in (*by_claim(table).values(), verdicts(table))))


def test_figures_are_plain_data_and_the_verdict_is_theirs() -> None:
    found = json.loads(_table(_found(), 1.0).to_json())
    figures = found["meta"]["figures"]
    assert figures["A1"] == [
        {"figure": "lost at 50 %", "measured": 0.0066667, "bar": "<= 0.01", "holds": True},
        {"figure": "zeros", "measured": 0.5, "bar": "== 0.5", "holds": True},
        {"figure": "bytes", "measured": 6023, "bar": None, "holds": None},
    ]
    for row in found["rows"]:
        held = [figure["holds"] for figure in figures[row["id"]] if figure["bar"]]
        assert (row["verdict"] == "pass") is (bool(held) and all(held))
    assert found["meta"]["failure"] == {"A3": "ValueError: the layer is gone", "B1": "AttributeError: no B1"}


@pytest.mark.parametrize("name", list(CLAIMS))
def test_no_figure_is_cut_on_a_terminal_of_80_columns(name: str) -> None:
    """Of numbers as long as they get, and failed."""
    check = CLAIMS[name]
    measured = {bar.what: -1.234e-100 for bar in check.bars} | {"seconds": 59.9}  # two rows are a grid
    outcome = Outcome(name, check.claim, check.method, check.bars, passed=False, seconds=59.9, measured=measured)
    shown = text(by_claim(_table([outcome], 59.9))[name], 80)
    assert "…" not in shown
    assert all(cells(line) <= 80 for line in shown.splitlines())
    for bar in check.bars:
        (line,) = (line for line in shown.splitlines() if line.startswith(f"{bar.what}  ") and bar.limit in line)
        assert "-1.234e-100" in line


def test_the_verb_shows_figures_as_text_and_on_its_page(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("steelyard.claims.run.run_claims", lambda *_, **__: _table(_found(), 1.0))
    assert main(["claims", "--html", str(tmp_path / "page.html")]) == 1
    said = capsys.readouterr().out.splitlines()
    assert "A1 pass: this passes" in said
    assert "lost at 50 %  0.006667  <= 0.01  yes" in said
    assert "lost at 50 %      0.02  <= 0.01  no" in said
    assert max(map(len, said)) <= 80
    page = (tmp_path / "page.html").read_text()
    assert "A2 FAIL: this does not" in page
    assert all(f">{word}<" in page for word in ("0.006667", "&lt;= 0.01", "yes", "no"))
    assert "the layer is gone" in page
    assert main(["claims", "--csv"]) == 1
    assert capsys.readouterr().out.startswith("chapter,id,claim,measured,bar,verdict,seconds\n")


def test_the_verb_knows_its_ids(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["claims", "A99"]) == 2
    assert "there is no claim 'A99'" in capsys.readouterr().err


@pytest.mark.skipif(os.name != "posix", reason="a terminal sends the signal to the whole group of processes")
@pytest.mark.parametrize("moment", [0.4, 3.0])  # while the processes start, and while they measure
def test_an_interrupt_ends_everything_at_once_with_one_line(moment: float, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "steelyard", "claims"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        start_new_session=True,
    )
    deadline = time.monotonic() + 20
    while not list(tmp_path.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(moment)
    since = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    try:
        out, err = process.communicate(timeout=10)
        assert (process.returncode, out, err) == (130, b"", b"steelyard: interrupted; no file was left half-written\n")
        assert time.monotonic() - since < 3
        assert list(tmp_path.iterdir()) == []
        with pytest.raises(ProcessLookupError):  # nobody of the group is left
            _wait_for_nobody(process.pid)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _wait_for_nobody(group: int) -> None:
    deadline = time.monotonic() + 2
    while time.monotonic() < deadline:
        os.killpg(group, 0)
        time.sleep(0.02)


@pytest.mark.skipif(os.name != "posix", reason="there is no mask of signals")
def test_what_starts_uninterrupted_never_gets_an_interrupt_and_its_parent_gets_it_afterwards() -> None:
    code = "import signal; print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []))"
    said = []

    def interrupted() -> None:
        with _uninterrupted():
            signal.pthread_kill(threading.get_ident(), signal.SIGINT)  # to this thread: another could take it at once
            said.append(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert said == ["True\n"]
