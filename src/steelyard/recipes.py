"""Named compositions of steps and codecs, and nothing else: what each does is said where its parts are defined."""

from __future__ import annotations

from steelyard.core.packed import Scheme, nest
from steelyard.core.transform import Chain, chain, on
from steelyard.core.where import where


def coded_sparse(k: int = 16) -> Scheme:
    """Hold a sparse tensor of at most `k` values besides zero as an entropy-coded mask and codebook indices."""
    from steelyard.codecs.bitmask import Bitmask
    from steelyard.codecs.entropy import Entropy
    from steelyard.codecs.palette import Palette

    return nest(Bitmask(), mask=Entropy(), values=nest(Palette(k), codes=Entropy()))


def nf4(block: int = 64) -> Scheme:
    """Hold a tensor by the 16 quantiles of a normal distribution: Dettmers et al., QLoRA, NeurIPS 2023."""
    from steelyard.codecs.floatgrid import FloatGrid

    return nest(FloatGrid("nf4", block))


def mxfp4() -> Scheme:
    """Hold a tensor in floats of 4 bits, 32 by a power of two: OCP Microscaling Formats 1.0, 2023."""
    from steelyard.codecs.floatgrid import FloatGrid

    return nest(FloatGrid("e2m1", 32, "e8m0"))


def nvfp4() -> Scheme:
    """Hold a tensor in floats of 4 bits, 16 by a float of 8: NVIDIA, 2025."""
    from steelyard.codecs.floatgrid import FloatGrid

    return nest(FloatGrid("e2m1", 16, "e4m3"))


def deep_compression(sparsity: float = 0.9, k: int = 16) -> Chain:
    """Prune, share and entropy-code every weight matrix: Han, Mao and Dally, "Deep Compression", ICLR 2016.

    Train on between the steps to win back what each costs.
    """
    from steelyard.edit.pack import Pack
    from steelyard.edit.prune import Prune
    from steelyard.edit.share import Share

    # The palette is lossy where there are more than k values: keep it away from what Share left alone.
    shared = where(min_ndim=2, kind="float")
    return chain(Prune(sparsity), Share(k), on(shared, Pack(coded_sparse(k))))
