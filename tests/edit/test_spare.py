"""What a step would make larger in a file stays as it was, judged by the bytes of a file."""

from __future__ import annotations

import numpy as np
import pytest

import steelyard as sy
from steelyard.errors import WeightsError
from steelyard.formats.layout import described

SHAPES = [(1, 1), (2, 2), (3, 40), (4, 9), (16, 16), (40, 60)]


def weights() -> sy.Weights:
    rng = np.random.default_rng(0)
    return sy.Weights.of({f"w{i}": rng.normal(size=s).astype(np.float32) for i, s in enumerate(SHAPES)})


def size(weights: sy.Weights, folder) -> int:
    return sy.write(weights, folder / "a.safetensors")


STEPS = [
    sy.Quantize(4),
    sy.Quantize(8, group=2),
    sy.Hqq(3, group=8),
    sy.Share(4),
    sy.Encode(sy.Vectors(16, 2)),
    sy.Encode(sy.FloatGrid("nf4", 4)),
    sy.RateDistortion(bits=4),
]


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_what_is_spared_is_as_it_was_and_the_file_no_larger(step, tmp_path) -> None:
    before, coded, after = weights(), step(weights()), sy.Spare(step)(weights())
    kept = [name for name in before if isinstance(after[name].read(), np.ndarray)]
    whole = size(after, tmp_path)
    for name in before:
        chosen, other = (before, coded) if name in kept else (coded, before)
        assert after[name].array().tobytes() == chosen[name].array().tobytes()
        otherwise = after.with_items(other[n] if n == name else item for n, item in after.items())
        assert whole <= size(otherwise, tmp_path) + 150  # what a header takes is more before it is deflated
    assert "w5" not in kept
    assert "w1" in kept or step.name == "ratedistortion"  # of which many lie in one array


def test_a_small_tensor_stays_and_is_read_once() -> None:
    reads: list[str] = []

    def read(name: str, x: np.ndarray) -> np.ndarray:
        reads.append(name)
        return x

    held = weights().arrays()
    lazy = sy.Weights([sy.Weight(n, sy.Spec.like(x), lambda n=n, x=x: read(n, x)) for n, x in held.items()])
    after = sy.Spare(sy.Quantize(4))(lazy)
    assert not reads
    assert np.array_equal(after["w1"].array(), held["w1"])
    assert not np.array_equal(after["w5"].array(), held["w5"])
    assert reads == ["w1", "w5"]


def test_what_is_held_in_fewer_bytes_already_stays(tmp_path) -> None:
    once = sy.Quantize(2)(weights())
    sy.write(once, tmp_path / "small.safetensors")
    again = sy.Spare(sy.Quantize(8))(sy.open(tmp_path / "small.safetensors"))
    found = [item.read().codec.bits for item in again.values()]
    assert found[2:] == [2] * 4  # of a few elements the shorter name decides


def test_what_passes_untouched_and_what_is_left_plain_is_not_compared() -> None:
    w = sy.Weights.of({"m": np.ones((2, 2), np.float32), "b": sy.pack(np.zeros(9, np.uint8), sy.Entropy())})
    after = sy.Spare(sy.Prune(0.5))(w)
    assert after["m"].array().tolist() == [[0, 0], [1, 1]]
    assert after["b"] is w["b"]


def test_a_step_that_changes_names_is_refused() -> None:
    with pytest.raises(WeightsError, match="the step rename changes names"):
        sy.Spare(sy.Rename("w0", "x"))(weights())


@pytest.mark.parametrize("plan", [None, sy.Affine(4), sy.nest(sy.Palette(4), codes=sy.Entropy())])
def test_the_bytes_of_a_tensor_are_about_those_of_a_file(plan, tmp_path) -> None:
    x = np.random.default_rng(1).normal(size=(300, 40)).astype(np.float32)
    held = sy.pack(x, plan)
    more = size(sy.Weights.of({"a": np.zeros(3), "model.weight": held}), tmp_path) - size(
        sy.Weights.of({"a": np.zeros(3)}), tmp_path
    )
    assert described("model.weight", held if isinstance(held, sy.Packed) else sy.Spec.like(held)) == pytest.approx(
        more, abs=140
    )  # what one text says of all tensors is left out
