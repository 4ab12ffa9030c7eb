"""What steps for matrices do with a choice of tensors in which there are none."""

from __future__ import annotations

import numpy as np
import pytest

from steelyard.core.weights import Weights
from steelyard.edit.adaround import AdaRound
from steelyard.edit.awq import Awq
from steelyard.edit.gptq import Gptq
from steelyard.edit.hqq import Hqq
from steelyard.edit.lowrank import Factorize
from steelyard.edit.nm import PruneNM
from steelyard.edit.prune import Prune
from steelyard.edit.quantize import Quantize
from steelyard.edit.ratedistortion import RateDistortion
from steelyard.edit.share import Share
from steelyard.edit.sparsegpt import SparseGPT
from steelyard.errors import WeightsError

STEPS = [
    Prune(0.5),
    PruneNM("1:2"),
    SparseGPT(0.5),
    Quantize(4),
    Gptq(),
    Awq(),
    AdaRound(),
    Hqq(),
    RateDistortion(bits=3, min_ndim=2),
    Factorize(keep=0.5),
    Share(4),
]


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_a_choice_without_anything_to_change_is_named(step) -> None:
    vectors = {f"b{i}": np.ones(3, np.float32) for i in range(3)}
    with pytest.raises(WeightsError, match=r"none of the 4 tensors can be .* 'b0' float32\[3\], .*, \.\.\.; choose"):
        step(Weights.of({**vectors, "n": np.ones((2, 2), np.int64)}))
    assert len(step(Weights([]))) == 0  # nothing was chosen: that is for whoever chooses to say
