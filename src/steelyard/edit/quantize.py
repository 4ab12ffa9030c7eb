"""Round to uniform levels of few bits. Decides which tensors; the levels themselves are the affine codec."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np

from steelyard.codecs.affine import Affine
from steelyard.core.packed import Codec, Packed, Plan, Scheme, pack
from steelyard.core.transform import Step
from steelyard.core.weights import Weight, Weights
from steelyard.edit._levels import Levels, finite, plans_of
from steelyard.edit._options import check_options
from steelyard.edit.evidence import About, check_same, importance_of
from steelyard.edit.pack import hold
from steelyard.edit.prune import scoped
from steelyard.errors import CodecError, RecipeError, quoted


@dataclass(frozen=True)
class Quantize(Step):
    """Round every weight to the nearest of 2^bits uniform levels, and hold it as the number of its level.

    One scale for a whole tensor, for each index along `axis` (0: each output channel), or for each `group`
    of consecutive elements of the last axis; `symmetric` levels need no zero point. See `codecs.affine`.
    Only floating-point tensors of at least `min_ndim` axes take part; the others pass untouched, and so do
    those that are held in this way already.

    The levels span the weights from the least to the greatest, or with ``error=p`` those that lose least:
    scale and zero point minimise sum_i s_i |w_i - q(w_i)|^p, with s_i = 1 or, `by` evidence (norms, moments,
    Hessian or Fisher information), the importance of each weight. A few bits lose far less that way.

    Args:
        codes: how the numbers of the levels are held: `Bits` unless said; ``Entropy()`` is smaller.
        scale: how the scales and zero points are held; plain unless said.

    Raises CodecError for settings that contradict each other and, naming the tensor, for NaN or infinite weights and
    shapes that do not fit; WeightsError if no tensor takes part, and for evidence that is missing or of other weights.

    >>> import numpy as np
    >>> w = Weights.of({"a": np.float32([[-1, 0.4, 1]])})
    >>> Quantize(bits=2, symmetric=True)(w)["a"].array().tolist()
    [[-1.0, 0.0, 1.0]]
    >>> Quantize(bits=2, error=2)(Weights.of({"a": np.float32([[-1, 1, 9, 9]])}))["a"].array().tolist()
    [[0.0, 0.0, 9.0, 9.0]]

    Source: error-minimising scales: Banner et al., "Post training 4-bit quantization of convolutional networks", 2019.
    """

    name: ClassVar[str] = "quantize"
    bits: int = 8
    symmetric: bool = True
    axis: int | None = None
    group: int | None = None
    min_ndim: int = 2
    error: float | None = None
    by: Weights | None = None
    codes: Plan = None
    scale: Plan = None

    def __post_init__(self) -> None:
        check_options(self)
        self.codec()
        if self.error is not None:
            Levels(self.bits, self.symmetric)
            if not 0 < self.error < 100:
                raise RecipeError(f"error is the exponent of the loss, above 0, not {self.error}")
        elif self.by is not None:
            raise RecipeError("evidence says where errors matter: give error=2 to choose scales by it")

    def codec(self) -> Affine:
        """The codec that rounds."""
        return Affine(bits=self.bits, symmetric=self.symmetric, axis=self.axis, group=self.group)

    def __call__(self, weights: Weights) -> Weights:
        codec = self.codec()
        plans = plans_of(self.codes, self.scale, self.symmetric)
        scheme = Scheme(codec, plans)
        chosen = {item.name for item in scoped(weights, self.min_ndim, "rounded")}

        def one(item: Weight) -> Weight:
            if item.name not in chosen or held_so(item, codec):
                return item
            function = partial(hold, item, scheme) if self.error is None else partial(self._search, item, plans)
            return item.then(function, scheme=scheme)

        return weights.with_items(one(item) for item in weights.values())

    def _search(self, weight: Weight, plans: dict[str, Plan], x: np.ndarray) -> Packed | np.ndarray:
        mass = importance_of(self.by, weight)
        if self.by is not None:
            check_same(About.of(self.by), weight, x)
        codec, levels = self.codec(), Levels(self.bits, self.symmetric)
        if not finite(weight, x).size:
            return pack(x, Scheme(codec, plans))
        groups, back = _together(weight, x.astype(np.float64), codec)
        own = None if mass is None else _together(weight, np.broadcast_to(mass, x.shape), codec)[0]
        if own is None and codec.group is not None:
            own = _together(weight, np.ones(x.shape), codec)[0]  # what fills the last group weighs nothing
        scale, zero = levels.search(groups, own, self.error or 2)
        codes = back(levels.round(groups, scale[:, None], zero[:, None]))
        shape = _shape_of_scales(x.shape, codec)
        parts = {"codes": codes.astype(np.uint8), "scale": scale.astype(np.float32).reshape(shape)}
        if not self.symmetric:
            parts["zero"] = zero.astype(x.dtype).reshape(shape)
        every = {**codec.inner, **plans}
        return Packed(weight.spec, codec, {name: pack(value, every.get(name)) for name, value in parts.items()})


def held_so(weight: Weight, codec: Codec) -> bool:
    """Whether a weight is held by this very codec: then there is nothing to round."""
    return isinstance(weight.scheme, Scheme) and weight.scheme.codec == codec


def _shape_of_scales(shape: tuple[int, ...], codec: Affine) -> tuple[int, ...]:
    if codec.axis is not None:
        return (shape[codec.axis],)
    if codec.group is not None and shape:
        return (*shape[:-1], -(-shape[-1] // codec.group))
    return ()


def _together(weight: Weight, x: np.ndarray, codec: Affine):  # type: ignore[no-untyped-def]
    """`x` as (groups that share a scale, members), zeros where a group is shorter; and the way back."""
    rank = x.ndim
    if codec.axis is not None:
        if not -rank <= codec.axis < rank:
            raise CodecError(
                f"{weight.origin}: {quoted(weight.name)}: axis {codec.axis} of a tensor with {rank} axes; "
                f"give one from {-rank} to {rank - 1}, or choose others (where, or --where)"
            )
        turned = np.moveaxis(x, codec.axis, 0)
        return turned.reshape(len(turned), -1), lambda y: np.moveaxis(y.reshape(turned.shape), 0, codec.axis)
    if codec.group is None or not rank:
        return x.reshape(1, -1), lambda y: y.reshape(x.shape)
    last, count = x.shape[-1], -(-x.shape[-1] // codec.group)
    if math.prod(x.shape[:-1]) * count * codec.group > 2 * x.size + (1 << 20):  # a group far longer than the axis
        return x.reshape(-1, last), lambda y: y.reshape(x.shape)
    filled = np.zeros((*x.shape[:-1], count * codec.group))
    filled[..., :last] = x
    return filled.reshape(-1, codec.group), lambda y: y.reshape(filled.shape)[..., :last]
