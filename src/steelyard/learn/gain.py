"""What an activation does to the scale of a signal, and the factor that makes up for it.

Decides that scale means the mean square, and that what comes in is standard normal. Knows no layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from steelyard.errors import ModelError, UnknownNameError

NODES = 200  # of the quadrature, on either side of 0, where many activations have a kink
REACH = 12.0  # a standard normal variable is beyond it with a chance of 10^-32
OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda z: z,
    "identity": lambda z: z,
    "sin": torch.sin,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "relu_squared": lambda z: functional.relu(z) ** 2,
}
NAMED = ("relu", "leaky_relu", "gelu", "silu", "mish", "elu", "selu", "celu", "softplus", "softsign", "tanhshrink")
NAMED = (*NAMED, "hardtanh", "hardswish", "hardsigmoid", "relu6", "logsigmoid", "softshrink", "hardshrink")


def gain(of: str | Callable[[Tensor], Tensor]) -> float:
    """g = E[f(z)^2]^(-1/2) for a standard normal z: weights of variance g^2 / fan in keep the mean square of sums at 1.

    That is the sqrt(2) of He for the ReLU, and 1.59 for tanh, for any activation: a name, or a function of a tensor
    that acts on each element. By Gauss-Legendre quadrature in float64. For GELU and SiLU a mean square of 1 is no
    stable point: a deviation grows by a sixth from layer to layer, so that deep nets of them need a start by data.

    >>> round(gain("relu") ** 2, 6), round(gain("tanh"), 4), round(gain(torch.sin), 4)
    (2.0, 1.5925, 1.5209)

    Raises UnknownNameError for another name, and ModelError for a function that gives no finite scale.

    Source: He et al. 2015, section 2.2, with f in place of the ReLU; Klambauer et al. 2017 for the fixed point.
    """
    function = of if callable(of) else activation(of)
    z, density = normal_points()
    with torch.no_grad():
        values = function(z.clone())
    if not isinstance(values, Tensor) or values.shape != z.shape:
        raise ModelError("an activation acts on each element: expected a tensor of the shape that it was given")
    square = float((values.double().square() * density).sum())
    if not 0 < square < math.inf:
        raise ModelError(
            f"the mean square of this activation of a normal variable is {square:g}; nothing makes up for it"
        )
    return square**-0.5


@cache
def normal_points(nodes: int = NODES, reach: float = REACH) -> tuple[Tensor, Tensor]:
    """Points z and weights, both (2 nodes,) in float64, such that (f(z) * weights).sum() is E[f] of a standard normal.

    Gauss-Legendre on either side of 0, so that a kink there costs nothing.
    """
    import numpy as np

    points, weights = np.polynomial.legendre.leggauss(nodes)
    half = (points + 1) * reach / 2
    z = torch.from_numpy(np.concatenate([-half, half]))
    return z, torch.from_numpy(np.tile(weights, 2)) * reach / 2 * torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The activation of a name, as a function of a tensor; raises UnknownNameError for another name."""
    if name in OTHERS:
        return OTHERS[name]
    if name not in NAMED:
        raise UnknownNameError("activation", name, [*OTHERS, *NAMED])
    found: Callable[[Tensor], Tensor] = getattr(functional, name)
    return found
