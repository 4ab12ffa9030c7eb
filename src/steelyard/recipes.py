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
