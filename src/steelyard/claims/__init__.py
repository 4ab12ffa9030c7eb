"""Every sentence of the field's definition of a weight as a measured check: the table. Nothing heavy is imported."""

from __future__ import annotations

from typing import Any

from steelyard.core.registry import Registry, Row

CHAPTERS: dict[str, str] = {
    "A": "the neuron: weighted sums",
    "B": "learning",
    "C": "beginnings",
    "D": "discipline",
    "E": "architectures",
    "F": "making them small",
    "G": "moving and publishing",
}

CLAIMS: Registry[Any] = Registry(
    "claim",
    "claims",
    {
        "A1": Row("steelyard.claims.a_neuron:A1", "a weight is the strength of one connection", "learn"),
        "A2": Row("steelyard.claims.a_neuron:A2", "inputs are multiplied by weights and summed", "learn"),
        "A3": Row("steelyard.claims.a_neuron:A3", "the sum passes through an activation", "learn"),
        "A8": Row("steelyard.claims.a_neuron:A8", "a negative weight acts in the opposite direction", "learn"),
        "B1": Row("steelyard.claims.b_learning:B1", "training adjusts weights to reduce error", "learn"),
        "B2": Row("steelyard.claims.b_learning:B2", "by backpropagation", "learn"),
        "B3": Row("steelyard.claims.b_steps:B3", "and gradient descent", "learn"),
        "B4": Row("steelyard.claims.b_learning:B4", "weights are tweaked slightly after each batch", "learn"),
        "B5": Row("steelyard.claims.b_steps:B5", "over thousands of iterations these steps accumulate", "learn"),
        "B6": Row("steelyard.claims.b_unseen:B6", "what is learned generalises to unseen inputs", "learn"),
        "B7": Row("steelyard.claims.b_objective:B7", "the loss is minimised", "learn"),
        "B8": Row("steelyard.claims.b_objective:B8", "over many batches", "learn"),
        "B9": Row("steelyard.claims.b_steps:B9", "the learning rate is decisive", "learn"),
        "B10": Row(
            "steelyard.claims.b_learning:B10",
            "without weights the net is static; with equal weights it cannot learn",
            "learn",
        ),
        "B11": Row("steelyard.claims.b_learning:B11", "weights are the memory of the model", "learn"),
        "B12": Row("steelyard.claims.b_patterns:B12", "each batch progressively encodes useful patterns", "learn"),
        "C1": Row("steelyard.claims.c_beginnings:C1", "initial values matter", "learn"),
        "C2": Row("steelyard.claims.c_beginnings:C2", "poor starts vanish or explode", "learn"),
        "C3": Row("steelyard.claims.c_beginnings:C3", "poor starts stall training", "learn"),
        "C4": Row(
            "steelyard.claims.c_beginnings:C4", "Xavier and He set the right scale for depth and activation", "learn"
        ),
        "C5": Row("steelyard.claims.c_beginnings:C5", "stable gradient flow from the outset", "learn"),
        "D1": Row("steelyard.claims.d_discipline:D1", "L1 discourages weights", "learn"),
        "D2": Row("steelyard.claims.d_discipline:D2", "L2 discourages large weights", "learn"),
        "D3": Row("steelyard.claims.d_discipline:D3", "to reduce overfitting", "learn"),
        "D4": Row("steelyard.claims.d_discipline:D4", "weight decay", "learn"),
        "D5": Row("steelyard.claims.d_discipline:D5", "upweighting examples", "learn"),
        "D6": Row("steelyard.claims.d_discipline:D6", "upweighting features", "learn"),
        "D7": Row("steelyard.claims.d_capacity:D7", "weights determine the capacity to generalise", "learn"),
        "E1": Row("steelyard.claims.e_architectures:E1", "in linear models weights are coefficients", "learn"),
        "E4": Row("steelyard.claims.e_memory:E4", "recurrent networks keep memory across time steps", "learn"),
        "F1": Row("steelyard.claims.f_pruning:F1", "networks hold redundant parameters", "learn"),
        "F2": Row("steelyard.claims.f_pruning:F2", "weights can be pruned", "learn"),
        "F3": Row("steelyard.claims.f_levels:F3", "fewer bits are enough", "learn"),
        "F4": Row("steelyard.claims.f_small:F4", "weights can be shared", "learn"),
        "F5": Row("steelyard.claims.f_small:F5", "less memory without much accuracy", "learn"),
        "G1": Row("steelyard.claims.g_moving:G1", "the count of weights is a measure of scale", "learn"),
    },
)
