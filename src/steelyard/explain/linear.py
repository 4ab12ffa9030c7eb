"""Linear models are their weights: to and from scikit-learn, and the fit of a logistic regression.

The objective is scikit-learn's, so that coefficients can be compared number by number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from steelyard.errors import ModelError


def from_sklearn(estimator: Any) -> nn.Linear:
    """A float64 nn.Linear with the coefficients and intercepts of a fitted linear estimator.

    A binary classifier has one output, the logit of its second class, as in scikit-learn.

    Raises ModelError if the estimator is not fitted or not linear.
    """
    weight, bias = getattr(estimator, "coef_", None), getattr(estimator, "intercept_", None)
    if weight is None or bias is None:
        raise ModelError(f"{type(estimator).__name__} has no coef_ and intercept_; fit a linear estimator first")
    weight = torch.atleast_2d(torch.as_tensor(weight, dtype=torch.float64))
    layer = nn.Linear(weight.shape[1], weight.shape[0], dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(torch.as_tensor(bias, dtype=torch.float64).expand(len(weight)))
    return layer


def to_sklearn(layer: nn.Linear, classes: Sequence[Any]) -> Any:
    """A fitted scikit-learn LogisticRegression that predicts with the weights of `layer`.

    Two classes may have one output (the logit of the second) or two (their difference is taken, which
    gives the same probabilities). Raises ModelError if the outputs do not fit the classes.
    """
    import numpy as np
    from sklearn.linear_model import LogisticRegression

    weight = layer.weight.detach().double().numpy().copy()
    bias = np.zeros(len(weight)) if layer.bias is None else layer.bias.detach().double().numpy().copy()
    if len(classes) == 2 and len(weight) == 2:
        weight, bias = weight[1:] - weight[:1], bias[1:] - bias[:1]
    if len(weight) != (1 if len(classes) == 2 else len(classes)):
        raise ModelError(f"{len(classes)} classes do not fit a layer with {len(weight)} outputs")
    model = LogisticRegression()
    model.classes_, model.coef_, model.intercept_ = np.asarray(classes), weight, bias
    model.n_features_in_, model.n_iter_ = weight.shape[1], np.zeros(1, np.int32)
    return model


def fit_logistic(inputs: Tensor, labels: Tensor, strength: float = 1.0, steps: int = 500) -> nn.Linear:
    """The logistic regression of scikit-learn's objective, fitted by torch's LBFGS in float64.

    minimise strength * sum_i cross_entropy(W x_i + b, y_i) + ||W||^2 / 2, with b not penalised.

    Args:
        inputs: (examples, features).
        labels: (examples,), 0 ... classes - 1; two classes give one output, the logit of class 1.
        strength: scikit-learn's C, the inverse of the penalty.
        steps: of LBFGS at most.

    Raises ModelError if it has not converged after `steps`.
    """
    x, y = inputs.detach().double(), labels.detach().long()
    classes = int(y.max()) + 1
    layer = nn.Linear(x.shape[1], 1 if classes == 2 else classes, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.zero_()
    optimizer = torch.optim.LBFGS(
        layer.parameters(),
        max_iter=steps,
        max_eval=2 * steps,
        history_size=50,
        line_search_fn="strong_wolfe",
        tolerance_grad=1e-9,
        tolerance_change=0,
    )
    scale = strength * len(x)

    def objective() -> Tensor:
        z = layer(x)
        if classes == 2:
            data = nn.functional.binary_cross_entropy_with_logits(z[:, 0], y.double())
        else:
            data = nn.functional.cross_entropy(z, y)
        return data + layer.weight.square().sum() / (2 * scale)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = objective()
        value.backward()
        return value

    optimizer.step(closure)
    closure()
    slope = max(float(p.grad.abs().max()) for p in layer.parameters() if p.grad is not None)
    if not slope < 1e-6:
        raise ModelError(f"the fit has not converged after {steps} steps (gradient {slope:.1e}); scale the inputs")
    for p in layer.parameters():
        p.grad = None
    return layer
