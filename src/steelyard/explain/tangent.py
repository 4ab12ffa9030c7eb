"""What gradient descent would learn from one batch: the tangent kernel of a model, and what it predicts of a sample.

Decides that a start is as good as what the other samples teach about each one. Knows nothing of schemes or training.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from steelyard.errors import ModelError
from steelyard.explain.layers import forward
from steelyard.learn.calling import calling
from steelyard.learn.evaluate import unfused
from steelyard.learn.seeding import generator

RIDGE = 0.03  # what tells samples apart counts as noise below this share of their gradients
FAINT = 0.001  # of what is asked: a prediction that is smaller is none, however right its direction
LEARNED = 0.01  # of the loss of outputs that are all zero: what is left when a batch has been learned
REACH = tuple(2.0 ** (quarter / 4) for quarter in range(-80, 121))  # how far outputs may have to go

Loss = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class Tangent:
    """The tangent kernel on a batch, the outputs, and the outputs that the loss asks for."""

    kernel: Tensor  # (samples, samples), float64
    outputs: Tensor  # (samples, outputs), float64
    asked: Tensor  # (samples, outputs), float64
    loss: float  # the mean over the samples

    @property
    def alike(self) -> float | None:
        """The mean cosine between the gradients of two samples: 1 where the model cannot tell them apart."""
        cosines = self._cosines()
        if cosines is None:
            return None
        count = len(cosines)
        return float((cosines.sum() - count) / (count * (count - 1)))

    @property
    def loud(self) -> float:
        """The spread of the outputs between samples, relative to that of the outputs asked for."""
        asked = float((self.asked - self.asked.mean(0)).norm())
        return float((self.outputs - self.outputs.mean(0)).norm()) / asked if asked > 0 else math.inf

    def taught(self, ridge: float = RIDGE) -> float:
        """How well each sample's outputs follow from the other samples: 1 exactly, 0 not at all.

        Outputs f, asked for y, both without their means over the samples; C the kernel divided by the lengths of the
        two gradients and without its means, which is an intercept; H = C (C + ridge I)^-1. Trained on the other
        samples, the outputs for sample i would be g_i = y_i - (r_i - (H r)_i) / (1 - H_ii) with r = y - f. What is
        returned is the correlation of g with y; a g that is shorter than a thousandth of y counts by that length.

        >>> y = torch.tensor([[1.0], [1.0], [-1.0], [-1.0]]).double()
        >>> same, none = torch.ones(4, 4).double(), torch.zeros(4, 1).double()
        >>> pairs = torch.block_diag(same[:2, :2], same[:2, :2])
        >>> [round(Tangent(kernel, none, y, 0.0).taught(), 3) for kernel in (same, pairs)]
        [0.0, 1.0]
        """
        cosines = self._cosines()
        if cosines is None or not bool(torch.isfinite(self.outputs).all() and torch.isfinite(self.asked).all()):
            return 0.0
        asked = self.asked - self.asked.mean(0)
        missing = asked - (self.outputs - self.outputs.mean(0))
        centred = cosines - cosines.mean(0) - cosines.mean(1, keepdim=True) + cosines.mean()
        smoother = torch.linalg.solve(centred + ridge * torch.eye(len(centred), dtype=torch.float64), centred)
        got = asked - (missing - smoother @ missing) / (1 - smoother.diagonal())[:, None]
        size = float(asked.norm())
        sizes = size * max(float(got.norm()), FAINT * size)
        return max(0.0, float((got * asked).sum()) / sizes) if sizes > 0 else 0.0

    def _cosines(self) -> Tensor | None:
        """The kernel with a diagonal of 1; None where it is not finite, or nothing moves the outputs of a sample."""
        size = self.kernel.diagonal().clamp_min(0).sqrt()
        if not bool(torch.isfinite(self.kernel).all()) or float(size.min()) == 0:
            return None
        return self.kernel / size[:, None] / size


def tangent(model: nn.Module, inputs: Any, targets: Tensor, loss: Loss, seed: int = 0) -> Tangent:
    """The tangent kernel of `model`, in the mode it is in: K_ij = sum over outputs o of <df_io/dW, df_jo/dW>.

    One forward pass, and a backward pass for each sample: the sum over the outputs is estimated without bias by one
    random direction r of signs, the same for all samples, K_ij = <d(r f_i)/dW, d(r f_j)/dW>. Takes 4 bytes for each
    weight and sample. The outputs asked for lie in the direction in which the loss falls from outputs that are all
    zero, where it has fallen to a hundredth, or is least.

    Args:
        inputs: a tensor, or a tuple of several arguments; the first axis counts the samples.
        targets: what `loss` is given beside the outputs.
        loss: of outputs and targets, a scalar or a value for each sample.
        seed: of the random direction.

    Raises ModelError for a model or a loss that fails, outputs that are not one tensor with a row for each sample, or
    that depend on no trainable weight.

    >>> net = nn.Linear(2, 1, bias=False)
    >>> x = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
    >>> found = tangent(net, x, torch.tensor([[3.0], [6.0], [3.0]]), nn.functional.mse_loss)
    >>> found.kernel.tolist(), [round(y, 1) for y in found.asked.flatten().tolist()]
    ([[1.0, 2.0, 0.0], [2.0, 4.0, 0.0], [0.0, 0.0, 1.0]], [2.8, 5.7, 2.8])

    Source: Jacot et al., "Neural tangent kernel", NeurIPS 2018; Mohamadi et al., "A fast, well-founded approximation
    to the empirical neural tangent kernel", ICML 2023 (one output for all).
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    count = len(targets)
    with unfused(), torch.enable_grad():
        with calling(f"{type(model).__name__}, called with the batch,"):
            outputs = forward(model, inputs)
        if not isinstance(outputs, Tensor) or outputs.ndim == 0 or len(outputs) != count:
            what = f"shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else f"a {type(outputs).__name__}"
            raise ModelError(f"the model returns {what} for {count} samples; expected a tensor with a row for each")
        if not parameters or not outputs.requires_grad:
            raise ModelError("the outputs do not depend on a trainable weight; there is nothing to compare")
        flat = outputs.reshape(count, -1)
        signs = torch.randint(0, 2, (flat.shape[1],), generator=generator(seed, "direction")) * 2 - 1
        along = flat @ signs.to(flat)
        gradients = [torch.autograd.grad(one, parameters, retain_graph=True, allow_unused=True) for one in along]
    kernel = torch.zeros(count, count, dtype=torch.float64)
    for of_one in zip(*gradients, strict=True):
        if of_one[0] is not None:
            rows = torch.stack([g.flatten() for g in of_one]).double().cpu()
            kernel += rows @ rows.T
    value, asked = _asked(outputs.detach(), targets, loss)
    return Tangent(kernel, flat.detach().double().cpu(), asked, value)


def _asked(outputs: Tensor, targets: Tensor, loss: Loss) -> tuple[float, Tensor]:
    """The mean loss, and the outputs that the loss asks for: (samples, outputs)."""
    start = torch.zeros_like(outputs, requires_grad=True)
    with calling("the loss"):
        value = float(loss(outputs, targets).mean())
        with torch.enable_grad():
            guess = loss(start, targets).mean()
        if not guess.requires_grad:
            raise ModelError("the loss does not depend on the outputs; there is nothing to learn")
        (downhill,) = torch.autograd.grad(-guess, start)
        far, least = 0.0, float(guess.detach())
        enough = LEARNED * least
        for length in REACH:
            left = float(loss(downhill * length, targets).mean())
            if left < least:
                far, least = length, left
            if left <= enough:
                break
    return value, (downhill * far).reshape(len(outputs), -1).double().cpu()
