"""The command line: the table of verbs, and the way in. A verb is one file: parse, one library call, tables.

Decides which verbs there are. Nothing that a verb needs is imported before that verb is called.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from steelyard.core.registry import Registry, Row

if TYPE_CHECKING:
    import click

VERBS: Registry[click.Command] = Registry(
    "verb",
    "verbs",
    {
        "run": Row("steelyard.cli.run:verb", "the whole life: start, train, explain, move, shrink, ship", "all"),
        "train": Row("steelyard.cli.train:verb", "start a model's weights, train them, write them", "learn"),
        "watch": Row("steelyard.cli.watch:verb", "what the log of a watched training says: its course and its faults"),
        "finetune": Row("steelyard.cli.finetune:verb", "carry trained weights to a new task", "learn"),
        "explain": Row("steelyard.cli.explain:verb", "what trained weights mean, checked by removal", "learn"),
        "sample": Row("steelyard.cli.sample:verb", "text from a trained language model of characters", "learn"),
        "init": Row("steelyard.cli.init:verb", "start a model's weights, and say of each layer how", "learn"),
        "starts": Row("steelyard.cli.starts:verb", "which start of a model will train best, and why", "learn"),
        "signal": Row("steelyard.cli.signal:verb", "the scale of every layer, forwards and backwards", "learn"),
        "inspect": Row("steelyard.cli.inspect:verb", "what is in a file: tensors, types, ties and sizes"),
        "diff": Row("steelyard.cli.diff:verb", "what changed between two files: which tensors, how, and by how much"),
        "convert": Row("steelyard.cli.convert:verb", "another file format, dtype, names or codec"),
        "score": Row("steelyard.cli.score:verb", "what data say about weights: evidence for the verbs below", "learn"),
        "prune": Row("steelyard.cli.prune:verb", "set the smallest weights to zero, and store the zeros cheaply"),
        "quantize": Row("steelyard.cli.quantize:verb", "round weights to uniform levels of 1 to 8 bits"),
        "lowrank": Row("steelyard.cli.lowrank:verb", "matrices as products of two thin ones, by rank, bytes or error"),
        "share": Row("steelyard.cli.share:verb", "few distinct values for each tensor: a codebook and indices"),
        "shrink": Row("steelyard.cli.shrink:verb", "the smallest file within a tolerance, with proof", "learn"),
        "claims": Row("steelyard.cli.claims:verb", "every claim of the field about weights, measured here", "learn"),
    },
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line on `arguments` (default: those of the process) and return its exit status."""
    try:
        from steelyard.cli.entry import run
    except KeyboardInterrupt:
        sys.stderr.write("steelyard: interrupted\n")
        return 130
    return run(arguments)
