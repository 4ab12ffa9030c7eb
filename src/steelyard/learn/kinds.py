"""What an operation that acts on more than single elements is to a signal that goes through it.

Decides by names: of functions, and of the classes of modules. Knows single operations, no models.
"""

from __future__ import annotations

from torch import nn

from steelyard.learn.tracing import Operation

KINDS = {  # of operations that let a signal through, by what their names contain
    "norm": ("norm", "normalize"),
    "dropout": ("drop",),
    "pool": ("pool", "mean", "sum", "amax", "interpolate", "upsample"),
    "concatenate": ("cat", "concat", "stack", "hstack", "vstack"),
}
ENDS = ("softmax", "softmin", "gumbel", "cross_entropy", "logsumexp", "glu", "attention")  # what is no activation
PRODUCTS = ("mul", "matmul", "rmatmul", "bmm", "mm", "einsum", "div", "baddbmm", "bilinear", "lerp", "addcmul")
SUMS = ("add", "sub", "rsub")


def kind(op: Operation) -> str:
    """'norm', 'dropout', 'pool', 'concatenate', 'add', '' for other shapes, 'end' for what lets no signal through."""
    name = op.name.lower()
    if any(part in name for part in ENDS) or _holds_matrices(op):
        return "end"
    if name in PRODUCTS and (len(op.sources) > 1 or name not in ("mul", "div")):
        return "end"
    if name in SUMS:
        return "add" if len(op.sources) > 1 else ""
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "")


def _holds_matrices(op: Operation) -> bool:
    """Whether weights that belong to no known layer multiply here."""
    if isinstance(op.call, nn.Module):
        return any(p.squeeze().ndim >= 2 for p in op.call.parameters())
    return op.name == "linear" or op.name.startswith("conv")
