"""Text drawn from a language model: the probabilities are the model's, as temperature, top-p and seed change them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from steelyard.errors import ModelError
from steelyard.learn.run import train
from steelyard.learn.sample import sample
from steelyard.learn.task import Task
from steelyard.learn.tasks import task


@pytest.fixture
def letters(tmp_path: Path) -> Task:
    path = tmp_path / "a.txt"
    path.write_text("abcdefgh" * 300)
    return task(f"text:{path}", context=10, model="rnn", batch_size=4)


class Says(nn.Module):
    """The same probabilities everywhere, and the contexts that it was given."""

    def __init__(self, probabilities: list[float]) -> None:
        super().__init__()
        self.logits = torch.tensor(probabilities).log()
        self.given: list[list[int]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.given.append(x[0].tolist())
        return self.logits.expand(*x.shape, -1)


P = [0.4, 0.3, 0.2, 0.05, 0.05, 0, 0, 0, 0.9]  # of a, b, ..., h and of the unknown character, which is never drawn


def shares(text: str) -> list[float]:
    return [text.count(c) / len(text) for c in "abcde"]


def test_characters_are_drawn_with_the_probabilities_of_the_model(letters: Task) -> None:
    drawn = sample(Says(P), letters, "a", length=4000)
    assert shares(drawn) == pytest.approx(P[:5], abs=0.03)
    assert "\ufffd" not in drawn
    assert drawn == sample(Says(P), letters, "a", length=4000)
    assert drawn != sample(Says(P), letters, "a", length=4000, seed=1)
    cold = shares(sample(Says(P), letters, "a", length=4000, temperature=0.5))
    squares = [p * p / sum(q * q for q in P[:5]) for p in P[:5]]
    assert cold == pytest.approx(squares, abs=0.03)
    assert sample(Says(P), letters, "a", length=50, temperature=0) == "a" * 50


@pytest.mark.parametrize(("top_p", "kept"), [(0.3, 1), (0.4, 1), (0.41, 2), (0.7, 2), (0.89, 3), (1.0, 5)])
def test_top_p_keeps_the_fewest_that_have_the_probability_together(letters: Task, top_p: float, kept: int) -> None:
    drawn = sample(Says(P), letters, "a", length=3000, top_p=top_p)
    total = sum(P[:kept])
    assert shares(drawn) == pytest.approx([p / total for p in P[:kept]] + [0] * (5 - kept), abs=0.03)


def test_the_model_is_given_what_was_said_up_to_its_context(letters: Task) -> None:
    model = Says([0, 0, 0, 1, 0, 0, 0, 0, 0])
    assert sample(model, letters, "abc", length=12) == "d" * 12
    assert model.given[0] == [0, 1, 2]
    assert model.given[3] == [0, 1, 2, 3, 3, 3]
    assert [len(given) for given in model.given] == [3, 4, 5, 6, 7, 8, 9, 10, 10, 10, 10, 10]


def test_a_trained_model_goes_on_with_the_alphabet(letters: Task) -> None:
    run = train(letters, epochs=6, rate=0.02, progress=False)
    run.model.train()
    assert sample(run.model, letters, "ab", length=20, temperature=0.3) == "cdefghabcdefghabcdef"
    assert run.model.training


def test_what_cannot_be_is_said(letters: Task) -> None:
    model = Says(P)
    with pytest.raises(ModelError, match="'x' in the prompt: expected one or more of the 9 characters"):
        sample(model, letters, "abx")
    with pytest.raises(ModelError, match="an empty prompt"):
        sample(model, letters, "")
    with pytest.raises(ModelError, match="'breast-cancer' has no characters to draw"):
        sample(model, task("breast-cancer"), "a")
    for top_p in (0, 1.5, math.nan, True):
        with pytest.raises(ModelError, match=r"top_p=.*expected a probability"):
            sample(model, letters, "a", top_p=top_p)
    with pytest.raises(ModelError, match=r"temperature=-1: expected a finite number, 0 or more"):
        sample(model, letters, "a", temperature=-1)
    with pytest.raises(ModelError, match="length=0"):
        sample(model, letters, "a", length=0)
