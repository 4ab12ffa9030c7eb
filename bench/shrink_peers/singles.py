"""Each single method of rounding, pruning and factoring, alone: a small grid of its one parameter, every file written.

A method holds the matrices in its way, coded losslessly; vectors are held as float16 in all of them, as `shrink` holds
them, and so are the values that pruning and factoring leave.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

import steelyard as sy
from steelyard.codecs.bitmask import Bitmask
from steelyard.core.packed import smallest
from steelyard.core.transform import Transform, chain, on
from steelyard.core.weights import Weights
from steelyard.edit.lowrank import Factorize
from steelyard.edit.pack import Pack
from steelyard.errors import CodecError, RecipeError
from steelyard.learn.evaluate import outcomes
from steelyard.shrinking.deep import MATRICES, vectors_halved

CODED = sy.Entropy()
SPARSE = smallest(sy.nest(Bitmask(), mask=CODED, values=CODED), CODED)
SHARED = smallest(sy.nest(sy.Palette(256), codes=CODED), CODED)
HALF = sy.Cast("float16")
BITS = range(8, 1, -1)
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)  # pruned, or of the bytes that factors may take
VALUES = (128, 64, 48, 32, 24, 16, 12, 8, 6, 4, 3, 2)
RATES = tuple(8 * 0.85**i for i in range(20))  # bits for each weight


def grids(model: nn.Module, task: sy.Task) -> Mapping[str, Mapping[str, Transform]]:
    """Methods, by the settings of their one parameter, the finest first."""
    hessian = sy.score(model, task, "hessian")
    measured = sy.where(",".join(hessian))
    known, others = MATRICES & measured, MATRICES & ~measured

    def nearest(bits: int) -> Transform:
        return sy.Quantize(bits, axis=0, error=2, codes=CODED, scale=CODED)

    def gptq(bits: int) -> Transform:
        """To nearest where the weight is no layer's: nothing is known of its inputs."""
        return chain(on(known, sy.Gptq(bits, by=hessian, codes=CODED, scale=CODED)), on(others, nearest(bits)))

    return {
        "prune": {f"{s:.0%}": on(MATRICES, chain(sy.Prune(s), HALF, Pack(SPARSE))) for s in SHARES},
        "nearest": {f"{b} bits": on(MATRICES, nearest(b)) for b in BITS},
        "gptq": {f"{b} bits": gptq(b) for b in BITS},
        "share": {f"{k} values": on(MATRICES, chain(sy.Share(k), Pack(SHARED))) for k in VALUES},
        "lowrank": {f"{s:.0%}": on(MATRICES, chain(HALF, Factorize(keep=s))) for s in SHARES[::-1]},
        "ratedistortion": {f"{b:.2f} bits": on(MATRICES, sy.RateDistortion(bits=b)) for b in RATES},
    }


def files(model: nn.Module, task: sy.Task, student: nn.Module) -> Iterator[dict[str, Any]]:
    """Every file of every grid: its bytes, and how often each example of validation and proof comes out right.

    student: takes the weights that are read from a file.
    """
    weights = sy.from_module(model).settle()
    for method, grid in grids(model, task).items():
        for setting, step in grid.items():
            found = _written(chain(vectors_halved(), step)(weights))
            if found is None:
                continue
            size, read = found
            sy.into_module(read, student)
            right = {split: outcomes(student, task, split)["accuracy"] for split in ("valid", "test")}
            yield {"method": method, "setting": setting, "bytes": size, **right}


def _written(made: Weights) -> tuple[int, Weights] | None:
    """The bytes of the file and what is read from it; None where this setting cannot be held, or is too few bits."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            size = sy.write(made, Path(folder) / "file.safetensors")
        except (CodecError, RecipeError):
            return None
        return size, sy.open(Path(folder) / "file.safetensors").settle()
