"""Ways to hold one tensor. One file = encode and decode on one screen, with the source."""

from __future__ import annotations

from steelyard.core.packed import Codec
from steelyard.core.registry import Registry, Row

CODECS: Registry[type[Codec]] = Registry(
    "codec",
    "codecs",
    {
        "affine": Row("steelyard.codecs.affine:Affine", "uniform levels: scale and zero point, 1 to 8 bits"),
        "floatgrid": Row("steelyard.codecs.floatgrid:FloatGrid", "levels of a small float: nf4, fp8, mxfp4, nvfp4"),
        "lowrank": Row("steelyard.codecs.lowrank:LowRank", "a matrix as the product of two thin ones"),
        "scaled": Row("steelyard.codecs.scaled:Scaled", "a factor for each index of an axis, and the other values"),
        "palette": Row("steelyard.codecs.palette:Palette", "a codebook of k values and an index for each element"),
        "vectors": Row("steelyard.codecs.vectors:Vectors", "a codebook of short runs, and an index for each run"),
        "bitmask": Row("steelyard.codecs.bitmask:Bitmask", "zeros as one bit each, and the other values"),
        "delta": Row("steelyard.codecs.delta:Delta", "zeros as the distances between the other values"),
        "nm": Row("steelyard.codecs.nm:NM", "n of each group of m elements, and where they stand"),
        "bits": Row("steelyard.codecs.bits:Bits", "lossless: whole numbers and booleans in as few bits as they need"),
        "trellis": Row("steelyard.codecs.trellis:Trellis", "levels along a trellis, for error and bits, entropy-coded"),
        "entropy": Row("steelyard.codecs.entropy:Entropy", "lossless: adaptive or static range coding"),
        "multiples": Row("steelyard.codecs.multiples:Multiples", "lossless: small multiples of one step, mostly 0"),
        "q8_0": Row("steelyard.codecs.ggml:Q8_0", "GGML: 8 bits and a scale for 32 elements"),
        "q4_0": Row("steelyard.codecs.ggml:Q4_0", "GGML: 4 bits and a scale for 32 elements"),
        "q4_1": Row("steelyard.codecs.ggml:Q4_1", "GGML: 4 bits, a scale and a minimum for 32 elements"),
        "q5_0": Row("steelyard.codecs.ggml:Q5_0", "GGML: 5 bits and a scale for 32 elements"),
        "q5_1": Row("steelyard.codecs.ggml:Q5_1", "GGML: 5 bits, a scale and a minimum for 32 elements"),
        "q2_k": Row("steelyard.codecs.ggml_k:Q2K", "GGML: 2 bits, scales in two levels; only read"),
        "q3_k": Row("steelyard.codecs.ggml_k:Q3K", "GGML: 3 bits, scales in two levels; only read"),
        "q4_k": Row("steelyard.codecs.ggml_k:Q4K", "GGML: 4 bits, scales and minima in two levels"),
        "q5_k": Row("steelyard.codecs.ggml_k:Q5K", "GGML: 5 bits, scales and minima in two levels"),
        "q6_k": Row("steelyard.codecs.ggml_k:Q6K", "GGML: 6 bits, scales in two levels"),
        "iq4_nl": Row("steelyard.codecs.ggml:IQ4NL", "GGML: 16 uneven levels and a scale for 32 elements; only read"),
        "iq4_xs": Row("steelyard.codecs.ggml_k:IQ4XS", "GGML: 16 uneven levels, scales in two levels; only read"),
        "mxfp4": Row("steelyard.codecs.ggml:MXFP4", "GGML: E2M1 and a power of two for 32 elements; only read"),
        "tq1_0": Row("steelyard.codecs.ggml_ternary:TQ1", "GGML: -1, 0, 1 in base 3, a scale for 256; only read"),
        "tq2_0": Row("steelyard.codecs.ggml_ternary:TQ2", "GGML: -1, 0, 1 in 2 bits, a scale for 256; only read"),
        "ggml": Row("steelyard.codecs.ggml:Ggml", "GGML: other block types, carried as they are"),
    },
)
