"""Block by block: later layers are fitted to what earlier ones have become, one block's evidence at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from steelyard.core.weights import Weights
from steelyard.edit.gptq import Gptq
from steelyard.errors import ModelError, UnknownNameError
from steelyard.formats.module import from_module, into_module
from steelyard.learn import evidence as measured
from steelyard.learn.blockwise import blockwise
from steelyard.learn.evidence import score


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, hidden_states: Tensor, scale: float = 1.0) -> tuple[Tensor, None]:
        return hidden_states + scale * self.down(self.up(hidden_states).relu()), None


class Net(nn.Module):
    def __init__(self, keyword: bool = False) -> None:
        super().__init__()
        self.keyword = keyword
        self.embed = nn.Embedding(11, 16)
        self.layers = nn.ModuleList(Block() for _ in range(4))
        self.head = nn.Linear(16, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x, _ = layer(hidden_states=x, scale=0.7) if self.keyword else layer(x, scale=0.7)
        return self.head(x)


def batches(count: int = 12) -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    return [torch.randint(11, (4, 9), generator=random) for _ in range(count)]


def rounded(evidence: Weights) -> Gptq:
    return Gptq(3, by=evidence)


@pytest.mark.parametrize("keyword", [False, True])
def test_the_second_block_sees_what_the_first_has_become(keyword: bool) -> None:
    torch.manual_seed(1)
    net = Net(keyword).train()
    state = {n: v.clone() for n, v in net.state_dict().items()}
    found = blockwise(net, batches(), rounded)
    assert all(torch.equal(v, state[n]) for n, v in net.state_dict().items())
    assert net.training
    assert list(found) == list(from_module(net))
    assert dict(found.ties) == {"head.weight": "embed.weight"}
    matrices = {n for n, item in found.items() if len(item.spec.shape) == 2}
    assert matrices == {n for n, item in found.items() if item.scheme is not None}
    # by hand: the model with its first block compressed gives the evidence of the second, and so on for the last
    so_far = dict(from_module(net).arrays())
    for place in ("layers.0", "layers.1", "layers.2", "layers.3", "embed"):
        other = Net(keyword)
        into_module(Weights.of(so_far, {"head.weight": "embed.weight"}), other)
        h = score(other, batches(), "hessian", where=f"{place}.*weight")
        by_hand = rounded(Weights([h[n] for n in h], meta={}))(
            from_module(net).select(lambda w, p=place: w.name.startswith(p))
        )
        for name, item in by_hand.items():
            if len(item.spec.shape) == 2:
                codes = found[name].array()
                assert np.mean(np.abs(codes - item.array()) < 1e-5) > 0.97, name
                so_far[name] = codes


def test_in_memory_is_the_evidence_of_one_block(monkeypatch) -> None:
    sizes = []
    before = measured.Inputs.__init__

    def note(self, parameters, **settings):
        sizes.append(sorted(parameters))
        before(self, parameters, **settings)

    monkeypatch.setattr(measured.Inputs, "__init__", note)
    told = []
    blockwise(Net(), batches(2), rounded, progress=lambda done, every: told.append((done, every)))
    assert sizes == [["down.weight", "up.weight"]] * 4 + [["embed.weight"]]
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_a_method_that_fails_leaves_the_model_as_it_was() -> None:
    net = Net().train()
    state = {n: v.clone() for n, v in net.state_dict().items()}

    def fails(evidence: Weights) -> Gptq:
        if "up.weight" not in evidence:
            raise ZeroDivisionError
        return rounded(evidence)

    with pytest.raises(ZeroDivisionError):
        blockwise(net, batches(2), fails)
    assert all(torch.equal(v, state[n]) for n, v in net.state_dict().items())
    assert net.training
    assert net(batches(1)[0]).shape == (4, 9, 11)
    assert "forward" not in net.layers[0].__dict__


def test_what_it_cannot_do_is_said() -> None:
    with pytest.raises(ModelError, match="no list of blocks"):
        blockwise(nn.Linear(2, 2), [torch.ones(1, 2)], rounded)
    with pytest.raises(UnknownNameError, match="did you mean 'layers'"):
        blockwise(Net(), batches(1), rounded, blocks="layer")
    with pytest.raises(ModelError, match="no batches"):
        blockwise(Net(), [], rounded)
    shared = Net()
    shared.layers[1] = shared.layers[0]
    with pytest.raises(ModelError, match="share weights"):
        blockwise(shared, batches(1), rounded)
