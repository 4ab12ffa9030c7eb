"""Files that run: the one that gets the name gains, keeps the promise, and is what was proven. Speeds are planted."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from steelyard.deploy import apart
from steelyard.deploy.session import OnnxModule
from steelyard.errors import FormatError, ModelError, UnknownNameError, VerdictError
from steelyard.formats.module import from_module
from steelyard.learn.data import Examples
from steelyard.learn.evaluate import outcomes
from steelyard.learn.imitation import imitation
from steelyard.learn.measures import accuracy, cross_entropy
from steelyard.learn.run import train
from steelyard.learn.task import SPLITS, Task
from steelyard.shrinking import contest, narrower
from steelyard.shrinking.contest import Contender, Contest
from steelyard.shrinking.journal import Journal
from steelyard.shrinking.page import page
from steelyard.shrinking.promise import Promise
from steelyard.shrinking.search import Search
from steelyard.shrinking.within import shrink

from damage import damaged_onnx


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.inner = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(self.inner(x))


@pytest.fixture(scope="module")
def task() -> Task:
    g = torch.Generator().manual_seed(0)
    centres = torch.randn(4, 20, generator=g) * 0.9
    y = {split: torch.arange(1200) % 4 for split in SPLITS}
    x = {split: centres[y[split]] + torch.randn(1200, 20, generator=g) for split in SPLITS}

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(20, 64), Block(64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))

    return Task("blobs", build, Examples(x, y, 64, 0), cross_entropy, {"accuracy": accuracy})


@pytest.fixture(scope="module")
def model(task: Task) -> nn.Module:
    return train(task, epochs=4, progress=False).model


@pytest.fixture
def by_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor on which a file takes a second for each megabyte."""
    monkeypatch.setattr(apart, "race", _by_bytes)


def _by_bytes(files: list[Path], batch: list[np.ndarray], rounds: int = 31) -> np.ndarray:
    return np.array([[file.stat().st_size / 1e6] * rounds for file in files])


def test_how_long_it_takes_follows_what_was_done(task: Task, model: nn.Module, by_bytes: None) -> None:
    said: list[tuple[str, float]] = []
    shrink(model, task, aim="latency", tolerance=0.03, epochs=3, say=lambda what, share: said.append((what, share)))
    words, shares = list(dict.fromkeys(what for what, _ in said)), dict(reversed(said))
    assert words[:2] == ["comparing the splits", "measuring the original"]
    assert words[2:4] == ["making the original in ONNX", "making as it is, int8 on the way"]
    assert words[-3:] == [*words[-3:-2], "re-reading and timing the file", "done"]
    assert len([what for what, _ in said if what == "training a student"]) > 3 * 19, "at each step"
    assert all(0 <= share <= 1 for _, share in said)
    assert shares["making as it is, int8"] < shares["measuring what is gained"] < shares["done"] == 1
    assert words[-3].startswith("proving")


def test_the_file_gains_and_keeps_the_promise(task: Task, model: nn.Module, by_bytes: None, tmp_path: Path) -> None:
    target = tmp_path / "fast.onnx"
    before = {name: p.clone() for name, p in model.state_dict().items()}
    found = shrink(model, task, target, aim="latency", tolerance=0.03, epochs=6)
    row, speed = found.proof.rows[0], found.running.rows[0]
    assert outcomes(OnnxModule(target), task, "test")["accuracy"].mean() == row["accuracy"]
    assert row["loss"] <= row["loss at most"] <= 0.03
    assert row["bytes"] == target.stat().st_size
    assert speed["faster"] == pytest.approx(row["smaller"])
    assert list(tmp_path.iterdir()) == [target]
    chosen = [row["candidate"] for row in found.curve.rows if row["note"] == "chosen"]
    assert chosen == [found.why.meta["candidate"]]
    for row in found.curve.rows:
        asked = row["note"] in ("chosen", "holds", "fails")
        assert asked == (row["loss"] is not None), "and else there is a reason"
        assert row["note"]
        assert row["note"] != "gains nothing" or row["faster when chosen"] <= 1
        if row["note"].startswith("another one gains more, or"):
            assert any(
                r["faster when chosen"] and r["faster when chosen"] >= row["faster when chosen"]
                for r in found.curve.rows
                if r is not row
            )
    gains = [row["faster when chosen"] for row in found.curve.rows if row["note"] in ("holds", "chosen")]
    assert len(gains) > 1, "what gains less is asked on the way"
    names = found.curve.column("candidate")
    assert {"as it is, int8", "1 of 1 blocks gone, float32"} <= set(names)
    assert any("of the multiplications, int8" in name for name in names)
    assert "gone" in found.why.column("shape") or max(found.why.column("left")) <= 1
    assert sum(found.why.column("weights")) < sum(found.why.column("weights before"))
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    written = page(found, "fast.onnx")
    assert written.title.startswith("Faster within 3.00 pp")


def test_the_proof_examples_choose_nothing(task: Task, model: nn.Module, by_bytes: None) -> None:
    """With other proof examples that prove as much, the same candidate comes out."""
    data = task.batches
    other = Examples({**data.inputs, "test": data.inputs["train"]}, {**data.targets, "test": data.targets["train"]},
                     64, 0)  # fmt: skip
    a, b = (shrink(model, t, aim="latency", tolerance=0.05, epochs=0) for t in (task, replace(task, batches=other)))
    assert a.why.meta["candidate"] == b.why.meta["candidate"]


def test_smaller_and_not_faster_is_a_no(
    task: Task, model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = [1.0, 1.5, 1.25, 1.3]
    monkeypatch.setattr(apart, "race", lambda files, *_: np.array([[s] * 31 for s in seconds[: len(files)]]))
    with pytest.raises(VerdictError, match=r"'as it is, int8', has 0\.80 times its speed.*smaller, not faster here"):
        shrink(model, task, tmp_path / "fast.onnx", aim="latency", tolerance=0.03, epochs=0)
    assert not list(tmp_path.iterdir())


def test_a_gain_that_may_be_chance_is_none(task: Task, model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """A median of 1.1 of which eleven rounds of thirty-one are below 1."""
    rounds = np.array([1 / 0.9] * 11 + [1 / 1.1] * 20)
    monkeypatch.setattr(apart, "race", lambda files, *_: np.array([np.ones(31)] + [rounds] * (len(files) - 1)))
    with pytest.raises(VerdictError, match=r"no form within the tolerance runs faster.*; more tolerance, or epochs"):
        shrink(model, task, aim="latency", tolerance=0.03, epochs=0)


def test_nothing_is_written_where_the_safest_fails(
    task: Task, model: nn.Module, by_bytes: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = contest.Contest._outcomes

    def planted(self: contest.Contest, module: nn.Module, split: str) -> np.ndarray:
        found = measure(self, module, split)
        return found * (np.arange(len(found)) >= 60) if split == "test" else found

    monkeypatch.setattr(contest.Contest, "_outcomes", planted)
    target = tmp_path / "fast.onnx"
    target.write_bytes(b"what was there")
    with pytest.raises(VerdictError, match=r"the safest candidate .* may lose 0\.06.* the tolerance is 0\.03"):
        shrink(model, task, target, aim="latency", tolerance=0.03, epochs=0)
    assert target.read_bytes() == b"what was there"


def test_what_loses_too_much_is_named(task: Task, model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = contest.Contest._outcomes
    monkeypatch.setattr(contest.Contest, "_outcomes", lambda *given: measure(*given) * 0.5)
    with pytest.raises(VerdictError, match=r"every form .* loses more than 0\.03 .* \(least of all 'as it is, int8"):
        shrink(model, task, aim="latency", tolerance=0.03, epochs=0)


@pytest.fixture(scope="module")
def proven(
    task: Task, model: nn.Module, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Contest, Contender]]:
    """A contest that has its winner, which has no name yet."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(apart, "race", _by_bytes)
        original = from_module(model).settle()
        search = Search(model, task, original, Promise(0.03), Journal(None, {}), 0, lambda *_: None)
        search.precondition()
        made = Contest(search, "latency", tmp_path_factory.mktemp("contest"))
        made.enter(0)
        yield made, made.proven(made.ranked())


@pytest.mark.parametrize("seed", [*range(7), *(pytest.param(s, marks=pytest.mark.slow) for s in range(7, 50))])
@pytest.mark.parametrize("when", ["written", "proven"])
def test_a_file_that_holds_something_else_never_gets_the_name(
    proven: tuple[Contest, Contender], when: str, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was damaged when it was written, or since it was proven."""
    made, found = proven
    (tmp_path / "out").mkdir()
    target = tmp_path / "out" / "fast.onnx"
    raw = found.file.read_bytes()
    wrong = damaged_onnx(raw, seed)
    assert wrong != raw
    sync = os.fsync

    def damaging(number: int) -> None:
        os.ftruncate(number, 0)
        os.pwrite(number, wrong, 0)
        sync(number)

    if when == "written":
        monkeypatch.setattr(contest.os, "fsync", damaging)
    else:
        (tmp_path / "damaged.onnx").write_bytes(wrong)
        found = replace(found, file=tmp_path / "damaged.onnx")
    with pytest.raises(VerdictError, match=r"other bytes than the one that was proven|does not run"):
        made.finished(found, target)
    assert not list(target.parent.iterdir())


def test_a_file_that_does_something_else_is_refused(
    task: Task, model: nn.Module, by_bytes: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = apart.answers

    def other(file: Path, batches: list) -> tuple[str, list[np.ndarray]]:
        digest, outputs = answers(file, batches)
        return digest, [-x for x in outputs]

    monkeypatch.setattr(apart, "answers", other)
    with pytest.raises(VerdictError, match=r"run by another process, loses .* not what it lost before"):
        shrink(model, task, tmp_path / "fast.onnx", aim="latency", tolerance=0.03, epochs=0)
    assert not list(tmp_path.iterdir())


def test_students_are_trained_once(
    task: Task, model: nn.Module, by_bytes: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(narrower, "KEPT", (0.5,))
    first = shrink(model, task, aim="latency", tolerance=0.03, epochs=6, checkpoint=tmp_path)
    monkeypatch.setattr(narrower, "train", None)
    again = shrink(model, task, aim="latency", tolerance=0.03, epochs=6, checkpoint=tmp_path)
    assert first.curve.column("candidate") == again.curve.column("candidate")
    assert first.why.rows == again.why.rows


def test_between_a_rung_that_is_not_borne_and_the_last_that_was_lies_one_more(task: Task, model: nn.Module) -> None:
    ladder = narrower.Ladder(model, task, Journal(None, {}), 1, 0)
    rungs = ladder.narrower("", model)
    names = [rungs.send(bears)[0] for bears in (None, True, False)]
    assert names == [f"{share}% of the multiplications" for share in (70, 50, 59)]
    with pytest.raises(StopIteration):
        rungs.send(True)
    shallower = ladder.shallower()
    assert next(shallower)[0] == "1 of 1 blocks gone"
    with pytest.raises(StopIteration):
        shallower.send(False)


@pytest.mark.skipif(not apart._STATUS.exists(), reason="only Linux says")
def test_memory(task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a wide net, weights are most of what it takes."""
    wide = task.with_model(lambda: nn.Sequential(nn.Linear(20, 1000), nn.ReLU(), nn.Linear(1000, 1500), nn.ReLU(),
                                                 nn.Linear(1500, 4)))  # fmt: skip
    made = train(wide, epochs=1, progress=False).model
    found = shrink(made, wide, tmp_path / "small.onnx", aim="memory", tolerance=0.03, epochs=0)
    row = found.running.rows[-1]
    assert row["memory"] < row["memory before"] - 2e6
    assert "less memory when chosen" in [column.name for column in found.curve.columns]
    monkeypatch.setattr(apart, "peak", lambda *_: None)
    with pytest.raises(ModelError, match="which this system does not have"):
        shrink(made, wide, aim="memory", tolerance=0.03, epochs=0)


def test_a_block_of_which_more_is_read_than_its_outputs_stays(by_bytes: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(narrower, "KEPT", ())
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    net = nn.Sequential(nn.Embedding(50, 16), nn.TransformerEncoder(layer, 2), nn.Flatten(), nn.Linear(16 * 8, 4))
    alike = imitation(net.eval(), [torch.randint(50, (16, 8)) for _ in range(12)], "cosine")
    found = shrink(net, alike, aim="latency", tolerance=0.5, epochs=1)
    assert any(str(name).startswith("1 of 1 blocks gone") for name in found.curve.column("candidate"))


def test_errors(task: Task, model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"expected a name that ends in \.onnx: shrink writes one file"):
        shrink(model, task, tmp_path / "fast.safetensors", aim="latency")
    with pytest.raises(UnknownNameError, match="latency"):
        shrink(model, task, aim="latecy")  # type: ignore[arg-type]
