"""The built-in recurrent network: plain, LSTM or GRU cells, and the starts by which they keep what they have seen.

Decides the architecture, its start, and how a state is carried from one training batch to the next. Tokens in give an
output for every position; numbers in give one output for the whole sequence. The last layer is called ``head``.
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from steelyard.errors import ModelError, UnknownNameError
from steelyard.learn.options import check_counts, check_dropout
from steelyard.learn.sequence import as_sequence, check_tied, normal, sequence_shape, share
from steelyard.learn.task import Interface

Cell = Literal["rnn", "rnn-relu", "lstm", "gru"]
RecurrentStart = Literal["orthogonal", "identity", "torch"]
State = Tensor | tuple[Tensor, ...]  # each (layers, batch, hidden)


class Recurrent(nn.Module):
    """Embedding (tokens only), recurrent layers, and a linear head on every state, or on the last one."""

    def __init__(self, interface: Interface, cell: Cell, hidden: int, layers: int, dropout: float):
        super().__init__()
        self.interface = interface
        tokens = interface.vocabulary > 0
        self.embed = nn.Embedding(interface.vocabulary, hidden) if tokens else None
        kind: Any = {"lstm": nn.LSTM, "gru": nn.GRU}.get(cell, nn.RNN)
        options = {"nonlinearity": "relu"} if cell == "rnn-relu" else {}
        inputs = hidden if tokens else sequence_shape(interface)[1]
        between = dropout if layers > 1 else 0.0
        self.recurrent = kind(inputs, hidden, layers, batch_first=True, dropout=between, **options)
        self.dropout = nn.Dropout(dropout)
        self.carried = Carried() if interface.carried else None
        self.head = nn.Linear(hidden, interface.outputs)

    def forward(
        self,
        x: Tensor,  # (batch, time) tokens, or (batch, *shape) numbers
        fresh: Tensor | None = None,  # (batch,): the rows that do not go on where the training batch before ended
    ) -> Tensor:
        x = as_sequence(x, self.interface) if self.embed is None else self.dropout(self.embed(x))
        carried = self.carried if self.training and fresh is not None else None
        before = None if carried is None or fresh is None else carried.state_for(fresh)
        states, after = self.recurrent(x, before)  # (batch, time, hidden)
        if carried is not None:
            carried.keep(after)
        logits: Tensor = self.head(self.dropout(states if self.embed is not None else states[:, -1]))
        return logits


class Carried(nn.Module):
    """The state with which a training batch ended; it is part of a checkpoint, and no weight."""

    def __init__(self) -> None:
        super().__init__()
        self._state: State | None = None

    def state_for(self, fresh: Tensor) -> State | None:
        """The state to go on with, zero in the rows that are fresh; None (zeros) if all are, or none fits."""
        state = self._state
        if state is None or bool(fresh.all()):
            return None
        parts = (state,) if isinstance(state, Tensor) else state
        if parts[0].shape[1] != len(fresh):
            raise ModelError(f"a batch of {len(fresh)} rows follows one of {parts[0].shape[1]} and says that it goes "
                             "on with it: carried batches have the same number of rows")  # fmt: skip
        parts = tuple(part.masked_fill(fresh.view(1, -1, 1), 0.0) for part in parts)
        return parts[0] if isinstance(state, Tensor) else parts

    def keep(self, state: State) -> None:
        """The batch ended so; no gradient goes back over its end."""
        self._state = state.detach() if isinstance(state, Tensor) else tuple(part.detach() for part in state)

    def get_extra_state(self) -> State | None:
        """What goes on with `set_extra_state`."""
        return self._state

    def set_extra_state(self, state: State | None) -> None:
        """Go on with what `get_extra_state` gave."""
        self._state = state


def rnn(
    interface: Interface,
    *,
    cell: Cell = "lstm",
    hidden: int = 128,
    layers: int = 1,
    dropout: float = 0.0,
    tied: bool = False,
    start: RecurrentStart = "orthogonal",
    memory: int | None = None,
) -> nn.Module:
    """A recurrent network over the tokens, the rows of an image, or the steps of a series.

    Args:
        interface: what goes in and out. Where batches are ``carried``, the model is called with (x, fresh), and in
            training each row that is not fresh goes on with the state in which the row before ended: truncated
            backpropagation through time (Williams & Peng 1990).
        cell: "rnn" (tanh), "rnn-relu", "lstm" or "gru".
        hidden: units in each layer.
        layers: one on top of the other.
        dropout: the probability, on the embedding, between layers and before the head (Zaremba et al. 2014).
        tied: the head's weights are those of the embedding (Press & Wolf 2017); tokens only.
        start: the recurrent matrices of every gate are "orthogonal" (Saxe et al. 2014), the "identity" (Le et al. 2015,
            IRNN: with inputs of standard deviation 0.001), or uniform in -+ 1 / sqrt(hidden) as "torch" starts them.
            Except in the last, biases are 0, and 1 in the forget gate of an LSTM (Jozefowicz et al. 2015).
        memory: chrono initialisation (Tallec & Ollivier 2018) for dependencies over so many steps: the bias of what
            keeps the state is log U(1, memory - 1), in an LSTM that of the input gate its negative. Gates only.

    Raises UnknownNameError for a cell or a start that is not there, RecipeError for a number that cannot be,
    ModelError for options that do not go together.
    """
    check_counts(hidden=hidden, layers=layers)
    check_dropout(dropout)
    for what, value, known in (("cell", cell, get_args(Cell)), ("start", start, get_args(RecurrentStart))):
        if value not in known:
            raise UnknownNameError(what, str(value), known)
    check_tied(tied, interface)
    if memory is not None and (cell not in ("lstm", "gru") or not isinstance(memory, int) or memory < 3):
        raise ModelError(f"memory={memory!r} with the cell {cell!r}: expected a number of steps, 3 or more, "
                         "and the cell 'lstm' or 'gru', whose gates it opens")  # fmt: skip
    net = Recurrent(interface, cell, hidden, layers, dropout)
    if start != "torch":
        _start(net.recurrent, start)
    if memory is not None:
        _chrono(net.recurrent, memory)
    normal(net.head, 1 / math.sqrt(hidden))
    if tied:
        share(net.head, net.embed)
    return net


def _start(layers: nn.RNNBase, start: RecurrentStart) -> None:
    """Each gate's matrices by `start`, biases 0, and 1 in the forget gates of an LSTM."""
    hidden = layers.hidden_size
    for name, parameter in layers.named_parameters():
        if not name.startswith("weight"):
            nn.init.zeros_(parameter)
            if isinstance(layers, nn.LSTM) and "_ih_" in name:
                parameter.data[hidden : 2 * hidden] = 1.0
            continue
        for gate in parameter.split(hidden):
            if start == "identity":
                nn.init.eye_(gate.data) if "_hh_" in name else nn.init.normal_(gate.data, std=0.001)
            else:
                (nn.init.orthogonal_ if "_hh_" in name else nn.init.xavier_uniform_)(gate.data)


@torch.no_grad()
def _chrono(layers: nn.RNNBase, memory: int) -> None:
    """Biases with which units keep the state for 1 to `memory` steps. torch adds two biases: the second is zero."""
    hidden = layers.hidden_size
    for name, bias in layers.named_parameters():
        if not name.startswith("bias"):
            continue
        gates = bias.view(-1, hidden)  # LSTM: input, forget, cell, output; GRU: reset, update (keeps), new
        keeping = torch.empty(hidden).uniform_(1, memory - 1).log()
        gates[1] = keeping if "_ih_" in name else 0.0
        if isinstance(layers, nn.LSTM):
            gates[0] = -keeping if "_ih_" in name else 0.0
