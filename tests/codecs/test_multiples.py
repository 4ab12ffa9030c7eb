"""The coder of small multiples: what it holds, what it costs, and what it says of both."""

from __future__ import annotations

import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from steelyard.codecs import multiples
from steelyard.codecs.entropy import Entropy
from steelyard.codecs.multiples import Multiples, costs, step_of
from steelyard.core.spec import Spec
from steelyard.errors import CodecError

RNG = np.random.default_rng(4)


def sparse(rows: int, columns: int, keep: float) -> np.ndarray:
    """Whole numbers, mostly 0, whose share follows the row and the column, as in a net that was trained to be small."""
    share = keep * np.exp(RNG.normal(0, 1, (rows, 1)) + RNG.normal(0, 1, columns))
    signs = RNG.choice([-1, 1], (rows, columns))
    return (signs * RNG.geometric(0.7, (rows, columns)) * (RNG.random((rows, columns)) < share)).astype(np.int32)


def coded(x: np.ndarray) -> int:
    stream = Multiples().encode(x)["stream"]
    assert np.array_equal(Multiples().decode({"stream": stream}, Spec.like(x)), x)
    return stream.size


def test_exact_bytes() -> None:
    def stream(*values: float) -> list[int]:
        return Multiples().encode(np.float32(values))["stream"].tolist()

    assert stream(0, 0, 0) == []
    assert stream(1)[:3] == [1, 0x3F, 0x80]  # two bytes of the step 1.0
    assert stream(0.1)[:5] == [3, 0x3D, 0xCC, 0xCC, 0xCD]
    assert len(stream(1, -2, 0, 1)) == 5


@pytest.mark.parametrize("keep", [0.003, 0.03, 0.2])
def test_it_takes_less_than_the_general_coder_and_dead_rows_take_nothing(keep: float) -> None:
    numbers = sparse(200, 300, keep)
    numbers[RNG.random(200) < 0.5] = 0
    assert coded(numbers * np.float32(0.25)) < 0.97 * Entropy().encode(numbers.astype(np.int8))["stream"].size
    more = np.concatenate([numbers, np.zeros((500, 300), np.int32)])
    assert coded(more * np.float32(0.25)) < coded(numbers * np.float32(0.25)) + 25


def test_lines_of_an_image_are_neighbours() -> None:
    blobs = np.zeros((60, 28, 28), np.int32)
    for blob in blobs:
        i, j = RNG.integers(0, 24, 2)
        blob[i : i + 4, j : j + 4] = RNG.choice([-1, 1])
    numbers = blobs.reshape(60, 784)
    shuffled = numbers[:, RNG.permutation(784)]
    assert coded(numbers * np.float32(0.5)) < 0.4 * coded(shuffled * np.float32(0.5))


@pytest.mark.parametrize("step", [0.1005859375, 2.0**-133, 2.0**100, 3 * 2.0**-7, 2.0**-900])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, ml_dtypes.bfloat16])
def test_the_step_is_found_exactly(step: float, dtype: type) -> None:
    numbers = np.array([[0, 2, -3], [255, 0, 1]])
    x = (numbers * step).astype(dtype)
    if not np.array_equal(x.astype(np.float64), numbers * step):
        pytest.skip("the type does not hold these multiples")
    found, whole = step_of(x)
    assert found == step
    assert np.array_equal(whole, numbers)
    assert coded(x) < 20


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0, np.nan], "NaN"),
        ([1.0, -0.0], "negative zeros"),
        ([1.0, 256.0, 3.0], "up to 256 times"),
        ([1.0, 1e-30], "share no step"),
        ([0.1, 0.37], "times their step|share no step"),
    ],
)
def test_what_it_does_not_hold_is_said(values: list[float], message: str) -> None:
    with pytest.raises(CodecError, match=message):
        Multiples().encode(np.float32(values))
    with pytest.raises(CodecError, match="int32 is not held"):
        Multiples().encode(np.int32([1]))


def test_costs_are_those_of_the_stream_and_zero_is_cheaper() -> None:
    numbers = sparse(50, 120, 0.05)
    found = costs(numbers)
    assert found.shape == (2, 50, 120)
    size = Multiples().encode(numbers * np.float32(0.5))["stream"].size
    flags = 50 + 120  # rows and columns that are there are told beside
    assert 8 * (size - 4) - 1.2 * flags <= found[0].sum() <= 8 * size
    ones, larger = np.abs(numbers) == 1, np.abs(numbers) > 1
    assert (found[1][ones] < found[0][ones]).mean() > 0.9
    assert np.array_equal(found[0][numbers == 0], found[1][numbers == 0])
    # one nearer to 0 is what the coder would have paid for that number at that place
    i, j = np.argwhere(larger)[-1]
    before, after = np.zeros((2, numbers.size, 2))
    room, at = np.zeros(1 << 14, np.uint8), i * 120 + j
    multiples._run(numbers, True, 4, room, decoding=False, costs=before)
    numbers[i, j] -= np.sign(numbers[i, j])
    multiples._run(numbers, True, 4, room, decoding=False, costs=after)
    assert after[at, 0] == pytest.approx(before[at, 1], abs=1e-9)


DENSE = """
import sys
import numpy as np
from steelyard.codecs.multiples import Multiples
random = np.random.default_rng(3)
for shape in [(7, 30), (5,), (3, 4, 2)]:
    for keep in (1.0, 0.9, 0.2):
        for most in (1, 255):
            x = random.integers(-most, most + 1, shape) * (random.random(shape) < keep)
            stream = Multiples().encode(x.astype(np.float32) * np.float32(0.5))["stream"]
            sys.stdout.write(stream.tobytes().hex() + chr(10))
"""


def test_dense_numbers_survive_and_compiled_code_does_what_is_written() -> None:
    """Compiled, an index beyond an array reads whatever lies there; interpreted, it is an error."""
    interpreted, compiled = (
        subprocess.run(
            [sys.executable, "-c", DENSE], env={**os.environ, **more}, capture_output=True, text=True, check=True
        )
        for more in ({"NUMBA_DISABLE_JIT": "1"}, {})
    )
    assert interpreted.stdout == compiled.stdout
    assert compiled.stdout.count("\n") == 18
    for shape in [(7, 30), (30, 7), (5,), (3, 4, 2, 2), (40, 56)]:
        for most in (1, 13, 255):
            assert coded(RNG.integers(-most, most + 1, shape) * np.float32(0.5))


def test_damage_never_hangs_or_crashes() -> None:
    x = sparse(40, 60, 0.05) * np.float32(0.5)
    stream = Multiples().encode(x)["stream"]
    for cut in (1, 2, 3, stream.size // 2, stream.size - 8):
        with pytest.raises(CodecError):
            Multiples().decode({"stream": stream[:cut]}, Spec.like(x))
    with pytest.raises(CodecError, match="step is"):
        Multiples().decode({"stream": np.uint8([1, 0x7F, 0x80, 0])}, Spec.like(x))
    with pytest.raises(CodecError, match="which has none"):
        Multiples().decode({"stream": stream}, Spec.of((40, 60), "int8"))
