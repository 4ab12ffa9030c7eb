"""The boundary: every error is one line with a remedy, and the status says which kind it was."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest

from steelyard import __version__
from steelyard.cli import VERBS, entry, main
from steelyard.cli.entry import explain
from steelyard.cli.models import named
from steelyard.errors import SteelyardError, VerdictError

SCRIPT = Path(sys.executable).with_name("steelyard")


def test_help_lists_every_verb_with_its_line(steelyard):
    for words in (["--help"], ["-h"], []):
        result = steelyard(*words)
        assert (result.status, result.err) == (0, "")
        for name, row in VERBS.rows.items():
            assert name in result.out
            assert row.about in " ".join(result.out.split())


def test_version(steelyard):
    assert steelyard("--version").out == f"steelyard {__version__}\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["inspct", "x"], "did you mean 'inspect'?"),
        (["inspect"], "Missing argument 'SOURCE...'; see 'steelyard inspect --help'"),
        (["inspect", "x", "--jsn"], "see 'steelyard inspect --help'"),
        (["inspect", "x", "--json", "--csv"], "exclude each other"),
        (["inspect", "x", "--depth", "-1"], "--depth"),
        (["inspect", "x", "--html", "nowhere/x.html"], "make it first"),
        (["--verson"], "see 'steelyard --help'"),
    ],
)
def test_wrong_use_is_one_line_and_status_2(steelyard, words, said):
    result = steelyard(*words)
    assert (result.status, result.out) == (2, "")
    assert result.err.startswith("steelyard: ")
    assert said in result.err
    assert result.err.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (SteelyardError("no\x1b[2Jway"), 2, "no\\x1b[2Jway"),
        (VerdictError("too large"), 1, "too large"),
        (click.UsageError("Bad."), 2, "Bad; see 'steelyard --help'"),
        (click.ClickException("odd"), 2, "odd; see 'steelyard --help'"),
        (KeyboardInterrupt(), 130, "interrupted; no file was left half-written"),
        (KeyboardInterrupt("go on with --resume"), 130, "go on with --resume"),
        (PermissionError(13, "Permission denied", "a.txt"), 2, "a.txt: permission denied; check its permissions"),
        (OSError(28, "No space left on device"), 2, "no space left on device; free some space"),
        (MemoryError(), 2, "not enough memory"),
        (ZeroDivisionError("division\nby zero"), 70, "a defect in steelyard: ZeroDivisionError: division by zero"),
    ],
)
def test_every_error_has_a_status_and_a_line(error, status, line):
    found = explain(error)
    assert found[0] == status
    assert line in found[1]
    assert "\n" not in found[1]


def test_a_traceback_only_when_asked_for(steelyard, monkeypatch):
    monkeypatch.setenv("STEELYARD_TRACEBACK", "1")
    with pytest.raises(SteelyardError):
        main(["inspct"])


@pytest.mark.parametrize("size", [100, 10_000_000])  # it breaks in the last flush, or in the midst of a verb
def test_a_closed_pipe_ends_quietly(size):
    code = "import sys\nfrom steelyard.cli import main, entry\n"
    code += f"entry.steelyard.callback = lambda: (sys.stdin.readline(), print('x' * {size}))\nsys.exit(main([]))"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, **pipes) as process:
        process.stdout.close()
        process.stdin.write(b"\n")
        process.stdin.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


@pytest.mark.parametrize("closed", [">&-", ">&- 2>&-"])
def test_a_closed_output_ends_quietly(model, closed):
    found = subprocess.run(["sh", "-c", f'"$0" inspect "$1" {closed}', SCRIPT, model], capture_output=True, check=False)
    assert (found.returncode, found.stderr) == (0, b"")


def test_control_c_is_one_line(tmp_path):
    code = "import sys, time; from steelyard.cli import main, entry\n"
    code += "def slow():\n    print('ready', flush=True)\n    time.sleep(30)\n"
    code += "entry.steelyard.callback = slow\nsys.exit(main([]))"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
        start_new_session=True,
    )
    process.stdout.readline()
    time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=10)
    assert (process.returncode, err) == (130, b"steelyard: interrupted; no file was left half-written\n")


def test_what_fails_after_control_c_is_no_defect(monkeypatch, capsys):
    """An import that swallows it leaves a module that is half there, and whoever uses that fails."""

    def half_imported():
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        except KeyboardInterrupt:
            raise RecursionError from None

    monkeypatch.setattr(entry.steelyard, "callback", half_imported)
    assert main([]) == 130
    assert capsys.readouterr().err == "steelyard: interrupted; no file was left half-written\n"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    monkeypatch.setattr(entry.steelyard, "callback", lambda: 1 // 0)
    assert main([]) == 70


def test_the_console_script_and_the_module_are_one(model):
    for command in ([str(SCRIPT)], [sys.executable, "-m", "steelyard"]):
        found = subprocess.run([*command, "inspect", str(model)], capture_output=True, text=True, check=True)
        assert "model.layer.weight" in found.stdout
        assert found.stderr == ""


def test_a_sign_that_the_encoding_lacks_does_not_break_the_output(model):
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    command = [str(SCRIPT), "inspect", str(model)]
    found = subprocess.run(command, capture_output=True, env=environment, check=True)
    assert b"40\xd716" in found.stdout
    assert b"\\u2500" in found.stdout


@pytest.mark.parametrize(
    "text",
    ["mlp(widths=(64", "mlp(path=/data)", "mlp(widths=(64)", "mlp(widths=64))", "mlp(64)", "(k=1)", "my.py:f(k=1"],
)
def test_a_model_that_cannot_be_read_is_a_mistake_of_form(steelyard, tmp_path, text):
    result = steelyard("train", "breast-cancer", tmp_path / "w.safetensors", "--model", text)
    assert (result.status, result.out) == (2, "")
    assert f"cannot read '{text}': expected a name, or a call such as mlp(widths=(64, 32)) or, a text" in result.err
    assert "being in quotes, mnist(path='/data')" in result.err


def test_names_of_models_and_tasks_with_and_without_options():
    assert named("mlp()") == named("mlp") == "mlp"
    assert named("mlp(widths=(64, 32))") == {"mlp": {"widths": (64, 32)}}
    assert named("csv:data (1).csv:y") == "csv:data (1).csv:y"
    assert named("my (1)/net.py:f") == "my (1)/net.py:f"
    assert named("text:data(1.txt") == "text:data(1.txt"
