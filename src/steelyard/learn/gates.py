"""The sums that go into the gates of recurrent layers, which no hook can see: W_ih x + W_hh h, without biases.

Decides that a recurrent layer is judged by these sums, because its output is bounded by its non-linearity. Knows
nothing of what they are wanted for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from steelyard.errors import ModelError


def cell_sums(cell: nn.RNNCellBase, args: tuple[Any, ...]) -> Tensor:
    """(batch, gates x hidden): the sums of one step of a cell, without gradients."""
    inputs, state = args[0], args[1] if len(args) > 1 else None
    hidden = state[0] if isinstance(state, tuple) else state
    with torch.no_grad():
        sums = inputs @ cell.weight_ih.T
        return sums if hidden is None else sums + hidden @ cell.weight_hh.T


def depths(layer: nn.RNNBase, args: tuple[Any, ...]) -> Iterator[Depth]:
    """The layers that are stacked in one, from below; each is run when its sums are asked for.

    Raises ModelError for a layer that is not given a sequence as its first argument.
    """
    if not args:
        raise ModelError(f"{type(layer).__name__} is called without a positional argument: pass the sequence first")
    inputs = args[0]
    if isinstance(inputs, PackedSequence):
        inputs, _ = pad_packed_sequence(inputs, layer.batch_first)
    for number in range(layer.num_layers):
        depth = Depth(layer, number, inputs)
        yield depth
        inputs = depth.outputs()


class Depth:
    """One of the layers that are stacked in a recurrent layer, with what goes into it."""

    def __init__(self, layer: nn.RNNBase, number: int, inputs: Tensor):
        self.layer, self.number, self.inputs = layer, number, inputs
        both = layer.bidirectional
        self.suffixes = [f"_l{number}", f"_l{number}_reverse"][: 1 + both]
        options: dict[str, Any] = {"bias": layer.bias, "batch_first": layer.batch_first, "bidirectional": both}
        if isinstance(layer, nn.LSTM):
            options["proj_size"] = layer.proj_size
        if isinstance(layer, nn.RNN):
            options["nonlinearity"] = layer.nonlinearity
        with torch.device("meta"):  # it borrows the weights of the layer
            self.alone = type(layer)(inputs.shape[-1], layer.hidden_size, 1, **options).train(False)

    def outputs(self) -> Tensor:
        """(time, batch, directions x hidden), or with batch first as the layer says."""
        mine = {
            f"{leaf}{suffix.replace(f'_l{self.number}', '_l0')}": getattr(self.layer, f"{leaf}{suffix}").detach()
            for suffix in self.suffixes
            for leaf in ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
            if getattr(self.layer, f"{leaf}{suffix}", None) is not None
        }
        with torch.no_grad():
            found: Tensor = torch.func.functional_call(self.alone, mine, (self.inputs.detach(),))[0]
        return found

    def sums(self) -> Tensor:
        """The sums into all gates at all times, flat; the state before the first time is 0."""
        outputs = self.outputs()
        inputs = self.inputs.detach()
        if self.layer.batch_first and inputs.ndim == 3:
            inputs, outputs = inputs.transpose(0, 1), outputs.transpose(0, 1)
        found = []
        for suffix, states in zip(self.suffixes, outputs.chunk(len(self.suffixes), -1), strict=True):
            empty = torch.zeros_like(states[:1])
            before = torch.cat([states[1:], empty] if suffix.endswith("reverse") else [empty, states[:-1]])
            ih, hh = getattr(self.layer, f"weight_ih{suffix}"), getattr(self.layer, f"weight_hh{suffix}")
            found.append((inputs @ ih.detach().T + before @ hh.detach().T).flatten())
        return torch.cat(found)
