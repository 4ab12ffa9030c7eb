"""What makes the queries of attention: which parameters, or which part of a packed projection.

Found where torch's scaled dot product attention is called, by the graph behind the queries. Decides nothing of scale.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from steelyard.learn.widths import run

# Nodes of the graph, by what they do to a tensor.
_MOVES = ("View", "UnsafeView", "Reshape", "Transpose", "Permute", "T", "Split", "SplitWithSizes", "Slice", "Select")
_MOVES = (*_MOVES, "Unbind", "Expand", "Clone", "Squeeze", "Unsqueeze", "Alias", "ToCopy", "Index", "Roll", "Neg")
_SUMS = ("Add", "Sub", "Cat", "Stack")
_FACTORS = ("Mul", "Div")
_LAYERS = ("Addmm", "Mm", "Bmm", "Linear", "MkldnnLinear", "Convolution", "NativeLayerNorm", "NativeGroupNorm")
_LAYERS = (*_LAYERS, "FusedRmsNorm", "NativeBatchNorm")


@dataclass
class Attention:
    """One call of scaled dot product attention."""

    size: int  # of a head
    scale: float  # of the products of queries and keys
    parameters: tuple[int, ...] = ()  # ids of those that the queries are linear in, if keys and values are not
    packed: nn.Linear | None = None  # else a layer that makes queries and more
    part: tuple[tuple[int, int], ...] = ()  # and which of its outputs become queries: from, to


def attentions(model: nn.Module, arguments: tuple[Any, ...]) -> list[Attention]:
    """Every call of torch's attention in one pass, in order, but for those inside ``nn.MultiheadAttention``.

    Raises ModelError if the model fails.
    """
    with _Watch(model) as watch:
        run(model, arguments)
    return watch.found


class _Watch(TorchFunctionMode):
    """Notes each call of attention while the graph behind it is still there."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.found: list[Attention] = []
        self.linears = {id(m.weight): m for m in model.modules() if isinstance(m, nn.Linear)}
        self.outputs: dict[nn.Linear, Tensor] = {}
        self.handles: list[Any] = []
        self.inside = 0  # how many nn.MultiheadAttention are running

    def __enter__(self) -> _Watch:
        for linear in self.linears.values():
            self.handles.append(linear.register_forward_hook(self._keep))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for handle in self.handles:
            handle.remove()

    def _keep(self, linear: nn.Linear, _inputs: Any, output: Tensor) -> None:
        self.outputs[linear] = output

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "multi_head_attention_forward":
            with torch._C.DisableTorchFunction():
                return func(*args, **options)
        if name == "scaled_dot_product_attention":
            names = ("query", "key", "value")
            self._note(*(args[i] if i < len(args) else options[name] for i, name in enumerate(names)), options)
        return func(*args, **options)

    def _note(self, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> None:
        size, given = query.shape[-1], options.get("scale")
        attention = Attention(size, 1 / math.sqrt(size) if given is None else float(given))
        self.found.append(attention)
        makers = linear_in(query)
        others = {id(p) for x in (key, value) for p in linear_in(x)}
        if not others.intersection(map(id, makers)):
            attention.parameters = tuple(map(id, makers))
            return
        layer = next((self.linears[id(p)] for p in makers if id(p) in self.linears), None)
        if layer is None or layer not in self.outputs:
            return
        parts = [part_of(x, self.outputs[layer]) for x in (query, key)]
        if parts[0] and not any(a < d and c < b for a, b in parts[0] for c, d in parts[1]):
            attention.packed, attention.part = layer, tuple(parts[0])


def linear_in(x: Tensor) -> list[Tensor]:
    """The nearest parameters behind a tensor that it is linear in, all of them together; none if it is not.

    >>> layer = nn.Linear(4, 8)
    >>> [tuple(p.shape) for p in linear_in(layer(torch.zeros(2, 4)).view(2, 2, 4).transpose(0, 1))]
    [(8,), (8, 4)]
    >>> linear_in(layer(torch.zeros(2, 4)).tanh())
    []
    """
    found: dict[int, Tensor] = {}
    seen: set[Any] = set()
    waiting = [x.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None:
            return []
        if node in seen:
            continue
        seen.add(node)
        kind = node.name().rstrip("0123456789").removesuffix("Backward")
        before = [n for n, _ in node.next_functions]
        own = [p for n in before if (p := _leaf(n)) is not None]
        found.update((id(p), p) for p in own)
        if kind in _SUMS:
            waiting.extend(n for n in before if _leaf(n) is None)
        elif own and kind in (*_LAYERS, *_FACTORS):
            continue
        elif kind in (*_MOVES, *_FACTORS) and sum(n is not None for n in before) == 1:
            waiting.extend(n for n in before if n is not None)
        else:
            return []
    return list(found.values())


def _leaf(node: Any) -> Tensor | None:
    """The parameter that a node is, or a view of."""
    while node is not None and getattr(node, "variable", None) is None:
        kind = node.name().rstrip("0123456789").removesuffix("Backward")
        if kind not in _MOVES or len(node.next_functions) != 1:
            return None
        node = node.next_functions[0][0]
    return None if node is None else node.variable


def part_of(x: Tensor, output: Tensor) -> list[tuple[int, int]]:
    """Which elements of the last axis of `output` become `x`, as runs (from, to)."""
    weights = torch.rand_like(x) + 0.5
    (gradient,) = torch.autograd.grad((x * weights).sum(), output, retain_graph=True, allow_unused=True)
    if gradient is None:
        return []
    used = (gradient != 0).flatten(0, -2).any(0).tolist()
    edges = [i for i in range(len(used) + 1) if (i > 0 and used[i - 1]) != (i < len(used) and used[i])]
    return list(zip(edges[::2], edges[1::2], strict=True))
