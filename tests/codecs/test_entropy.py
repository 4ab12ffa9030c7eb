"""The entropy coder against the entropy, byte for byte and at its edges."""

from __future__ import annotations

import numpy as np
import pytest

from steelyard.codecs.bits import Bits
from steelyard.codecs.entropy import Entropy
from steelyard.core.spec import DTYPES, Spec
from steelyard.errors import CodecError

CONSTANT = 1  # a plane of zeros is this byte alone
RNG = np.random.default_rng(5)


def entropy_bytes(x: np.ndarray) -> float:
    """The order-0 empirical entropy."""
    counts = np.unique(x, return_counts=True)[1]
    return float(-(counts * np.log2(counts / x.size)).sum() / 8)


def coded(x: np.ndarray, mode: str = "auto") -> int:
    codec = Entropy(mode)  # type: ignore[arg-type]
    parts = codec.encode(x)
    assert codec.decode(parts, Spec.like(x)).tobytes() == x.tobytes()
    return parts["stream"].size


SKEWED = {
    "normal-4-bit": np.clip(np.rint(RNG.standard_normal(100_000) * 2) + 8, 0, 15).astype(np.uint8),
    "normal-8-bit": np.clip(np.rint(RNG.standard_normal(100_000) * 20) + 128, 0, 255).astype(np.uint8),
    "geometric": np.minimum(RNG.geometric(0.5, 100_000) - 1, 255).astype(np.uint8),
    "ternary": RNG.choice(np.int8([-1, 0, 1]), 100_000, p=[0.05, 0.9, 0.05]),
    "one-in-20": RNG.random(100_000) < 0.05,
    "one-in-10": RNG.random(100_000) < 0.10,
}


@pytest.mark.parametrize("mode", ["auto", "adaptive", "static"])
@pytest.mark.parametrize("kind", list(SKEWED))
def test_within_one_percent_of_the_entropy(kind: str, mode: str) -> None:
    assert coded(SKEWED[kind], mode) <= 1.01 * entropy_bytes(SKEWED[kind]) + (0 if SKEWED[kind].dtype == bool else 64)


@pytest.mark.parametrize("n", [1, 10, 100, 1000])
def test_little_costs_little(n: int) -> None:
    codes = np.clip(np.rint(RNG.standard_normal(n) * 2) + 8, 0, 15).astype(np.uint8)
    mask = RNG.random(n) < 0.1
    for x in (codes, mask, RNG.integers(0, 256, n, np.uint8)):
        assert coded(x) <= (Bits().encode(x)["stream"].size if n > 10 else n + 1) + 1
    assert coded(codes) <= entropy_bytes(codes) * 1.02 + 10


def test_exact_bytes() -> None:
    def stream(x: np.ndarray) -> list[int]:
        return Entropy().encode(x)["stream"].tolist()

    assert stream(np.zeros(0, np.float32)) == []
    assert stream(np.zeros(1000, np.uint8)) == [1]
    assert stream(np.full(1000, 7, np.uint8)) == [1, 7]
    assert stream(np.int8([-1, -1])) == [1, 1]  # folded
    assert stream(np.uint8([1, 0])) == [0, 1]  # raw, depth 1
    assert stream(np.uint8([3, 0, 1])) == [8, 0b01_00_11]
    assert stream(np.zeros(5, np.int32)) == [1, CONSTANT] * 3 + [
        CONSTANT
    ]  # three planes with their lengths, and the last
    assert stream(np.float32([1, 1])) == [1, CONSTANT] * 3 + [CONSTANT, 127]  # sign lowest, exponent a plane of its own


# A stream that was written once must decode for ever: the checksum of what each coder writes.
GOLDEN = {
    "adaptive": "558f4cda",
    "contexts": "17ba042c",
    "static": "9d581f6b",
}


@pytest.mark.parametrize("mode", list(GOLDEN))
def test_golden_streams(mode: str) -> None:
    import zlib

    i = np.arange(6000, dtype=np.int64)
    x = (((i * i) >> 5) % 11 * ((i % 60) > 40)).astype(np.uint8).reshape(100, 60)
    stream = Entropy(mode).encode(x)["stream"]  # type: ignore[arg-type]
    assert f"{zlib.crc32(stream.tobytes()):08x}" == GOLDEN[mode], "the format of the stream has changed"


def test_neighbours_are_used_in_two_dimensions() -> None:
    density = np.repeat(RNG.random(60) < 0.1, 5)  # some columns are busy, as the pixels of an image are
    mask = RNG.random((200, 300)) < np.where(density, 0.5, 0.005)
    assert coded(mask) < 0.6 * entropy_bytes(mask)
    assert coded(mask) < 0.7 * coded(mask.reshape(-1))


def test_the_exponent_of_floats_is_found() -> None:
    w = (RNG.standard_normal(50_000) * 0.05).astype(np.float32)
    half = w.astype(DTYPES["bfloat16"].numpy)
    assert coded(w) / w.nbytes < 0.85
    assert coded(half) / half.nbytes < 0.67


def test_what_changes_along_the_way_is_followed() -> None:
    x = np.concatenate([RNG.integers(0, 4, 20_000), RNG.integers(8, 12, 20_000)]).astype(np.uint8)
    assert coded(x) < 0.7 * entropy_bytes(x)


def test_long_planes_are_judged_by_a_part() -> None:
    x = (RNG.random((1100, 1000)) < 0.02).astype(np.uint8)
    assert coded(x) <= 1.01 * entropy_bytes(x)
    rows = np.repeat(RNG.random(1200) < 0.5, 1000).reshape(1200, 1000)
    assert coded(rows) < 0.05 * entropy_bytes(rows)


@pytest.mark.parametrize("mode", ["static", "adaptive", "contexts"])
def test_every_truncation_and_extension_is_noticed(mode: str) -> None:
    x = np.minimum(RNG.geometric(0.3, (40, 50)) - 1, 15).astype(np.uint8)
    codec = Entropy(mode)  # type: ignore[arg-type]
    stream = codec.encode(x)["stream"]
    for length in range(stream.size):
        if length >= stream.size - 4 and mode != "static":
            continue  # the last bytes of a range coder may decide nothing
        with pytest.raises(CodecError):
            codec.decode({"stream": stream[:length]}, Spec.like(x))
    with pytest.raises(CodecError):
        codec.decode({"stream": np.concatenate([stream, np.zeros(6, np.uint8)])}, Spec.like(x))


def test_an_unknown_mode_or_coder_is_refused() -> None:
    with pytest.raises(CodecError, match="expected auto"):
        Entropy("huffman")  # type: ignore[arg-type]
    with pytest.raises(CodecError, match="no coder 7"):
        Entropy().decode({"stream": np.uint8([7, 1])}, Spec.of((4,), "uint8"))
