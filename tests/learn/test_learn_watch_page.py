"""A watch with a live page: it is there while the training runs, and the training is the same."""

from __future__ import annotations

import json
import urllib.error
import urllib.request

import pytest
import torch
from torch import nn

import steelyard as sy
from steelyard.errors import WeightsError


def train(steps=6, look=None, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    with sy.watch(model, optimizer, **options) as log:
        for _ in range(steps):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(torch.randn(4, 3)), torch.tensor([0, 1, 0, 1]))
            loss.backward()
            optimizer.step()
            log.note(loss=loss)
        if look is not None:
            look(log)
    return model, log


def state(log):
    with urllib.request.urlopen(f"{log.url}state", timeout=20) as answer:
        return json.loads(answer.read())


@pytest.mark.parametrize("path", [None, "log.sqlite"])
def test_a_page_while_the_training_runs(tmp_path, capsys, path):
    seen = []

    def look(log):
        log.write()
        seen.extend([state(log), log.path])

    model, log = train(look=look, page=True, path=None if path is None else tmp_path / path)
    assert capsys.readouterr().err == f"live page: {log.url}\n"
    assert '<dt>steps</dt><dd class="value">6</dd>' in seen[0]["head"]
    assert not seen[0]["ended"]
    assert len(log.table("steps").rows) == 6  # also when the file was for the time being
    assert seen[1].exists() == (path is not None)
    with pytest.raises(urllib.error.URLError):
        state(log)
    plain, _ = train()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


def test_a_port_that_cannot_be_had_leaves_the_model_alone():
    model = nn.Linear(2, 2)
    with pytest.raises(WeightsError, match=r"port 99999 of 127\.0\.0\.1 for the live page: expected 0 to 65535"):
        sy.watch(model, torch.optim.SGD(model.parameters(), lr=0.1), page=99999).__enter__()
    assert not model._forward_pre_hooks
    assert not model._forward_hooks
