"""Another number format. Decides what happens to a number that the new format cannot hold; rounding is no such case."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import ml_dtypes
import numpy as np

from steelyard.core.spec import DType, Spec
from steelyard.core.spec import dtype as find_dtype
from steelyard.core.transform import Step
from steelyard.core.weights import Weight, Weights
from steelyard.errors import RecipeError, WeightsError, quoted

_FAMILY = {"float": "float", "int": "int", "uint": "int", "bool": "bool", "complex": "complex"}

_KINDS = {
    "float": "floating-point tensors",
    "int": "tensors of whole numbers",
    "bool": "tensors of truth values",
    "complex": "complex tensors",
}


@dataclass(frozen=True)
class Cast(Step):
    """Store numbers in another format of the same family, rounding to nearest.

    Floating-point tensors are cast to floating-point formats, whole numbers to whole numbers; tensors of
    another family pass untouched: ``Cast("bf16")`` of a model leaves its counters alone. But a cast to whole
    numbers refuses fractions, which it could neither keep nor ignore in silence; Quantize rounds them.

    Args: `dtype` is a name such as 'float16' or 'bf16'. `overflow` says what becomes of a number beyond
    the largest finite one: 'error' raises WeightsError, 'saturate' takes the nearest finite number,
    'allow' takes what the format gives (an infinity, NaN, or the remainder modulo 2^bits). NaN and
    infinities that were there before are kept, and are an error in a format that has none.

    Raises UnknownNameError for a format that does not exist, RecipeError for another `overflow`, and
    WeightsError where no tensor is of the format's family, or one has fractions and the format has not.

    >>> import numpy as np
    >>> w = Weights.of({"a": np.float32([1, 70000])})
    >>> Cast("float16", "saturate")(w)["a"].array().tolist()
    [1.0, 65504.0]
    >>> Cast("float16")(w)["a"].array()
    Traceback (most recent call last):
    ...
    steelyard.errors.WeightsError: memory: 'a' holds 70000.0, which float16 cannot hold (at most 65504.0); ...
    """

    name: ClassVar[str] = "cast"
    dtype: str
    overflow: Literal["error", "saturate", "allow"] = "error"

    def __post_init__(self) -> None:
        if self.overflow not in ("error", "saturate", "allow"):
            raise RecipeError(f"overflow is 'error', 'saturate' or 'allow', not {self.overflow!r}")
        object.__setattr__(self, "dtype", find_dtype(self.dtype).name)

    def __call__(self, weights: Weights) -> Weights:
        self._check(weights)
        return weights.with_items(self._one(item) for item in weights.values())

    def _check(self, weights: Weights) -> None:
        """Raise rather than do nothing."""
        family = _FAMILY[find_dtype(self.dtype).kind]
        for item in weights.values():
            if family == "int" and item.spec.dtype.kind in ("float", "complex"):
                raise WeightsError(
                    f"{item.origin}: {quoted(item.name)} is {item.spec}, and a cast to {self.dtype} takes whole "
                    "numbers only; round fractions with quantize, or choose other tensors (where, or --where)"
                )
        if len(weights) and not any(_FAMILY[item.spec.dtype.kind] == family for item in weights.values()):
            first = next(iter(weights.values()))
            raise WeightsError(
                f"a cast to {self.dtype} changes {_KINDS[family]} only, and there are none: "
                f"{quoted(first.name)} is {first.spec}; choose a dtype of its kind"
            )

    def _one(self, weight: Weight) -> Weight:
        new = find_dtype(self.dtype)
        if weight.spec.dtype == new or _FAMILY[weight.spec.dtype.kind] != _FAMILY[new.kind]:
            return weight
        return weight.then(lambda x: self._cast(x, new, weight), elementwise=True, spec=Spec(weight.spec.shape, new))

    def _cast(self, x: np.ndarray, new: DType, weight: Weight) -> np.ndarray:
        if self.overflow == "allow" or np.can_cast(x.dtype, new.numpy, "safe"):
            with np.errstate(over="ignore", invalid="ignore"):
                return x.astype(new.numpy)
        if new.kind == "complex":  # its real and imaginary parts, one by one
            part = find_dtype("float32" if new.bits == 64 else "float64")
            pairs = np.ascontiguousarray(x).reshape(-1).view(x.real.dtype)
            return self._cast(pairs, part, weight).view(new.numpy).reshape(x.shape)
        y, lost, highest = (_to_float if new.kind == "float" else _to_int)(x, new, self.overflow == "saturate")
        if lost.any():
            raise WeightsError(
                f"{weight.origin}: {quoted(weight.name)} holds {x[lost].ravel()[0]}, which {new} cannot hold "
                f"(at most {highest}); choose a wider dtype, or overflow 'saturate' or 'allow'"
            )
        return y


def _to_float(x: np.ndarray, new: DType, saturate: bool) -> tuple[np.ndarray, np.ndarray, float]:
    """`x` in the format `new`, where it could not be held, and the largest finite number."""
    limits = ml_dtypes.finfo(new.numpy)
    low, high = float(limits.min), float(limits.max)
    with np.errstate(over="ignore", invalid="ignore"):
        y = x.astype(new.numpy)
        has_nan = bool(np.isnan(np.array(np.nan, np.float32).astype(new.numpy).astype(np.float32)))
    if has_nan and np.isfinite(y).all():  # what cannot be held would show as an infinity or NaN
        return y, np.zeros(x.shape, bool), high
    wide, back = x.astype(np.float64), y.astype(np.float64)
    # A format without NaN saturates by itself, unasked; the others show an overflow as an infinity or NaN.
    over = np.isfinite(wide) & (~np.isfinite(back) if has_nan else (wide < low) | (wide > high))
    over |= np.isinf(wide) & ~np.isinf(back)
    if saturate:
        y = np.where(over, np.clip(wide, low, high).astype(new.numpy), y)
        over = np.zeros_like(over)
    return y, over | (np.isnan(wide) & ~np.isnan(back)), high


def _to_int(x: np.ndarray, new: DType, saturate: bool) -> tuple[np.ndarray, np.ndarray, int]:
    """`x` in the format `new`, where it could not be held, and the largest number."""
    limits = ml_dtypes.iinfo(new.numpy)
    wide = x if x.dtype == np.uint64 else x.astype(np.int64)
    bounds = np.iinfo(wide.dtype)
    low, high = max(int(limits.min), bounds.min), min(int(limits.max), bounds.max)
    held = np.clip(wide, low, high)
    lost = np.zeros(x.shape, bool) if saturate else held != wide
    return held.astype(new.numpy), lost, int(limits.max)
