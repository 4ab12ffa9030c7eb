"""Pruning in training: the schedule, the scores, the ties, what is left, and a run that goes on bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from steelyard.errors import ModelError, RecipeError, SteelyardError
from steelyard.formats.module import from_module
from steelyard.learn.run import Run
from steelyard.learn.sparse import Gradual, Scores, train_sparse
from steelyard.learn.task import build_seeded
from steelyard.learn.tasks import task

DATA = task("digits", model="mlp", augment=False)
STEPS = sum(1 for _ in DATA.batches("train", 0))


def shares(model: nn.Module) -> float:
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    return sum(int((p == 0).sum()) for p in matrices) / sum(p.numel() for p in matrices)


@pytest.mark.parametrize("method", ["magnitude", "movement"])
def test_the_share_rises_by_the_cube_and_ends_where_it_is_asked_to(method):
    model = build_seeded(DATA)
    gradual = Gradual(model, 0.9, steps=4 * STEPS, method=method, begin=0.25, end=0.75, every=5)
    seen = []

    def after(model: nn.Module) -> None:
        gradual(model)
        seen.append(gradual.zeros)

    with Run(DATA, model, epochs=4, after_step=after, keep="last") as run:
        for _ in run:
            pass
    assert seen == sorted(seen)
    assert all(z == 0 for z in seen[: STEPS - 1])
    at = 2 * STEPS - 1 - (2 * STEPS % 5)  # the last renewal before the half of the schedule
    progress = (at + 1 - STEPS) / (2 * STEPS)
    assert seen[at] == pytest.approx(0.9 * (1 - (1 - progress) ** 3), abs=1e-3)
    assert seen[3 * STEPS] == seen[-1] == pytest.approx(0.9, abs=1e-4)
    gradual.release()
    assert [name for name, _ in model.named_parameters()] == [n for n, _ in build_seeded(DATA).named_parameters()]
    assert shares(model) == pytest.approx(0.9, abs=1e-4)


def test_by_magnitude_what_has_gone_stays_gone_and_by_movement_it_may_come_back():
    for method, back in (("magnitude", False), ("movement", True)):
        model = build_seeded(DATA)
        gradual = Gradual(model, 0.8, steps=3 * STEPS, method=method, every=1)
        gone = torch.zeros_like(model.fc1.weight, dtype=torch.bool)
        returned = 0
        with Run(DATA, model, epochs=3, after_step=gradual, keep="last") as run:
            for _ in run:
                zero = model.fc1.weight == 0
                returned += int((gone & ~zero).sum())
                gone = zero
        assert (returned > 0) == back


def test_the_gradient_of_a_score_is_that_of_its_mask_times_the_weight():
    net = nn.Sequential(nn.Linear(3, 2, bias=False))
    weight = net[0].weight.detach().clone()
    gradual = Gradual(net, 0.5, steps=1, method="movement", end=1.0)
    (gate,) = gradual._every_gate("0.weight")
    gate.mask[0, 1] = False
    x = torch.tensor([[1.0, 2.0, -3.0]])
    net(x).sum().backward()
    assert torch.equal(gate.score.grad, x.expand(2, 3) * weight)
    assert torch.equal(net[0].parametrizations.weight.original.grad, x.expand(2, 3) * gate.mask)


class Stop(Exception):
    pass


@pytest.mark.parametrize("method", ["magnitude", "movement", "soft-movement"])
def test_a_run_that_was_broken_off_goes_on_bit_for_bit(tmp_path, method):
    def run(resume: bool, stop: int | None, folder: str) -> nn.Module:
        model = build_seeded(DATA)
        gradual = Gradual(model, 0.9, steps=4 * STEPS, method=method, every=3)
        penalties = [Scores(300.0)] if method == "soft-movement" else []
        options = {"checkpoint": tmp_path / folder, "every": 5, "resume": resume, "keep": "last"}
        try:
            with Run(DATA, model, epochs=4, after_step=gradual, penalties=penalties, **options) as going:
                for step in going:
                    if step.index == stop:
                        raise Stop
        except Stop:
            return model
        return gradual.release()

    straight = run(False, None, "straight")
    run(False, int(1.6 * STEPS), "broken")
    resumed = run(True, None, "broken")
    assert shares(resumed) > 0.1
    for name, x in from_module(straight).arrays().items():
        assert x.tobytes() == from_module(resumed).arrays()[name].tobytes()


@pytest.mark.parametrize("method", ["magnitude", "movement"])
def test_tied_weights_have_one_mask(method):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 10)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu(self.b(torch.relu(self.a(x.flatten(1))))))

    run = train_sparse(DATA.with_model(Tied), None, 0.7, method=method, epochs=2, progress=False)
    assert run.model.a.weight is run.model.b.weight
    assert shares(run.model) == pytest.approx(0.7, abs=1e-3)


def test_a_recurrent_net_is_pruned_too():
    data = task("digits", model="rnn", augment=False)
    run = train_sparse(data, None, 0.5, epochs=1, progress=False)
    assert shares(run.model) == pytest.approx(0.5, abs=1e-3)


def test_the_strength_of_soft_movement_decides():
    found = [
        shares(train_sparse(DATA, None, 0.9, method="soft-movement", strength=s, epochs=10, progress=False).model)
        for s in (1e-3, 300.0)
    ]
    assert found[0] < 0.5 < found[1]


def test_a_sparse_net_still_reads_digits():
    run = train_sparse(DATA, None, 0.8, epochs=15, progress=False)
    assert run.history().column("accuracy")[-1] > 0.93
    assert shares(run.model) == pytest.approx(0.8, abs=1e-3)


def test_scopes_and_choices_are_those_of_pruning():
    run = train_sparse(DATA, None, 0.5, scope="row", where="fc*", epochs=1, progress=False)
    assert (run.model.head.weight != 0).all()
    assert ((run.model.fc1.weight == 0).sum(1) == 32).all()


BAD = [
    ({"fraction": 1.5}, RecipeError, "fraction"),
    ({"steps": 0}, SteelyardError, "steps"),
    ({"begin": 0.8}, RecipeError, "begin < end"),
    ({"method": "wanda"}, SteelyardError, "method"),
    ({"scope": "column"}, RecipeError, "scope"),
    ({"threshold": 0.7}, RecipeError, "threshold"),
    ({"where": "*.bias"}, ModelError, "no matrix"),
]  # fmt: skip


@pytest.mark.parametrize(("wish", "kind", "message"), BAD, ids=[m for *_, m in BAD])
def test_what_is_wrong_is_named_and_the_model_is_as_it_was(wish, kind, message):
    model = build_seeded(DATA)
    before = from_module(model).arrays()
    with pytest.raises(kind, match=message):
        Gradual(model, **{"fraction": 0.5, "steps": 10} | wish)
    assert all(np.array_equal(x, before[name]) for name, x in from_module(model).arrays().items())


def test_scores_need_soft_movement():
    with pytest.raises(ModelError, match="make a Gradual first"):
        Scores(1.0).bind(build_seeded(DATA))
    with pytest.raises(RecipeError, match="after_step"):
        train_sparse(DATA, None, 0.5, after_step=lambda model: None, progress=False)
