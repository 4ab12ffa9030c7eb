"""Evidence as steps read it: what it is of, whether it speaks of the weights at hand, and a matrix for each weight.

Decides how a weight is looked at as matrices of outputs and inputs. Knows nothing of how evidence is measured
(`learn.evidence`): it is Weights with the names of the weights, and metadata that say what they are.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from steelyard.core.weights import Weight, Weights
from steelyard.errors import WeightsError, quoted

SAMPLE = 64  # values of each tensor that are kept to recognise it
ALIKE = 0.5  # the least cosine between the sample and the same places of a tensor that evidence is used for
MASS = ("norms", "moments", "hessian", "fisher", "taylor")  # kinds that say how much an error matters
FEW = 8  # places that are not zero, below which the cosine says nothing


@dataclass(frozen=True)
class About:
    """What the metadata of evidence say; of Weights that somebody else made, nothing."""

    kind: str | None = None
    samples: Mapping[str, str] | None = None  # name of a weight -> what it was like
    first: frozenset[str] = frozenset()  # weights whose first axis is that of the inputs, not of the outputs

    @staticmethod
    def of(evidence: Weights) -> About:
        """Raises WeightsError for metadata that cannot be read."""
        text = evidence.meta.get("evidence")
        if text is None:
            return About()
        try:
            data = json.loads(text)
            return About(str(data["kind"]), dict(data["samples"]), frozenset(data["inputs first"]))
        except (ValueError, KeyError, TypeError) as error:
            raise WeightsError(f"the metadata of the evidence are damaged ({error}); make it again (score)") from None


def sample(x: np.ndarray) -> str:
    """A few values of a tensor, as text of 88 characters: enough to tell it from another one, whatever its type.

    >>> sample(np.float32([1, -0.5])) == sample(np.float16([2, -1]))
    True
    """
    few = _places(x).astype(np.float64)
    most = np.abs(few).max(initial=0.0)
    scaled = np.rint(few / most * 127) if most > 0 and np.isfinite(most) else np.zeros(few.size)
    return base64.b64encode(scaled.astype(np.int8).tobytes()).decode()


def check_same(about: About, weight: Weight, x: np.ndarray) -> None:
    """Raise WeightsError if the evidence was measured on other values than `x`, those of `weight`.

    Weights that were rounded or trained a little since then pass, and so do those of which some were set to zero;
    another training of the same architecture does not.
    """
    text = (about.samples or {}).get(weight.name)
    if text is None:
        return
    try:
        then = np.frombuffer(base64.b64decode(text, validate=True), np.int8).astype(np.float64)
    except ValueError:
        raise WeightsError(f"the metadata of the evidence for {quoted(weight.name)} are damaged") from None
    now = _places(x).astype(np.float64)
    if then.size == now.size:
        both = (then != 0) & (now != 0)
        a, b = then[both], now[both]
        if a.size < FEW or float(a @ b) >= ALIKE * float(np.linalg.norm(a) * np.linalg.norm(b)):
            return
    raise WeightsError(
        f"{weight.origin}: the evidence for {quoted(weight.name)} was measured on other weights; "
        "measure it on these (score)"
    )


def evidence_of(by: Weights, weight: Weight, kinds: tuple[str, ...] = MASS) -> Weight:
    """The tensor of `by` for `weight`; raises WeightsError if there is none or `by` is evidence of another kind."""
    kind = About.of(by).kind
    if kind is not None and kind not in kinds:
        raise WeightsError(
            f"expected evidence of the kind {either(kinds)}, got {quoted(kind)}; measure that one (score)"
        )
    found = by.get(weight.name)
    if found is None:
        raise WeightsError(
            f"the evidence has no tensor {quoted(weight.name)}; "
            "measure it for every weight in scope, or choose fewer weights (where, or --where)"
        )
    return found


def either(words: Sequence[str]) -> str:
    """Words of which one is meant.

    >>> either(["a", "b", "c"])
    'a, b or c'
    """
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))


@dataclass(frozen=True)
class Rows:
    """How a weight is a matrix (outputs, inputs): which axis the inputs are, and how its rows fall into blocks."""

    shape: tuple[int, ...]  # of the weight
    first: bool = False  # the inputs are the first axis (transformers' Conv1D, transposed convolutions)
    blocks: int = 1  # of consecutive outputs that have inputs of their own (groups; packed queries, keys and values)

    @property
    def inputs(self) -> int:
        """The columns of the matrix."""
        if not self.shape:
            return 1
        return self.shape[0] if self.first else math.prod(self.shape[1:])

    def matrix(self, x: np.ndarray) -> np.ndarray:
        """The values as (outputs, inputs), float64."""
        wide = x.astype(np.float64)
        if self.first:
            return wide.reshape(self.inputs, -1).T
        return wide.reshape(self.shape[0] if self.shape else 1, self.inputs)

    def tensor(self, matrix: np.ndarray) -> np.ndarray:
        """The inverse of `matrix`, in the type of the matrix."""
        return np.ascontiguousarray(matrix.T if self.first else matrix).reshape(self.shape)


def hessian_of(by: Weights, weight: Weight) -> tuple[Rows, np.ndarray]:
    """How `weight` is a matrix, and the second moments of its inputs: (blocks, inputs, inputs), float64.

    Raises WeightsError if there are none, if they are not finite or if their shape does not fit.
    """
    found = evidence_of(by, weight, ("hessian",))
    first = weight.name in About.of(by).first
    rows = Rows(weight.spec.shape, first)
    if first and len(rows.shape) > 2:
        raise WeightsError(
            f"{quoted(weight.name)} is a transposed convolution, which no method with data knows; leave it"
        )
    inputs = rows.inputs
    outputs = weight.spec.size // max(inputs, 1)
    h = found.array().astype(np.float64)
    if h.ndim == 2:
        h = h[None]
    if h.ndim != 3 or h.shape[1:] != (inputs, inputs) or not h.shape[0] or outputs % h.shape[0]:
        raise WeightsError(
            f"{found.origin}: the Hessian of {quoted(weight.name)} is {found.spec}, expected "
            f"[blocks, {inputs}, {inputs}] for {weight.spec}; measure it on these weights (score)"
        )
    if not np.isfinite(h).all():
        raise WeightsError(f"{found.origin}: the Hessian of {quoted(weight.name)} has NaN or infinite values")
    return Rows(weight.spec.shape, first, h.shape[0]), h


def importance_of(by: Weights | None, weight: Weight) -> np.ndarray | None:
    """How much the square of an error at each element matters, as `by` says; broadcasts against the weight, float64.

    Norms and moments give the mean square of the inputs, a Hessian its diagonal, other evidence is taken as it is.
    Raises WeightsError if it is missing, of another shape, negative or not finite.
    """
    if by is None:
        return None
    kind = About.of(by).kind
    if kind == "hessian":
        rows, h = hessian_of(by, weight)
        diagonal = np.stack([np.diag(own) for own in h])
        every = np.repeat(diagonal, weight.spec.size // max(rows.inputs, 1) // len(h), axis=0)
        return rows.tensor(every) if every.size else np.ones(weight.spec.shape)
    found = evidence_of(by, weight)
    mass = found.array().astype(np.float64)
    mass = mass**2 if kind == "norms" else mass[1] if kind == "moments" else mass
    try:
        fits = np.broadcast_shapes(mass.shape, weight.spec.shape) == weight.spec.shape
    except ValueError:
        fits = False
    if not fits:
        raise WeightsError(
            f"{found.origin}: the evidence for {quoted(weight.name)} is {found.spec}, its weights {weight.spec}; "
            "measure it on these (score)"
        )
    if not (np.isfinite(mass) & (mass >= 0)).all():
        raise WeightsError(f"{found.origin}: the importances of {quoted(weight.name)} must be finite and >= 0")
    return mass


def _places(x: np.ndarray) -> np.ndarray:
    """Up to SAMPLE elements at places that depend on the size alone, and follow no row or column."""
    flat = x.reshape(-1)
    if flat.size <= SAMPLE:
        return flat
    return np.asarray(flat[np.sort(np.random.default_rng(flat.size).choice(flat.size, SAMPLE, replace=False))])
