"""The training batches, epoch after epoch, and the place in them: what lets a run go on with the very next batch.

Decides what the order of data depends on: the task, the global generators of random numbers, and the generators that
a torch DataLoader or its samplers hold. Knows nothing of what is done with a batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import Any

import torch

from steelyard.errors import ModelError
from steelyard.learn.state import State, random_state, set_random_state
from steelyard.learn.task import Batch, Split, Task


class Feed:
    """Gives out the batches of one epoch at each `rest`, from the first that was not given out yet."""

    def __init__(self, task: Task, *, tracked: bool):
        self.task, self.tracked = task, tracked  # tracked: the state will be asked for
        self.epoch = 0
        self.served = 0  # batches of this epoch
        self._per_epoch: int | None = None
        self._order: State = {}  # of this epoch: the generators as it began
        self._resumed: State | None = None  # generators to put back before the next batch
        self._found: Any = None

    def count(self) -> int:
        """How many batches an epoch has, counted once; raises ModelError for none."""
        if self._per_epoch is None:
            self._per_epoch = _count(self.task.batches("train", 0), self.task, "train")
        return self._per_epoch

    def rest(self) -> Iterator[Batch]:
        """The batches of this epoch that are still to come."""
        resumed, self._resumed = self._resumed, None
        if resumed is not None:
            set_random_state(self._order["random"])
        elif self.tracked:
            self._order = {"random": random_state()}
        self._found = self.task.batches("train", self.epoch)
        if resumed is not None:
            _set_generators(self._found, self._order["generators"])
        elif self.tracked:
            self._order["generators"] = [g.get_state() for g in generators_of(self._found)]
        batches = iter(self._found)
        if resumed is not None and self.served:
            for _ in range(self.served):
                next(batches, None)
            self._put(resumed)
        for batch in batches:
            self.served += 1
            yield batch

    def end_epoch(self) -> None:
        """The next `rest` gives the batches of the next epoch."""
        self.epoch, self.served = self.epoch + 1, 0

    def end(self) -> None:
        """No more batches are wanted; the generators of a run that was resumed at its end are put back."""
        if self._resumed is not None:
            self._put(self._resumed)
            self._resumed = None

    def _put(self, state: State) -> None:
        set_random_state(state["random"])
        _set_generators(self._found, state["generators"])

    def state(self) -> State:
        """The place, and every generator that the order of what follows may depend on."""
        now = {"random": random_state(), "generators": [g.get_state() for g in generators_of(self._found)]}
        place = {"epoch": self.epoch, "served": self.served, "per epoch": self.count()}
        return place | {"order": self._order if self.served else now, "now": now}

    def load(self, state: State) -> None:
        """Go on from a place that `state` told; the generators are put back when the next batch is asked for."""
        self.epoch, self.served, self._per_epoch = state["epoch"], state["served"], state["per epoch"]
        self._order, self._resumed = state["order"], state["now"]


def generators_of(batches: Any) -> list[torch.Generator]:
    """The generators that a DataLoader, its samplers, or whatever has such attributes, draws its order from."""
    found: dict[int, torch.Generator] = {}
    places = [batches]
    for place in places:
        if isinstance(drawn := getattr(place, "generator", None), torch.Generator):
            found[id(drawn)] = drawn
        inner = [getattr(place, name, None) for name in ("found", "batch_sampler", "sampler")]
        places += [other for other in inner if other is not None and all(other is not p for p in places)]
    return list(found.values())


def _set_generators(batches: Any, states: list[torch.Tensor]) -> None:
    for drawn, state in zip(generators_of(batches), states, strict=False):
        drawn.set_state(state)


def _count(batches: Iterable[Batch], task: Task, split: Split) -> int:
    """How many batches there are: their length, or one pass over them."""
    count = len(batches) if isinstance(batches, Sized) else sum(1 for _ in batches)
    if count == 0:
        raise ModelError(f"the {split} split of the task {task.name!r} is empty")
    return count
