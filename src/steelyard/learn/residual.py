"""Scaling residual branches by depth, so that the stream that they add to keeps its scale.

Decides which published rule scales which matrix, on top of any scheme. Where a norm stands between the last layer of a
branch and the sum, the rule is applied to the gain of that norm, which the scale of the layer does not reach.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from steelyard.errors import ModelError, UnknownNameError
from steelyard.learn.branches import Branch
from steelyard.learn.flow import Flow
from steelyard.learn.matrices import is_started, matrices

RULES = ("gpt2", "rezero", "fixup", "t-fixup")


def check_rule(rule: str) -> None:
    """Raise UnknownNameError for a rule that does not exist."""
    if rule not in RULES:
        raise UnknownNameError("rule for residual branches", rule, RULES)


def scale_branches(
    model: nn.Module, found: Mapping[str, nn.Module], seen: Flow, rule: str, said: dict[str, str]
) -> None:
    """Scale the matrices of a model that was just started by one of the RULES, and add to what is said of each layer.

    'gpt2': the last matrices of each branch times 1 / sqrt(N), N sums on their stream. 'rezero': the last matrices
    zero. 'fixup': the last matrices and the last layer of the model zero, other layers in the L branches times
    L^(-1 / (2 m - 2)) for m layers in a branch; scalar biases and multipliers are not added to the model. 't-fixup',
    upon the scheme xavier: values, outputs and hidden layers of N encoder layers times 0.67 N^(-1/4), of decoder
    layers times (9 N)^(-1/4), embeddings normal with std d^(-1/2) (9 N)^(-1/4); norms are left in the model.

    Raises ModelError for a model without residual branches.

    Source: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019, section 2.3; Bachlechner et
    al., "ReZero is All You Need", UAI 2021; Zhang, Dauphin and Ma, "Fixup Initialization", ICLR 2019; Huang, Pérez,
    Ba and Volkovs, "Improving Transformer Optimization Through Better Initialization", ICML 2020.
    """
    if not seen.branches:
        raise ModelError(f"residual={rule!r} scales residual branches, and {type(model).__name__} has none")
    work = _Work(model, found, said)
    {"gpt2": _gpt2, "rezero": _rezero, "fixup": _fixup, "t-fixup": _t_fixup}[rule](work, seen)


@dataclass
class _Work:
    """The layers of a model, each of which is scaled once."""

    model: nn.Module
    found: Mapping[str, nn.Module]
    said: dict[str, str]
    done: set[int] = field(default_factory=set)  # parameters

    def end(self, name: str, norm: str, factor: float, why: str) -> None:
        """Scale the last layer of a branch, or the gain of the norm behind it."""
        gain = getattr(self.model.get_submodule(norm), "weight", None) if norm else None
        if isinstance(gain, Tensor) and is_started(gain):
            self._scale([(gain, gain.detach())], factor, f"{norm}.weight", name, why)
        else:
            self.layer(name, factor, why)

    def layer(self, name: str, factor: float, why: str) -> None:
        """Scale what a layer multiplies its inputs by: of attention, the values."""
        self._scale(list(_carrying(self.found[name])), factor, "", name, why)

    def _scale(self, parts: list[tuple[Tensor, Tensor]], factor: float, what: str, name: str, why: str) -> None:
        parts = [(p, values) for p, values in parts if is_started(p) and id(p) not in self.done]
        for _, values in parts:
            values.mul_(factor)
        self.done.update(id(p) for p, _ in parts)
        if parts:
            did = f"times {factor:.4g}" if factor else "zero"
            self.said[name] += f"; {what} {did} ({why})".replace("  ", " ")


def _carrying(layer: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """The parameters and matrices whose scale is that of the output."""
    for matrix in matrices(layer):
        values = matrix.index == 2 or matrix.parameter == "v_proj_weight"
        if matrix.role != "recurrent" and (values or not isinstance(layer, nn.MultiheadAttention)):
            yield getattr(layer, matrix.parameter), matrix.values


def _gpt2(work: _Work, seen: Flow) -> None:
    for branch in seen.branches:
        sums = sum(other.stream == branch.stream for other in seen.branches)
        for name, norm in branch.ends.items():
            work.end(name, norm, sums**-0.5, f"gpt2: {sums} residual sums")


def _rezero(work: _Work, seen: Flow) -> None:
    for branch in seen.branches:
        for name, norm in branch.ends.items():
            work.end(name, norm, 0.0, "ends a residual branch")


def _fixup(work: _Work, seen: Flow) -> None:
    _rezero(work, seen)
    count = len(seen.branches)
    for branch in seen.branches:
        for name in branch.layers:
            if name not in branch.ends and branch.depth > 1:
                work.layer(name, count ** (-1 / (2 * branch.depth - 2)), f"fixup: {count} branches")
    last = max(seen.layers.values(), key=lambda place: place.order)
    inside = any(last.layer in branch.layers for branch in seen.branches)
    if last.activation is None and not inside and not _is_shared(work, last.layer):
        work.layer(last.layer, 0.0, "the last layer")


def _is_shared(work: _Work, name: str) -> bool:
    mine = {id(p) for p in work.found[name].parameters()}
    return any(id(p) in mine for other, layer in work.found.items() if other != name for p in layer.parameters())


def _t_fixup(work: _Work, seen: Flow) -> None:
    counts = {branch.stream: _blocks(seen, branch) for branch in seen.branches}
    for branch in seen.branches:
        blocks, crossed = counts[branch.stream]
        factor = (9 * blocks) ** -0.25 if crossed else 0.67 * blocks**-0.25
        kind = "decoder" if crossed else "encoder"
        for name in branch.layers:
            work.layer(name, factor, f"t-fixup: {blocks:g} {kind} layers")
    deepest = max(blocks for blocks, _ in counts.values())
    for name, layer in work.found.items():
        if isinstance(layer, (nn.Embedding, nn.EmbeddingBag)) and not _is_shared(work, name):
            work.layer(name, layer.embedding_dim**-0.5 * (9 * deepest) ** -0.25, "t-fixup")


def _blocks(seen: Flow, branch: Branch) -> tuple[float, bool]:
    """Layers in the sense of a transformer on the stream of a branch, and whether they cross to another stream."""
    mine = [other for other in seen.branches if other.stream == branch.stream]
    crossed = sum(other.crosses for other in mine)
    return (crossed, True) if crossed else (max(len(mine) / 2, 1), False)
