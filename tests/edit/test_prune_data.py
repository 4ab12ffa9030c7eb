"""Pruning by evidence, by rows, by layers, by patterns, and with repair: what goes, and what it costs at the outputs."""

from __future__ import annotations

import json

import numpy as np
import pytest

from steelyard import formats
from steelyard.codecs.nm import NM
from steelyard.core.packed import Packed, nest, pack
from steelyard.core.weights import Weights
from steelyard.edit.nm import PruneNM
from steelyard.edit.prune import Prune, erk
from steelyard.edit.sparsegpt import SparseGPT
from steelyard.errors import RecipeError, WeightsError

RNG = np.random.default_rng(0)
W = RNG.normal(size=(24, 64)).astype(np.float32)
X = RNG.normal(size=(400, 64)) @ (RNG.normal(size=(64, 64)) / 8) * np.exp(RNG.normal(size=64))  # related, of many sizes
H = (X.T @ X / len(X))[None].astype(np.float32)
NORMS = np.sqrt(np.mean(X**2, 0, keepdims=True)).astype(np.float32)


def weights(**more: np.ndarray) -> Weights:
    return Weights.of({"fc.weight": W.copy(), "fc.bias": np.ones(24, np.float32), **more})


def evidence(
    kind: str, values: np.ndarray, first: tuple[str, ...] = (), samples: dict[str, str] | None = None
) -> Weights:
    about = {"kind": kind, "samples": samples or {}, "inputs first": list(first)}
    return Weights.of({"fc.weight": values}, meta={"evidence": json.dumps(about)})


def damage(pruned: np.ndarray) -> float:
    """The mean square that the outputs change by."""
    d = (pruned - W).astype(np.float64)
    return float(np.trace(d @ H[0] @ d.T))


def nearest(w: np.ndarray, bits: int) -> np.ndarray:
    """Levels that reach the greatest weight of each row."""
    step = np.abs(w).max(1, keepdims=True) / (2 ** (bits - 1) - 1)
    return np.rint(w / np.where(step > 0, step, 1)) * step


def one(step, given: Weights | None = None) -> np.ndarray:
    return step(given or weights())["fc.weight"].array()


def test_wanda_prunes_each_row_by_magnitude_times_norm():
    found = one(Prune(0.5, "row", evidence("norms", NORMS)))
    scores = np.abs(W) * NORMS
    for i in range(24):
        least = set(np.argsort(scores[i])[:32].tolist())
        assert set(np.flatnonzero(found[i] == 0).tolist()) == least
    assert np.array_equal(found[found != 0], W[found != 0])


def test_inputs_that_come_first_are_known_from_the_evidence():
    turned = Weights.of({"fc.weight": W.T.copy()})
    found = one(Prune(0.5, "row", evidence("norms", NORMS.T, ("fc.weight",))), turned)
    assert np.array_equal(found.T, one(Prune(0.5, "row", evidence("norms", NORMS))))
    found = one(PruneNM("2:4", evidence("norms", NORMS.T, ("fc.weight",))), turned)
    assert np.array_equal(found.T, one(PruneNM("2:4", evidence("norms", NORMS))))
    found = one(SparseGPT(0.5, evidence("hessian", H, ("fc.weight",))), turned)
    assert np.array_equal(found.T, one(SparseGPT(0.5, evidence("hessian", H))))


def test_fisher_and_taylor_rank_as_they_say():
    fisher = np.square(RNG.normal(size=W.shape)).astype(np.float32)
    found = one(Prune(0.3, by=evidence("fisher", fisher)))
    assert np.array_equal(found == 0, one(Prune(0.3, by=Weights.of({"fc.weight": W * W * fisher}))) == 0)
    found = one(Prune(0.3, by=evidence("taylor", fisher)))
    assert np.array_equal(found == 0, one(Prune(0.3, by=Weights.of({"fc.weight": fisher}))) == 0)


def test_rows_keep_what_rows_have():
    found = one(Prune(0.75, "row"))
    assert ((found != 0).sum(1) == 16).all()
    whole = (one(Prune(0.75)) != 0).sum(1)
    assert len(set(whole.tolist())) > 1


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.6, 0.9, 0.99, 1.0])
def test_erk_prunes_the_whole_by_the_fraction_and_small_layers_less(fraction):
    shapes = {"conv1": (20, 1, 5, 5), "conv2": (50, 20, 5, 5), "fc1": (500, 800), "head": (10, 500)}
    found = erk(shapes, fraction)
    sizes = {name: int(np.prod(shape)) for name, shape in shapes.items()}
    gone = sum(found[name] * sizes[name] for name in shapes)
    assert gone == pytest.approx(fraction * sum(sizes.values()), abs=1e-6)
    assert all(0 <= f <= 1 for f in found.values())
    assert max(found["conv1"], found["head"]) <= min(found["conv2"], found["fc1"])
    given = Weights.of({name: RNG.normal(size=shape).astype(np.float32) for name, shape in shapes.items()})
    pruned = Prune(fraction, "erk")(given)
    for name in shapes:
        assert (pruned[name].array() == 0).sum() == round(found[name] * sizes[name])


@pytest.mark.parametrize(("pattern", "n", "m"), [("2:4", 2, 4), ("4:8", 4, 8), ("1:16", 1, 16), ("4:4", 4, 4)])
def test_a_pattern_keeps_the_greatest_of_each_group(pattern, n, m):
    groups = one(PruneNM(pattern)).reshape(24, -1, m)
    assert ((groups != 0).sum(-1) == n).all()
    kept = np.where(groups != 0, np.abs(groups), np.inf).min(-1)
    lost = np.where(groups == 0, np.abs(W.reshape(groups.shape)), 0).max(-1)
    assert (kept >= lost).all()


def test_groups_of_a_kernel_lie_along_its_input_channels():
    kernel = RNG.normal(size=(6, 8, 3, 3)).astype(np.float32)
    for step in (PruneNM("2:4"), SparseGPT(pattern="2:4"), SparseGPT(pattern="2:4", by=None, bits=4)):
        found = step(Weights.of({"k": kernel}))["k"].array()
        assert ((found.reshape(6, 2, 4, 9) != 0).sum(2) <= 2).all()
        assert (found != 0).sum() >= 0.45 * found.size


def test_the_codec_of_a_pattern_is_smaller_than_a_mask(tmp_path):
    from steelyard.codecs.bitmask import Bitmask
    from steelyard.codecs.entropy import Entropy

    pruned = one(PruneNM("2:4"))
    held = pack(pruned, NM())
    assert isinstance(held, Packed)
    assert held.nbytes < pack(pruned, Bitmask()).nbytes
    assert held.nbytes == 24 * 64 // 2 * 4 + 1 + 24 * 64 // 4 * 3 // 8  # values, and 3 bits a group
    assert np.array_equal(held.array(), pruned)
    assert pack(pruned, nest(NM(), codes=Entropy())).array().tobytes() == pruned.tobytes()
    path = tmp_path / "a.safetensors"
    formats.write(Weights.of({"a": held}), path)
    assert formats.open(path)["a"].array().tobytes() == pruned.tobytes()


def test_repair_by_the_hessian_beats_wanda_and_wanda_beats_magnitude():
    hessian, norms = evidence("hessian", H), evidence("norms", NORMS)
    for magnitude, wanda, repaired in (
        (Prune(0.5, "row"), Prune(0.5, "row", norms), SparseGPT(0.5, hessian)),
        (PruneNM("2:4"), PruneNM("2:4", norms), SparseGPT(by=hessian, pattern="2:4")),
    ):
        found = [damage(one(step)) for step in (repaired, wanda, magnitude)]
        assert found[0] < 0.9 * found[1]
        assert found[1] < found[2]
    assert (one(SparseGPT(0.7, hessian)) == 0).mean() == pytest.approx(0.7, abs=1e-3)


def test_a_refit_is_the_best_that_what_stays_can_be():
    hessian = evidence("hessian", H)
    found, refitted = one(SparseGPT(0.5, hessian)), one(SparseGPT(0.5, hessian, refit=True, damping=1e-9))
    again = one(SparseGPT(0.5, hessian, refit=True))
    assert np.array_equal(found == 0, again == 0)
    assert damage(again) < damage(found) < 0.7 * damage(np.where(found != 0, W, 0))
    for row, before in zip(refitted, W, strict=True):  # the gradient vanishes where weights stay
        gradient = H[0].astype(np.float64) @ (row - before)
        assert np.abs(gradient[row != 0]).max() < 1e-3 * np.abs(H[0] @ before).max()


def test_blocks_of_inputs_give_what_one_block_gives_where_the_choice_is_the_same():
    hessian = evidence("hessian", H)
    one_block, many = (one(SparseGPT(pattern="2:4", by=hessian, block=b)) for b in (64, 8))
    assert np.allclose(one_block, many, atol=1e-4)


@pytest.mark.parametrize("settings", [{"fraction": 0.5}, {"fraction": 0.8, "block": 16}, {"pattern": "2:4"}])
@pytest.mark.parametrize("bits", [3, 4])
def test_rounding_in_the_same_pass_beats_rounding_after_it(settings, bits):
    hessian = evidence("hessian", H)
    together, after = one(SparseGPT(by=hessian, bits=bits, **settings)), one(SparseGPT(by=hessian, **settings))
    assert all(len(np.unique(row)) <= 2**bits - 1 for row in together)
    assert damage(together) < damage(nearest(after, bits))
    assert (together == 0).mean() >= (after == 0).mean() > 0.49


def test_levels_reach_weights_that_grew_by_making_up_for_others():
    rng = np.random.default_rng(1)
    factors = rng.normal(size=(500, 8)) @ rng.normal(size=(8, 64)) + 0.1 * rng.normal(size=(500, 64))
    related = evidence("hessian", (factors.T @ factors / 500)[None].astype(np.float32))

    def lost(**settings) -> float:
        d = (one(SparseGPT(0.8, related, **settings)) - W).astype(np.float64)
        return float(np.square(factors @ d.T).mean())

    assert (np.abs(one(SparseGPT(0.8, related))).max(1) > 1.5 * np.abs(W).max(1)).mean() > 0.5  # they did grow
    for block in (16, 128):
        assert lost(bits=8, block=block) < 1.03 * lost(block=block)
        assert lost(bits=4, block=block) < 1.2 * lost(block=block)


def test_rounding_passes_over_outputs_that_lose_all_their_weights():
    given = W.copy()
    given[3] = 0
    given[4] *= 1e-6
    found = SparseGPT(0.5, evidence("hessian", H), bits=4)(Weights.of({"fc.weight": given}))["fc.weight"].array()
    assert (found[3:5] == 0).all()
    assert np.isfinite(found).all()
    assert (one(SparseGPT(1.0, evidence("hessian", H), bits=4)) == 0).all()


def test_outputs_with_inputs_of_their_own_have_hessians_of_their_own():
    other = np.diag(np.linspace(0.1, 10, 64))[None].astype(np.float32)
    found = one(SparseGPT(0.5, evidence("hessian", np.concatenate([H, other]))))
    assert np.array_equal(
        found[:12], SparseGPT(0.5, evidence("hessian", H))(Weights.of({"fc.weight": W[:12]}))["fc.weight"].array()
    )


def test_inputs_that_are_always_zero_lose_their_weights_first():
    dead = H.copy()
    dead[:, 5], dead[:, :, 5] = 0, 0
    assert (one(SparseGPT(0.25, evidence("hessian", dead), damping=0))[:, 5] == 0).all()
    assert (one(SparseGPT(0.25, evidence("hessian", dead)))[:, 5] == 0).mean() > 2 * 0.25


BAD = [
    (lambda: Prune(0.5, "column"), RecipeError, "'global', 'tensor', 'row' or 'erk'"),
    (lambda: PruneNM("4:2"), RecipeError, "N:M with 0 < N <= M <= 16"),
    (lambda: PruneNM("half"), RecipeError, "N:M"),
    (lambda: PruneNM("3:5")(weights()), WeightsError, r"3:5 does not divide the 64 inputs of 'fc.weight' \[24, 64\]"),
    (lambda: SparseGPT(pattern="3:5", block=5)(weights()), WeightsError, "3:5 does not divide the 64 inputs"),
    (lambda: PruneNM("2:4")(Weights.of({"conv[1].weight": np.ones((8, 1, 5, 5), np.float32)})), WeightsError,
     r"the 1 inputs of 'conv\[1\].weight' .*: --where '!conv\[\[\]1\].weight' \(where\)"),
    (lambda: SparseGPT(1.5), RecipeError, "between 0 and 1"),
    (lambda: SparseGPT(0.5, block=0), RecipeError, "a block"),
    (lambda: SparseGPT(0.5, pattern="2:4", block=6), RecipeError, "whole number of groups"),
    (lambda: SparseGPT(0.5, bits=1), RecipeError, "bits are 2 to 8"),
    (lambda: SparseGPT(0.5, damping=-1), RecipeError, "damping"),
    (lambda: Prune(0.5, by=evidence("hessian", H))(weights()), WeightsError, "norms, fisher or taylor, got 'hessian'"),
    (lambda: Prune(0.5, by=evidence("norms", NORMS[:, :5]))(weights()), WeightsError,
     r"the evidence .norms. of 'fc.weight' is .*; measure it on these \(score\)"),
    (lambda: Prune(0.5, by=evidence("fisher", NORMS))(weights()), WeightsError, "the evidence .fisher. of 'fc.weight'"),
    (lambda: SparseGPT(0.5, evidence("norms", NORMS))(weights(more=W)), WeightsError, "kind hessian, got 'norms'"),
    (lambda: SparseGPT(0.5, evidence("hessian", H))(weights(more=W)), WeightsError, "no tensor 'more'"),
    (lambda: one(SparseGPT(0.5, evidence("hessian", H[:, :5, :5]))), WeightsError, r"expected \[blocks, 64, 64\]"),
    (lambda: one(Prune(0.5, by=evidence("norms", NORMS * np.nan))), WeightsError, "have NaN"),
    (lambda: one(SparseGPT(0.5), Weights.of({"fc.weight": W * np.nan})), WeightsError, "'fc.weight' has NaN or inf"),
    (lambda: one(PruneNM(), Weights.of({"fc.weight": W * np.nan})), WeightsError, "'fc.weight' has NaN"),
]  # fmt: skip


@pytest.mark.parametrize(("act", "kind", "message"), BAD, ids=range(len(BAD)))
def test_what_is_wrong_is_named(act, kind, message):
    with pytest.raises(kind, match=message):
        act()


def test_evidence_that_was_measured_on_other_weights_is_refused():
    from steelyard.edit.evidence import sample

    samples = {"fc.weight": sample(RNG.normal(size=W.shape))}
    for step in (
        Prune(0.5, by=evidence("norms", NORMS, samples=samples)),
        PruneNM("2:4", evidence("norms", NORMS, samples=samples)),
        SparseGPT(0.5, evidence("hessian", H, samples=samples)),
    ):
        with pytest.raises(WeightsError, match="measured on other weights"):
            one(step)
