"""Residual blocks that go: only those, the least missed first, and a file from which the original becomes shallow."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from steelyard import formats
from steelyard.errors import ModelError
from steelyard.formats.module import from_module, into_module
from steelyard.graph.skip import drop_, dropped
from steelyard.learn.blocks import blocks, prune_blocks_
from steelyard.learn.run import train
from steelyard.learn.task import build_seeded, first_batch
from steelyard.learn.tasks import task


class Block(nn.Module):
    def __init__(self, scale: float):
        super().__init__()
        self.up, self.down = nn.Linear(32, 16), nn.Linear(16, 32)
        with torch.no_grad():
            self.down.weight *= scale
            self.down.bias *= scale

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.down(torch.relu(self.up(x))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.plain = nn.Linear(64, 32), nn.Linear(32, 32)
        self.blocks = nn.Sequential(Block(3.0), Block(0.01), Block(3.0), Block(0.1))
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.plain(torch.relu(self.embed(x.flatten(1))))))


DIGITS = task("digits", model="mlp", augment=False)
DATA = DIGITS.with_model(Net)


def test_blocks_are_what_adds_to_what_it_is_given():
    assert blocks(build_seeded(DATA), DATA) == [f"blocks.{i}" for i in range(4)]
    transformer = task("digits", model="transformer", augment=False)
    assert blocks(build_seeded(transformer).eval(), transformer) == ["blocks.0", "blocks.1"]
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    torchs = DIGITS.with_model(
        lambda: nn.Sequential(
            nn.Flatten(1), nn.Unflatten(1, (8, 8)), nn.TransformerEncoder(layer, 3), nn.Flatten(), nn.Linear(64, 10)
        )
    )
    assert blocks(build_seeded(torchs).eval(), torchs) == ["2.layers.1", "2.layers.2"]  # it reads its first one


def test_what_does_least_goes_first_and_the_file_makes_the_original_shallow(tmp_path):
    model = train(DATA, build_seeded(DATA), epochs=1, rate=1e-4, progress=False).model
    table = prune_blocks_(model, DATA, 2)
    assert set(table.column("block")) == {"blocks.1", "blocks.3"}
    assert dropped(model) == ["blocks.1", "blocks.3"]
    x = first_batch(DATA, "test").inputs
    path = tmp_path / "shallow.safetensors"
    formats.write(from_module(model), path)
    assert not any(name.startswith(("blocks.1.", "blocks.3.")) for name in formats.open(path))
    again = Net()
    with pytest.raises(ModelError, match="missing"):
        into_module(formats.open(path), again)
    into_module(formats.open(path), again, resize=True)
    assert torch.equal(again.eval()(x), model.eval()(x))
    other = Net()
    with pytest.raises(ModelError, match="do not match"):
        into_module(formats.open(path).select(lambda item: item.name != "head.bias"), other, resize=True)
    assert dropped(other) == []
    assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in model.parameters())


def test_what_is_wrong_is_named_and_nothing_goes():
    model = build_seeded(DATA)
    with pytest.raises(ModelError, match="has 4 residual blocks, and 5 cannot go: take at most 4"):
        prune_blocks_(model, DATA, 5)
    with pytest.raises(ModelError, match="no block 'nowhere'"):
        drop_(model, ["blocks.1", "nowhere"])
    assert dropped(model) == []


def test_a_model_without_residual_blocks_says_what_else_there_is() -> None:
    made = task("breast-cancer")
    with pytest.raises(ModelError, match=r"has 0 residual blocks, and 1 cannot go: take units instead, by a fraction"):
        prune_blocks_(made.build(), made, 1)
