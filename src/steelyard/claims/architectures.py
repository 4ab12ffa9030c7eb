"""Twelve small architectures, each with a batch: what a start must be right for."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from steelyard.learn.gates import depths

WIDTH, SAMPLES = 64, 128
MEASURED = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd, nn.RNNBase)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + 1


def words(*shape: int) -> Tensor:
    return torch.randint(50, shape, generator=torch.Generator().manual_seed(0))


class Reversed(nn.Module):
    """Registered in the reverse of the order of execution."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        for layer in reversed(self.layers):
            x = functional.relu(layer(x))
        return x


class Shared(nn.Module):
    """One layer three times, between two others."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared, self.head = nn.Linear(20, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for _ in range(3):
            x = torch.tanh(self.shared(x))
        return self.head(x)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH)) for _ in range(8)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, groups=4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(16 * 49, 10),
    )


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.rnn = kind(12, 32, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.head = nn.Linear(WIDTH, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0])


class Vision(nn.Module):
    """A small vision transformer: patches, two encoder layers, mean."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 32, 4, stride=4)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True, activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.patches(x).flatten(2).transpose(1, 2)).mean(1))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.middle = nn.Conv2d(2, 8, 3, stride=2, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.up, self.out = nn.ConvTranspose2d(8, 8, 2, stride=2, groups=2), nn.Conv2d(10, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(functional.silu(self.middle(functional.silu(self.down(x)))))
        return self.out(torch.cat([x, y], 1))


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image, self.table = nn.Linear(30, WIDTH), nn.Linear(5, WIDTH)
        self.both = nn.Bilinear(WIDTH, WIDTH, 16)

    def forward(self, image: Tensor, table: Tensor) -> Tensor:
        return self.both(torch.tanh(self.image(image)), functional.gelu(self.table(table)))


class Tied(nn.Module):
    """A language model whose head is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.hidden = nn.Embedding(50, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(functional.relu(self.hidden(self.embed(x))))


def series() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(4, 16, 5), nn.ELU(), nn.Conv1d(16, 16, 5, dilation=2), nn.ELU(), nn.Flatten(), nn.Linear(16 * 38, 2)
    )


ZOO: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...]]] = {
    "reverse-registered MLP": (Reversed, (noise(SAMPLES, WIDTH),)),
    "weight-shared": (Shared, (noise(SAMPLES, 20),)),
    "residual": (Residual, (noise(SAMPLES, WIDTH),)),
    "CNN": (cnn, (noise(SAMPLES, 3, 16, 16),)),
    "LSTM": (lambda: Recurrent(nn.LSTM), (noise(SAMPLES, 15, 12),)),
    "GRU": (lambda: Recurrent(nn.GRU), (noise(SAMPLES, 15, 12),)),
    "MHA": (Attention, (noise(SAMPLES, 9, WIDTH),)),
    "small ViT": (Vision, (noise(SAMPLES, 1, 16, 16),)),
    "U-Net": (UNet, (noise(SAMPLES, 2, 16, 16),)),
    "multi-input": (TwoInputs, (noise(SAMPLES, 30), noise(SAMPLES, 5, seed=1))),
    "tied embedding": (Tied, (words(SAMPLES, 12),)),
    "Conv1d": (series, (noise(SAMPLES, 4, 50),)),
}


def standard_deviations(model: nn.Module, batch: tuple[Tensor, ...]) -> dict[str, float]:
    """Of the output of every executed layer, all calls together; of recurrent layers, of the sums into gates.

    Measured by hooks that only look; dropout is off.
    """
    seen: dict[str, list[float]] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: Any, output: Any) -> None:
            values = torch.cat([d.sums() for d in depths(layer, args)]) if isinstance(layer, nn.RNNBase) else output
            seen.setdefault(name, []).append(float(values.var(unbiased=False)))

        return hook

    handles = [m.register_forward_hook(watch(n)) for n, m in model.named_modules() if isinstance(m, MEASURED)]
    for layer in model.modules():
        layer.training = not isinstance(layer, nn.Dropout)
    try:
        with torch.no_grad():
            model(*batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: math.sqrt(statistics.fmean(variances)) for name, variances in seen.items()}
