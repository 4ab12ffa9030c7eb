"""Chapter F, making them small: fewer bits for each weight."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from steelyard import formats
from steelyard.claims.check import Bar, Check
from steelyard.claims.material import digits, inputs_of, trained
from steelyard.core.transform import Step
from steelyard.core.weights import Weights
from steelyard.edit.gptq import Gptq
from steelyard.edit.quantize import Quantize
from steelyard.formats.module import from_module, into_module
from steelyard.learn.evaluate import compare
from steelyard.learn.evidence import score
from steelyard.learn.task import Task, build_seeded

GROUP = 32
HEAD = 4096  # bytes of a file that describe it


def stated(weights: Weights, bits: int) -> int:
    """The bytes that a number of bits promises: those of the codes, a float32 scale for each group, and the vectors."""
    total = 0
    for item in weights.values():
        shape = item.spec.shape
        if len(shape) == 2:
            total += math.ceil(item.spec.size * bits / 8) + 4 * shape[0] * math.ceil(shape[1] / GROUP)
        else:
            total += item.spec.nbytes
    return total


def reread(data: Task, step: Step, weights: Weights, folder: str) -> tuple[nn.Module, int]:
    """What a step makes of the weights, written, read into a new model; and the bytes of the file."""
    path = Path(folder) / "small.safetensors"
    size = formats.write(step(weights), path)
    model = build_seeded(data, 99)
    into_module(formats.open(path), model)
    return model.eval(), size


def _quantized() -> Mapping[str, float]:
    data = digits("mlp")
    model = trained(data, epochs=10).eval()
    weights, evidence = from_module(model), score(model, data, "hessian")
    found: dict[str, float] = {"bytes beyond those stated": 0}
    x, moved = inputs_of(data, "test"), {}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        logits = model(x)
        for bits in (8, 4, 3, 2):
            steps = {"nearest": Quantize(bits, group=GROUP), "data": Gptq(bits, group=GROUP, by=evidence)}
            for name, step in steps.items():
                again, size = reread(data, step, weights, folder)
                beyond = size - stated(weights, bits)
                found["bytes beyond those stated"] = max(found["bytes beyond those stated"], beyond)
                moved[name, bits] = float((again(x) - logits).square().mean())
                row = next(r for r in compare(model, again, data).rows if r["metric"] == data.headline)
                found[f"lost, {bits} bits, {name}"] = row["a"] - row["b"]
    for bits in (3, 2):
        found[f"logits moved by data, {bits} bits"] = moved["data", bits] / moved["nearest", bits]
    return found


F3 = Check(
    "F3",
    "fewer bits are enough",
    "8, 4, 3, 2 bits in groups of 32, to the nearest and by data; bytes on disk; re-read; accuracy and logits held out",
    (
        Bar("bytes beyond those stated", "<=", HEAD),
        Bar("lost, 8 bits, nearest", "<=", 0.002),
        Bar("lost, 4 bits, data", "<=", 0.01),
        Bar("lost, 2 bits, data", "<=", 0.03),
        Bar("logits moved by data, 3 bits", "<=", 0.2),
        Bar("logits moved by data, 2 bits", "<=", 0.2),
    ),
    _quantized,
)
