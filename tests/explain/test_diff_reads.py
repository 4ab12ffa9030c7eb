"""What cannot be read by parts, such as packed tensors, is decoded a few times and not once for each row or partner."""

from __future__ import annotations

from collections import Counter

import numpy as np

from steelyard.core.weights import Weight, Weights
from steelyard.explain.diff import difference


def counted(arrays, reads):
    """Weights without `fill`; `reads` counts how often each is read."""

    def lazy(name, x):
        def read():
            reads[name] += 1
            return x

        return Weight(name, Weight.of(name, x).spec, read)

    return Weights([lazy(name, x) for name, x in arrays.items()])


def test_unrelated_tensors_are_read_a_few_times():
    rng, reads = np.random.default_rng(0), Counter()
    a, b = (counted({"w": rng.standard_normal((64, 48)).astype(np.float32)}, reads) for _ in "ab")
    found = difference(a, b)
    assert [f.verdict for f in found.findings] == ["values"]
    assert reads["w"] <= 12  # of both sides together


def test_partners_are_looked_for_without_reading_all_for_each():
    rng, reads = np.random.default_rng(0), Counter()
    parts = {f"a.{i}.{k}": rng.standard_normal((4, 8)).astype(np.float32) for i in range(10) for k in "qkv"}
    wholes = {f"b.{i}.qkv": rng.standard_normal((12, 8)).astype(np.float32) for i in range(10)}
    found = difference(counted(parts, reads), counted(wholes, reads))
    assert {f.verdict for f in found.findings} == {"added", "removed"}
    assert max(reads.values()) <= 4


def test_parts_of_many_layers_are_read_a_few_times():
    rng, reads = np.random.default_rng(0), Counter()
    parts = {f"a.{i}.{k}": rng.standard_normal((4, 8)).astype(np.float32) for i in range(10) for k in "qkv"}
    wholes = {f"b.{i}.qkv": np.concatenate([parts[f"a.{i}.{k}"] for k in "qkv"]) for i in range(10)}
    found = difference(counted(parts, reads), counted(wholes, reads))
    assert Counter(f.verdict for f in found.findings) == {"joined": 10}
    assert max(reads.values()) <= 4
