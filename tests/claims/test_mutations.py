"""Each claim passes as it is, and fails when the feature that it speaks of is broken on purpose."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from steelyard.claims import (
    CLAIMS,
    a_neuron,
    b_learning,
    b_patterns,
    b_steps,
    b_unseen,
    c_beginnings,
    d_discipline,
    e_architectures,
    f_levels,
    f_pruning,
    f_small,
    g_moving,
    weighting,
)
from steelyard.claims.check import Check, Outcome, run_check
from steelyard.core.weights import Weights
from steelyard.edit import _layers
from steelyard.edit.evidence import hessian_of
from steelyard.edit.importance import Importance
from steelyard.edit.quantize import Quantize
from steelyard.edit.share import Share
from steelyard.explain import (
    address,
    affine,
    capacity,
    counts,
    gradients,
    memory,
    probes,
    recurrent,
    sharpness,
    signal,
    signed,
    tangent,
)
from steelyard.explain.linear import fit_logistic
from steelyard.init.he import He
from steelyard.learn import (
    alarm,
    auto,
    datadriven,
    decay,
    examples,
    folds,
    generalization,
    parameters,
    path,
    penalize,
    penalties,
    rate,
    run,
    stepsize,
    symmetry,
    verdicts,
)
from steelyard.learn import recurrent as recurrent_model
from steelyard.learn.sparse import Gradual
from steelyard.learn.watch.norms import Norms
from steelyard.shrinking import search

Patch = pytest.MonkeyPatch


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def small_d5() -> Mapping[str, float]:
    """The measurement of D5 with fewer seeds."""
    return d_discipline.upweighting(seeds=5)


def check_of(name: str) -> Check:
    found: Check = CLAIMS[name]
    smaller = {"D5": small_d5}
    return replace(found, measure=smaller[name]) if name in smaller else found


@pytest.mark.parametrize("name", list(CLAIMS))
def test_the_claim_holds(name: str) -> None:
    outcome = run_check(check_of(name))
    assert outcome.passed, outcome.evidence


def _scaled_set(patch: Patch) -> None:
    honest = address.Connection.set
    patch.setattr(address.Connection, "set", lambda self, value: honest(self, value * 1.001))


def _neighbour_set(patch: Patch) -> None:
    honest = a_neuron.connection
    patch.setattr(
        a_neuron, "connection", lambda model, layer, i, j, tap: honest(model, layer, i - 1 if i else 1, j, tap)
    )


def _without_bias(patch: Patch) -> None:
    honest = affine._affine
    patch.setattr(affine, "_affine", lambda x, w, b, *rest: honest(x, w, None if b is None else 0.99 * b, *rest))


def _one_bias_off(patch: Patch) -> None:
    honest = affine._affine

    def off(x: Any, w: Any, b: Any, *rest: Any) -> affine.Affine:
        found = honest(x, w, b, *rest)
        found.bias[0, 0] += 1e-3
        return found

    patch.setattr(affine, "_affine", off)


def _reversed_taps(patch: Patch) -> None:
    honest = affine._patches
    patch.setattr(affine, "_patches", lambda layer, x, taps: honest(layer, x, taps[::-1]))


def _swapped_gates(patch: Patch) -> None:
    patch.setattr(recurrent, "gates", lambda layer: "figo" if isinstance(layer, torch.nn.LSTM) else "zrn")


def _leaky_step(patch: Patch) -> None:
    honest = recurrent._step
    patch.setattr(recurrent, "_step", lambda layer, x, h, state, c: honest(layer, x, h, state, 0.999 * c))


def _wrong_scores(patch: Patch) -> None:
    patch.setattr(affine.math, "sqrt", lambda x: x)


def _overlooked_unit(patch: Patch) -> None:
    honest = signal._Watch._activation

    def overlook(self: Any, seen: Any, *given: Any) -> None:
        honest(self, seen, *given)
        seen.dead = seen.dead[1:] if seen.dead else seen.dead

    patch.setattr(signal._Watch, "_activation", overlook)


def _imagined_unit(patch: Patch) -> None:
    honest = signal._Watch._activation

    def imagine(self: Any, seen: Any, *given: Any) -> None:
        honest(self, seen, *given)
        if seen.dead is not None:
            seen.dead = list(range(seen.units))

    patch.setattr(signal._Watch, "_activation", imagine)


def _wrong_sign(patch: Patch) -> None:
    honest = signed._differences
    patch.setattr(signed, "_differences", lambda *given: -honest(*given))


def _no_training(patch: Patch) -> None:
    patch.setattr(b_learning, "train", lambda *_, **__: None)


def _ascent(patch: Patch) -> None:
    def climb(_task: Any, net: torch.nn.Module, **__: Any) -> None:
        with torch.no_grad():
            for parameter in net.parameters():
                if parameter.requires_grad:
                    parameter.mul_(-1.0).add_(0.1)

    patch.setattr(b_learning, "train", climb)


def _thawed(patch: Patch) -> None:
    honest = b_learning.train

    def thaw(task: Any, net: torch.nn.Module, **options: Any) -> Any:
        return honest(task, net.requires_grad_(), **options)

    patch.setattr(b_learning, "train", thaw)


def _steep(patch: Patch) -> None:
    honest = gradients._slope
    patch.setattr(gradients, "_slope", lambda *given: 1.0001 * honest(*given))


def _blind(patch: Patch) -> None:
    patch.setattr(gradients, "_error", lambda *_: 0.0)


def _dropped_tensor(patch: Patch) -> None:
    honest = b_learning.into_module

    def drop(weights: Weights, module: torch.nn.Module) -> Any:
        return honest(weights.select(lambda item: item.name != "head.bias"), module, partial=True)

    patch.setattr(b_learning, "into_module", drop)
    patch.setattr(b_learning, "train", lambda *_, **__: None)


def _forgetful(patch: Patch) -> None:
    patch.setattr(b_learning, "train", lambda *_, **__: None)


def _untrained_folds(patch: Patch) -> None:
    honest = b_unseen.cross_validate
    patch.setattr(b_unseen, "cross_validate", lambda *given, **options: honest(*given, **{**options, "rate": 1e-9}))


def _one_fold_starved(patch: Patch) -> None:
    honest = folds.train

    def starve(task: Any, *given: Any, **options: Any) -> Any:
        return honest(task, *given, **{**options, "rate": options["rate"] / (1e3 if task.about["fold"] == 2 else 1)})

    patch.setattr(folds, "train", starve)


def _overlapping(patch: Patch) -> None:
    honest = folds._divided

    def overlap(*given: Any) -> Any:
        parts = honest(*given)
        parts[0] = torch.cat([parts[0], parts[1][:1]])
        return parts

    patch.setattr(folds, "_divided", overlap)


def _trained_on_the_test(patch: Patch) -> None:
    honest = folds.Pool.divided

    def leak(pool: Any, rows: Any, seed: int) -> Any:
        return honest(pool, {**rows, "train": torch.cat([rows["train"], rows["test"][:3]])}, seed)

    patch.setattr(folds.Pool, "divided", leak)


def _no_noise(patch: Patch) -> None:
    patch.setattr(b_unseen, "label_noise", lambda task, share, seed: task)


def _nothing_spoilt(patch: Patch) -> None:
    patch.setattr(generalization, "corrupted", lambda task, *given, **options: task)


def _asleep(patch: Patch) -> None:
    honest = b_patterns.train
    patch.setattr(b_patterns, "train", lambda *given, **options: honest(*given, **{**options, "rate": 1e-9}))


def _true_labels(patch: Patch) -> None:
    patch.setattr(b_patterns, "random_labels", lambda task: task)


def _seen_inputs(patch: Patch) -> None:
    honest = probes._handed_on

    def seen(model: torch.nn.Module, *given: Any) -> Any:
        found = honest(model, *given)
        weight = next(model.parameters())
        found.features["inputs"] = found.features["inputs"] @ weight.detach().T
        return found

    patch.setattr(probes, "_handed_on", seen)


def _by_loss(patch: Patch) -> None:
    patch.setattr(tangent.Tangent, "taught", lambda self: self.loss)


def _half_variance(patch: Patch) -> None:
    honest = He.variance
    patch.setattr(He, "variance", lambda self, spec: honest(self, spec) / 2)


def _no_verdict(patch: Patch) -> None:
    patch.setattr(verdicts, "LIMIT", 1e30)
    patch.setattr(verdicts, "BOTH", 1e30)


def _other_penalty(patch: Patch) -> None:
    patch.setattr(e_architectures, "fit_logistic", lambda x, y: fit_logistic(x, y, strength=1.01))


def _rounded_return(patch: Patch) -> None:
    honest = e_architectures.from_sklearn
    patch.setattr(e_architectures, "from_sklearn", lambda estimator: honest(estimator).float().double())


def _scales_for_each_four(patch: Patch) -> None:
    """Eight times the scales that were stated."""
    patch.setattr(f_levels, "Quantize", lambda bits, group: Quantize(bits, group=group // 8))


def _two_bits_for_all(patch: Patch) -> None:
    patch.setattr(f_levels, "Quantize", lambda bits, group: Quantize(min(bits, 2), group=group))


def _no_evidence(patch: Patch) -> None:
    patch.setattr(f_levels, "Gptq", lambda bits, group, by: Quantize(bits, group=group))


def _no_compensation(patch: Patch) -> None:
    patch.setattr(_layers, "hessian_of", _no_hessian)


def _no_hessian(by: Weights, item: Any) -> Any:
    """The evidence of inputs that are all alike and independent."""
    rows, h = hessian_of(by, item)
    return rows, np.eye(h.shape[1])[None]


def _one_value_too_many(patch: Patch) -> None:
    patch.setattr(f_small, "Share", lambda k, **options: Share(k + 1, **options))


def _loosened_ties(patch: Patch) -> None:
    honest = f_small.from_module

    def loosen(module: torch.nn.Module) -> Weights:
        found = honest(module)
        return Weights(found.values(), {}, found.meta)

    patch.setattr(f_small, "from_module", loosen)


def _changed_bit(patch: Patch) -> None:
    honest = f_small.into_module

    def change(weights: Weights, module: torch.nn.Module) -> Any:
        table = honest(weights, module)
        with torch.no_grad():
            next(module.parameters())[0, 0] += 1e-3
        return table

    patch.setattr(f_small, "into_module", change)


def _nothing_coded(patch: Patch) -> None:
    halves = lambda self, _bits: Weights.of({n: x.astype(np.float16) for n, x in self.original.arrays().items()})  # noqa: E731
    patch.setattr(search.Search, "_held", halves)


def _proof_ignored(patch: Patch) -> None:
    patch.setattr(search.Promise, "kept", lambda _self, _worse: True)


def _misread(patch: Patch) -> None:
    honest = f_small.into_module

    def misread(weights: Weights, module: torch.nn.Module) -> Any:
        table = honest(weights, module)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(parameter.flatten().roll(1).reshape(parameter.shape))
        return table

    patch.setattr(f_small, "into_module", misread)


def _no_buffers(patch: Patch) -> None:
    honest = counts._tensors
    kept = torch.nn.Parameter
    patch.setattr(counts, "_tensors", lambda m, unique: [t for t in honest(m, unique) if isinstance(t, kept)])


def _ties_twice(patch: Patch) -> None:
    honest = g_moving.summary

    def twice(weights: Weights) -> Any:
        table = honest(weights)
        extra = sum(weights[name].spec.size for name in weights.ties.values())
        return replace(table, rows=({**table.rows[0], "elements": table.rows[0]["elements"] + extra},))

    patch.setattr(g_moving, "summary", twice)


def _no_correction(patch: Patch) -> None:
    patch.setattr(datadriven._Run, "share", lambda run: None)


def _endless(patch: Patch) -> None:
    honest = c_beginnings.init_

    def thrice(*args: Any) -> Any:
        table = honest(*args)
        return replace(table, meta={**table.meta, "passes": 1 + table.meta["passes"]})

    patch.setattr(c_beginnings, "init_", thrice)


def _steeper(patch: Patch) -> None:
    honest = datadriven._rms_of

    patch.setattr(datadriven, "_rms_of", lambda g: honest(g) ** 8)


def _ratio_of_norms(patch: Patch) -> None:
    honest = Norms.after

    def longer(norms: Norms) -> Any:
        found = honest(norms)
        return replace(found, update=found.update * (1 + 1e-6))

    patch.setattr(Norms, "after", longer)


def _touching(patch: Patch) -> None:
    honest = Norms.before

    def nudging(norms: Norms) -> None:
        with torch.no_grad():
            next(iter(norms.tensors.values())).mul_(1.001)
        honest(norms)

    patch.setattr(Norms, "before", nudging)


def _tenfold(patch: Patch) -> None:
    honest = b_steps.find_lr

    def find(*given: Any, **options: Any) -> Any:
        table = honest(*given, **options)
        return replace(table, meta={**table.meta, "rate": 10 * table.meta["rate"]})

    patch.setattr(b_steps, "find_lr", find)


def _forgotten_moments(patch: Patch) -> None:
    patch.setattr(run, "set_optimizer_state", lambda *_: None)


def _forgotten_place(patch: Patch) -> None:
    honest = run.Feed.load

    def load(feed: Any, state: dict[str, Any]) -> None:
        honest(feed, state)
        feed.served = 0

    patch.setattr(run.Feed, "load", load)


def _gentle(patch: Patch) -> None:
    honest = b_steps.find_lr

    def find(*given: Any, **options: Any) -> Any:
        table = honest(*given, **options)
        return replace(table, meta={**table.meta, "rate": table.meta["rate"] / 100})

    patch.setattr(b_steps, "find_lr", find)


def _left_behind(patch: Patch) -> None:
    patch.setattr(rate, "set_optimizer_state", lambda *_: None)


def _easily_alarmed(patch: Patch) -> None:
    patch.setattr(verdicts, "LIMIT", 1.5)
    patch.setattr(verdicts, "UNIT", 0.01)


def _no_symmetry(patch: Patch) -> None:
    for where in (signal, alarm):
        patch.setattr(where, "symmetric", lambda *_: set())


def _only_the_report(patch: Patch) -> None:
    patch.setattr(alarm, "symmetric", lambda *_: set())


def _everything_alike(patch: Patch) -> None:
    patch.setattr(symmetry, "rows_alike", lambda rows: True)


def _untied_units(patch: Patch) -> None:
    honest = b_learning.of_value

    def untie(value: float | None) -> torch.nn.Module:
        net = honest(value)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.mul_(torch.linspace(0.5, 1.5, len(parameter)).reshape(-1, *[1] * (parameter.ndim - 1)))
        return net

    patch.setattr(b_learning, "of_value", untie)


def _random_constant(patch: Patch) -> None:
    honest = b_learning.of_value
    patch.setattr(b_learning, "of_value", lambda value: honest(value or None))


def _no_branches(patch: Patch) -> None:
    honest = auto._target
    patch.setattr(auto, "_target", lambda place, *rest: honest(replace(place, ends_branch=False), *rest))


def _colder(patch: Patch) -> None:
    """Each layer has a little less than the one before it."""
    honest = auto._target

    def target(place: Any, *rest: Any) -> Any:
        std, why = honest(place, *rest)
        return std * 0.98**place.order, why

    patch.setattr(auto, "_target", target)


def _unscaled(patch: Patch) -> None:
    patch.setattr(datadriven._Run, "_keep", lambda run: None)


def _unpenalised_print(patch: Patch) -> None:
    honest = penalize.Penalized.values
    patch.setattr(penalize.Penalized, "values", lambda self: {n: v * 1.0001 for n, v in honest(self).items()})


def _forgotten_decay(patch: Patch) -> None:
    patch.setattr(run, "own_decay", lambda optimizer: {})


def _count_of_examples(patch: Patch) -> None:
    honest = examples.ExampleLoss.terms

    def uncounted(self: Any, outputs: torch.Tensor, targets: torch.Tensor) -> Any:
        sums, counts = honest(self, outputs, targets)
        return sums, torch.ones_like(counts)

    patch.setattr(examples.ExampleLoss, "terms", uncounted)


def _averaged_twice(patch: Patch) -> None:
    honest = weighting.of_processes
    patch.setattr(weighting, "of_processes", lambda: {n: g / weighting.PROCESSES for n, g in honest().items()})


def _plain_subgradient(patch: Patch) -> None:
    def bind(self: Any, model: torch.nn.Module) -> Any:
        term = honest(self, model)
        return replace(term, smooth=term.value, proximal=None)

    honest = penalties.L1.bind
    patch.setattr(penalties.L1, "bind", bind)


def _without_momentum(patch: Patch) -> None:
    patch.setitem(stepsize.RULES, torch.optim.SGD, lambda group, state: group["lr"])


def _pulled_more(patch: Patch) -> None:
    honest = penalties.shrink_groups
    patch.setattr(penalties, "shrink_groups", lambda z, sizes, pull: honest(z, sizes, 1.01 * pull))


def _whole_square(patch: Patch) -> None:
    honest = penalties.checked
    patch.setattr(penalties, "checked", lambda number, what: honest(number, what) * (2 if what == "L2" else 1))


def _everything_decays(patch: Patch) -> None:
    patch.setattr(parameters, "_connects", lambda name, owner, parameter: True)


def _no_penalty(patch: Patch) -> None:
    honest = path.L2
    patch.setattr(d_discipline.regularization_path, "__defaults__", (lambda strength: honest(0.0), None))


def _faster(patch: Patch) -> None:
    patch.setitem(decay.SHARES, "rate", lambda rate, peak: rate * (1 + 1e-5))


def _weights_squared(patch: Patch) -> None:
    honest = examples.checked_weight
    patch.setattr(examples, "checked_weight", lambda weight, like: honest(weight, like) ** 2)


def _unweighted_second(patch: Patch) -> None:
    honest = d_discipline.just_train_twice
    patch.setattr(d_discipline, "just_train_twice", lambda *a, **kw: honest(*a, **{**kw, "upweight": 1.0}))


def _wrong_way(patch: Patch) -> None:
    turned = replace(capacity.MEASURES["spectral product"], more=False)
    patch.setitem(capacity.MEASURES, "spectral product", turned)


def _multiplied_margins(patch: Patch) -> None:
    honest = capacity._margins
    patch.setattr(capacity, "_margins", lambda land, spectral, ratios: honest(land, -spectral, ratios))


def _by_size(patch: Patch) -> None:
    def errors(land: Any, sigma: float, *_: Any) -> float:
        return sigma * sum(weight.numel() for weight in land.weights) / 1e4

    patch.setattr(sharpness, "_errors", errors)


def _factors_inverted(patch: Patch) -> None:
    honest = penalties.factors_of
    patch.setattr(penalties, "factors_of", lambda *a: [None if f is None else 1 / f for f in honest(*a)])


def _chrono_ignored(patch: Patch) -> None:
    patch.setattr(recurrent_model, "_chrono", lambda layers, memory: None)


def _nothing_forgotten(patch: Patch) -> None:
    """The gradient of each step instead of that of all of them together."""
    honest = memory._curve
    patch.setattr(memory, "_curve", lambda layer, inputs, *rest: honest(layer, inputs[-2:], *rest) * len(inputs))


def _half_the_rank(patch: Patch) -> None:
    honest = f_pruning.truncated
    patch.setattr(f_pruning, "truncated", lambda w, ranks, by: honest(w, {n: r // 2 for n, r in ranks.items()}, by))


def _nothing_lost(patch: Patch) -> None:
    honest = f_pruning.redundancy
    patch.setattr(f_pruning, "redundancy", lambda weights, by, error: honest(weights, by, error=0.0))


def _greatest_first(patch: Patch) -> None:
    honest = Importance.of
    patch.setattr(Importance, "of", lambda self, x=None: -honest(self, x))


def _half_the_share(patch: Patch) -> None:
    honest = Gradual.share
    patch.setattr(Gradual, "share", lambda self, progress: honest(self, progress) / 2)


def _no_repair(patch: Patch) -> None:
    patch.setattr(f_pruning, "SparseGPT", lambda by, pattern: f_pruning.PruneNM(pattern))


def _as_wide_as_before(patch: Patch) -> None:
    patch.setattr(f_pruning, "prune_structured_", lambda model, batch, fraction, budget: None)


def _loaded_elsewhere(patch: Patch) -> None:
    honest = f_pruning.into_module

    def change(weights: Weights, module: torch.nn.Module, **options: Any) -> None:
        honest(weights, module, **options)
        if options:
            next(module.parameters()).data[0] += 1e-3

    patch.setattr(f_pruning, "into_module", change)


MUTATIONS: list[tuple[str, Callable[[Patch], None], str]] = [
    ("A1", _scaled_set, "error"),
    ("A1", _neighbour_set, "change elsewhere"),
    ("A2", _without_bias, "linear"),
    ("A2", _one_bias_off, "ledger"),
    ("A2", _reversed_taps, "convolution"),
    ("A2", _swapped_gates, "GRU"),
    ("A2", _leaky_step, "LSTM"),
    ("A2", _wrong_scores, "attention"),
    ("A3", _overlooked_unit, "recall"),
    ("A3", _imagined_unit, "precision"),
    ("A8", _wrong_sign, "linear"),
    ("B1", _no_training, "trainable tensors that stayed"),
    ("B1", _ascent, "loss after / before"),
    ("B1", _thawed, "frozen tensors that moved"),
    ("B2", _steep, "worst of the types"),
    ("B2", _blind, "a wrong layer"),
    ("B4", _ratio_of_norms, "relative error of a ratio"),
    ("B4", _touching, "losses that watching changed"),
    ("B3", _tenfold, "share of steps"),
    ("B5", _forgotten_moments, "bytes that differ"),
    ("B5", _forgotten_place, "losses that differ"),
    ("B9", _gentle, "points below the best of 20"),
    ("B9", _left_behind, "parts that changed"),
    ("B10", _no_symmetry, "constant start, called symmetric"),
    ("B10", _only_the_report, "constant start, alarms of symmetry"),
    ("B10", _everything_alike, "random start, called symmetric"),
    ("B10", _everything_alike, "random start, alarms of symmetry"),
    ("B10", _random_constant, "weights that zeros turned into"),
    ("B10", _untied_units, "constant start, hidden rank"),
    ("B6", _untrained_folds, "accuracy of 5 folds"),
    ("B6", _one_fold_starved, "spread of 5 folds"),
    ("B6", _overlapping, "examples not tested once"),
    ("B6", _trained_on_the_test, "examples in two splits"),
    ("B6", _no_noise, "least growth of the gap, low"),
    ("B6", _nothing_spoilt, "least cost of spoilt inputs, low"),
    ("B7", _unpenalised_print, "printed - recomputed"),
    ("B7", _forgotten_decay, "printed - recomputed"),
    ("B8", _count_of_examples, "1, 2 and 8 parts"),
    ("B8", _averaged_twice, "2 processes"),
    ("B11", _dropped_tensor, "largest logit difference"),
    ("B11", _forgetful, "accuracy on random labels"),
    ("B12", _asleep, "least rise of a layer, low"),
    ("B12", _asleep, "least order in time"),
    ("B12", _true_labels, "least rise over random labels, low"),
    ("B12", _seen_inputs, "rise of the inputs"),
    ("C1", _by_loss, "tau-b"),
    ("C2", _half_variance, "He flagged"),
    ("C2", _no_verdict, "Xavier flagged"),
    ("C3", _no_verdict, "default starts without an alarm"),
    ("C3", _easily_alarmed, "false alarms"),
    ("C4", _colder, "smallest"),
    ("C4", _unscaled, "largest"),
    ("C4", _no_branches, "stream, largest"),
    ("C5", _no_correction, "furthest from 1"),
    ("C5", _endless, "forward passes"),
    ("C5", _steeper, "gradient, largest over smallest"),
    ("D1", _plain_subgradient, "exact zeros, SGD"),
    ("D1", _without_momentum, "objective gap"),
    ("D1", _pulled_more, "distance from a minimum by groups"),
    ("D2", _whole_square, "from the closed form"),
    ("D2", _everything_decays, "moved without a gradient: norm, bias, embedding"),
    ("D3", _no_penalty, "test accuracy gained"),
    ("D4", _faster, "factor of a step - formula"),
    ("D5", _weights_squared, "gradient of weight k - of k copies"),
    ("D5", _unweighted_second, "least gain over ERM"),
    ("D6", _factors_inverted, "difference of weights"),
    ("D7", _wrong_way, "norm: low"),
    ("D7", _multiplied_margins, "margin: low"),
    ("D7", _by_size, "sharpness: low"),
    ("E1", _other_penalty, "coefficient difference"),
    ("E1", _rounded_return, "round trip difference"),
    ("F3", _scales_for_each_four, "bytes beyond those stated"),
    ("F3", _two_bits_for_all, "lost, 8 bits, nearest"),
    ("F3", _no_evidence, "lost, 2 bits, data"),
    ("F3", _no_compensation, "logits moved by data, 2 bits"),
    ("E4", _chrono_ignored, "least gradient that a good start keeps"),
    ("E4", _nothing_forgotten, "most gradient that a bad start keeps"),
    ("F1", _half_the_rank, "lost by cutting at the rank"),
    ("F1", _nothing_lost, "redundant weights"),
    ("F2", _greatest_first, "lost at 50 %"),
    ("F2", _half_the_share, "zeros of the gradual net"),
    ("F2", _no_repair, "2:4 error, data-aware over magnitude"),
    ("F2", _as_wide_as_before, "structured: parameters left"),
    ("F2", _loaded_elsewhere, "structured: difference after reload"),
    ("F4", _one_value_too_many, "tensors without k distinct values"),
    ("F4", _loosened_ties, "ties broken"),
    ("F4", _changed_bit, "tied logit difference"),
    ("F5", _nothing_coded, "times smaller"),
    ("F5", _misread, "lost"),
    ("F5", _proof_ignored, "lost at most"),
    ("G1", _no_buffers, "models counted wrongly"),
    ("G1", _ties_twice, "headers counted wrongly"),
]


@pytest.mark.parametrize(("name", "breaks", "bar"), MUTATIONS, ids=[f"{n}{f.__name__}" for n, f, _ in MUTATIONS])
def test_the_claim_fails_when_its_feature_is_broken(
    name: str, breaks: Callable[[Patch], None], bar: str, monkeypatch: Patch
) -> None:
    check = check_of(name)
    breaks(monkeypatch)
    outcome: Outcome = run_check(check)
    assert not outcome.passed, outcome.evidence
    broken = next(b for b in check.bars if b.what == bar)
    assert not broken.holds(outcome.measured[bar]), outcome.evidence


def test_every_claim_has_a_mutation() -> None:
    assert {name for name, _, _ in MUTATIONS} == set(CLAIMS)
    assert c_beginnings.C2.bars
