"""Multi-head attention with fewer heads than its width would hold.

`torch.nn.MultiheadAttention` computes the width of a head as embed_dim / num_heads and cuts the projections by
embed_dim, so it cannot lose a head. This one has the same parameters under the same names, of any number of rows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from steelyard.errors import ModelError


class NarrowAttention(nn.MultiheadAttention):  # type: ignore[misc]
    """softmax(q k^T / sqrt(head_dim)) v for `num_heads` heads of `head_dim`, whatever embed_dim is.

    Made of a MultiheadAttention by `narrow_`, never built directly.
    """

    def forward(
        self,
        query: Tensor,  # (time, batch, width); (batch, time, width) with batch_first; (time, width)
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,  # (batch, source time): True or -inf where a key is left out
        need_weights: bool = True,
        attn_mask: Tensor | None = None,  # (time, source time) or (batch * heads, time, source time)
        average_attn_weights: bool = True,
        is_causal: bool = False,  # a hint of torch's: the mask is given, too
    ) -> tuple[Tensor, Tensor | None]:
        """The same results and shapes as `torch.nn.MultiheadAttention.forward`."""
        single = query.dim() == 2
        if single:
            query, key, value = (x.unsqueeze(1 if not self.batch_first else 0) for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        if not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = (self._heads(x, part) for part, x in enumerate((query, key, value)))  # (batch, heads, time, depth)
        mask = self._mask(q, attn_mask, key_padding_mask, is_causal)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) / math.sqrt(self.head_dim)
            weights = torch.softmax(scores if mask is None else scores + mask, -1)
            weights = functional.dropout(weights, dropout) if dropout else weights
            mixed = weights @ v
        else:
            mixed = functional.scaled_dot_product_attention(q, k, v, mask, dropout)
        out = functional.linear(mixed.transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj.bias)
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if single:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return out if self.batch_first else out.transpose(0, 1), weights

    def _heads(self, x: Tensor, part: int) -> Tensor:
        """The queries (part 0), keys or values: (batch, time, width) to (batch, heads, time, depth)."""
        rows = slice(part * self.num_heads * self.head_dim, (part + 1) * self.num_heads * self.head_dim)
        if self.in_proj_weight is not None:
            weight = self.in_proj_weight[rows]
        else:
            weight = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)[part]
        bias = None if self.in_proj_bias is None else self.in_proj_bias[rows]
        return functional.linear(x, weight, bias).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _mask(self, q: Tensor, mask: Tensor | None, padding: Tensor | None, is_causal: bool) -> Tensor | None:
        """What is added to the scores, broadcastable to (batch, heads, time, source time)."""
        if mask is None and is_causal:
            raise ModelError("is_causal is a hint that goes with attn_mask: give the mask, too")
        found = None if mask is None else _additive(mask, q.dtype)
        if found is not None and found.dim() == 3:
            if found.shape[0] != q.shape[0] * self.num_heads:
                raise ModelError(f"the attention mask is {tuple(found.shape)}: expected {q.shape[0] * self.num_heads} "
                                 f"matrices, one for each example and each of the {self.num_heads} heads")  # fmt: skip
            found = found.view(q.shape[0], self.num_heads, *found.shape[1:])
        if padding is None:
            return found
        left_out = _additive(padding, q.dtype)[:, None, None, :]
        return left_out if found is None else found + left_out


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(mask, float("-inf"))


def narrow_(attention: nn.MultiheadAttention, inner: int) -> None:
    """Turn an attention, in place, into one whose heads have `inner` dimensions together."""
    if type(attention) not in (nn.MultiheadAttention, NarrowAttention):
        raise ModelError(f"{type(attention).__name__} has its own forward pass: its heads cannot be removed")
    if inner % attention.head_dim or inner < attention.head_dim:
        raise ModelError(f"{inner} dimensions are no whole number of heads of {attention.head_dim}")
    attention.__class__ = NarrowAttention  # in place: hooks, ties and whoever holds the module stay with it
    attention.num_heads = inner // attention.head_dim
    attention._qkv_same_embed_dim = False  # keeps torch's fused layer away, which reads in_proj_weight by embed_dim
