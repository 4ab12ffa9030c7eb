"""A job that is killed at any moment and started again ends with the bytes of one that was not."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress

import numpy as np
import pytest

import steelyard as sy
from steelyard.cli import main
from steelyard.codecs.affine import Affine
from steelyard.core.transform import chain
from steelyard.core.weights import Weight, Weights
from steelyard.edit.prune import Prune
from steelyard.edit.quantize import Quantize
from steelyard.edit.transfer import transfer
from steelyard.errors import FormatError, VerdictError, WeightsError
from steelyard.formats import resuming
from steelyard.formats.gguf import Gguf
from steelyard.formats.safetensors import Safetensors
from steelyard.formats.sharded import Sharded

TARGETS = {
    "one": ("out.safetensors", []),
    "gguf": ("out.gguf", []),
    "many": ("out.safetensors.index.json", ["--shard-size", "6MB"]),
}
SLOW = """
import sys, time
from steelyard.cli import main
from steelyard.codecs.affine import Affine
from steelyard.formats import base, resuming
resuming.MARK, resuming.WORTH = 1 << 20, 1 << 18
write = base.Sink.write
base.Sink.write = lambda sink, data: (time.sleep(0.03), write(sink, data))[1]
sys.exit(main(sys.argv[1:]))
"""  # a disk that takes its time, so that a kill falls in the middle


@pytest.fixture
def source(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {f"l.{i}.w": rng.normal(size=(512, 1 + 300 * (i % 3), 2)).astype(np.float32) for i in range(16)}
    path = tmp_path / "source.safetensors"
    sy.write(Weights.of(arrays, {"head": "l.1.w"}, {"license": "mit"}), path)
    return path


def started(*words):
    return subprocess.Popen(
        [sys.executable, "-c", SLOW, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def written(folder):
    """The bytes of an unfinished target."""
    sizes = 0
    for path in folder.glob(".*/out*.[sp]a*"):
        with suppress(FileNotFoundError):  # it may get another name at any moment
            sizes += path.stat().st_size
    return sizes


@pytest.mark.parametrize("where", TARGETS)
def test_killed_at_random_it_ends_with_the_same_bytes(source, tmp_path, where, monkeypatch):
    name, options = TARGETS[where]
    for folder in ("whole", "broken"):
        (tmp_path / folder).mkdir()
    words = ["convert", source, tmp_path / "whole" / name, "--dtype", "bf16", *options]
    said = "1 tie is kept as metadata; other readers see one name: --untie writes each\n"
    assert started(*words).communicate()[1] == said
    words[2] = tmp_path / "broken" / name
    moments, kept = random.Random(1), []
    for _ in range(5):
        before = written(tmp_path / "broken")
        job = started(*words)
        until = before + moments.randrange(400_000, 2_500_000)
        while job.poll() is None and written(tmp_path / "broken") < until:
            time.sleep(0.002)
        job.send_signal(signal.SIGKILL)
        job.communicate()
        if (tmp_path / "broken" / name).exists():
            break
        kept.append(written(tmp_path / "broken"))
    assert len(kept) > 1
    assert kept[-1] > 2_000_000
    if any((tmp_path / "broken").glob(".*")) or not (tmp_path / "broken" / name).exists():
        job = started(*words)
        assert (job.communicate()[1], job.returncode) == (said, 0)
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")
    assert sorted(os.listdir(tmp_path / "broken")) == sorted(os.listdir(tmp_path / "whole"))


def failing(weights, after):
    """The weights, of which the first `after` can be read, and the numbers of reads."""
    reads = []

    def lazy(item):
        def read():
            if after is not None and len(reads) == after:
                raise KeyboardInterrupt
            reads.append(item.name)
            return item.array()

        return Weight(item.name, item.spec, read, origin=item.origin)

    return weights.with_items(map(lazy, weights.values())), reads


@pytest.mark.parametrize("format", [Safetensors(), Gguf(), Sharded(2_000_000)], ids=lambda format: format.name)
def test_what_was_done_is_not_done_again(source, tmp_path, format, monkeypatch):
    monkeypatch.setattr(resuming, "WORTH", 1)
    target = tmp_path / f"out{format.suffixes[0]}"
    (tmp_path / "whole").mkdir()
    sy.write(sy.open(source), tmp_path / "whole" / target.name, format)
    step, done = chain(), []
    for after in (5, 6, None):
        opened = sy.open

        def open(path, after=after, opened=opened):
            weights, reads = failing(opened(path), after if path == source else None)
            done.append(reads)
            return weights

        with monkeypatch.context() as patch:
            patch.setattr("steelyard.formats.open", open)
            if after is None:
                transfer(source, target, step, format=format, resumed=True)
            else:
                with pytest.raises(KeyboardInterrupt) as caught:
                    transfer(source, target, step, format=format, resumed=True)
                assert "run the same command again" in caught.value.__notes__[0]
    first, second, third, _ = done
    assert (len(first), len(second), len(third)) == (5, 6, 5)
    assert len({*first, *second, *third}) == 16
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()
    assert not list(tmp_path.glob(".*"))


def broken(source, target, monkeypatch, **options):
    """Leave a job behind that was broken off."""
    monkeypatch.setattr(resuming, "WORTH", 1)
    with monkeypatch.context() as patch:
        opened = sy.open
        patch.setattr("steelyard.formats.open", lambda path: failing(opened(path), 5)[0])
        with pytest.raises(KeyboardInterrupt):
            transfer(source, target, chain(), resumed=True, **options)
    (part,) = target.parent.glob(".*.steelyard-part")
    return part


@pytest.mark.parametrize("change", ["source", "step", "where", "version", "damage"])
def test_another_job_begins_anew(source, tmp_path, change, monkeypatch):
    target = tmp_path / "out.safetensors"
    part = broken(source, target, monkeypatch)
    (draft,) = part.glob("*.part")
    whole = draft.read_bytes()
    kept = 0 if change == "damage" else len(whole) - 1000
    draft.write_bytes(whole[:kept] + b"\xff" * (len(whole) - kept))  # what must not be gone on from
    step, where = chain(), None
    if change == "source":
        sy.write(sy.open(source), source)
    elif change == "step":
        step = Prune(0.5, min_ndim=1)
    elif change == "where":
        where = sy.where("l.1.*")
    elif change == "version":
        monkeypatch.setattr(sy, "__version__", "0")
    transfer(source, target, step, where, resumed=True, verified=True)
    expected = tmp_path / "expected.safetensors"
    sy.write((sy.on(where, step) if where else step)(sy.open(source)), expected)
    assert target.read_bytes() == expected.read_bytes()
    assert not list(tmp_path.glob(".*"))


def test_damage_to_what_was_kept_is_found(source, tmp_path, monkeypatch):
    target = tmp_path / "out.safetensors"
    part = broken(source, target, monkeypatch)
    (draft,) = part.glob("*.part")
    with draft.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    with pytest.raises(VerdictError, match="element"):
        transfer(source, target, chain(), resumed=True, verified=True)
    assert os.listdir(tmp_path) == ["source.safetensors"]


def test_little_is_not_kept_and_nothing_of_an_error_at_once(source, tmp_path):
    def wrong(x):
        raise WeightsError("wrong")

    step = sy.each(lambda w: w.then(wrong))
    with pytest.raises(WeightsError):
        transfer(source, tmp_path / "out.safetensors", step, verified=True)
    assert os.listdir(tmp_path) == ["source.safetensors"]


def test_an_interrupt_says_how_to_go_on(source, tmp_path, monkeypatch, capsys):
    part = broken(source, tmp_path / "out.safetensors", monkeypatch)
    assert json.loads((part / "job.json").read_text())["source"]
    monkeypatch.setattr(resuming, "WORTH", 1)
    opened = sy.open
    monkeypatch.setattr("steelyard.formats.open", lambda path: failing(opened(path), 2)[0])
    status = main(["convert", str(source), str(tmp_path / "out.safetensors")])
    line = capsys.readouterr().err
    assert (status, line.count("\n")) == (130, 1)
    assert line.startswith("steelyard: interrupted; what is done is kept: run the same command again to go on")


def test_what_is_in_the_way_is_not_touched(source, tmp_path):
    folder = tmp_path / ".out.safetensors.steelyard-part"
    folder.mkdir()
    (folder / "precious").write_text("x")
    with pytest.raises(FormatError, match="in the way"):
        transfer(source, tmp_path / "out.safetensors", chain(), resumed=True)
    assert (folder / "precious").read_text() == "x"
    link = tmp_path / ".two.safetensors.steelyard-part"
    link.symlink_to(folder)
    with pytest.raises(FormatError, match="a link"):
        transfer(source, tmp_path / "two.safetensors", chain(), resumed=True)


def test_two_at_a_time_do_not_mix(source, tmp_path):
    from steelyard.edit._unfinished import workplace

    target = tmp_path / "out.safetensors"
    with workplace(target, None), pytest.raises(FormatError, match="another process is writing it"):
        transfer(source, target, chain(), resumed=True)


@pytest.mark.parametrize("moved", [0, 1, 3, None])
def test_a_job_that_ended_while_it_moved_its_files(source, tmp_path, moved, monkeypatch):
    (tmp_path / "out").mkdir()
    target = tmp_path / "out" / "out.safetensors.index.json"
    format, replace, count = Sharded(2_000_000), type(target).replace, [0]

    def stopping(path, place):
        if (
            str(path.parent).endswith("steelyard-part")
            and ".safetensors" in path.name
            and place.parent == target.parent
        ):
            if count[0] == moved:
                os._exit(9)
            count[0] += 1
        return replace(path, place)

    child = os.fork()
    if child == 0:
        monkeypatch.setattr(type(target), "replace", stopping)
        monkeypatch.setattr("steelyard.edit._unfinished.shutil.rmtree", lambda *_, **__: os._exit(9))
        transfer(source, target, chain(), format=format, resumed=True)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert len(list(target.parent.glob("out-*"))) == (moved if moved is not None else count_of(target))
    done = transfer(source, target, chain(), format=format, resumed=True)
    assert done.files[1] == sum(path.stat().st_size for path in target.parent.iterdir())
    sy.write(sy.open(source), tmp_path / target.name, format)
    assert contents(target.parent) == {n: x for n, x in contents(tmp_path).items() if n.startswith("out")}
    assert not list(target.parent.glob(".*"))


def count_of(target):
    return len(set(json.loads(target.read_text())["weight_map"].values()))


def test_what_was_encoded_is_not_encoded_again(tmp_path, monkeypatch):
    rng = np.random.default_rng(1)
    arrays = {f"l.{i}.w": rng.normal(size=(400, 300)).astype(np.float32) for i in range(6)}
    arrays["bias"] = np.ones(9, np.float32)
    sy.write(Weights.of(arrays), tmp_path / "source.safetensors")
    words = ["quantize", str(tmp_path / "source.safetensors"), "", "--bits", "8"]
    encode, names = Affine.encode, []

    def counted(self, x):
        if len(names) == limit:
            raise KeyboardInterrupt
        names.append(x.shape)
        return encode(self, x)

    monkeypatch.setattr(Affine, "encode", counted)
    limit = 99
    assert main([*words[:2], str(tmp_path / "whole.safetensors"), *words[3:]]) == 0
    names, limit = [], 4
    words[2] = str(tmp_path / "broken.safetensors")
    assert main(words) != 0
    (folder,) = tmp_path.glob(".*")
    assert len(list(folder.glob("encoded-*"))) == 4
    names, limit = [], 99
    assert main(words) == 0
    assert len(names) == 2
    assert not list(tmp_path.glob(".*"))
    assert contents(tmp_path)["broken.safetensors"] == contents(tmp_path)["whole.safetensors"]


def test_another_job_keeps_nothing_that_was_encoded(tmp_path, monkeypatch):
    arrays = {f"l.{i}.w": np.random.default_rng(i).normal(size=(400, 300)).astype(np.float32) for i in range(3)}
    source, target = tmp_path / "source.safetensors", tmp_path / "out.safetensors"
    sy.write(Weights.of(arrays), source)
    encode, left = Affine.encode, [2]

    def counted(self, x):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return encode(self, x)

    monkeypatch.setattr(Affine, "encode", counted)
    with pytest.raises(KeyboardInterrupt):
        transfer(source, target, Quantize(8), resumed=True)
    monkeypatch.undo()
    transfer(source, target, Quantize(3), resumed=True)
    for item in sy.open(target).values():
        assert item.read().codec == Affine(3)
