"""The built-in tasks: splits without overlap, right encodings, and bad files that are named with their place."""

from __future__ import annotations

import gzip
import hashlib
import os
import struct
import urllib.error
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from steelyard.errors import FormatError, ModelError, RecipeError, SteelyardError, UnknownNameError
from steelyard.learn.data import few, stratified
from steelyard.learn.evaluate import evaluate
from steelyard.learn.run import Run, train
from steelyard.learn.task import SPLITS, Split, Task, build_seeded
from steelyard.learn.tasks import mnist, task
from steelyard.learn.tasks.bundled import vary
from steelyard.life.record import make_task


def all_of(found: Task, split: Split, epoch: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    batches = list(found.batches(split, epoch))
    return torch.cat([b.inputs for b in batches]), torch.cat([b.targets for b in batches])


def test_stratified_splits_are_disjoint_complete_and_proportional() -> None:
    labels = np.random.default_rng(0).integers(0, 4, 500)
    parts = stratified(labels, seed=3)
    assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(500))
    for split, share in (("train", 0.6), ("valid", 0.15), ("test", 0.25)):
        for label in range(4):
            count = (labels == label).sum()
            assert abs((labels[parts[split]] == label).sum() - share * count) <= 1
    again, other = stratified(labels, seed=3), stratified(labels, seed=4)
    assert all(np.array_equal(parts[s], again[s]) for s in SPLITS)
    assert not np.array_equal(parts["test"], other["test"])


def test_digits() -> None:
    found = task("digits", augment=False)
    assert found.about["examples"] == {"train": 1078, "valid": 269, "test": 450}
    seen = {row.numpy().tobytes() for row in all_of(found, "test")[0]}
    assert not seen & {row.numpy().tobytes() for row in all_of(found, "train")[0]}
    x, y = all_of(found, "train")
    assert (x.min(), x.max()) == (0, 1)
    assert y.unique().tolist() == list(range(10))
    assert found.headline == "accuracy"


def test_digits_of_some_classes_are_numbered_anew_and_few_are_few() -> None:
    found = task("digits", classes=(7, 3), shots=4, augment=False)
    assert found.classes == ("7", "3")
    assert all_of(found, "train")[1].bincount().tolist() == [4, 4]
    everything = task("digits", augment=False)
    y = all_of(everything, "test")[1]
    assert torch.equal(all_of(found, "test")[1].bincount(), torch.tensor([(y == 7).sum(), (y == 3).sum()]))
    with pytest.raises(ModelError, match="two different digits"):
        task("digits", classes=(1, 1))
    with pytest.raises(ModelError, match="shots=500: class 0 has"):
        task("digits", shots=500)
    with pytest.raises(ModelError, match="batch size is 0"):
        task("digits", batch_size=0)


def test_few_takes_the_same_rows_for_the_same_seed() -> None:
    labels = np.arange(40) % 2
    assert np.array_equal(few(np.arange(40), labels, 3, 0), few(np.arange(40), labels, 3, 0))
    assert not np.array_equal(few(np.arange(40), labels, 3, 0), few(np.arange(40), labels, 3, 1))


def test_varied_images_are_new_in_each_epoch_and_the_held_out_ones_never() -> None:
    found = task("digits")
    a, b = (next(iter(found.batches("train", epoch))).inputs for epoch in (0, 1))
    assert not torch.equal(a, b)
    assert torch.equal(all_of(found, "test")[0], all_of(task("digits", augment=False), "test")[0])
    still = torch.rand(4, 1, 8, 8)
    same = vary(still, torch.Generator(), degrees=0, stretch=0, shift=0)
    assert torch.allclose(same, still, atol=1e-6)


def test_breast_cancer_is_standardised_by_the_training_rows() -> None:
    found = task("breast-cancer")
    x, _ = all_of(found, "train")
    assert torch.allclose(x.mean(0), torch.zeros(30), atol=1e-5)
    assert torch.allclose(x.std(0, correction=0), torch.ones(30), atol=1e-5)
    assert found.features[0] == "mean radius"
    run = train(found, epochs=15, rate=0.03, progress=False)
    assert evaluate(run.model, found).rows[0]["value"] > 0.95


def alphabet(tmp_path: Path, repeats: int = 200) -> Path:
    path = tmp_path / "a.txt"
    path.write_text("abcdefgh" * repeats + "Z" * 40, encoding="utf-8")
    return path


def test_text_gives_the_next_character(tmp_path: Path) -> None:
    found = task(f"text:{alphabet(tmp_path)}", context=10, model="rnn", carry=False)
    assert found.classes == (*"abcdefgh", "\ufffd")
    for split in SPLITS:
        x, y = all_of(found, split)
        assert torch.equal(x[:, 1:][y[:, :-1] >= 0], y[:, :-1][y[:, :-1] >= 0])
    assert found.classes[all_of(found, "test")[1][-1, -1]] == "\ufffd"  # Z is not in the training part
    table = evaluate(build_seeded(found), found)
    assert table.column("metric") == ["accuracy", "bits per character", "loss"]
    assert table.rows[1]["value"] == pytest.approx(table.rows[2]["value"] / np.log(2))
    assert table.column("method") == ["block bootstrap"] * 3
    run = train(found, epochs=5, rate=0.01, progress=False)
    assert run.history().column("accuracy")[-1] > 0.9


@pytest.mark.parametrize(("context", "stride"), [(10, 10), (10, 3), (16, 1)])
def test_every_held_out_character_is_scored_once_with_what_comes_before(
    tmp_path: Path, context: int, stride: int
) -> None:
    path = tmp_path / "random.txt"
    letters = "".join(np.random.default_rng(0).choice(list("abcdefghij"), 3000))
    path.write_text(letters)
    found = task(f"text:{path}", context=context, stride=stride)
    sizes = found.about["characters"]
    assert sum(sizes.values()) == 3000
    assert abs(sizes["test"] - 300) <= stride / 2
    begins = {"valid": sizes["train"], "test": sizes["train"] + sizes["valid"]}
    for split, first in begins.items():
        x, y = all_of(found, split)
        counted = y != -100
        assert counted.sum(1).tolist() == [stride] * len(y)
        said = "".join(found.classes[i] for i in y[counted])
        assert said == letters[first : first + sizes[split]]
        last = "".join(found.classes[i] for i in x[-1])
        assert last == letters[first + sizes[split] - context - 1 : first + sizes[split] - 1]


def test_the_score_of_a_text_is_the_mean_over_its_characters(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 40)
    found = task(f"text:{path}", context=24, stride=7)
    model = build_seeded(found)
    values = []
    for batch in found.batches("test", 0):
        with torch.no_grad():
            logits = model.eval()(batch.inputs)[:, -7:].double()
        values.append(-logits.log_softmax(-1).gather(-1, batch.targets[:, -7:, None])[..., 0])
    bits = torch.cat(values).flatten().mean() / np.log(2)
    row = evaluate(model, found).rows[1]
    assert row["value"] == pytest.approx(float(bits), rel=1e-5)
    assert row["low"] < row["value"] < row["high"]


def test_frequencies_are_the_baseline_of_a_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("aaab" * 1000)
    baselines = task(f"text:{path}", context=8).baselines
    assert baselines["accuracy"] == 0.75
    assert baselines["bits per character"] == pytest.approx(0.8113, abs=0.002)  # the entropy of (3/4, 1/4)


def test_windows_begin_elsewhere_in_each_epoch_and_nothing_is_read_twice_in_one(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("".join(chr(0x4E00 + i) for i in range(2000)))
    found = task(f"text:{path}", context=10, batch_size=4)
    seen = [all_of(found, "train", epoch)[0] for epoch in range(4)]
    assert len({int(x.min()) for x in seen}) > 1
    for x in seen:
        assert len(x.unique()) == x.numel()
        assert len(x) == len(seen[0])


def streams(found: Task, epoch: int) -> torch.Tensor:
    return torch.cat([batch.inputs[0] for batch in found.batches("train", epoch)], 1)


def test_carried_batches_are_streams_that_go_on(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("".join(chr(0x4E00 + i) for i in range(2000)))
    found = task(f"text:{path}", context=10, batch_size=4, model="rnn")
    batches = list(found.batches("train", 0))
    assert batches[0].inputs[1].all()
    assert not any(batch.inputs[1].any() for batch in batches[1:])
    rows = streams(found, 0)
    assert torch.equal(rows[:, 1:], rows[:, :-1] + 1)  # each stream is the text without a gap
    assert torch.equal(torch.cat([batch.targets for batch in batches], 1), rows + 1)
    assert len({int(streams(found, epoch)[0, 0]) for epoch in range(4)}) > 1
    assert all(batch.inputs[1].all() for batch in found.batches("test", 0))
    with pytest.raises(ModelError, match="a transformer has none: use rnn, or carry=False"):
        build_seeded(task(f"text:{path}", context=10, batch_size=4, model="transformer", carry=True))
    with pytest.raises(ModelError, match=r"too few for windows of 100 .* a smaller context or batch"):
        task(f"text:{path}", context=100, batch_size=32, model="rnn")


def test_a_carried_state_is_that_of_one_long_pass_without_its_gradient(tmp_path: Path) -> None:
    found = task(f"text:{alphabet(tmp_path)}", context=10, batch_size=4, model="rnn")
    net = build_seeded(found).train()
    batches = list(found.batches("train", 0))[:3]
    outputs = [net(*batch.inputs) for batch in batches]
    whole = build_seeded(found)(torch.cat([batch.inputs[0] for batch in batches], 1))
    assert torch.allclose(torch.cat(outputs, 1), whole, atol=1e-5)
    outputs[2].sum().backward()  # does not reach the graphs before
    fresh = net(batches[0].inputs[0], torch.tensor([True, True, False, True]))
    assert torch.allclose(fresh[[0, 1, 3]], outputs[0][[0, 1, 3]], atol=1e-6)
    assert not torch.allclose(fresh[2], outputs[0][2], atol=1e-3)
    state = net.carried.get_extra_state()
    evaluate(net, found)
    assert net.carried.get_extra_state() is state  # measuring does not disturb the streams
    with pytest.raises(ModelError, match="a batch of 3 rows follows one of 4"):
        net.train()(batches[0].inputs[0][:3], batches[1].inputs[1][:3])


def test_a_run_that_carries_a_state_goes_on_bit_for_bit(tmp_path: Path) -> None:
    found = task(f"text:{alphabet(tmp_path)}", context=10, batch_size=4, model="rnn")
    options = {"epochs": 2, "keep": "last"}
    whole = train(found, progress=False, **options)
    with Run(found, checkpoint=tmp_path / "kept", **options) as run:
        for step in run:
            if step.index == 4:
                break
    parts = train(found, checkpoint=tmp_path / "kept", resume=True, progress=False, **options)
    assert parts.table().column("loss") == whole.table().column("loss")
    assert all(torch.equal(a, b) for a, b in zip(parts.model.parameters(), whole.model.parameters(), strict=True))


def test_a_model_that_is_named_decides_what_a_text_serves(tmp_path: Path) -> None:
    path = alphabet(tmp_path)
    for model, carried in (("rnn", True), ({"rnn": {"cell": "gru"}}, True), ("transformer", False), (None, False)):
        made = make_task({f"text:{path}": {"context": 8, "batch_size": 4}}, model, 0)
        assert made.interface.carried is carried
        assert isinstance(getattr(build_seeded(made), "recurrent", None), torch.nn.GRU) is isinstance(model, dict)


def test_the_bundled_text() -> None:
    found = task("text")
    assert found.name == "text:moby-dick"
    assert sum(found.about["characters"].values()) == 1_190_317
    said = "".join(found.classes[i] for i in found.batches.code[:40])
    assert said == "CHAPTER 1. Loomings.\n\nCall me Ishmael. S"
    assert 4 < found.baselines["bits per character"] < 5


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"abc", "3 characters, too few"), (b"\xff\xfe\xff", "not UTF-8 at byte 0"), (None, "No such file")],
)
def test_bad_texts(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "bad.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ModelError, match=message) as caught:
        task(f"text:{path}")
    assert "\n" not in str(caught.value)


def table(tmp_path: Path, rows: int = 60) -> Path:
    random = np.random.default_rng(0)
    lines = ["size, colour ,price,kind"]
    for _ in range(rows):
        size, colour = random.normal(), random.choice(["red", "green", "blue"])
        kind = "big" if size > 0 else "small"
        lines.append(f'{size},{colour},{3 * size + (colour == "red") + 0.01 * random.normal():.4f},"{kind}"')
    path = tmp_path / "t.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8-sig")
    return path


def test_csv_classification_and_regression(tmp_path: Path) -> None:
    path = table(tmp_path)
    kind = task(f"csv:{path}:kind")
    assert kind.classes == ("big", "small")
    assert kind.features == ("size", "colour=blue", "colour=green", "colour=red", "price")
    x, _ = all_of(kind, "train")
    assert torch.allclose(x[:, 0].mean(), torch.tensor(0.0), atol=1e-6)
    assert x[:, 1:4].sum(1).unique().tolist() == [1]
    price = task(f"csv:{path}:price", model="linear")
    run = train(price, epochs=60, rate=0.05, progress=False)
    assert price.lower_is_better == ("squared error", "absolute error")
    assert run.history().column("squared error")[-1] < 0.05
    numbered = task(f"csv:{path}:kind", kind="classification")
    assert numbered.classes == kind.classes
    with pytest.raises(ModelError, match=r"line 2: the column 'kind' is '(big|small)', expected a number"):
        task(f"csv:{path}:kind", kind="regression")


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ("a,b\n1,2\n", UnknownNameError, "no column 'y'"),
        ("a,y\n1,2\n1\n", ModelError, "line 3: expected 2 cells, found 1"),
        ("a,y\n1,2\n ,3\n", ModelError, "line 3: the column 'a' is empty"),
        ("a,a\n1,2\n", ModelError, "'a' is named twice"),
        ("a,y\n", ModelError, "expected a header line and rows, found 1"),
        ("", ModelError, "expected a header line and rows, found 0"),
        ("a,y\n1,2\n3,4\n", ModelError, "2 rows are too few"),
        ("y\n" + "0\n1\n" * 20, ModelError, "only column"),
        ('a,y\n"1"x,2\n', ModelError, "line 2: "),
    ],
)
def test_bad_tables(tmp_path: Path, content: str, error: type[SteelyardError], message: str) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(content)
    with pytest.raises(error, match=message) as caught:
        task(f"csv:{path}:y")
    assert "\n" not in str(caught.value)


MIXED = "a,y\n" + "".join(f"{i / 2},{'no' if i % 2 else 'yes'}\n" for i in range(20))
UNLIKE = "".join(f"{'x' * (i + 1)},{i % 2}\n" for i in range(60))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            MIXED.replace("1.5", "n/a"),
            r"line 5: the column 'a' is 'n/a', expected a finite number as in 19 of 20 rows: .*leave",
        ),
        (MIXED.replace("1.5", "nan"), r"line 5: the column 'a' is 'nan', expected a finite number"),
        ("a,y\n" + "nan,1\n1,2\n" * 20, "line 2: the column 'a' is 'nan'"),
        ("y,a\n" + "1,2\n2,1\n" * 20 + "two,1\n", "line 42: the column 'y' is 'two', .*kind='classification'"),
        ("a,y\n" + UNLIKE, "'a' has 60 different texts in 60 rows, .*leave the column out"),
        ("a,y\n" + UNLIKE * 9, "'a' has 60 different texts in 540 rows, expected names that repeat, at most 50"),
        ("a,y\n" + "".join(UNLIKE.splitlines(True)[:30]), "'a' has 30 different texts in 30 rows"),
        ("a,y\n" + "1,ham\n2,ham\n" * 20, "'y' is 'ham' in every row, .*at least two classes"),
        ("a,y\n" + "1,7\n2,7\n" * 20, "'y' is '7' in every row"),
    ],
)
def test_tables_that_nothing_can_be_learned_from(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "t.csv"
    path.write_text(content)
    with pytest.raises(ModelError, match=message) as caught:
        task(f"csv:{path}:y")
    assert "\n" not in str(caught.value)


def test_tables_near_the_limits_are_taken(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("a,y\n" + "".join(UNLIKE.splitlines(True)[:50]) * 2)
    assert len(task(f"csv:{path}:y").features) == 50
    path.write_text("a,y\n" + "4,1\nmany,2\nsome,3\n" * 20)  # a third are numbers: they are names
    assert task(f"csv:{path}:y").features == ("a=4", "a=many", "a=some")
    path.write_text("a,y\n" + "1,2\n2,1\n" * 20 + "1,two\n" * 9)
    assert task(f"csv:{path}:y", kind="classification").classes == ("1", "2", "two")


def idx(values: np.ndarray) -> bytes:
    return b"\0\0\x08" + bytes([values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


@pytest.fixture
def idx_files() -> dict[str, bytes]:
    random = np.random.default_rng(0)
    files = {}
    for name in mnist.MNIST.files:
        shape = ((240 if "train" in name else 50), *((28, 28) if "images" in name else ()))
        values = random.integers(0, 256, shape) if "images" in name else np.arange(shape[0]) % 10
        files[name] = gzip.compress(idx(values.astype(np.uint8)), mtime=0)
    return files


def test_mnist_from_a_folder_of_idx_files(tmp_path: Path, idx_files: dict[str, bytes]) -> None:
    for name, data in idx_files.items():
        (tmp_path / name).write_bytes(data)
    found = task("mnist", path=str(tmp_path))
    assert found.about["examples"] == {"train": 220, "valid": 20, "test": 50}
    assert all_of(found, "test")[1].tolist() == [i % 10 for i in range(50)]  # the published test images
    assert task("mnist", path=str(tmp_path), limit=30).about["examples"]["train"] == 30
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(b"\0\0\x08\x01\0\0\0\x09abc"))
    with pytest.raises(FormatError, match="the header says"):
        task("mnist", path=str(tmp_path))
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(b"no gzip")
    with pytest.raises(FormatError, match="gzip"):
        task("mnist", path=str(tmp_path))


def test_mnist_is_downloaded_once_with_checksums(
    tmp_path: Path, idx_files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    class Answer:
        def __init__(self, data: bytes):
            self.data = data

        def __enter__(self) -> Answer:
            return self

        def __exit__(self, *_: object) -> None: ...

        def read(self, limit: int) -> bytes:
            return self.data

    def urlopen(address: str, timeout: float) -> Answer:
        asked.append(address)
        if address.startswith(mnist.MNIST.mirrors[0]):
            raise urllib.error.URLError("no route")
        return Answer(idx_files[address.rsplit("/", 1)[1]])

    monkeypatch.setattr(mnist, "_cache", lambda: tmp_path / "cache")
    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    with pytest.raises(FormatError, match="published is"):
        task("mnist")
    assert list((tmp_path / "cache" / "mnist").iterdir()) == []
    sums = {name: hashlib.sha256(data).hexdigest() for name, data in idx_files.items()}
    monkeypatch.setattr(mnist, "MNIST", replace(mnist.MNIST, files=sums))
    assert task("mnist").about["examples"]["test"] == 50
    inside = {name: hashlib.sha256(gzip.decompress(data)).hexdigest() for name, data in idx_files.items()}
    with pytest.raises(FormatError, match="published is"):
        task("fashion-mnist")
    monkeypatch.setattr(mnist, "FASHION", replace(mnist.FASHION, files=inside))
    assert task("fashion-mnist").classes[1] == "trouser"
    asked.clear()
    task("mnist")
    assert asked == []


def test_mnist_offline_says_where_to_put_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def urlopen(address: str, timeout: float) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(mnist, "_cache", lambda: tmp_path)
    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    with pytest.raises(ModelError, match=r"put the four IDX files there, or give path=") as caught:
        task("mnist")
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith("on a command line as \"mnist(path='/data')\"")
    with pytest.raises(ModelError, match=r"\"fashion-mnist\(path='/data'\)\""):
        task("fashion-mnist")
    with pytest.raises(ModelError, match="expected a folder"):
        task("mnist", path=str(tmp_path / "nowhere"))


def test_training_images_are_shifted_and_nothing_else(tmp_path: Path, idx_files: dict[str, bytes]) -> None:
    for name, data in idx_files.items():
        (tmp_path / name).write_bytes(data)
    still, moved = (task("mnist", path=str(tmp_path), shift=shift) for shift in (0, 2))
    assert torch.equal(all_of(still, "test")[0], all_of(moved, "test")[0])
    images = torch.rand(400, 1, 9, 7)
    out = mnist.shifted(images, torch.Generator().manual_seed(1), 2)
    seen = set()
    for before, after in zip(images, out, strict=True):
        wide = torch.nn.functional.pad(before, (2, 2, 2, 2))
        places = [(i, j) for i in range(5) for j in range(5) if torch.equal(wide[:, i : i + 9, j : j + 7], after)]
        assert len(places) == 1
        seen.update(places)
    assert len(seen) == 25
    with pytest.raises(ModelError, match="shift=28: expected 0 to 27"):
        task("mnist", path=str(tmp_path), shift=28)


def test_mnist_from_an_npz(tmp_path: Path) -> None:
    path = tmp_path / "m.npz"
    np.savez(path, images=np.zeros((100, 28, 28), np.uint8), labels=np.arange(100) % 10)
    assert task("mnist", path=str(path)).about["examples"] == {"train": 60, "valid": 20, "test": 20}
    np.savez(path, images=np.zeros((100, 28, 27), np.uint8), labels=np.arange(100) % 10)
    with pytest.raises(FormatError, match="expected uint8 images"):
        task("mnist", path=str(path))
    np.savez(path, pictures=np.zeros(3))
    with pytest.raises(FormatError, match="expected the arrays"):
        task("mnist", path=str(path))
    path.write_bytes(b"PK\x03\x04 broken")
    with pytest.raises(FormatError, match="no readable npz"):
        task("mnist", path=str(path))


def test_real_mnist_is_learned() -> None:
    folder = os.environ.get("STEELYARD_DATA")
    if not folder or not Path(folder, "mnist10k.npz").is_file():
        pytest.skip("STEELYARD_DATA names no folder with mnist10k.npz")
    found = task("mnist", path=str(Path(folder, "mnist10k.npz")), limit=2000, model="lenet-300-100")
    run = train(found, epochs=3, progress=False)
    assert run.history().column("accuracy")[-1] > 0.9


def test_the_users_own_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own_tasks.py").write_text(
        "from steelyard.learn.tasks import task\n"
        "ready = task('breast-cancer')\n"
        "def made(seed=0): return task('breast-cancer', seed=seed)\n"
        "def wrong(): return 3\nnumber = 3\n"
    )
    assert task("own_tasks:ready").name == "breast-cancer"
    assert task("own_tasks:made", seed=2).about["seed"] == 2
    for name, error, message in (
        ("own_tasks:wrong", ModelError, "returns a int, expected a Task"),
        ("own_tasks:number", ModelError, "is a int, expected a Task"),
        ("own_tasks:nothing", ModelError, "no 'nothing' in it"),
        ("digit", UnknownNameError, "did you mean 'digits'"),
        ("csv:table.csv", ModelError, "write csv:FILE:TARGET"),
        ("text:", ModelError, "write text:FILE"),
    ):
        with pytest.raises(error, match=message):
            task(name)
    with pytest.raises(RecipeError, match="takes no options"):
        task("own_tasks:ready", seed=1)
    with pytest.raises(RecipeError, match="digits has no option 'shot'; did you mean 'shots'"):
        task("digits", shot=3)
