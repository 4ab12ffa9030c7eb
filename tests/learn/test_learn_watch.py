"""Watching: exact norms for any tensor and optimizer, a loop that is the same bit for bit, a log that others can read."""

from __future__ import annotations

import copy
import math
import sqlite3

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import steelyard as sy
from steelyard.errors import FormatError, ModelError, UnknownNameError, WeightsError
from steelyard.learn.run import Run
from steelyard.learn.watch import norms as norms_module
from steelyard.learn.watch.reading import watched
from steelyard.learn.watch.session import watch


def net(seed: int = 0, **options: object) -> nn.Module:
    torch.manual_seed(seed)
    layers = nn.Linear(5, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3)
    return nn.Sequential(*layers).to(**options)


def data(steps: int, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    random = torch.Generator().manual_seed(seed)
    return [(torch.randn(8, 5, generator=random), torch.randint(3, (8,), generator=random)) for _ in range(steps)]


def loop(model, optimizer, log=None, steps=5, clip=None, seen=None):
    losses = []
    for x, y in data(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x.to(next(model.parameters()).dtype)).float(), y)
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        before = {n: p.detach().double().clone() for n, p in model.named_parameters()}
        optimizer.step()
        losses.append(loss.item())
        if log is not None:
            log.note(loss=loss)
        if seen is not None:
            seen.append(
                (before, {n: p.grad.double().norm().item() for n, p in model.named_parameters()}, moves(model, before))
            )
    return losses


def moves(model, before):
    return {n: (p.detach().double() - before[n]).norm().item() for n, p in model.named_parameters()}


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "one by one": lambda p: torch.optim.Adam(p, lr=1e-2, foreach=False),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_norm_is_exact(name, dtype):
    model = net(dtype=dtype)
    optimizer, seen = OPTIMIZERS[name](model.parameters()), []
    with watch(model, optimizer) as log:
        loop(model, optimizer, clip=0.5, seen=seen)
    rows = iter(log.table("norms").rows)
    for step, (before, gradients, updates) in enumerate(seen):
        for tensor, old in before.items():
            row = next(rows)
            assert (row["step"], row["tensor"]) == (step, tensor)
            assert row["weight norm"] == pytest.approx(old.norm().item(), rel=1e-13)
            assert row["gradient norm"] == pytest.approx(gradients[tensor], rel=1e-13)
            assert row["update norm"] == pytest.approx(updates[tensor], rel=1e-13)
            size = old.norm().item()
            assert row["update ratio"] == (pytest.approx(updates[tensor] / size, rel=1e-12) if size else None)
    assert next(rows, None) is None


def test_the_training_is_the_same_bit_for_bit():
    plain, observed = net(), net()
    torch.manual_seed(5)
    without = loop(plain, torch.optim.AdamW(plain.parameters()))
    optimizer = torch.optim.AdamW(observed.parameters())
    torch.manual_seed(5)
    with watch(observed, optimizer) as log:
        watching = loop(observed, optimizer, log)
    assert without == watching
    assert all(
        torch.equal(a, b) for a, b in zip(plain.state_dict().values(), observed.state_dict().values(), strict=True)
    )
    assert log.table("notes").column("value") == without
    assert log.table("notes").column("step") == list(range(5))
    assert not observed._forward_pre_hooks
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_pieces_and_threads_give_the_same_norms(monkeypatch):
    model = nn.ModuleDict({"a": nn.Linear(40, 30), "b": nn.Linear(1, 1, bias=False), "c": nn.Embedding(3, 0)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def norms():
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        with watch(model, optimizer) as log:
            optimizer.step()
        return [row["update norm"] for row in log.table("norms").rows]

    whole = norms()
    monkeypatch.setattr(norms_module, "PIECE", 7)
    monkeypatch.setattr(norms_module, "SHARED", 0)
    torch.set_num_threads(2)
    assert norms() == pytest.approx(whole, rel=1e-6)
    assert whole == pytest.approx([0.1 * math.sqrt(1200), 0.1 * math.sqrt(30), 0.1, 0.0], rel=1e-6)


def test_what_lies_elsewhere_in_memory_is_read_as_well():
    weight = nn.Parameter(torch.arange(12.0).reshape(3, 4).t())
    complex_one, row = nn.Parameter(torch.tensor([3 + 4j])), nn.Parameter(torch.ones(4)[::2])
    model = nn.ParameterList([weight, complex_one, row])
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for p in model:
        p.grad = torch.ones_like(p)
    with watch(model, optimizer) as log:
        optimizer.step()
    table = log.table("norms")
    assert table.column("weight norm") == pytest.approx([math.sqrt(506), 5, math.sqrt(2)])
    assert table.column("update norm") == pytest.approx([math.sqrt(12), 1, math.sqrt(2)], rel=1e-6)


def test_sparse_gradients_count_their_values():
    model = nn.Embedding(10, 4, sparse=True)
    optimizer = torch.optim.SparseAdam(model.parameters(), lr=0.1)
    with watch(model, optimizer) as log:
        model(torch.tensor([1, 1, 3])).sum().backward()
        optimizer.step()
    row = log.table("norms").rows[0]
    assert row["gradient norm"] == pytest.approx(math.sqrt(4 * 4 + 4))
    assert row["update norm"] == pytest.approx(0.1 * math.sqrt(8), rel=1e-5)


def test_a_step_by_closure():
    model, (x, y) = net(), data(1)[0]
    model.eval()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    with watch(model, optimizer) as log:
        optimizer.step(closure)
    table = log.table("norms")
    assert min(table.column("gradient norm")) > 0
    assert max(table.column("update norm")) > 0


def test_what_happens_between_the_steps_is_no_part_of_an_update():
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with watch(model, optimizer) as log:
        for _ in range(2):
            model(torch.ones(1, 3)).sum().backward()
            optimizer.step()
            model.weight.data.mul_(0.5)
    assert set(log.table("norms").column("update norm")) == {0.0}
    sizes = log.table("norms", tensor="weight").column("weight norm")
    assert sizes[1] == pytest.approx(sizes[0] / 2)


def test_sharded_tensors_have_the_norms_of_the_whole():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        logs = []
        for sharded in (False, True):
            model = net()
            if sharded:
                fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
            torch.manual_seed(3)
            with watch(model, optimizer) as log:
                for x, y in data(3):
                    optimizer.zero_grad()
                    nn.functional.cross_entropy(model(x), y).backward()
                    optimizer.step()
            logs.append(log)
    finally:
        torch.distributed.destroy_process_group()
    plain, sharded = (log.table("norms") for log in logs)
    for column in ("weight norm", "gradient norm", "update norm"):
        assert sharded.column(column) == pytest.approx(plain.column(column), rel=1e-12)
    assert [log.table("faults").rows for log in logs] == [(), ()]
    assert len(logs[0].table("values").rows) == len(logs[1].table("values").rows)


def test_several_optimizers_make_one_step():
    model, (x, y) = net(), data(1)[0]
    matrices = torch.optim.SGD([p for p in model.parameters() if p.ndim > 1], lr=0.1)
    others = torch.optim.Adam([p for p in model.parameters() if p.ndim < 2], lr=0.1)
    with watch(model, [matrices, others]) as log:
        for _ in range(12):
            nn.functional.cross_entropy(model(x), y).backward()
            matrices.step()
            others.step()
    assert len(log.table("steps").rows) == 12
    assert min(log.table("norms").column("update norm")) > 0
    assert log.table("faults").rows == ()
    assert log.table("norms").meta["optimizer"] == "SGD, Adam"


def test_frozen_unused_and_foreign_tensors():
    model = nn.ModuleDict({"frozen": nn.Linear(4, 4), "unused": nn.Linear(4, 4), "used": nn.Linear(4, 4)})
    model["frozen"].requires_grad_(False)
    optimizer = torch.optim.SGD(model["used"].parameters(), lr=0.1)
    session = watch(model, optimizer)
    with session as log:
        for _ in range(2):
            model["used"](torch.ones(1, 4)).sum().backward()
            optimizer.step()
        assert set(session.norms.copies) == {"unused.weight", "unused.bias", "used.weight", "used.bias"}
        model["frozen"].requires_grad_(True)
        optimizer.step()
        assert "frozen.weight" in session.norms.copies
    assert not session.norms.copies
    for name, gradient in (("frozen", None), ("unused", None)):
        table = log.table("norms", tensor=f"{name}.weight")
        assert table.column("gradient norm") == [gradient] * 3
        assert table.column("update norm") == [0.0] * 3
        assert table.column("weight norm")[0] == pytest.approx(model[name].weight.norm().item())


def test_nan_and_infinity_are_kept_apart_from_nothing():
    model = nn.ParameterList([torch.ones(2), torch.ones(2), torch.ones(2)])
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model[0].grad, model[1].grad = torch.tensor([math.nan, 1.0]), torch.tensor([math.inf, 1.0])
    with watch(model, optimizer) as log:
        optimizer.step()
    nan, infinite, none = log.table("norms").column("gradient norm")
    assert math.isnan(nan)
    assert math.isinf(infinite)
    assert none is None


def test_tied_compiled_and_parametrised_names():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    nn.utils.parametrizations.weight_norm(model[1], "weight")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer) as log:
        pass
    assert log.table("tensors").column("tensor") == [
        "0.weight",
        "0.bias",
        "1.bias",
        "1.weight.original0",
        "1.weight.original1",
    ]


def test_a_copy_of_a_watched_model_is_not_watched(tmp_path):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer) as log:
        loop(model, optimizer, steps=1)
        twin = copy.deepcopy(model)
        torch.save(model, tmp_path / "whole.pt")
        log.note(after=1)
        twin(torch.ones(2, 5))
        log.note(after=2)
    assert log.table("notes").column("step") == [0, 0]
    assert torch.load(tmp_path / "whole.pt", weights_only=False)(torch.ones(2, 5)).shape == (2, 3)


def test_a_run_is_watched_with_its_losses(task):
    shown = []
    run = Run(task, epochs=2, progress=lambda run: shown.append(run.log[-1]["loss"]))
    with watch(run) as log, run:
        losses = [step.loss for step in run]
    assert log.table("notes").column("value") == losses == shown
    assert log.table("notes").column("step") == list(range(len(losses)))
    assert log.table("steps").column("rate") == run.table().column("rate")


def test_the_log_as_a_file(tmp_path):
    path, model = tmp_path / "log.sqlite", net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer, path=path) as log:
        loop(model, optimizer, log)
        log.write()
        assert len(watched(path, "steps").rows) == 5  # read while it grows
    assert [file.name for file in tmp_path.iterdir()] == ["log.sqlite"]
    assert watched(path, tensor="0.weight").rows == log.table("norms", tensor="0.weight").rows
    base = sqlite3.connect(path)
    units = dict(base.execute("""SELECT "column", unit FROM "columns" WHERE "table" = 'steps'"""))
    assert units == {c.name: c.unit for c in watched(path, "steps").columns}
    base.close()


def test_what_can_go_wrong_is_said_in_one_line(tmp_path):
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ModelError, match="none of the model's 2 parameters is in the optimizer"):
        watch(other, optimizer)
    with pytest.raises(ModelError, match="expected an optimizer"):
        watch(model)
    with pytest.raises(ModelError, match="expected a torch optimizer, got int"):
        watch(model, 3)
    with pytest.raises(ModelError, match="expected a torch optimizer, got none"):
        watch(model, [])
    with pytest.raises(ModelError, match="got str"):
        watch("model", optimizer)
    with watch(model, optimizer) as log:
        with pytest.raises(WeightsError, match="note: loss is no number"):
            log.note(loss=torch.ones(3))
        with pytest.raises(WeightsError, match="note: loss is no number"):
            log.note(loss="low")
        with pytest.raises(UnknownNameError, match="did you mean 'norms'"):
            log.table("norm")
        with pytest.raises(UnknownNameError, match="tensor in the log 'wieght'; did you mean 'weight'"):
            log.table("norms", tensor="wieght")
        with pytest.raises(UnknownNameError, match="table by tensor 'steps'"):
            log.table("steps", tensor="weight")
    (tmp_path / "text").write_text("no log " * 99)
    sqlite3.connect(tmp_path / "empty").close()
    before = (tmp_path / "text").read_bytes()
    with pytest.raises(WeightsError, match="exists: choose another name"):
        watch(model, optimizer, path=tmp_path / "text")
    for name in ("text", "empty", "missing"):
        with pytest.raises(FormatError, match=name):
            sy.watched(tmp_path / name)
    with pytest.raises(WeightsError, match="cannot be written"):
        watch(model, optimizer, path=tmp_path / "no folder" / "log")
    assert (tmp_path / "text").read_bytes() == before


def test_an_error_in_the_loop_leaves_no_hook_and_a_whole_log(tmp_path):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def failing():
        with watch(model, optimizer, path=tmp_path / "log"):
            loop(model, optimizer, steps=2)
            raise KeyError

    with pytest.raises(KeyError):
        failing()
    assert not model._forward_pre_hooks
    assert len(sy.watched(tmp_path / "log", "steps").rows) == 2
