"""`diff` on the command line: what it prints, its exit status, other formats, and tensors that cannot be read."""

from __future__ import annotations

import csv
import io
import json

import numpy as np
import pytest

import steelyard as sy


@pytest.fixture
def changed(model, tmp_path):
    """The model with one sign flipped, one tensor renamed and one more tensor."""
    arrays = sy.open(model).arrays()
    arrays["model.layer.weight"][3, 4] *= -1
    arrays["model.layer.beta"] = arrays.pop("model.layer.bias")
    arrays["extra"] = np.zeros(3, np.float32)
    path = tmp_path / "changed.safetensors"
    sy.write(sy.Weights.of(arrays, ties={"head.weight": "model.embed.weight"}), path)
    return path


def test_text_of_diff(steelyard, model, changed, golden):
    result = steelyard("diff", model, changed)
    assert result.status == 0
    golden(result.out)


def test_json_and_csv(steelyard, model, changed):
    first = json.loads(steelyard("diff", model, changed, "--json").out.splitlines()[0])
    said = {row["name"]: (row["verdict"], row["was"]) for row in first["rows"]}
    assert said == {
        "model.layer.weight": ("sign flips", None),
        "model.layer.beta": ("renamed", "model.layer.bias"),
        "extra": ("added", None),
    }
    rows = list(csv.DictReader(io.StringIO(steelyard("diff", model, changed, "--csv", "--all").out)))
    assert len(rows) == 5


def test_the_page_has_a_picture(steelyard, model, changed, tmp_path):
    assert steelyard("diff", model, changed, "--html", tmp_path / "page.html").status == 0
    page = (tmp_path / "page.html").read_text()
    assert "Change by layer" in page
    assert "model.layer.beta" in page


def test_exit_status(steelyard, model, changed):
    assert steelyard("diff", model, model, "--exit-code").status == 0
    result = steelyard("diff", model, changed, "--exit-code")
    assert result.status == 1
    assert result.err.endswith("differ\n")
    assert steelyard("diff", model, changed).status == 0
    assert steelyard("diff", model, "nowhere.safetensors").status == 2
    assert steelyard("diff", model, changed, "--where", "nothing*").status == 2
    assert steelyard("diff", model).status == 2


def test_other_formats_hold_the_same(steelyard, model, tmp_path):
    assert steelyard("convert", model, tmp_path / "model.npz").status == 0
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(model.read_bytes())
    for other in (tmp_path / "model.npz", folder):
        result = steelyard("diff", model, other, "--json")
        assert result.status == 0
        assert json.loads(result.out.splitlines()[-1])["rows"][0]["verdict"].startswith(("identical", "the same"))


def test_a_set_of_shards_holds_the_same(steelyard, model, tmp_path):
    (tmp_path / "set").mkdir()
    assert steelyard("convert", model, tmp_path / "set", "--shard-size", "2kB").status == 0
    assert steelyard("diff", model, tmp_path / "set", "--exit-code").status == 0
    row = json.loads(steelyard("diff", model, tmp_path / "set", "--json").out.splitlines()[-1])["rows"][0]
    assert row["verdict"].startswith("identical")
    assert row["files"] == f"1 and {len(list((tmp_path / 'set').glob('*.safetensors')))}"


def test_gguf_and_torch_hold_the_same(steelyard, model, tmp_path):
    assert steelyard("convert", model, tmp_path / "model.gguf", "--where", "*.weight").status == 0
    words = ("--where", "*.weight", "--json")
    row = json.loads(steelyard("diff", model, tmp_path / "model.gguf", *words).out.splitlines()[-1])["rows"][0]
    assert row["identical"] == 2
    torch = pytest.importorskip("torch")
    torch.save({k: torch.from_numpy(v) for k, v in sy.open(model).arrays().items()}, tmp_path / "model.pt")
    row = json.loads(steelyard("diff", model, tmp_path / "model.pt", "--json").out.splitlines()[-1])["rows"][0]
    assert row["identical"] == 4


def test_a_tensor_that_cannot_be_read_is_named_and_the_others_go_on(steelyard, tmp_path):
    header = {
        "bad": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]},
        "good": {"dtype": "U8", "shape": [1], "data_offsets": [3, 4]},
    }
    for name, last in (("a", 1), ("b", 2)):
        text = json.dumps(header).encode()
        (tmp_path / f"{name}.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes([0, 0, 0, last]))
    result = steelyard("diff", tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--json")
    assert result.status == 2
    assert "1 of the tensors could not be read" in result.err
    rows = {row["name"]: row["verdict"] for row in json.loads(result.out.splitlines()[0])["rows"]}
    assert rows == {"bad": "unreadable", "good": "values"}


def test_hostile_names_are_escaped(steelyard, tmp_path):
    for name, value in (("a", 0), ("b", 1)):
        weights = {"\x1b[31mred\n": np.full(3, value, np.float32)}
        sy.write(sy.Weights.of(weights), tmp_path / f"{name}.safetensors")
    out = steelyard("diff", tmp_path / "a.safetensors", tmp_path / "b.safetensors").out
    assert "\x1b" not in out
    assert r"\x1b[31mred\n" in out


def test_several_are_ranked(steelyard, model, changed, tmp_path):
    result = steelyard("diff", model, changed, model, "--json")
    table = json.loads(result.out)
    assert [row["source"] for row in table["rows"]] == [str(model), str(changed)]
    table = json.loads(steelyard("diff", model, changed, "--ancestor", "--json").out)
    assert "verdict" in table["meta"]
    assert steelyard("diff", model, changed, model, "--exit-code").status == 1


def test_a_tie_is_compared_under_either_name(steelyard, tmp_path):
    x, y = np.ones((4, 3), np.float32), np.zeros(2, np.float32)
    sy.write(sy.Weights.of({"embed": x, "b": y}, ties={"head": "embed"}), tmp_path / "tied.npz")
    sy.write(sy.Weights.of({"head": x, "b": y}), tmp_path / "plain.safetensors")
    for pair in (("tied.npz", "plain.safetensors"), ("plain.safetensors", "tied.npz")):
        words = (*(tmp_path / name for name in pair), "--where", "head", "--all", "--json")
        rows = json.loads(steelyard("diff", *words).out.splitlines()[0])["rows"]
        assert [(row["name"], row["verdict"]) for row in rows] == [("head", "identical")]
    result = steelyard("inspect", tmp_path / "tied.npz", "--where", "head", "--json")
    assert [row["name"] for row in json.loads(result.out.splitlines()[0])["rows"]] == ["embed"]


def test_the_help_says_which_verdict_has_a_rank(steelyard):
    assert "with the verdict 'values'" in " ".join(steelyard("diff", "--help").out.split())
