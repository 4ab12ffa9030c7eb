"""Laws of every step: names, order, ties and metadata survive; nothing is read early; a step is data."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from steelyard.codecs import CODECS
from steelyard.codecs.bitmask import Bitmask
from steelyard.codecs.floatgrid import FloatGrid
from steelyard.codecs.vectors import Vectors
from steelyard.core.packed import Packed, Scheme, Smallest, nest, smallest
from steelyard.core.recipe import Reader, to_data
from steelyard.core.spec import Spec
from steelyard.core.transform import Step, chain, on
from steelyard.core.weights import Weight, Weights
from steelyard.core.where import where
from steelyard.edit import STEPS
from steelyard.edit.encode import Encode
from steelyard.edit.quantize import Quantize
from steelyard.errors import WeightsError

# Settings to test a row with, besides the first of each; a row must be here.
SETTINGS = {
    "cast": [{"dtype": "bfloat16"}, {"dtype": "float64", "overflow": "saturate"}],
    "rename": [{"pattern": "*.weight", "to": "*.w"}, {"pattern": "^head", "to": "lm_head", "regex": True}],
    "split": [
        {"pattern": "conv.*", "into": ("half.a.*", "half.b.*")},
        {"pattern": "*.bias", "into": ("*.q", "*.k", "*.v"), "shares": (3, 1, 1)},
        {"pattern": "fc.weight", "into": ("fc.weight", "fc.rest"), "shares": (5, 3), "axis": -1},
    ],
    "join": [{"parts": ("e.0.w", "e.1.w"), "into": "e.w"}, {"parts": ("e.1.*", "e.0.*"), "into": "e.*", "axis": 1}],
    "stack": [{"pattern": "e.#.*", "into": "e.*"}],
    "unstack": [{"pattern": "conv.weight", "into": "conv.#.weight"}],
    "prune": [
        {"fraction": 0.5},
        {"fraction": 0.3, "scope": "tensor", "min_ndim": 1},
        {"fraction": 0.4, "scope": "row"},
        {"fraction": 0.6, "scope": "erk"},
    ],
    "prune_nm": [{"pattern": "1:2"}, {"pattern": "2:2", "min_ndim": 1}],
    "sparsegpt": [{}, {"fraction": 0.3, "block": 2}, {"pattern": "1:2", "bits": 4}],
    "ratedistortion": [
        {"bits": 4.0, "min_ndim": 2},
        {"error": 0.1, "states": 1, "importance": {"*": 0.5}, "min_ndim": 2},
    ],
    "quantize": [
        {},
        {"bits": 4, "symmetric": False, "axis": 0},
        {"bits": 3, "group": 4},
        {"bits": 3, "error": 2, "group": 5},
    ],
    "gptq": [{}, {"bits": 3, "symmetric": False, "group": 4, "order": False}, {"bits": 6, "step": 0.5}],
    "awq": [{"bits": 3, "group": 3}, {"group": None, "symmetric": True}],
    "adaround": [{}, {"bits": 3, "symmetric": False, "group": 3, "rounds": 9}],
    "hqq": [{}, {"bits": 2, "group": 3}],
    "lowrank": [{"rank": 2}, {"keep": 0.6}, {"error": 0.2}],
    "share": [{"k": 3}, {"k": 2, "scope": "global", "keep_zeros": False}],
    "encode": [{"plan": FloatGrid("nf4", 4)}, {"plan": nest(Vectors(4, 2), codes=None), "min_ndim": 2}],
    "spare": [{"step": Quantize(4)}, {"step": Encode(Vectors(2, 4))}],
    "pack": [{"plan": Bitmask()}, {"plan": smallest(nest(Bitmask(), mask=None), None)}, {"plan": None}],
    "untie": [{}],
    "settle": [{}],
}
EVERY = [(name, settings) for name in STEPS for settings in SETTINGS[name]]
PIECES = {"split", "join", "stack", "unstack"}  # the tensors that come of these are others
NAMING = PIECES | {"rename"}
EAGER = {"settle"}  # it exists to read everything at once
TOGETHER = {"prune", "ratedistortion"}  # by default, all tensors decide together, and are read for that
MOVING = {"ratedistortion"}  # no projection: the second time, an error is made anew, though no greater than the first
UNTYING = {"untie"}  # it exists to end ties: each alias is a tensor after the others


def arrays():
    rng = np.random.default_rng(0)
    return {
        "embed.weight": rng.normal(size=(6, 8)).astype(np.float32),
        "fc.weight": rng.normal(size=(5, 8)).astype(np.float16),
        "fc.bias": rng.normal(size=5).astype(np.float32),
        "conv.weight": rng.normal(size=(4, 2, 3, 3)).astype(np.float32),
        "steps": np.arange(4).reshape(2, 2),
        "e.1.w": np.ones((2, 3), np.int8),
        "e.0.w": np.zeros((2, 3), np.int8),
        "mask": np.array([[True, False]]),
    }


class Watched:
    """Weights whose reads are counted, and of which so many values at once are in memory."""

    def __init__(self):
        self.reads: dict[str, int] = {}
        self._lock = threading.Lock()

    def weights(self):
        return Weights(
            [Weight(n, Spec.like(x), lambda n=n, x=x: self._read(n, x), 99, f"f.bin {n}") for n, x in arrays().items()],
            ties={"head.weight": "embed.weight"},
            meta={"license": "mit"},
        )

    def _read(self, name, x):
        with self._lock:
            self.reads[name] = self.reads.get(name, 0) + 1
        return x.copy()


def build(name, settings) -> Step:
    return STEPS[name](**settings)


def test_every_step_is_in_its_row_and_has_its_settings_here():
    assert set(SETTINGS) == set(STEPS)
    for name in STEPS:
        assert STEPS[name].name == name
        assert issubclass(STEPS[name], Step)


@pytest.mark.parametrize(("name", "settings"), EVERY)
def test_order_ties_and_metadata_survive(name, settings):
    before = Watched().weights()
    after = build(name, settings)(before)
    assert after.meta == before.meta
    if name in UNTYING:
        assert dict(after.ties) == {}
        assert list(after) == [*before, *before.ties]
        assert [after[alias].spec for alias in before.ties] == [before[alias].spec for alias in before.ties]
        return
    assert len(after.ties) == 1
    ((alias, target),) = after.ties.items()
    assert list(after).index(target) == 0
    if name not in NAMING:
        assert list(after) == list(before)
        assert (alias, target) == ("head.weight", "embed.weight")
    if name in PIECES:
        kept = [item for item in before if item in after]
        assert kept == [item for item in after if item in before]
        assert after.nbytes == before.nbytes
        return
    assert len(after) == len(before)
    assert [item.spec.shape for item in after.values()] == [item.spec.shape for item in before.values()]


@pytest.mark.parametrize(("name", "settings"), [case for case in EVERY if case[0] not in EAGER])
def test_nothing_is_read_before_a_read_and_then_only_what_it_takes(name, settings):
    watched = Watched()
    after = build(name, settings)(watched.weights())
    assert watched.reads == {}
    if name in PIECES:
        for item in after.values():
            watched.reads.clear()
            item.array()
            assert set(watched.reads.values()) == {1}
            assert len(watched.reads) <= 1 or item.name in ("e.w", "e.0.w")
        return
    after["fc.bias"].array()
    together = settings.get("scope", "global" if name in TOGETHER else "") == "global"
    assert set(watched.reads) <= {"fc.bias"} or together
    assert watched.reads["fc.bias"] == 1
    watched.reads.clear()
    conv = list(after.values())[3]
    conv.array()
    if not together:
        assert watched.reads == {"conv.weight": 1}
    watched.reads.clear()
    conv.array()
    assert watched.reads == {"conv.weight": 1}  # what all tensors decided together is decided once


@pytest.mark.parametrize(("name", "settings"), EVERY)
def test_what_is_read_is_what_was_announced_and_the_same_again(name, settings):
    after = build(name, settings)(Watched().weights())
    for item in after.values():
        value = item.read()
        assert isinstance(value, Packed) == (item.scheme is not None) or isinstance(item.scheme, Smallest)
        if isinstance(item.scheme, Scheme):
            assert value.codec == item.scheme.codec
        assert value.spec == item.spec if isinstance(value, Packed) else Spec.like(value) == item.spec
        assert item.array().tobytes() == item.array().tobytes()


@pytest.mark.parametrize(("name", "settings"), EVERY)
def test_tensors_that_are_not_floating_point_keep_their_values(name, settings):
    after = build(name, settings)(Watched().weights())
    assert after["steps"].array().tolist() == arrays()["steps"].tolist()
    assert after["mask"].array().tolist() == arrays()["mask"].tolist()


@pytest.mark.parametrize(("name", "settings"), EVERY)
def test_the_input_is_left_as_it_was(name, settings):
    held = arrays()
    build(name, settings)(Weights.of(held, {"head.weight": "embed.weight"})).settle()
    assert all(held[n].tobytes() == x.tobytes() for n, x in arrays().items())


@pytest.mark.parametrize(("name", "settings"), EVERY)
def test_twice_is_once(name, settings):
    """All of these steps are projections: a second time changes no value (pruned fractions count what is zero).

    In one number format, that is: values shared among several formats are rounded to each.
    """
    step = build(name, settings)
    once = step(STEPS["cast"]("float32")(Watched().weights()))
    if name in NAMING:  # the names have gone, and a step without effect says so
        with pytest.raises(WeightsError, match=r"no name matches|cannot be split"):
            step(once)
        return
    if name in MOVING:
        first, second, third = (
            STEPS["cast"]("float32")(Watched().weights()).arrays(),
            once.arrays(),
            step(once).arrays(),
        )
        for n in ("embed.weight", "conv.weight"):
            assert np.linalg.norm(third[n] - second[n]) <= 2 * np.linalg.norm(second[n] - first[n])
        return
    assert [x.tobytes() for x in step(once).arrays().values()] == [x.tobytes() for x in once.arrays().values()]


@pytest.mark.parametrize(("name", "settings"), EVERY)
def test_a_step_is_data_and_back(name, settings):
    step = chain(build(name, settings), on(where("*.weight", min_ndim=2), build(name, settings)))
    data = json.loads(json.dumps(to_data(step)))
    assert Reader(CODECS, STEPS).step(data) == step


@pytest.mark.parametrize(("name", "settings"), EVERY)
def test_no_weights_are_no_trouble(name, settings):
    assert len(build(name, settings)(Weights([]))) == 0
    if name in PIECES:
        return
    empty = Weights.of({"head.weight": np.zeros((0, 3), np.float32)})
    (found,) = build(name, settings)(empty).arrays().values()
    assert found.shape == (0, 3)


@pytest.mark.parametrize(("name", "settings"), EVERY)
def test_several_threads_get_what_one_gets(name, settings):
    after = build(name, settings)(Watched().weights())
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda item: item.array().tobytes(), after.values()))
    alone = build(name, settings)(Watched().weights())
    assert together == [item.array().tobytes() for item in alone.values()]
