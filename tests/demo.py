"""A realistic report, all numbers made up by formulas: what a run of a small convolutional network shows."""

from __future__ import annotations

import math
import random

from steelyard.core.table import Column, Table
from steelyard.report.html import KeyFigure, Page, Section
from steelyard.report.plots import Bars, Histogram, Images, Line, Scatter, Treemap

LAYERS = {
    "features.0.weight": (32, 1, 3, 3),
    "features.0.bias": (32,),
    "features.3.weight": (64, 32, 3, 3),
    "features.3.bias": (64,),
    "classifier.1.weight": (128, 1600),
    "classifier.1.bias": (128,),
    "classifier.4.weight": (10, 128),
    "classifier.4.bias": (10,),
}


def loss_table() -> Table:
    noise = random.Random(0)
    rows = []
    for step in range(0, 1200, 6):
        fall = 2.3 * math.exp(-step / 180)
        rows.append(
            {
                "step": step,
                "training loss": fall + 0.04 + 0.25 * fall * noise.random(),
                "held-out loss": fall + 0.09 + 0.01 * noise.random() + step * 1e-5,
            }
        )
    return Table.of("loss", {"step": "", "training loss": "", "held-out loss": ""}, rows, {"task": "digits", "seed": 0})


def stages_table() -> Table:
    stages = [
        ("trained", 847_112, 0.9867, 21.4),
        ("pruned 90 %", 121_004, 0.9861, 12.2),
        ("16 shared values", 46_312, 0.9856, 8.1),
        ("entropy coded", 24_870, 0.9856, 0.03),
    ]
    columns = [
        Column("stage"),
        Column("file", "B", "bytes on disk"),
        Column("smaller", "x", "against the trained file"),
        Column("accuracy", "%", "on 450 held-out digits"),
        Column("low", "%", "lower end of the 95 % Wilson interval"),
        Column("high", "%", "upper end of the 95 % Wilson interval"),
        Column("time", "s"),
    ]
    rows = [
        {
            "stage": s,
            "file": b,
            "smaller": stages[0][1] / b,
            "accuracy": a,
            "low": a - 0.011,
            "high": a + 0.007,
            "time": t,
        }
        for s, b, a, t in stages
    ]
    return Table.of("stages", columns, rows, {"held out": "450 digits", "interval": "95 % Wilson"})


def bytes_table() -> Table:
    noise = random.Random(2)
    rows = []
    for name, shape in LAYERS.items():
        size = 4 * math.prod(shape)
        values = max(size // 60, 8)
        rows.append(
            {"tensor": name, "before": size, "mask": size // 90, "codes": values, "codebook": noise.choice([32, 64])}
        )
    return Table.of("bytes", {"tensor": "", "before": "B", "mask": "B", "codes": "B", "codebook": "B"}, rows)


def filters_table() -> Table:
    noise = random.Random(1)
    rows = []
    for i in range(32):
        angle, phase = math.pi * i / 16, noise.uniform(-1, 1)
        tile = [
            [
                math.sin(1.4 * (x * math.cos(angle) + y * math.sin(angle)) + phase) * math.exp(-(x * x + y * y) / 9)
                for x in range(-2, 3)
            ]
            for y in range(-2, 3)
        ]
        rows.append({"filter": i, "weights": tile})
    return Table.of("first-layer filters", {"filter": "", "weights": ""}, rows)


def histogram_table() -> Table:
    rows = []
    for layer, (name, shape) in enumerate((n, s) for n, s in LAYERS.items() if n.endswith("weight")):
        width = 1.2 / math.sqrt(math.prod(shape[1:]))
        for when in ("before", "after"):
            for i in range(-20, 20):
                centre = (i + 0.5) / 10
                count = round(math.prod(shape) * math.exp(-2 * centre**2) / 12.5)
                if when == "after":
                    count = 0 if abs(centre) < 0.7 + 0.1 * layer else round(count * 0.9)
                rows.append(
                    {"tensor": name, "when": when, "from": i * width / 10, "to": (i + 1) * width / 10, "count": count}
                )
    return Table.of("weight histograms", {"tensor": "", "when": "", "from": "", "to": "", "count": ""}, rows)


def tensor_table() -> Table:
    rows = []
    for block in range(12):
        for part, shape in (("attention.qkv", (2304, 768)), ("attention.out", (768, 768)), ("mlp.up", (3072, 768))):
            size = math.prod(shape)
            rows.append(
                {
                    "name": f"transformer.h.{block}.{part}.weight",
                    "shape": shape,
                    "dtype": "bfloat16",
                    "elements": size,
                    "bytes": 2 * size,
                }
            )
    return Table.of("tensors", {"name": "", "shape": "", "dtype": "", "elements": "", "bytes": "B"}, rows)


def page() -> Page:
    stages = stages_table()
    last = stages.rows[-1]
    return Page(
        "The whole life of a small network",
        [
            Section(
                "What came out",
                "The network was trained on 1,347 digits and measured on 450 that it never saw. Each stage was written to "
                "disk, read back in a fresh process, and measured again.\n\n"
                "The last file, `small.safetensors`, opens in any safetensors reader.",
                [stages],
                [
                    Scatter(
                        stages,
                        "file",
                        "accuracy",
                        "low",
                        "high",
                        "stage",
                        log_x=True,
                        joined=True,
                        title="Accuracy against size",
                    )
                ],
            ),
            Section(
                "Training",
                "Both losses fall together; the held-out one turns up slightly near the end.",
                pictures=[
                    Line(loss_table(), "step", ("training loss", "held-out loss"), title="Loss over time", log_y=True)
                ],
            ),
            Section(
                "What the first layer sees",
                "Edges in several directions:\n\n- blue weights add what lies under them,\n- orange weights take it away.",
                pictures=[Images(filters_table(), "weights", "filter", title="First-layer filters")],
            ),
            Section(
                "Weights before and after",
                pictures=[
                    Histogram(
                        histogram_table(),
                        "from",
                        "to",
                        "count",
                        by="when",
                        facet="tensor",
                        across=2,
                        title="Weight histograms",
                    )
                ],
            ),
            Section(
                "Bytes per layer",
                pictures=[
                    Bars(
                        bytes_table(),
                        "tensor",
                        ("mask", "codes", "codebook"),
                        stacked=True,
                        title="Bytes in the small file",
                    ),
                    Treemap(tensor_table(), "name", "bytes", title="Where the bytes of a transformer are"),
                ],
                tables=[bytes_table(), tensor_table()],
            ),
        ],
        meta={"task": "digits", "model": "cnn", "seed": 0, "device": "cpu", "torch": "2.13.0"},
        figures=[
            KeyFigure("Smaller by", last["smaller"], "x", "847,112 to 24,870 bytes on disk"),
            KeyFigure("Accuracy", last["accuracy"], "%", "98.67 % before, on 450 held-out digits"),
            KeyFigure("Change", -0.0011, "pp", "95 % interval -0.9 to +0.6"),
            KeyFigure("Time", 41.8, "s", "two cores, no accelerator"),
        ],
        lead="A convolutional network for handwritten digits, from its first random weights to the file that ships.",
    )
