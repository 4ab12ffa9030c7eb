"""Mutated files of every row of the fuzz are refused with an error of ours or read; the long run is bench/fuzz."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from steelyard.formats import WRITTEN

from fuzzing import ROWS, disagreement, judge

COUNTS = {"safetensors": 10_000, "gguf": 10_000}


def test_every_format_that_is_written_to_one_file_has_a_row() -> None:
    assert set(WRITTEN) - {"sharded"} <= set(ROWS)


def seeds_of(format: str) -> list[bytes]:
    """The whole files of a row; the test is skipped where the package that makes them is not installed."""
    try:
        return ROWS[format].seeds()
    except ModuleNotFoundError as error:
        pytest.skip(f"files of {format} are made by {error.name}, which is not installed")


@pytest.mark.parametrize("format", ROWS)
def test_a_whole_file_is_read(format: str) -> None:
    for content in seeds_of(format):
        assert judge(format, content) is None


@pytest.mark.parametrize("format", ROWS)
def test_mutations_are_refused_or_read(format: str) -> None:
    rng = random.Random(5)
    seeds = seeds_of(format)
    verdicts: Counter[bool] = Counter()
    for _ in range(COUNTS.get(format, 2_000)):
        content = ROWS[format].mutate(rng, rng.choice(seeds), seeds)
        said = judge(format, content)
        verdicts[said is None] += 1
        assert said is None or (said.isprintable() and len(said) < 1000)
        if format == "safetensors":
            assert disagreement(content, said) == "", content
    assert min(verdicts[True], verdicts[False]) > 20
