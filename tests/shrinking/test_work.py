"""How long it will take: counts of what is left, and what such things have taken."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from steelyard.shrinking.work import Meter, Work


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_share_follows_what_parts_have_taken() -> None:
    clock, said = Clock(), []
    work = Work(lambda what, share: said.append((what, share)), clock)
    work.left |= {"sizes": 3, "examples": 100, "files": 1}
    work.guesses["examples"] = {"sizes": 0.02}
    work.priors["files"] = 4.0
    with work.on("sizes", "first"):
        clock.now += 2
    work.tell("second")  # 2 s gone; two sizes of 2 s, 100 examples of 0.04 s and a file of 4 s to come
    assert said == [("first", 0.0), ("second", pytest.approx(2 / 14))]
    work.took("examples", 50, 10)
    clock.now += 10
    work.tell("third")  # 12 s gone; 4 s, 50 examples of 0.2 s, 4 s
    assert said[-1][1] == pytest.approx(12 / 30)
    assert work.left["sizes"] == 2
    work.guesses["turns"] = {"sizes": 0.5, "examples": 10.0}
    assert work.each("turns") == 2.0, "the most that what is like it says: half of a size, ten examples of 0.2 s"
    work.guesses["turns"]["sizes"] = 1.5
    assert work.each("turns") == 3.0


def test_epochs_of_several_runs_are_counted_and_those_of_another_process_have_no_seconds() -> None:
    clock, said = Clock(), []
    work = Work(lambda what, share: said.append(share), clock)
    work.left["epochs"] = 10
    meter = Meter(work, "epochs", "training")
    first = SimpleNamespace(done=0.5, epochs=4)  # half of it was done before
    meter(first)
    assert work.left["epochs"] == 8
    clock.now += 6
    first.done = 1.0
    meter(first)
    assert work.each("epochs") == 3
    assert said[-1] == pytest.approx(6 / (6 + 6 * 3))
    meter.at(4)
    clock.now += 50  # what lies between two runs is no part of an epoch
    meter(SimpleNamespace(done=0.1, epochs=2))
    assert work.each("epochs") == 3
    assert work.left["epochs"] == pytest.approx(5.8)
