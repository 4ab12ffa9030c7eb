"""Where a softmax or a gate is at its limits, so that hardly any gradient passes.

Decides what counts as saturated for attention and for the gates of recurrent layers. Knows nothing of verdicts.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from steelyard.learn.gates import cell_sums, depths

EDGE = 0.97  # of the way to the limit of an activation is saturated; so is attention with so much on a single key
LOOKED_AT = 8  # sequences of a batch: scores take as much memory as the square of their length

Found = tuple[float | None, float | None]


def entropy(
    weights: Tensor,  # (..., queries, keys)
    keys: Tensor,  # (..., queries): how many keys may be attended to
) -> Found:
    """The entropy of attention as a share of that of equal attention, and the share of queries bound to one key.

    Queries with a single key to attend to are left out; (None, None) if there are no others.

    >>> entropy(torch.full((2, 4), 0.25), torch.tensor([4, 4]))
    (1.0, 0.0)
    """
    free = (keys > 1).expand(weights.shape[:-1])
    p, n = weights.detach()[free].double(), keys.expand(weights.shape[:-1])[free].double()
    if not len(p):
        return None, None
    bits = -torch.special.xlogy(p, p).sum(-1)
    return float((bits / n.log()).mean()), float((p.amax(-1) > EDGE).double().mean())


def allowed(scores: Tensor) -> Tensor:
    """How many keys each query may attend to: masked scores are minus infinity, or as good as."""
    return (scores.detach() > -1e4).sum(-1)


def attended(
    q: Tensor,  # (..., queries, width)
    k: Tensor,  # (..., keys, width)
    v: Tensor | None = None,  # noqa: ARG001 - the signature of torch's function
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,  # noqa: ARG001 - as above
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Found:
    """The entropy of torch's scaled_dot_product_attention, computed from its arguments, for the first sequences."""
    if attn_mask is not None and attn_mask.ndim == q.ndim and len(attn_mask) == len(q):
        attn_mask = attn_mask[:LOOKED_AT]
    q, k = q.detach()[:LOOKED_AT], k.detach()[:LOOKED_AT]
    if enable_gqa:
        k = k.repeat_interleave(q.shape[-3] // k.shape[-3], -3)
    scores = q @ k.transpose(-2, -1) * (scale if scale is not None else 1 / math.sqrt(q.shape[-1]))
    if is_causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)
    if attn_mask is not None:
        mask = attn_mask.detach()
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    return entropy(scores.softmax(-1), allowed(scores))


def multihead(layer: nn.MultiheadAttention, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Found:
    """The entropy of one call of torch's attention, by calling it once more for its weights, without dropout."""
    given = dict(zip(("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask"), args, strict=False))
    given |= kwargs | {"need_weights": True, "average_attn_weights": False}
    training, layer.training = layer.training, False
    try:
        weights = layer.forward(**given)[1]
    finally:
        layer.training = training
    masked = given.get("attn_mask") is not None or given.get("key_padding_mask") is not None
    keys = (weights > 0).sum(-1) if masked else torch.tensor(weights.shape[-1], device=weights.device)
    return entropy(weights, keys)


def gates_at_limits(layer: nn.RNNBase | nn.RNNCellBase, args: tuple[Any, ...]) -> list[float]:
    """The share of gates (of a plain recurrent layer: of units) at their limits; none for rectified ones."""
    plain = isinstance(layer, (nn.RNN, nn.RNNCell))
    if plain and layer.nonlinearity == "relu":
        return []
    limit = math.atanh(EDGE) * (1 if plain else 2)  # sigmoid(2 x) = (1 + tanh(x)) / 2
    sums = [d.sums() for d in depths(layer, args)] if isinstance(layer, nn.RNNBase) else [cell_sums(layer, args)]
    return [float((s.abs() > limit).double().mean()) for s in sums]
