"""How much the outputs of a model mind errors in pairs of its weights: two small matrices for each large one.

Decides how gradients become the two factors, and how rows that few examples reach are judged. What is done with the
factors is `edit.kronecker`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from steelyard.core.weights import Weights
from steelyard.edit.evidence import sample
from steelyard.edit.kronecker import INPUTS, KIND, OUTPUTS
from steelyard.errors import ModelError
from steelyard.formats.module import to_array
from steelyard.learn.calling import calling
from steelyard.learn.evidence import collected
from steelyard.learn.parameters import Named, named_parameters
from steelyard.learn.reached import foretold
from steelyard.learn.unharmed import unfrozen, unmoved

CONSTRAINED = ".parametrizations."
WIDEST = 2048  # rows or columns of which pairs are kept: 16 MB for a factor of float32


def kronecker(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
) -> Weights:
    """Measure E[g gᵀ] and E[gᵀ g] for each matrix W (outputs, inputs, ...) of `model`, g the gradient of `loss`.

    With ``A = E[g gᵀ]`` and ``B = E[gᵀ g] / tr A``, an error D of the weights costs about ``tr(A D B Dᵀ) / 2``: the
    Fisher matrix as a product of Kronecker. For the weight `name` the result holds ``name|outputs`` (A: (outputs,
    outputs), or its diagonal where there are more than 2,048) and ``name|inputs`` (B, the same way, a kernel being
    flattened), float32. A vector, of which all elements count alike, has the mean of E[g²] in A: (n,), and B: [1].
    `sy.RateDistortion` takes it as `by`.

    loss: of (model, batch), one number; its gradient has to be of mean zero over draws for the Fisher matrix, as with
    labels that the model itself draws. One backward pass for each batch. The diagonal of many outputs is what the rows
    would get on average over examples: a row that no batch reached, as that of a rare word, counts as much as its
    contents, its length and its place foretell (`learn.reached`). The model is left as it was.

    Weights of which no gradient arrives have zeros. Raises ModelError if there is no batch, no matrix, or a gradient
    is not finite.

    >>> x = torch.eye(2) * torch.tensor([1.0, 2.0])
    >>> found = kronecker(nn.Linear(2, 1, bias=False), [x[:1], x[1:]], lambda model, batch: model(batch).sum())
    >>> found["weight|inputs"].array().round(3).tolist() == np.float32([[0.2, 0], [0, 0.8]]).tolist()
    True

    Source: V. Gupta, T. Koren, Y. Singer, "Shampoo: Preconditioned Stochastic Tensor Optimization", ICML 2018; as the
    Fisher matrix: D. Morwani et al., "A New Perspective on Shampoo's Preconditioner", 2024.
    """
    chosen = [n for n in named_parameters(model) if n.parameter.is_floating_point() and n.parameter.ndim > 0]
    if all(n.parameter.ndim == 1 for n in chosen):
        raise ModelError(f"{type(model).__name__} has no matrix or filter")
    parameters = [n.parameter for n in chosen]
    sums = [_Sums(p) for p in parameters]
    count = 0
    with unmoved(model), unfrozen(parameters):
        model.eval()
        for batch in batches:
            with torch.enable_grad(), calling("the loss of a batch"):
                gradients = torch.autograd.grad(loss(model, batch), parameters, allow_unused=True)
            for total, gradient in zip(sums, gradients, strict=True):
                if gradient is not None:
                    total.add(gradient.reshape(len(gradient), -1), count % 2)
            count += 1
    if not count:
        raise ModelError("there are no batches to measure on: give at least one")
    return _told(model, chosen, sums, count)


def _told(model: nn.Module, chosen: list[Named], sums: list[_Sums], count: int) -> Weights:
    found: dict[str, np.ndarray] = {}
    for n, total in zip(chosen, sums, strict=True):
        outputs, inputs = total.factors(n.parameter, count)
        found |= {n.name + OUTPUTS: outputs, n.name + INPUTS: inputs}
    plain = {id(n.parameter): n.name for n in chosen}
    ties = {alias: n.name for n in chosen for alias in list(n.names)[1:]}
    # What a constraint is computed from has its whole name in `from_module`: layer.parametrizations.weight.original0.
    ties |= {name: plain[id(p)] for name, p in model.named_parameters() if CONSTRAINED in f".{name}" and id(p) in plain}
    samples = {n.name: sample(to_array(n.parameter)) for n in chosen}
    about = {"kind": KIND, "model": type(model).__name__, "inputs first": [], "samples": samples}
    made = collected(model, found, {}, about)
    both = {alias + part: name + part for alias, name in ties.items() for part in (OUTPUTS, INPUTS)}
    return Weights(made.values(), both, made.meta)


class _Sums:
    """What is summed for one matrix."""

    def __init__(self, parameter: Tensor):
        rows, columns = parameter.shape[0], parameter[0].numel() if len(parameter) else 0
        self.vector = parameter.ndim == 1
        like = {"dtype": torch.float64, "device": parameter.device}
        self.paired = rows <= WIDEST and not self.vector
        self.outputs = torch.zeros((rows, rows) if self.paired else (2, rows), **like)  # pairs, or halves
        self.inputs = torch.zeros((columns, columns) if columns <= WIDEST else (columns,), **like)

    def add(self, g: Tensor, half: int) -> None:
        if self.paired:
            self.outputs += _moments(g)
        else:
            norms = torch.linalg.vector_norm(g, dim=1)
            self.outputs[half] += norms.square()
            g = g[norms != 0]  # of a large table, a batch reaches few rows
        self.inputs += _moments(g.T) if self.inputs.ndim > 1 else g.square().sum(0)

    def factors(self, parameter: Tensor, count: int) -> tuple[np.ndarray, np.ndarray]:
        """A and B."""
        outputs, inputs = (x.cpu().numpy() for x in (self.outputs, self.inputs))
        if self.vector:
            each = inputs.sum() / max(parameter.numel(), 1) / count
            return np.full(parameter.numel(), each, np.float32), np.ones(1, np.float32)
        outputs = (outputs if self.paired else foretold(*outputs, to_array(parameter.detach()))) / count
        whole = float(inputs.trace() if inputs.ndim > 1 else inputs.sum())
        with np.errstate(invalid="ignore", over="ignore"):
            return outputs.astype(np.float32), (inputs / (whole or 1.0)).astype(np.float32)


def _moments(g: Tensor) -> Tensor:
    """g gᵀ; NumPy knows that this is symmetric, and takes half the time."""
    if g.device.type != "cpu" or g.dtype not in (torch.float32, torch.float64):
        return g @ g.T
    rows = g.numpy()
    with np.errstate(invalid="ignore", over="ignore"):  # of gradients that are not finite, which is told later
        return torch.from_numpy(rows @ rows.T)
