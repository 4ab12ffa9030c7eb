"""Weights to Weights: the steps that change what tensors hold, how they are held, or what they are called."""

from __future__ import annotations

from steelyard.core.registry import Registry, Row
from steelyard.core.transform import Step

STEPS: Registry[type[Step]] = Registry(
    "step",
    "steps",
    {
        "cast": Row("steelyard.edit.cast:Cast", "another number format"),
        "rename": Row("steelyard.edit.rename:Rename", "other names, by glob or regular expression"),
        "split": Row("steelyard.edit.split:Split", "one tensor into several along an axis, such as q, k and v"),
        "join": Row("steelyard.edit.split:Join", "several tensors into one along an axis: the inverse of split"),
        "stack": Row("steelyard.edit.stack:Stack", "numbered tensors, such as experts, along a new axis"),
        "unstack": Row("steelyard.edit.stack:Unstack", "a tensor into numbered ones: the inverse of stack"),
        "prune": Row("steelyard.edit.prune:Prune", "the least important weights become zero"),
        "prune_nm": Row("steelyard.edit.nm:PruneNM", "n of every m inputs stay, such as 2:4"),
        "sparsegpt": Row("steelyard.edit.sparsegpt:SparseGPT", "weights go, and those that are left make up for it"),
        "quantize": Row("steelyard.edit.quantize:Quantize", "round to uniform levels of few bits"),
        "ratedistortion": Row(
            "steelyard.edit.ratedistortion:RateDistortion",
            "the least error at the bits, by evidence of any kind or none",
        ),
        "gptq": Row("steelyard.edit.gptq:Gptq", "round column by column, each making up for those before"),
        "awq": Row("steelyard.edit.awq:Awq", "round with the inputs that matter scaled up"),
        "adaround": Row("steelyard.edit.adaround:AdaRound", "round each weight up or down, as the outputs like it"),
        "hqq": Row("steelyard.edit.hqq:Hqq", "round with zero points that make the error sparse, without data"),
        "lowrank": Row("steelyard.edit.lowrank:Factorize", "matrices as products of thin ones, by bytes or error"),
        "share": Row("steelyard.edit.share:Share", "few distinct values: the codebook with the least squared error"),
        "encode": Row("steelyard.edit.encode:Encode", "matrices by a codec, such as levels of small floats"),
        "spare": Row("steelyard.edit.spare:Spare", "what a step would make larger in a file stays as it is"),
        "pack": Row("steelyard.edit.pack:Pack", "hold tensors as a plan of codecs says"),
        "untie": Row("steelyard.edit.untie:Untie", "each further name of a tensor becomes a tensor of its own"),
        "settle": Row("steelyard.edit.settle:Settle", "run everything so far, once, and keep the result in memory"),
    },
)
