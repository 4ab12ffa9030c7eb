"""Few distinct values: the codebook with the least squared error. Decides which elements take part and what they weigh.

The search is `kernels.kmeans`; how indices and codebook are held is the palette codec.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import ClassVar, Literal

import numpy as np

from steelyard.codecs._parts import is_whole
from steelyard.codecs.palette import Palette
from steelyard.core.packed import Packed, Scheme, pack
from steelyard.core.transform import Step
from steelyard.core.weights import Weight, Weights
from steelyard.edit._levels import finite
from steelyard.edit._options import check_options
from steelyard.edit.evidence import About, check_same, evidence_of, importance_of
from steelyard.edit.prune import check_scope, scoped
from steelyard.errors import CodecError, RecipeError, quoted

POINTS = 1 << 24  # elements that are clustered as they are; more are gathered into bins first
Points = tuple[np.ndarray, np.ndarray]  # values and what each weighs, both (n,) float64


@dataclass(frozen=True)
class Share(Step):
    """Move every weight to the nearest of `k` shared values, chosen for the least squared error.

    The values are the 1-D k-means ``min sum_i s_i (w_i - c(w_i))^2`` with s_i = 1, or `by`: evidence (Fisher
    information; norms, moments or Hessians of the inputs), or importances >= 0 of the same names and of
    shapes that broadcast. They are rounded to the tensor's dtype. Zeros stay zeros and take none of the k
    values unless `keep_zeros` is off. The result is held by the palette codec: an index for each weight, and
    the codebook.

    The scope 'tensor' gives every tensor its own values; 'global' finds one set for all, at the first
    read of any, once, in one pass with one tensor in memory at a time beside the points to cluster:
    all of them up to 2^24 elements, above that 65,536 bins of each tensor.

    Only floating-point tensors of at least `min_ndim` axes take part; the others pass untouched.

    Raises RecipeError for a k outside 1 to 65,535, WeightsError if no tensor takes part and for importances that are
    missing, have another shape or were measured on other weights, CodecError for NaN or infinite weights.

    >>> w = Weights.of({"a": np.float32([[0, 1, 1.2], [5, 5.2, 9]])})
    >>> Share(3)(w)["a"].array().tolist()
    [[0.0, 1.100000023841858, 1.100000023841858], [5.099999904632568, 5.099999904632568, 9.0]]

    Source: Han, Mao and Dally, "Deep Compression", ICLR 2016, section 3; weighted: Choi, El-Khamy and
    Lee, "Towards the Limit of Network Quantization", ICLR 2017.
    """

    name: ClassVar[str] = "share"
    k: int = 16
    scope: Literal["global", "tensor"] = "tensor"
    keep_zeros: bool = True
    min_ndim: int = 2
    by: Weights | None = None

    def __post_init__(self) -> None:
        check_options(self)
        if not is_whole(self.k, 1, 65_535):
            raise RecipeError(f"the number of shared values k is 1 to 65535, not {self.k!r}")
        check_scope(self.scope)

    def __call__(self, weights: Weights) -> Weights:
        chosen = {item.name: item for item in scoped(weights, self.min_ndim, "shared")}
        if self.by is not None:
            for item in chosen.values():
                evidence_of(self.by, item)
        common = _Common(self, tuple(chosen.values()))
        codec = Palette(self.k + 1 if self.keep_zeros else self.k)

        def share(item: Weight, x: np.ndarray) -> np.ndarray | Packed:
            points = common.centres() if self.scope == "global" else self.centres(item, x)
            return pack(_nearest(x, points.astype(x.dtype), self.keep_zeros), codec)

        return weights.with_items(
            item.then(partial(share, item), scheme=Scheme(codec)) if name in chosen else item
            for name, item in weights.items()
        )

    def centres(self, weight: Weight, x: np.ndarray) -> np.ndarray:
        """The shared values of one tensor, float64, ascending."""
        return _cluster(*self.points(weight, x), self.k, weight)

    def points(self, weight: Weight, x: np.ndarray) -> Points:
        """What is clustered of one tensor."""
        values, mass = finite(weight, x).reshape(-1).astype(np.float64), np.ones(x.size)
        if self.by is not None:
            check_same(About.of(self.by), weight, x)
            mass = np.broadcast_to(importance_of(self.by, weight), x.shape).reshape(-1)
        wanted = values != 0 if self.keep_zeros else np.ones(values.size, bool)
        return values[wanted], mass[wanted]


@dataclass
class _Common:
    """The shared values of all tensors, found when they are first asked for. Safe with several threads."""

    share: Share
    items: tuple[Weight, ...]
    lock: threading.Lock = field(default_factory=threading.Lock)

    def centres(self) -> np.ndarray:
        with self.lock:
            return self._found

    @cached_property
    def _found(self) -> np.ndarray:
        from steelyard.kernels.kmeans import BINS, gather

        total = sum(item.spec.size for item in self.items)
        parts = []
        for item in self.items:
            points = self.share.points(item, item.array())
            parts.append(points if total <= POINTS else gather(*points, BINS))
        values, mass = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        return _cluster(values, mass, self.share.k, self.items[0])


def _cluster(values: np.ndarray, mass: np.ndarray, k: int, weight: Weight) -> np.ndarray:
    from steelyard.kernels.kmeans import kmeans_1d

    try:
        return kmeans_1d(values, k, mass)
    except CodecError as error:
        raise CodecError(f"{weight.origin}: {quoted(weight.name)}: {error}") from error


def _nearest(x: np.ndarray, centres: np.ndarray, keep_zeros: bool) -> np.ndarray:
    """Every element of `x` at the nearest of `centres`, which are ascending and of its dtype."""
    if centres.size == 0:  # nothing but zeros
        return np.zeros_like(x)
    wide = centres.astype(np.float64)
    nearest = centres[np.searchsorted((wide[1:] + wide[:-1]) / 2, x.astype(np.float64))]
    return np.where(x == 0, x.dtype.type(0), nearest) if keep_zeros else nearest
