"""Models that are sharded among processes (FSDP2): the steps, checkpoints, averages and files of one process alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import steelyard as sy
from steelyard import formats
from steelyard.learn.treefile import read_tree

PROGRAM = """
import json, sys, torch
from torch import distributed as dist, nn
from steelyard import formats
from steelyard.formats.module import from_module, into_module
from steelyard.learn.average import Ema
from steelyard.learn.data import Examples
from steelyard.learn.decay import Decay
from steelyard.errors import ModelError
from steelyard.learn.finite import not_finite
from steelyard.learn.gradients import clip
from steelyard.learn.measures import accuracy, cross_entropy
from steelyard.learn.penalties import L1, L2, GroupL1
from steelyard.learn.processes import shard
from steelyard.learn.run import Run, train
from steelyard.learn.task import Task, build_seeded
torch.set_num_threads(1)
folder, stop, averaged, penalty = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "ema", sys.argv[4]
g = torch.Generator().manual_seed(0)
x, y = torch.randn(59, 5, generator=g).double(), torch.arange(59) % 3
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(5))  # its own, not that of a layer
        self.first = nn.Linear(5, 7)
        self.blocks = nn.ModuleList(nn.Linear(7, 7) for _ in range(2))  # 7 rows for 2 processes
        self.head = nn.Linear(7, 3)
        self.register_buffer("shift", torch.full((3,), 0.5))
    def forward(self, x):
        x = torch.tanh(self.first(x * self.scale))
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return self.head(x) + self.shift
data = Examples({"train": x[:41], "valid": x[41:]}, {"train": y[:41], "valid": y[41:]}, 8, 0)
task = Task("noise", lambda: Net().double(), data, cross_entropy, {"accuracy": accuracy})
penalties = {"none": [], "l1": [L1(1e-2)], "l2": [L2(1e-2), Decay(0.1)]}[penalty]
options = dict(epochs=3, accumulate=2, clip=0.3, checkpoint=folder, resume=True, penalties=penalties,
               average=Ema(0.9) if averaged else None, keep="best" if averaged else "last")
if stop:
    with Run(task, shard(build_seeded(task)), **options) as run:
        for step in run:
            if step.index == stop:
                break
run = train(task, shard(build_seeded(task)), progress=False, **options)
weights = from_module(run.model)
if not dist.is_initialized() or dist.get_rank() == 0:
    formats.write(weights, folder + "/weights.safetensors")
if dist.is_initialized():
    rank, model = dist.get_rank(), run.model
    kinds = {type(p).__name__ for p in model.parameters()}
    found = {"kinds": sorted(kinds), "held": sum(p.to_local().numel() for p in model.parameters())}
    other = shard(build_seeded(task, 1))
    into_module(weights, other)
    found["same"] = all(torch.equal(a.full_tensor(), b.full_tensor())
                        for a, b in zip(model.parameters(), other.parameters(), strict=True))
    other(x[:4]).sum().backward()
    extra = nn.Parameter(torch.zeros(2).double())  # every process has it
    extra.grad = torch.ones(2).double()
    whole = [p.grad.full_tensor() for p in other.parameters()] + [extra.grad.clone()]
    norm = torch.cat([g.flatten() for g in whole]).norm()
    found["norm"] = abs(float(clip([*other.parameters(), extra], 0.1)) - float(norm))
    clipped = [p.grad.full_tensor() for p in other.parameters()] + [extra.grad]
    found["clipped"] = float(torch.cat([g.flatten() for g in clipped]).norm())
    try:
        Run(task, other, penalties=[GroupL1(1e-2)])
    except ModelError as error:
        found["refused"] = str(error)
    other.head.weight.to_local().data[rank * 9 :].fill_(float("nan"))  # in one process alone
    found["not finite"] = not_finite(other.head.weight)
    if rank == 0:
        print("found", json.dumps(found))
"""


def run(tmp_path: Path, who: str, launch: list[str], *arguments: object) -> tuple[Any, Any, str]:
    """The checkpoint, the weights that were written, and what was printed."""
    (tmp_path / "program.py").write_text(PROGRAM)
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    command = [*launch, str(tmp_path / "program.py"), str(tmp_path / who), *map(str, arguments)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    written = formats.open(tmp_path / who / "weights.safetensors")
    return read_tree(tmp_path / who / "state.safetensors"), written, done.stdout


TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def leaves(tree: Any, path: str = "") -> dict[str, Any]:
    """The tensors and numbers of a checkpoint by their place."""
    if isinstance(tree, dict):
        return {k: v for key, inner in tree.items() for k, v in leaves(inner, f"{path}.{key}").items()}
    if isinstance(tree, (list, tuple)):
        return {k: v for i, inner in enumerate(tree) for k, v in leaves(inner, f"{path}.{i}").items()}
    return {path: tree}


@pytest.mark.parametrize(("averaged", "penalty", "stop"), [("ema", "none", 4), ("plain", "l1", 0), ("plain", "l2", 0)])
def test_two_processes_with_shards_are_one(tmp_path: Path, averaged: str, penalty: str, stop: int) -> None:
    """7 rows for 2 processes; with an average the run is broken off and goes on."""
    one, weights, _ = run(tmp_path, "one", [sys.executable], 0, averaged, penalty)
    two, sharded, said = run(tmp_path, "two", TWO, stop, averaged, penalty)
    for part in ("model", "optimizer", "kept", "epochs"):
        a, b = (leaves(state[part]) for state in (one, two))
        assert a.keys() == b.keys()
        for name, value in a.items():
            if "seconds" in name:
                continue
            if isinstance(value, (torch.Tensor, float)):
                assert torch.allclose(torch.as_tensor(value), torch.as_tensor(b[name]), rtol=0, atol=1e-6), name
            else:
                assert value == b[name], name
    for name, weight in weights.items():
        assert abs(weight.array() - sharded[name].array()).max() <= 1e-6
    found = json.loads(said.partition("found ")[2])
    assert found["kinds"] == ["DTensor"]
    assert 0.4 < found["held"] / sum(w.array().size for n, w in weights.items() if n != "shift") < 0.65
    assert found["same"]
    assert found["norm"] < 1e-9
    assert found["clipped"] == pytest.approx(0.1, rel=1e-4)
    assert found["not finite"] > 0
    assert found["refused"].startswith("GroupL1 on weights that are sharded among processes: only L1, L2")


def test_the_command_line_shards_a_model_and_writes_the_whole(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the quick brown fox jumps over the lazy dog. " * 30)
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    found = {}
    for who, launch, more in (("one", [sys.executable], []), ("two", TWO, ["--shard"])):
        train = ["-m", "steelyard", "train", f"text:{tmp_path}/a.txt(context=8, batch_size=8)", f"{who}.safetensors"]
        train += [
            "--model",
            "transformer(width=16, layers=2, tied=True)",
            "--epochs",
            "1",
            "--json",
            "--clip",
            "1",
            "--watch",
            f"{who}.sqlite",
            *more,
        ]
        done = subprocess.run(
            [*launch, *train], check=False, capture_output=True, text=True, env=environment, cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr
        found[who] = json.loads(done.stdout.splitlines()[0])["rows"]
    one, two = (formats.open(tmp_path / f"{who}.safetensors") for who in ("one", "two"))
    assert list(one) == list(two)
    assert one.ties == two.ties != {}
    for name, weight in one.items():
        assert abs(weight.array() - two[name].array()).max() < 1e-4, name
    assert [row["value"] for row in found["one"]] == pytest.approx([row["value"] for row in found["two"]], abs=1e-4)
    alone, shared = (sy.read_log(tmp_path / f"{who}.sqlite")["norms"] for who in ("one", "two"))
    assert alone.column("tensor") == shared.column("tensor")
    assert alone.column("weight norm") == pytest.approx(shared.column("weight norm"), rel=1e-4)


ALARMED = """
import os, sys, torch
from torch import distributed as dist, nn
from torch.distributed.fsdp import fully_shard
import steelyard as sy
torch.set_num_threads(1)
fault = sys.argv[1]
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.cell, self.middle = nn.Embedding(9, 6), nn.LSTM(6, 6, batch_first=True), nn.Linear(6, 6)
        self.gate, self.head = nn.Linear(6, 6), nn.Linear(6, 3)
        nn.init.normal_(self.gate.weight, std=1e-6)  # opens while it learns: no fault
        if fault == "vanishing signal":
            with torch.no_grad():
                for p in [*self.cell.parameters(), *self.middle.parameters()]:
                    p.mul_(1e-4)
    def forward(self, ids):
        x = torch.tanh(self.middle(self.cell(self.table(ids))[0]))
        x = x if fault == "vanishing signal" else x + self.gate(x)
        return self.head(x[:, -1])
torch.manual_seed(0)
dist.init_process_group("gloo")
model = Net()
for layer in list(model.children()):
    fully_shard(layer)  # each by itself: outside of their calls all that a process sees is its part
fully_shard(model)
held = [p for n, p in model.named_parameters() if fault != "frozen" or not n.startswith("middle")]
optimizer = torch.optim.SGD(held, lr=0.05)
found = []
alarm = sy.Alarm(model, optimizer, say=found.append) if dist.get_rank() == 0 else None  # the others do not wait for it
x, y = torch.arange(32).reshape(8, 4) % 9, torch.arange(8) % 3
for _ in range(12):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
if dist.get_rank() == 0:
    print("found", [(f.layer, f.verdict) for f in found])
dist.barrier()
sys.stdout.flush()
os._exit(0)  # what is asked is answered: torch's own threads now and then abort a process that is taken down around them
"""


@pytest.mark.parametrize(
    ("fault", "said"),
    [("none", []), ("frozen", [("middle", "frozen")]), ("vanishing signal", [("cell", "vanishing signal")])],
)
def test_an_alarm_watches_what_one_process_holds(tmp_path: Path, fault: str, said: list[tuple[str, str]]) -> None:
    (tmp_path / "alarmed.py").write_text(ALARMED)
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    command = [*TWO, str(tmp_path / "alarmed.py"), fault]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert f"found {said}" in done.stdout


CARRIED = """
import sys, torch
from steelyard.learn.run import Run, train
from steelyard.learn.tasks import task
torch.set_num_threads(1)
folder, stop = sys.argv[1], int(sys.argv[2])
found = task("text:" + sys.argv[3], context=8, batch_size=6, model="rnn")
options = dict(epochs=2, keep="last", checkpoint=folder, resume=True)
if stop:
    with Run(found, **options) as run:
        for step in run:
            if step.index == stop:
                break
train(found, progress=False, **options)
"""


def test_each_process_goes_on_with_the_state_of_its_own_rows(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the quick brown fox jumps over the lazy dog. " * 20)
    (tmp_path / "carried.py").write_text(CARRIED)
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    states = {}
    for who, stop in (("whole", 0), ("parts", 9)):
        command = [*TWO, str(tmp_path / "carried.py"), str(tmp_path / who), str(stop), str(tmp_path / "a.txt")]
        done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        states[who] = read_tree(tmp_path / who / "state.safetensors")
    whole, parts = (leaves(states[who]["model"]["tensors"]) for who in ("whole", "parts"))
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())
    first, second = states["parts"]["extras"]
    assert not torch.equal(first["carried"][0], second["carried"][0])
    alone = subprocess.run(
        [sys.executable, *command[len(TWO) :]], check=False, capture_output=True, text=True, env=environment
    )
    assert "2 processes had states of their own when the checkpoint was written, and there are 1 now" in alone.stderr
