"""One forward pass as a graph of aten operations whose inputs are the model's tensors and the batch.

Decides how a model is run to be looked at. Knows nothing of what an operation does to an axis.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from steelyard.errors import ModelError


@dataclass(frozen=True)
class Trace:
    """The operations in the order of execution. The first placeholders are `names`, the rest are inputs."""

    graph: fx.Graph
    names: tuple[str, ...]  # of parameters and buffers
    examples: int  # in the batch that was traced


def trace(model: nn.Module, arguments: tuple[Any, ...], keywords: Mapping[str, Any] | None = None) -> Trace:
    """Run the model once, in the mode that it is in, and note every operation; nothing of it is changed.

    The model is to be in evaluation mode, else batch norms use, and the trace updates, what they should not.
    Raises ModelError for a model that fails, or that decides by values of its inputs what to compute.
    """
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, tensor in named.items():
        if isinstance(tensor, nn.parameter.UninitializedTensorMixin):
            raise ModelError(f"{name!r} has no shape yet; run the model once on a batch before this")
    names = tuple(named)

    def run(values: list[Tensor], given: tuple[Any, ...]) -> Any:
        return functional_call(model, dict(zip(names, values, strict=True)), given, dict(keywords or {}))

    with _plain():
        try:
            graph = make_fx(run)([t.detach() for t in named.values()], arguments).graph
        except ModelError:
            raise
        except Exception as error:
            line = str(error).strip().splitlines()
            raise ModelError(
                f"{type(model).__name__} cannot be followed on this batch: {line[0] if line else type(error).__name__}"
            ) from error
    first = next((a for a in arguments if isinstance(a, Tensor) and a.dim()), None)
    return Trace(graph, names, 1 if first is None else len(first))


@contextmanager
def _plain() -> Iterator[None]:
    """No gradients, no autocast, and no fused layers, which would hide what is inside of them."""
    fast, onednn = torch.backends.mha.get_fastpath_enabled(), torch._C._get_mkldnn_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    torch._C._set_mkldnn_enabled(False)  # the context manager of torch.backends would warn of what it also touches
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        torch._C._set_mkldnn_enabled(onednn)
