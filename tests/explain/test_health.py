"""Health: each planted fault is found in the right tensor, and healthy models have none."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import steelyard as sy
from steelyard.explain import faults, reading


def healthy() -> dict[str, np.ndarray]:
    """Six layers as a transformer has them after training: scales that grow a little, a few channels that stand out."""
    rng = np.random.default_rng(0)
    weights = {"embed.weight": rng.normal(size=(200, 96)).astype(np.float32)}
    for i in range(6):
        growth = 0.02 * (1 + 0.1 * i)
        weights[f"layers.{i}.attention.weight"] = (rng.normal(size=(96, 96)) * growth).astype(np.float32)
        up = rng.normal(size=(192, 96)) * growth
        up[7] *= 3
        weights[f"layers.{i}.up.weight"] = up.astype(np.float32)
        weights[f"layers.{i}.up.bias"] = np.zeros(192, np.float32)
        weights[f"layers.{i}.norm.weight"] = np.ones(96, np.float32)
    return weights


def found(weights: dict[str, np.ndarray], **options) -> dict[tuple[str, str], dict]:
    table = sy.health(sy.Weights.of(weights, **options))
    return {(row["name"], row["finding"]): row for row in table.rows}


def test_healthy_weights_have_no_findings() -> None:
    assert found(healthy()) == {}


NAME = "layers.2.up.weight"


def broken(kind: str) -> tuple[np.ndarray, str, str, str]:
    """A tensor with a fault, the finding, its severity, and words of the evidence."""
    x = healthy()[NAME]
    if kind == "nan":
        x[5, 3], x[9, 95] = np.nan, np.nan
        return x, "NaN", "error", "2 of 18,432 values, first at [5, 3]; in 2 rows: 5, 9"
    if kind == "payload":
        x.view(np.uint32)[0, 1] = 0x7F800001
        return x, "NaN", "error", "first at [0, 1]"
    if kind == "inf":
        x[191, 0] = -np.inf
        return x, "infinite", "error", "0 × +Inf, 1 × -Inf of 18,432 values, first at [191, 0]; in 1 rows: 191"
    if kind == "dead rows":
        x[[3, 60]] = 0
        return x, "dead rows", "warning", "2 of 192: 3, 60"
    if kind == "dead columns":
        x[:, 95] = -0.0
        return x, "dead columns", "warning", "1 of 96: 95"
    if kind == "constant rows":
        x[17] = 0.125
        return x, "constant rows", "warning", "1 of 192: 17"
    if kind == "all zero":
        return x * 0, "all zero", "warning", "18,432 zeros"
    if kind == "outlier rows":
        x[11] *= 10
        return x, "outlier rows", "note", "in row 11"
    if kind == "far out":
        x[:, 12] *= 500
        return x, "outlier columns", "warning", "in column 12"
    if kind == "bf16":
        return x.astype(ml_dtypes.bfloat16).astype(np.float32), "was bfloat16", "note", "last 16 bits"
    if kind == "f16":
        return x.astype(np.float16).astype(np.float32), "was float16", "note", "last 13 bits"
    if kind == "large":
        return x * 1e4, "scale too large", "warning", "fan-in 96"
    if kind == "small":
        return x * 1e-5, "scale too small", "warning", "fan-in 96"
    if kind == "drift":
        return x * 12, "scale drift", "warning", "the median of 6 siblings"
    if kind == "shift":
        return x + 0.5, "mean drift", "warning", "mean 0.5"
    if kind == "absolute":
        return abs(x), "sign drift", "warning", "100.0% positive, the median of 6 siblings is 50."
    if kind == "subnormal":
        return (x * 1e-38).astype(np.float32), "all subnormal", "warning", "18,432 subnormal values"
    if kind == "saturated":
        return np.where(x > 0.05, np.finfo(np.float32).max, x), "saturated", "warning", "3.403e+38"
    assert kind == "quantised"
    return np.round(x / 0.005).astype(np.float32) * np.float32(0.005), "looks quantised", "note", "distinct values"


KINDS = [
    "nan",
    "payload",
    "inf",
    "dead_rows",
    "dead_columns",
    "constant_rows",
    "all_zero",
    "outlier_rows",
    "far_out",
    "bf16",
    "f16",
    "large",
    "small",
    "drift",
    "shift",
    "absolute",
    "subnormal",
    "saturated",
    "quantised",
]


@pytest.mark.parametrize("compiled", [False, True], ids=["numpy", "compiled"])
@pytest.mark.parametrize("kind", [k.replace("_", " ") for k in KINDS])
def test_a_planted_fault_is_found_where_it_is(kind: str, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steelyard.explain.health.SMALL", 0 if compiled else 1 << 40)
    x, finding, severity, words = broken(kind)
    rows = found(healthy() | {NAME: x})
    row = rows[NAME, finding]
    assert row["severity"] == severity
    assert words in row["evidence"]
    assert row["remedy"]
    assert {name for name, _ in rows} == {NAME}


def test_faults_are_found_whatever_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for block in (64, 100, 1000):
        monkeypatch.setattr(reading, "BLOCK", block)
        monkeypatch.setattr(faults, "BLOCK", block)
        monkeypatch.setattr("steelyard.explain.health.BLOCK", block)
        for kind in ("nan", "dead rows", "bf16"):
            x, finding, _, words = broken(kind)
            assert words in found({NAME: x})[NAME, finding]["evidence"]


def test_sixteen_bits_and_eight() -> None:
    x = np.random.default_rng(0).normal(size=(128, 64)) * 0.1
    with np.errstate(over="ignore"):
        rows = found({"h": np.where(x > 0.3, 70000, x).astype(np.float16)})
    assert set(rows) == {("h", "infinite")}
    half = np.where(x > 0.3, 65504, x).astype(np.float16)
    assert "saturated" in {finding for _, finding in found({"h": half})}
    eight = np.clip(x * 4480, -448, 448)
    assert "saturated" not in {f for _, f in found({"e": (x / abs(x).max() * 448).astype(ml_dtypes.float8_e4m3fn)})}
    assert "saturated" in {f for _, f in found({"e": eight.astype(ml_dtypes.float8_e4m3fn)})}
    assert found({"q": np.full((64, 64), 127, np.int8)}) == {}


def test_signs_of_pruned_and_of_small_siblings_are_no_drift() -> None:
    weights = healthy()
    rng = np.random.default_rng(3)
    weights[NAME] = np.where(rng.random((192, 96)) < 0.9, 0, weights[NAME])  # of what is left, half is positive
    for i in range(6):
        weights[f"small.{i}.weight"] = abs(rng.normal(size=(2, 4)).astype(np.float32)) * (-1 if i == 3 else 1)
    assert not {finding for _, finding in found(weights)} & {"sign drift"}


def test_rows_at_the_end_of_the_range_of_float64_have_a_median_norm() -> None:
    x = np.full((32, 2), 1.2e308)
    x[:, 1] *= np.where(np.arange(32) % 2, 1, -1)
    assert {finding for _, finding in found({"x": x})} == {"scale too large"}


def test_duplicates_and_ties() -> None:
    weights = healthy()
    weights["layers.3.attention.weight"] = weights["layers.1.attention.weight"].copy()
    changed = weights["layers.1.attention.weight"][::-1].copy()  # the same values elsewhere
    weights["layers.4.attention.weight"] = changed
    rows = found(weights, ties={"head.weight": "embed.weight"})
    assert set(rows) == {("layers.3.attention.weight", "duplicate"), ("head.weight", "tied")}
    assert "layers.1.attention.weight" in rows["layers.3.attention.weight", "duplicate"]["evidence"]


def test_a_padding_row_and_the_second_half_of_a_lora_pair_are_notes() -> None:
    weights = healthy()
    weights["embed.weight"][0] = 0
    weights["layers.0.lora_B.weight"] = np.zeros((96, 4), np.float32)
    rows = found(weights)
    assert {(key, row["severity"]) for key, row in rows.items()} == {
        (("embed.weight", "dead rows"), "note"),
        (("layers.0.lora_B.weight", "all zero"), "note"),
    }


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (0, 3), (1,), (1, 1), (2, 1, 1)])
@pytest.mark.parametrize("value", [0.0, 1.0, np.nan, np.inf])
@pytest.mark.parametrize("name", ["float32", "bfloat16", "float8_e5m2", "float64", "complex64"])
def test_every_shape_and_value_is_defined(shape: tuple[int, ...], value: float, name: str) -> None:
    with np.errstate(invalid="ignore"):
        x = np.full(shape, value).astype(sy.dtype(name).numpy)
    sy.health(sy.Weights.of({"x": x})).to_json()


def test_models_that_torch_starts_are_healthy() -> None:
    torch = pytest.importorskip("torch")
    from torch import nn

    torch.manual_seed(0)
    models = [
        nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.BatchNorm1d(256), nn.Linear(256, 10)),
        nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.Conv2d(32, 64, 3, groups=4), nn.Linear(64, 10)),
        nn.Sequential(
            nn.Embedding(1000, 64),
            nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 128), 6, enable_nested_tensor=False),
        ),
        nn.LSTM(32, 64, 2),
    ]
    for model in models:
        for weights in (sy.from_module(model), sy.Cast("bf16")(sy.from_module(model))):
            rows = sy.health(weights).rows
            assert [row for row in rows if row["severity"] != "note"] == []
            assert {row["finding"] for row in rows} <= {"duplicate", "tied"}


def test_a_trained_model_is_healthy() -> None:
    pytest.importorskip("torch")
    pytest.importorskip("sklearn")
    task = sy.task("digits")
    net = sy.model("cnn", task.interface)
    sy.train(task, net, epochs=3, seed=0)
    assert [row for row in sy.health(sy.from_module(net)).rows if row["severity"] != "note"] == []
