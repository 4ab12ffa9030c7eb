"""The built-in transformer, and what models of sequences share.

Decides the architecture and its start. Tokens in give an output for every position (and no position sees a later
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

Positions = Literal["learned", "rotary"]


class Attention(nn.Module):
    """Multi-head scaled dot-product attention: softmax(q k^T / sqrt(width)) v (Vaswani et al. 2017)."""

    def __init__(self, width: int, heads: int, causal: bool):
        super().__init__()
        self.depth, self.causal = width // heads, causal  # of a head: the number of heads follows from the weights
        self.query, self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, turns: Tensor | None = None) -> Tensor:  # (batch, time, width)
        batch, time, _ = x.shape
        q, k, v = (
            layer(x).view(batch, time, -1, self.depth).transpose(1, 2)  # (batch, heads, time, depth)
            for layer in (self.query, self.key, self.value)
        )
        if turns is not None:
            q, k = rotated(q, turns), rotated(k, turns)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        result: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, time, -1))
        return result


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, width: int, heads: int, causal: bool, dropout: float):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, causal)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, turns: Tensor | None = None) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x), turns))
        result: Tensor = x + self.dropout(self.down(functional.gelu(self.up(self.norm2(x)))))
        return result


class Transformer(nn.Module):
    """Embedding (or a linear map) and positions, blocks, a norm, and a head on each position or on the mean."""

    def __init__(self, interface: Interface, width: int, layers: int, heads: int, dropout: float, positions: Positions):
        super().__init__()
        self.interface = interface
        tokens = interface.vocabulary > 0
        time, inputs = sequence_shape(interface)
        self.embed = nn.Embedding(interface.vocabulary, width) if tokens else nn.Linear(inputs, width)
        self.positions = nn.Parameter(torch.empty(time, width)) if positions == "learned" else None
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, heads, tokens, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, interface.outputs)
        self._start(layers)

    def forward(self, x: Tensor) -> Tensor:  # (batch, time) tokens, or (batch, *shape) numbers
        tokens = self.interface.vocabulary > 0
        x = self.embed(x if tokens else as_sequence(x, self.interface))
        turns = None
        if self.positions is None:
            head = self.blocks[0].attention.depth
            turns = angles(x.shape[1], head, x.device)
        elif x.shape[1] > len(self.positions):
            raise ModelError(f"the transformer was built for {len(self.positions)} positions, given are {x.shape[1]}")
        else:
            x = x + self.positions[: x.shape[1]]
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x, turns)
        x = self.norm(x)
        logits: Tensor = self.head(x if tokens else x.mean(1))
        return logits

    def _start(self, layers: int) -> None:
        """Normal with 0.02; what is added to the residual stream starts smaller, by sqrt(2 layers) (GPT-2)."""
        if self.positions is not None:
            nn.init.normal_(self.positions, std=0.02)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                residual = name.endswith(("attention.out", "down"))
                normal(module, 1 / math.sqrt(module.in_features) / (math.sqrt(2 * layers) if residual else 1.0))
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)


def transformer(
    interface: Interface,
    *,
    width: int = 64,
    layers: int = 2,
    heads: int = 4,
    dropout: float = 0.0,
    positions: Positions | None = None,
    tied: bool = False,
) -> nn.Module:
    """A pre-norm transformer over the tokens (causal), the rows of an image, or the steps of a series.

    Args:
        interface: what goes in and out.
        width: of the residual stream; the hidden layers between are four times as wide.
        layers: blocks of attention and a hidden layer, one after the other.
        heads: of each attention; a divisor of the width.
        dropout: the probability, on the embedding and on what each half of a block adds.
        positions: "learned" vectors that are added to the embedding, or "rotary": queries and keys are turned by
            their position, so that attention knows distances (Su et al. 2021, RoFormer). None: rotary for tokens, of
            which it learns in much less time (bench/text), if the width of a head is even; learned for numbers.
        tied: the head's weights are those of the embedding (Press & Wolf 2017); tokens only.

    Raises UnknownNameError for positions of another kind, RecipeError for a number that cannot be, ModelError for
    options that do not go together.
    """
    check_counts(width=width, layers=layers, heads=heads)
    check_dropout(dropout)
    if positions is None:
        positions = "rotary" if interface.vocabulary and width % (2 * heads) == 0 else "learned"
    if positions not in get_args(Positions):
        raise UnknownNameError("kind of positions", str(positions), get_args(Positions))
    if width % heads:
        raise ModelError(
            f"width={width} is no multiple of heads={heads}: choose, say, width={heads * max(1, width // heads)}"
        )
    if positions == "rotary" and width // heads % 2:
        raise ModelError(f"positions='rotary' turns pairs, and a head has {width // heads} of {width=}: choose an even "
                         "number for each head")  # fmt: skip
    if interface.carried:
        raise ModelError("the training batches carry a state on, and a transformer has none: use rnn, or carry=False")
    check_tied(tied, interface)
    net = Transformer(interface, width, layers, heads, dropout, positions)
    if tied:
        share(net.head, net.embed)
    return net


def angles(
    time: int,
    size: int,  # of a head
    device: torch.device,
) -> Tensor:
    """Cosines and sines of rotary positions: pair i of a head turns by t / 10000^(2 i / size) at time t.

    Returns (2, time, size / 2).
    """
    rates = 10_000.0 ** (-torch.arange(0, size, 2, device=device) / size)
    angle = torch.arange(time, device=device)[:, None] * rates
    return torch.stack([angle.cos(), angle.sin()])


def rotated(
    x: Tensor,  # (batch, heads, time, size)
    turns: Tensor,  # (2, time, size / 2)
) -> Tensor:
    """Each pair (x_i, x_{i + size/2}) turned by its angle: scalar products depend on distances of positions alone."""
    cos, sin = turns.to(x.dtype)
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)


def check_tied(tied: bool, interface: Interface) -> None:
    """Raise ModelError for a tied head where nothing, or something else, is embedded."""
    if tied and interface.vocabulary != interface.outputs:
        found = f"{interface.vocabulary} tokens and {interface.outputs} outputs" if interface.vocabulary else "numbers"
        raise ModelError(f"tied=True makes the head of the embedding, and the task gives {found}: leave it out")


def share(head: nn.Linear, embed: nn.Module) -> None:
    """The head's weights become those of the embedding, too, as the head starts."""
    embed.weight = head.weight


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


def normal(layer: nn.Linear, std: float) -> None:
    nn.init.normal_(layer.weight, std=std)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
