"""The coordinate check: flat in the maximal update parametrisation, and not in the standard one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import steelyard as sy
from steelyard.errors import ModelError, RecipeError, UnknownNameError
from steelyard.learn.coordinates import coordinate_check

WIDTHS = (64, 256, 1024)


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def words(*shape: int) -> Tensor:
    return torch.randint(0, 20, shape, generator=torch.Generator().manual_seed(0))


def loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs.flatten(0, -2), targets.flatten())


def mlp(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(20, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Dropout(), nn.Linear(width, 10)
    )


def cnn(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, width, 3, 2),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, 2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(width, 10),
    )


class Recurrent(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed, self.rnn, self.head = (
            nn.Embedding(20, width),
            nn.GRU(width, width, batch_first=True),
            nn.Linear(width, 20),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.embed(x))[0])


def transformer(width: int) -> nn.Module:
    return sy.model("transformer", sy.Interface((8,), 20, 20), width=width, layers=1)


TASKS = {
    "mlp": (mlp, noise(32, 20), words(32) % 10),
    "cnn": (cnn, noise(16, 1, 8, 8), words(16) % 10),
    "gru": (Recurrent, words(8, 6), words(8, 6)),
    "transformer": (transformer, words(4, 8), words(4, 8)),
}


@pytest.mark.parametrize(
    ("name", "optimizer", "rate"),
    [
        ("mlp", "sgd", 0.03),
        ("mlp", "adam", 3e-3),
        ("cnn", "adam", 3e-3),
        ("gru", "adam", 3e-3),
        ("transformer", "adam", 3e-3),
    ],
)
def test_what_steps_change_does_not_depend_on_width(name: str, optimizer: str, rate: float) -> None:
    factory, inputs, targets = TASKS[name]
    widths = WIDTHS if name == "mlp" else (64, 128, 512)
    tables = [
        coordinate_check(
            factory, widths, (inputs, targets), loss, optimizer=optimizer, rate=rate, seeds=2, parametrisation=which
        )
        for which in ("mup", "standard")
    ]
    slopes = [[abs(s) for s in table.column("slope") if s is not None] for table in tables]
    assert max(slopes[0]) < 0.2
    assert max(slopes[1]) > 0.4
    assert tables[0].meta["verdict"] == "flat"
    assert tables[1].meta["verdict"] == "grows"
    assert tables[0].column("layer")[-1] == "(output)"
    sizes = tables[0].meta["sizes"]
    assert len(sizes.rows) == len(widths) * len(tables[0].rows)
    assert min(sizes.column("change")) > 0


def test_it_notices_an_output_that_shapes_do_not_show() -> None:
    class Tied(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.embed, self.hidden = nn.Embedding(20, width), nn.Linear(width, width)

        def forward(self, x: Tensor) -> Tensor:
            return functional.linear(functional.relu(self.hidden(self.embed(x))), self.embed.weight)

    table = coordinate_check(Tied, WIDTHS, (words(8, 6), words(8, 6)), loss, rate=3e-3, seeds=2)
    assert table.meta["verdict"] == "grows"
    assert table.meta["steepest"] == "(output)"


def test_the_same_twice_and_the_global_generator_is_left_alone() -> None:
    factory, inputs, targets = TASKS["mlp"]
    torch.manual_seed(1)
    first = coordinate_check(factory, (16, 32), (inputs, targets), loss, seeds=1)
    assert torch.equal(torch.rand(2), torch.rand(2, generator=torch.Generator().manual_seed(1)))
    assert first.rows == coordinate_check(factory, (16, 32), (inputs, targets), loss, seeds=1).rows
    assert first.column("standard error") == [None] * len(first.rows)


def test_it_can_be_drawn() -> None:
    from steelyard.report.plots import Line

    factory, inputs, targets = TASKS["mlp"]
    table = coordinate_check(factory, (16, 32), (inputs, targets), loss, seeds=1)
    picture = Line(table.meta["sizes"], "width", ("change",), by="layer", log_x=True, log_y=True)
    assert len(picture.figure()["data"]) == len(table.rows)


def test_errors() -> None:
    factory, inputs, targets = TASKS["mlp"]
    batch = inputs, targets
    with pytest.raises(RecipeError, match="at least two widths"):
        coordinate_check(factory, [64, 64], batch, loss)
    with pytest.raises(UnknownNameError, match="did you mean 'standard'"):
        coordinate_check(factory, [64, 128], batch, loss, parametrisation="standart")
    with pytest.raises(ModelError, match=r"at width 16 is not finite: lower the rate"):
        coordinate_check(factory, [16, 32], batch, lambda o, t: ((o - 1) ** 4).mean(), optimizer="sgd", rate=1e9)
    with pytest.raises(ModelError, match="the loss fails"):
        coordinate_check(factory, [16, 32], batch, lambda o, t: 1 / 0)
