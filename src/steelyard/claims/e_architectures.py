"""Chapter E, architectures: what weights are in each kind of model."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from steelyard.claims.check import Bar, Check
from steelyard.explain.linear import fit_logistic, from_sklearn, to_sklearn


def _coefficients() -> Mapping[str, float]:
    from sklearn.datasets import load_breast_cancer, load_digits
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    found = {"coefficient difference": 0.0, "probability difference": 0.0, "round trip difference": 0.0}
    for load in (load_breast_cancer, load_digits):
        data = load()
        x, y = StandardScaler().fit_transform(data.data), data.target
        ours = fit_logistic(torch.from_numpy(x), torch.from_numpy(y))
        theirs = LogisticRegression(C=1.0, tol=1e-8, max_iter=10_000).fit(x, y)
        weight, bias = ours.weight.detach().numpy(), ours.bias.detach().numpy()
        apart = max(np.abs(weight - theirs.coef_).max(), np.abs(bias - theirs.intercept_).max())
        moved = to_sklearn(ours, range(len(data.target_names)))
        with torch.no_grad():
            z = ours(torch.from_numpy(x))
            p = torch.cat([-z, z], 1).div(2).softmax(1) if z.shape[1] == 1 else z.softmax(1)
            back = from_sklearn(moved)
            trip = float((back.weight - ours.weight).abs().max() + (back.bias - ours.bias).abs().max())
        found["coefficient difference"] = max(found["coefficient difference"], float(apart))
        off = float(np.abs(moved.predict_proba(x) - p.numpy()).max())
        found["probability difference"] = max(found["probability difference"], off)
        found["round trip difference"] = max(found["round trip difference"], trip)
    return found


E1 = Check(
    "E1",
    "in linear models weights are coefficients",
    "logistic regression by torch and by scikit-learn at one objective, two data sets; to scikit-learn and back",
    (
        Bar("coefficient difference", "<=", 1e-4),
        Bar("probability difference", "<=", 1e-9),
        Bar("round trip difference", "==", 0),
    ),
    _coefficients,
)
