"""Weights of which gradients tell less: computed by a parametrization, or tables that are buffers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from steelyard import formats
from steelyard.errors import ModelError
from steelyard.formats.module import into_module
from steelyard.learn.imitation import imitation
from steelyard.learn.levels import levelled
from steelyard.shrinking.within import shrink


class _Net(nn.Module):
    def __init__(self, first: Callable[[nn.Module], nn.Module], table: bool = False):
        super().__init__()
        self.a, self.h = first(nn.Linear(8, 32)), nn.Linear(32, 4)
        self.register_buffer("table", torch.randn(32, 32) if table else None)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).relu()
        return self.h(y if self.table is None else y @ self.table)


NETS: dict[str, Callable[[], nn.Module]] = {
    "weight_norm": lambda: _Net(weight_norm),
    "spectral_norm": lambda: _Net(spectral_norm),
    "table": lambda: _Net(lambda layer: layer, table=True),
}


@pytest.mark.parametrize("epochs", [0, 1])
@pytest.mark.parametrize("name", NETS)
def test_it_is_shrunk_within_the_tolerance(name: str, epochs: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, other = NETS[name]().eval(), NETS[name]().eval()
    batches = [torch.randn(32, 8) for _ in range(12)]
    before = model(batches[0])
    file = tmp_path / "small.safetensors"
    row = shrink(model, imitation(model, batches, "cosine"), file, tolerance=0.03, epochs=epochs).proof.rows[0]
    assert row["bytes"] < row["bytes before"]
    assert torch.equal(model(batches[0]), before)
    into_module(formats.open(file), other)
    assert torch.cosine_similarity(other(batches[0]), before).mean() > 0.95


def test_who_has_nothing_but_parametrizations_is_told() -> None:
    layer = weight_norm(nn.Linear(8, 32))
    with pytest.raises(ModelError, match="parametrizations compute is left out: remove them"):
        levelled(layer)
    task = imitation(layer, [torch.randn(32, 8) for _ in range(12)], "cosine")
    with pytest.raises(ModelError, match=r"remove them.*; or shrink it without training, epochs=0"):
        shrink(layer, task, tolerance=0.03, epochs=1, say=_unsaid)


def _unsaid(what: str, _share: float) -> None:
    assert "making" not in what, "before the search"
