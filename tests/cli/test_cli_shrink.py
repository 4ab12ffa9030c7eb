"""``steelyard shrink``: what a user sees of a search that is broken off."""

from __future__ import annotations

import pytest

from steelyard.shrinking import within


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--checkpoint", "kept"], "interrupted; the same command goes on from what kept has"),
        ([], "nothing is kept: with --checkpoint FOLDER the same command would go on from there"),
    ],
)
def test_what_is_interrupted_says_how_to_go_on(steelyard, tmp_path, monkeypatch, more, said):
    def shrink(*_given, **_options):
        raise KeyboardInterrupt

    weights, target = tmp_path / "weights.safetensors", tmp_path / "small.safetensors"
    steelyard("train", "breast-cancer", weights, "--model", "mlp", "--epochs", "1")
    monkeypatch.setattr(within, "shrink", shrink)
    result = steelyard("shrink", "breast-cancer", weights, target, "--model", "mlp", *more)
    assert (result.status, result.out) == (130, "")
    assert said in result.err
    assert not target.exists()
