"""``steelyard shrink``: what a user sees of a search that is broken off, and of weights without a task."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest

from steelyard import formats
from steelyard.cli.models import loaded
from steelyard.core.weights import Weights
from steelyard.errors import ModelError, ProofWarning, VerdictError
from steelyard.formats.module import from_module
from steelyard.shrinking import within


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--checkpoint", "kept"], "interrupted; the same command goes on from what kept has"),
        (["--checkpoint", "none"], "interrupted before anything was kept in none: the same command starts anew"),
        ([], "nothing is kept: with --checkpoint FOLDER the same command would go on from there"),
    ],
)
def test_what_is_interrupted_says_how_to_go_on(steelyard, tmp_path, monkeypatch, more, said):
    def shrink(*_given, **_options):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "journal.jsonl").touch()
    weights, target = tmp_path / "weights.safetensors", tmp_path / "small.safetensors"
    steelyard("train", "breast-cancer", weights, "--model", "mlp", "--epochs", "1")
    monkeypatch.setattr(within, "shrink", shrink)
    result = steelyard("shrink", "breast-cancer", weights, target, "--model", "mlp", *more)
    assert (result.status, result.out) == (130, "")
    assert said in result.err
    assert not target.exists()


def test_an_interrupt_before_the_search_says_it_as_well(steelyard, tmp_path, monkeypatch):
    def loaded(*_given):
        raise KeyboardInterrupt

    weights = tmp_path / "weights.safetensors"
    steelyard("train", "breast-cancer", weights, "--model", "mlp", "--epochs", "1")
    monkeypatch.setattr("steelyard.cli.shrink.loaded", loaded)
    result = steelyard("shrink", "breast-cancer", weights, tmp_path / "small.safetensors", "--checkpoint", "kept")
    said = "steelyard: interrupted before anything was kept in kept: the same command starts anew\n"
    assert (result.status, result.err) == (130, said)


def test_every_further_interrupt_says_it_as_well(steelyard, tmp_path, monkeypatch):
    """The second comes while the first is on its way out: what is said is still that of the first."""

    def shrink(*_given, **_options):
        try:
            raise KeyboardInterrupt("interrupted; and what is kept")
        finally:
            raise KeyboardInterrupt

    monkeypatch.setattr(within, "shrink", shrink)
    monkeypatch.setattr("steelyard.cli.shrink._interrupted", lambda _checkpoint: "")
    weights = tmp_path / "weights.safetensors"
    steelyard("train", "breast-cancer", weights, "--model", "mlp", "--epochs", "1")
    result = steelyard("shrink", "breast-cancer", weights, tmp_path / "small.safetensors", "--model", "mlp")
    assert (result.status, result.err.splitlines()[-1]) == (130, "steelyard: interrupted; and what is kept")


def test_proof_examples_that_were_seen_are_a_line(steelyard, tmp_path, monkeypatch):
    def shrink(*_given, **_options):
        warnings.warn("13 of 213 proof examples", ProofWarning, stacklevel=2)
        raise VerdictError("no")

    monkeypatch.setattr(within, "shrink", shrink)
    weights = tmp_path / "weights.safetensors"
    steelyard("train", "breast-cancer", weights, "--model", "mlp", "--epochs", "1")
    result = steelyard("shrink", "breast-cancer", weights, tmp_path / "small.safetensors", "--model", "mlp")
    assert result.err.splitlines()[-2:] == ["steelyard: 13 of 213 proof examples", "steelyard: no"]


def test_without_a_task_the_weights_are_shrunk_alone(steelyard, tmp_path):
    weights, target = tmp_path / "weights.safetensors", tmp_path / "small.safetensors"
    formats.write(Weights.of({"w": np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)}), weights)
    result = steelyard("shrink", weights, target, "--error", "0.05", "--json")
    summary, tensors = map(json.loads, result.out.splitlines())
    assert result.status == 0
    assert 0.04 < summary["rows"][0]["error"] <= 0.05
    assert "nothing is said of any metric" in summary["meta"]["promise"]
    assert tensors["rows"][0]["name"] == "w"
    assert steelyard("shrink", weights, target).status == 2  # it is there
    assert steelyard("shrink", weights, target, "--force").status == 0


@pytest.mark.parametrize("folder", [True, False])
def test_what_is_said_of_plain_weights_makes_them_plain(steelyard, tmp_path, folder):
    source = tmp_path / ("source" if folder else "source.safetensors")
    if folder:
        source.mkdir()
        (source / "config.json").write_text("{}")
    weights = Weights.of({"w": np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)})
    formats.write(weights, source / "model.safetensors" if folder else source)
    small = tmp_path / ("small" if folder else "small.safetensors")
    said = json.loads(steelyard("shrink", source, small, "--json").out.splitlines()[0])["meta"]["plain again"]
    program, *words = said.replace(" plain.", f" {tmp_path}/plain.").split()
    assert (program, steelyard(*words).status) == ("steelyard", 0)
    (plain,) = formats.open(words[2]).values()
    assert plain.scheme is None
    assert (
        plain.array().tobytes()
        == formats.open(small / "packed.safetensors" if folder else small)["w"].array().tobytes()
    )


def test_the_constants_of_a_graph_are_no_weights_of_a_model():
    weights = from_module(loaded("breast-cancer", "mlp", 0, None)[1]).settle()
    graph = Weights.of({**weights.arrays(), "val_6": np.array([1, 2])}).with_meta(**{"graph.name": "main"})
    _, module = loaded("breast-cancer", "mlp", 1, graph)
    assert all(np.array_equal(a, b) for a, b in
               zip(weights.arrays().values(), from_module(module).arrays().values(), strict=True))  # fmt: skip
    with pytest.raises(ModelError, match="unexpected 'val_6'"):
        loaded("breast-cancer", "mlp", 1, Weights.of(graph.arrays()))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["a.safetensors", "b.safetensors", "--tolerance", "1"], "--tolerance is for a TASK, and none is given"),
        (["digits", "a.safetensors", "b.safetensors", "--error", "0.1"], "--tolerance is for its metric"),
        (["a.safetensors", "b.safetensors", "--bytes", "9"], "--bytes is for a TASK, and none is given"),
        (
            ["digits", "a.safetensors", "b.safetensors", "--bytes", "9"],
            "take what a search has left in its --checkpoint",
        ),
        (
            ["digits", "a.safetensors", "b.safetensors", "--choose", "--checkpoint", "kept", "--epochs", "3"],
            "--epochs is for a search; --choose and --bytes take what one has found",
        ),
        (["a.safetensors"], "expected [TASK] WEIGHTS TARGET, got 1 of them"),
        (["1", "2", "3", "4"], "expected [TASK] WEIGHTS TARGET, got 4 of them"),
        (["a.safetensors", "b.safetensors", "--error", "1"], "1.0 is not in the range 0<x<1"),
    ],
)
def test_options_of_the_other_kind_are_refused(steelyard, words, said):
    result = steelyard("shrink", *words)
    assert (result.status, result.out) == (2, "")
    assert said in result.err
