"""What many activations in series do to two samples and to a gradient, and the scale at which they do little.

Decides, of an activation and a number of layers, whether the layers can be started as they are, and with which
standard deviation of their sums. Everything is the expectation for sums that are normal: the mean field of a wide
network. Knows no layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from steelyard.learn.gain import activation, normal_points

ALIKE = 0.4  # two independent samples that are correlated more than this after all layers count as the same
GROWTH = 2.0  # of the mean square of a gradient through all layers: its rms grows 1.4-fold
SMALLEST = 1e-3  # standard deviation of sums

Function = Callable[[Tensor], Tensor]


def odd_part(of: Function) -> Function:
    """(f(z) - f(-z)) / 2: what a mirrored pair of units hands on. Of ReLU, GELU, SiLU and softplus that is z / 2."""
    return lambda z: (of(z) - of(-z)) / 2


def growth(of: str | Function, std: float = 1.0) -> float:
    """chi = std^2 E[f'(z)^2] / E[f(z)^2] for z normal of that standard deviation.

    Where weights keep the mean square of the sums at std^2, the mean square of a gradient, and the squared distance of
    two samples that are almost the same, grow by chi at each layer.

    >>> round(growth("relu"), 6), round(growth("tanh"), 3), round(growth("tanh", 0.1), 4)
    (1.0, 1.178, 1.0001)

    Source: Poole et al., "Exponential expressivity in deep neural networks through transient chaos", 2016;
    Schoenholz et al., "Deep information propagation", 2017.
    """
    z, density = normal_points()
    sums = (z * std).requires_grad_()
    with torch.enable_grad():
        values = _function(of)(sums.clone())
        (slopes,) = torch.autograd.grad(values.sum(), sums)
    square = float((values.detach().square() * density).sum())
    return std**2 * float((slopes.square() * density).sum()) / square if square else math.inf


def alike(of: str | Function, layers: int) -> float:
    """The correlation of two samples after `layers` layers, about 0, if they had none before; sums have variance 1.

    >>> round(alike("relu", 1), 3), round(alike("relu", 30), 2), abs(alike("tanh", 30)) < 1e-6
    (0.318, 0.97, True)

    Source: Cho and Saul, "Kernel methods for deep learning", 2009 (1/pi for one ReLU); Poole et al. 2016.
    """
    function = _function(of)
    z, density = normal_points(60, 8.0)
    values = function(z.clone())
    square = float((values.square() * density).sum())
    c = 0.0
    for _ in range(layers):
        if abs(c) > 1 - 1e-9 or not square:
            break
        others = function(c * z[:, None] + math.sqrt(1 - c * c) * z[None, :])
        c = float((values * density) @ others @ density) / square
    return c


def calm(of: str | Function, layers: int) -> float:
    """The largest standard deviation up to 1 at which a gradient's mean square at most doubles through `layers`.

    >>> calm("relu", 100), round(calm("tanh", 100), 2)
    (1.0, 0.3)

    0.001 where none is small enough. Source: Pennington, Schoenholz and Ganguli, "Resurrecting the sigmoid in deep
    learning through dynamical isometry", 2017: weights orthogonal, and sums so small that the activation is linear.
    """
    function = _function(of)

    def too_large(std: float) -> bool:
        return layers * math.log(growth(function, std)) > math.log(GROWTH)

    if not too_large(1.0):
        return 1.0
    low, high = math.log(SMALLEST), 0.0
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (low, middle) if too_large(math.exp(middle)) else (middle, high)
    return math.exp(low)


def is_deep(of: str | Function, layers: int) -> str:
    """Why so many layers of an activation cannot be started as they are, with sums of variance 1; '' if they can."""
    after = alike(of, layers)
    if abs(after) > ALIKE:
        return f"{layers} in series make independent samples alike (correlation {after:.2f})"
    grown = growth(of) ** layers
    if grown > GROWTH:
        return f"{layers} in series enlarge a gradient {math.sqrt(grown):.3g} times"
    return ""


def _function(of: str | Function) -> Function:
    return of if callable(of) else activation(of)
