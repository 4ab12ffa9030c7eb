"""Chapter E, the memory of recurrent networks: how far back a start lets gradients, and what can be learned then."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from steelyard.claims.check import Bar, Check
from steelyard.explain.memory import memory
from steelyard.learn.recurrent import rnn
from steelyard.learn.run import train
from steelyard.learn.seeding import seeded
from steelyard.learn.task import Task, first_batch
from steelyard.learn.tasks import task

LENGTHS = (50, 100, 200)
GOOD: dict[str, dict[str, Any]] = {
    "LSTM, chrono": {"cell": "lstm", "memory": ...},
    "GRU, chrono": {"cell": "gru", "memory": ...},
    "identity": {"cell": "rnn-relu", "start": "identity"},
}
BAD: dict[str, dict[str, Any]] = {
    "LSTM, torch": {"cell": "lstm", "start": "torch"},
    "GRU, torch": {"cell": "gru", "start": "torch"},
    "tanh, torch": {"cell": "rnn", "start": "torch"},
}


def _net(found: Task, options: Mapping[str, Any]) -> nn.Module:
    assert found.interface is not None
    told = {**options, "memory": found.interface.shape[0]} if "memory" in options else options
    with seeded(0):
        return rnn(found.interface, hidden=32, **told)


def _memory() -> Mapping[str, float]:
    kept, lost, reached = [], [], []
    for length in LENGTHS:
        found = task(f"adding:{length}", examples=3000)
        batch = first_batch(found, "valid").inputs[:8]
        for starts, gradients in ((GOOD, kept), (BAD, lost)):
            gradients += [memory(_net(found, options), batch).rows[-1]["gradient"] for options in starts.values()]
        table = memory(_net(found, GOOD["LSTM, chrono"]), batch)
        reached.append((table.meta["recurrent.l0"]["reach"] or length) / length)
    found = task("adding:50", examples=2500)
    losses = {}
    for name, starts in (("LSTM, chrono", GOOD), ("tanh, torch", BAD)):
        rate = 1e-2 if "LSTM" in name else 1e-3
        run = train(found, _net(found, starts[name]), optimizer="adam", rate=rate, epochs=12, clip=1.0,
                    schedule="constant", weight_decay=0.0, progress=False)  # fmt: skip
        losses[name] = min(run.history().column("valid loss")) / found.baselines["loss"]
    return {
        "least gradient that a good start keeps": min(kept),
        "most gradient that a bad start keeps": max(lost),
        "least share of the length that is reached": min(reached),
        "error of a good start": losses["LSTM, chrono"],
        "error of a bad start": losses["tanh, torch"],
    }


E4 = Check(
    "E4",
    "recurrent networks keep memory across time steps",
    "||dh_T/ds_1|| of three good and three bad starts at T = 50, 100 and 200; adding two of 50 numbers, trained from "
    "one of each, against a model without memory",
    (
        Bar("least gradient that a good start keeps", ">=", 0.03),
        Bar("most gradient that a bad start keeps", "<=", 1e-6),
        Bar("least share of the length that is reached", ">=", 1),
        Bar("error of a good start", "<=", 0.1),
        Bar("error of a bad start", ">=", 0.8),
    ),
    _memory,
)
