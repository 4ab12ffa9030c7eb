"""The built-in models of sequences: recurrent networks and a transformer.

Decides architectures and their start. Tokens in give an output for every position (and no position sees a later
one); numbers in give one output for the whole sequence. The last layer is called ``head``.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from steelyard.errors import ModelError, UnknownNameError
from steelyard.learn.options import check_counts, check_dropout
from steelyard.learn.task import Interface

Cell = Literal["rnn", "lstm", "gru"]


class Recurrent(nn.Module):
    """Embedding (tokens only), recurrent layers, and a linear head on every state, or on the last one."""

    def __init__(self, interface: Interface, cell: Cell, hidden: int, layers: int, dropout: float):
        super().__init__()
        self.interface = interface
        tokens = interface.vocabulary > 0
        self.embed = nn.Embedding(interface.vocabulary, hidden) if tokens else None
        kind = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}[cell]
        inputs = hidden if tokens else sequence_shape(interface)[1]
        self.recurrent = kind(inputs, hidden, layers, batch_first=True, dropout=dropout if layers > 1 else 0.0)
        self.head = nn.Linear(hidden, interface.outputs)
        self._start()

    def forward(self, x: Tensor) -> Tensor:  # (batch, time) tokens, or (batch, *shape) numbers
        x = as_sequence(x, self.interface) if self.embed is None else self.embed(x)
        states, _ = self.recurrent(x)  # (batch, time, hidden)
        logits: Tensor = self.head(states if self.embed is not None else states[:, -1])
        return logits

    def _start(self) -> None:
        """Orthogonal recurrent gates, Xavier input gates, forget bias 1 (Jozefowicz et al. 2015)."""
        hidden = self.recurrent.hidden_size
        for name, parameter in self.recurrent.named_parameters():
            if name.startswith("weight"):
                start = nn.init.orthogonal_ if "_hh_" in name else nn.init.xavier_uniform_
                for gate in parameter.split(hidden):
                    start(gate.data)
            else:
                nn.init.zeros_(parameter)
                if isinstance(self.recurrent, nn.LSTM) and "_ih_" in name:
                    parameter.data[hidden : 2 * hidden] = 1.0
        _normal(self.head, 1 / math.sqrt(hidden))


class Attention(nn.Module):
    """Multi-head scaled dot-product attention: softmax(q k^T / sqrt(width)) v (Vaswani et al. 2017)."""

    def __init__(self, width: int, heads: int, causal: bool):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.query, self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (batch, time, width)
        batch, time, width = x.shape
        q, k, v = (
            layer(x).view(batch, time, self.heads, width // self.heads).transpose(1, 2)  # (batch, heads, time, .)
            for layer in (self.query, self.key, self.value)
        )
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        result: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, time, width))
        return result


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, width: int, heads: int, causal: bool, dropout: float):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, causal)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x)))
        result: Tensor = x + self.dropout(self.down(functional.gelu(self.up(self.norm2(x)))))
        return result


class Transformer(nn.Module):
    """Embedding (or a linear map) and learned positions, blocks, a norm, and a head on each position or on the mean."""

    def __init__(self, interface: Interface, width: int, layers: int, heads: int, dropout: float):
        super().__init__()
        self.interface = interface
        tokens = interface.vocabulary > 0
        time, inputs = sequence_shape(interface)
        self.embed = nn.Embedding(interface.vocabulary, width) if tokens else nn.Linear(inputs, width)
        self.positions = nn.Parameter(torch.empty(time, width))
        self.blocks = nn.ModuleList(Block(width, heads, tokens, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, interface.outputs)
        self._start(layers)

    def forward(self, x: Tensor) -> Tensor:  # (batch, time) tokens, or (batch, *shape) numbers
        tokens = self.interface.vocabulary > 0
        x = self.embed(x if tokens else as_sequence(x, self.interface))
        if x.shape[1] > len(self.positions):
            raise ModelError(f"the transformer was built for {len(self.positions)} positions, given are {x.shape[1]}")
        x = x + self.positions[: x.shape[1]]
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        logits: Tensor = self.head(x if tokens else x.mean(1))
        return logits

    def _start(self, layers: int) -> None:
        """Normal with 0.02; what is added to the residual stream starts smaller, by sqrt(2 layers) (GPT-2)."""
        nn.init.normal_(self.positions, std=0.02)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                residual = name.endswith(("attention.out", "down"))
                _normal(module, 1 / math.sqrt(module.in_features) / (math.sqrt(2 * layers) if residual else 1.0))
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)


def rnn(
    interface: Interface, *, cell: Cell = "lstm", hidden: int = 128, layers: int = 1, dropout: float = 0.0
) -> nn.Module:
    """A recurrent network over the tokens, the rows of an image, or the steps of a series."""
    check_counts(hidden=hidden, layers=layers)
    check_dropout(dropout)
    if cell not in get_args(Cell):
        raise UnknownNameError("cell", str(cell), get_args(Cell))
    return Recurrent(interface, cell, hidden, layers, dropout)


def transformer(
    interface: Interface, *, width: int = 64, layers: int = 2, heads: int = 4, dropout: float = 0.0
) -> nn.Module:
    """A pre-norm transformer over the tokens (causal), the rows of an image, or the steps of a series."""
    check_counts(width=width, layers=layers, heads=heads)
    check_dropout(dropout)
    if width % heads:
        raise ModelError(
            f"width={width} is no multiple of heads={heads}: choose, say, width={heads * max(1, width // heads)}"
        )
    return Transformer(interface, width, layers, heads, dropout)


def sequence_shape(interface: Interface) -> tuple[int, int]:
    """(time, features): the rows of an image (channels, height, width), the steps of (time, features) or of (time,)."""
    shape = interface.shape
    if len(shape) == 3:
        return shape[1], shape[0] * shape[2]
    if len(shape) == 2:
        return shape[0], shape[1]
    if len(shape) == 1:
        return shape[0], 1
    raise ModelError(f"a sequence has 1 to 3 axes, the task gives {shape}: use mlp")


def as_sequence(x: Tensor, interface: Interface) -> Tensor:
    """(batch, *shape) as (batch, time, features), in the order of `sequence_shape`."""
    if len(interface.shape) == 3:
        return x.transpose(1, 2).flatten(2)  # (batch, height, channels * width)
    return x if len(interface.shape) == 2 else x.unsqueeze(-1)


def _normal(layer: nn.Linear, std: float) -> None:
    nn.init.normal_(layer.weight, std=std)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
