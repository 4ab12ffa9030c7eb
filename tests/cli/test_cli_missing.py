"""What needs an extra says how to install it: on the command line and in Python."""

import subprocess
import sys

import pytest

BLOCKED = """
import sys
sys.modules[{module!r}] = None  # as if it were not installed
from steelyard.cli import main
raise SystemExit(main({arguments!r}))
"""


@pytest.mark.parametrize(
    ("module", "arguments", "extra"),
    [
        ("torch", ["train", "digits", "t.safetensors"], "learn"),
        ("torch", ["run", "--out", "out"], "learn"),
        ("torch", ["explain", "digits", "w.safetensors"], "learn"),
        ("torch", ["finetune", "digits", "w.safetensors", "t.safetensors"], "learn"),
        ("torch", ["init", "digits", "t.safetensors"], "learn"),
        ("torch", ["claims"], "learn"),
        ("onnxruntime", ["run", "--out", "out"], "deploy"),
    ],
)
def test_a_verb_whose_package_is_missing_prints_the_command(module, arguments, extra, tmp_path):
    script = BLOCKED.format(module=module, arguments=arguments)
    found = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert found.returncode == 2, found.stderr
    assert f"pip install 'steelyard[{extra}]'" in found.stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []  # said before the work, not after it


def test_a_name_whose_package_is_missing_says_so_in_python():
    script = "import sys; sys.modules['torch'] = None; import steelyard; steelyard.train"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "steelyard.train needs the package 'torch': pip install 'steelyard[learn]'" in found.stderr


def test_html_never_replaces_weights(tmp_path, monkeypatch, capsys):
    import numpy as np

    import steelyard as sy
    from steelyard.cli import main

    monkeypatch.chdir(tmp_path)
    size = sy.write(sy.Weights.of({"a": np.ones((4, 4), np.float32)}), "a.safetensors")
    assert main(["inspect", "a.safetensors", "--html", "a.safetensors"]) == 2
    assert "name a file ending in .html" in capsys.readouterr().err
    assert (tmp_path / "a.safetensors").stat().st_size == size


def test_finetune_never_replaces_its_source(tmp_path, monkeypatch, capsys):
    import numpy as np

    import steelyard as sy
    from steelyard.cli import main

    monkeypatch.chdir(tmp_path)
    sy.write(sy.Weights.of({"head.weight": np.ones((2, 30), np.float32)}), "a.safetensors")
    assert main(["finetune", "breast-cancer", "a.safetensors", "a.safetensors", "--force"]) == 2
    assert "is the source itself" in capsys.readouterr().err
