"""Ways to hold one tensor. One file = encode and decode on one screen, with the source."""

from __future__ import annotations

from steelyard.core.packed import Codec
from steelyard.core.registry import Registry, Row

CODECS: Registry[type[Codec]] = Registry(
    "codec",
    "codecs",
    {
        "affine": Row("steelyard.codecs.affine:Affine", "uniform levels: scale and zero point, 1 to 8 bits"),
        "palette": Row("steelyard.codecs.palette:Palette", "a codebook of k values and an index for each element"),
        "bitmask": Row("steelyard.codecs.bitmask:Bitmask", "zeros as one bit each, and the other values"),
        "delta": Row("steelyard.codecs.delta:Delta", "zeros as the distances between the other values"),
        "bits": Row("steelyard.codecs.bits:Bits", "lossless: whole numbers and booleans in as few bits as they need"),
        "entropy": Row("steelyard.codecs.entropy:Entropy", "lossless: adaptive or static range coding"),
    },
)
