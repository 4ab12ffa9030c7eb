"""Other models, data, optimizers and faults than those of zoo.py, with which nothing of the watch was chosen.

Written before the watch had seen any of it. What makes a training healthy is that its loss falls; `check` says so
without the watch: python bench/watch_faults/held_out.py
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import zoo
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, load_wine
from torch import Tensor, nn
from torch.nn import functional
from zoo import Batch, Job

SHIFT = 0  # of all seeds
TEXT = " ".join((load_wine().DESCR + load_diabetes().DESCR).split())[:6000]
KNOWN = sorted(set(TEXT))
VOCABULARY = len(KNOWN)
TIME = 24
PIECE = 12  # of the sequences that are to be reversed
SYMBOLS = 11  # in them; and one that begins the answer

square = functional.mse_loss
cross = zoo.loss_of


# --- data


def tabular(name: str) -> Batch:
    data: Any = {"breast cancer": load_breast_cancer, "diabetes": load_diabetes}[name]()
    x = torch.tensor(data.data, dtype=torch.float32)
    x = (x - x.mean(0)) / x.std(0)
    if name == "breast cancer":
        return x, torch.tensor(data.target)
    y = torch.tensor(data.target, dtype=torch.float32)
    return x, ((y - y.mean()) / y.std()).unsqueeze(1)


def pictures() -> Batch:
    data = load_digits()
    return torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 8 - 1, torch.tensor(data.target)


DIGITS, CANCER, DIABETES = pictures(), tabular("breast cancer"), tabular("diabetes")


def rows(x: Tensor, y: Tensor, size: int, seed: int) -> Iterator[Batch]:
    random = torch.Generator().manual_seed(seed)
    while True:
        chosen = torch.randint(len(x), (size,), generator=random)
        yield x[chosen], y[chosen]


def noisy(size: int, seed: int) -> Iterator[Batch]:
    """Digits with noise, and without."""
    random = torch.Generator().manual_seed(seed)
    for x, _ in rows(*DIGITS, size, seed):
        yield x + 0.5 * torch.randn(x.shape, generator=random), x


def themselves(size: int, seed: int) -> Iterator[Batch]:
    for x, _ in rows(*DIGITS, size, seed):
        yield x.flatten(1), (x.flatten(1) + 1) / 2


def characters(size: int, seed: int) -> Iterator[Batch]:
    ids = torch.tensor([KNOWN.index(c) for c in TEXT])
    random = torch.Generator().manual_seed(seed)
    while True:
        piece = ids[torch.randint(len(ids) - TIME - 1, (size, 1), generator=random) + torch.arange(TIME + 1)]
        yield piece[:, :-1], piece[:, 1:]


def reversing(size: int, seed: int) -> Iterator[Batch]:
    """Pairs of a sequence and the answer so far, (batch, 2, time), and the sequence backwards."""
    random = torch.Generator().manual_seed(seed)
    while True:
        given = torch.randint(SYMBOLS - 1, (size, PIECE), generator=random)
        answer = given.flip(1)
        begin = torch.full((size, 1), SYMBOLS - 1)
        yield torch.stack([given, torch.cat([begin, answer[:, :-1]], 1)], 1), answer


def categories(size: int, seed: int) -> Iterator[Batch]:
    """Six attributes of 12 kinds each, and a class that follows from them."""
    random = torch.Generator().manual_seed(seed)
    values = torch.randn(6, 12, generator=torch.Generator().manual_seed(3))
    while True:
        ids = torch.randint(12, (size, 6), generator=random)
        score = values[torch.arange(6), ids]
        yield ids + 12 * torch.arange(6), (score[:, :3].sum(1) > 0).long() + (score[:, 3:].sum(1) > 0).long()


def sums(size: int, seed: int) -> Iterator[Batch]:
    """The adding task: (batch, time, 2), and the sum of the two numbers that are marked."""
    random = torch.Generator().manual_seed(seed)
    while True:
        x = torch.zeros(size, 6, 2)
        x[:, :, 0] = torch.rand(size, 6, generator=random)
        for half in (0, 3):
            x[torch.arange(size), half + torch.randint(3, (size,), generator=random), 1] = 1.0
        yield x, (x[:, :, 0] * x[:, :, 1]).sum(1, keepdim=True) - 1


# --- models


class UNet(nn.Module):
    """Down twice and up twice, with what was seen on the way down laid beside; group normalisation."""

    def __init__(self, norm: bool = True):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 12, 3, padding=1), nn.Conv2d(12, 24, 3, 2, padding=1)
        self.third = nn.Conv2d(24, 32, 3, 2, padding=1)
        self.up1, self.up2 = nn.ConvTranspose2d(32, 24, 2, 2), nn.ConvTranspose2d(48, 12, 2, 2)
        self.norms = nn.ModuleList(nn.GroupNorm(4, c) if norm else nn.Identity() for c in (12, 24, 32))
        self.out = nn.Conv2d(24, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        a = functional.relu(self.norms[0](self.first(x)))
        b = functional.relu(self.norms[1](self.second(a)))
        c = functional.relu(self.norms[2](self.third(b)))
        d = torch.cat([functional.relu(self.up1(c)), b], 1)
        found: Tensor = self.out(torch.cat([functional.relu(self.up2(d)), a], 1))
        return found


class Basic(nn.Module):
    def __init__(self, given: int, made: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(given, made, 3, stride, 1, bias=False), nn.BatchNorm2d(made)
        self.conv2, self.bn2 = nn.Conv2d(made, made, 3, 1, 1, bias=False), nn.BatchNorm2d(made)
        self.short: nn.Module = nn.Identity()
        if stride > 1 or given != made:
            self.short = nn.Sequential(nn.Conv2d(given, made, 1, stride, bias=False), nn.BatchNorm2d(made))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        found: Tensor = (y + self.short(x)).relu()
        return found


class ResNet(nn.Module):
    def __init__(self, width: int = 12):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.stages = nn.Sequential(Basic(width, width, 1), Basic(width, 2 * width, 2), Basic(2 * width, 4 * width, 2))
        self.fc = nn.Linear(4 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.fc(self.stages(self.bn(self.stem(x)).relu()).mean((2, 3)))
        return found


class Separable(nn.Module):
    """Depthwise and pointwise convolutions with batch normalisation and ReLU6."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU6()]
        for a, b, stride in ((16, 24, 2), (24, 32, 1)):
            layers += [nn.Conv2d(a, a, 3, stride, 1, groups=a, bias=False), nn.BatchNorm2d(a), nn.ReLU6()]
            layers += [nn.Conv2d(a, b, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU6()]
        self.features, self.classifier = nn.Sequential(*layers), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.classifier(self.features(x).mean((2, 3)))
        return found


class Mixing(nn.Module):
    """Attention with one matrix for queries, keys and values, and the softmax written out."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.qkv, self.proj, self.heads = nn.Linear(width, 3 * width), nn.Linear(width, width), heads
        self.scale = (width // heads) ** -0.5

    def forward(self, x: Tensor) -> Tensor:
        b, t, w = x.shape
        q, k, v = self.qkv(x).reshape(b, t, 3, self.heads, w // self.heads).permute(2, 0, 3, 1, 4)
        weights = ((q @ k.transpose(-2, -1)) * self.scale).softmax(-1)
        found: Tensor = self.proj((weights @ v).transpose(1, 2).reshape(b, t, w))
        return found


class Encoder(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.ln1, self.ln2, self.attn = nn.LayerNorm(width), nn.LayerNorm(width), Mixing(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Dropout(0.1), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln1(x))
        found: Tensor = x + self.mlp(self.ln2(x))
        return found


class ViT(nn.Module):
    """Patches of 2x2 pixels, a class token, learned positions."""

    def __init__(self, width: int = 40, depth: int = 3):
        super().__init__()
        self.patch, self.token = nn.Conv2d(1, width, 2, 2), nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 17, width))
        self.layers = nn.ModuleList(Encoder(width, 4) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        for layer in self.layers:
            x = layer(x)
        found: Tensor = self.head(self.norm(x)[:, 0])
        return found


class Language(nn.Module):
    """Two layers of a recurrent cell with dropout between them; the head may share the table."""

    def __init__(self, cell: Any = nn.GRU, width: int = 40, tied: bool = False, vocabulary: int = VOCABULARY):
        super().__init__()
        self.table = nn.Embedding(vocabulary, width)
        nn.init.normal_(self.table.weight, std=0.3 if tied else 1.0)
        self.rnn = cell(width, width, num_layers=2, dropout=0.1, batch_first=True)
        self.norm, self.decode = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=not tied)
        if tied:
            self.decode.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.decode(self.norm(self.rnn(self.table(x))[0]))
        return found


class Causal(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(functional.pad(x, ((self.kernel_size[0] - 1) * self.dilation[0], 0)))


class Temporal(nn.Module):
    """Dilated causal convolutions over characters, with weight normalisation."""

    def __init__(self, width: int = 32):
        super().__init__()
        norm = nn.utils.parametrizations.weight_norm
        self.table = nn.Embedding(VOCABULARY, width)
        self.convs = nn.ModuleList(norm(Causal(width, width, 3, dilation=2**i)) for i in range(3))
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, x: Tensor) -> Tensor:
        x = self.table(x).transpose(1, 2)
        for conv in self.convs:
            x = x + functional.leaky_relu(conv(x), 0.1)
        found: Tensor = self.head(x.transpose(1, 2))
        return found


class Reversing(nn.Module):
    """torch's encoder and decoder with attention across; one table for both and for the head, if tied."""

    def __init__(self, width: int = 32, tied: bool = False):
        super().__init__()
        self.table = nn.Embedding(SYMBOLS, width)
        nn.init.normal_(self.table.weight, std=0.3)
        self.places = nn.Parameter(0.3 * torch.randn(PIECE, width))
        with warnings.catch_warnings(action="ignore"):  # torch says that its quick path is not taken
            self.core = nn.Transformer(width, 4, 1, 1, 64, 0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(width, SYMBOLS, bias=not tied)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        source, target = (self.table(part) + self.places for part in x.unbind(1))
        mask = nn.Transformer.generate_square_subsequent_mask(PIECE)
        found: Tensor = self.head(self.core(source, target, tgt_mask=mask, tgt_is_causal=True))
        return found


class Attributes(nn.Module):
    def __init__(self, more: int = 0):
        super().__init__()
        self.kinds = nn.Embedding(72 + more, 8)
        self.body = nn.Sequential(nn.Linear(48, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 3))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.body(self.kinds(x).flatten(1))
        return found


class Adding(nn.Module):
    def __init__(self, width: int = 32):
        super().__init__()
        self.rnn, self.out = nn.RNN(2, width, batch_first=True), nn.Linear(width, 1)
        nn.init.orthogonal_(self.rnn.weight_hh_l0)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.out(self.rnn(x)[0][:, -1])
        return found


class Mixer(nn.Module):
    """Rows and columns of the picture mixed in turn, without attention."""

    def __init__(self, width: int = 32, depth: int = 2):
        super().__init__()
        self.inputs = nn.Linear(8, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * depth))
        self.across = nn.ModuleList(nn.Linear(8, 8) for _ in range(depth))
        self.along = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inputs(x.squeeze(1))
        for i, (across, along) in enumerate(zip(self.across, self.along, strict=True)):
            x = x + functional.gelu(across(self.norms[2 * i](x).transpose(1, 2))).transpose(1, 2)
            x = x + functional.gelu(along(self.norms[2 * i + 1](x)))
        found: Tensor = self.head(x.mean(1))
        return found


def table(inputs: int, outputs: int, act: Callable[[], nn.Module], widths: tuple[int, ...] = (48, 48)) -> nn.Sequential:
    parts: list[nn.Module] = []
    for a, b in itertools.pairwise((inputs, *widths)):
        parts += [nn.Linear(a, b), act(), nn.Dropout(0.1)]
    return nn.Sequential(*parts, nn.Linear(widths[-1], outputs))


def autoencoder(act: Callable[[], nn.Module] = nn.ReLU, last: Callable[[], nn.Module] = nn.Sigmoid) -> nn.Sequential:
    parts: list[nn.Module] = []
    for a, b in itertools.pairwise((64, 40, 12, 40)):
        parts += [nn.Linear(a, b), act()]
    return nn.Sequential(*parts, nn.Linear(40, 64), last())


Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Kind:
    build: Callable[[], nn.Module]
    data: Callable[[int, int], Iterator[Batch]]  # (size, seed)
    loss: Loss
    factor: float = 1.0  # of the rates


of_digits, of_cancer, of_diabetes = (partial(rows, *data) for data in (DIGITS, CANCER, DIABETES))
KINDS: dict[str, Kind] = {
    "u-net": Kind(UNet, noisy, square),
    "u-net without norm": Kind(lambda: UNet(False), noisy, square),
    "resnet": Kind(ResNet, of_digits, cross),
    "separable": Kind(Separable, of_digits, cross),
    "vit": Kind(ViT, of_digits, cross),
    "mixer": Kind(Mixer, of_digits, cross),
    "gru text": Kind(Language, characters, cross),
    "lstm text, tied": Kind(lambda: Language(nn.LSTM, tied=True), characters, cross),
    "tcn text": Kind(Temporal, characters, cross),
    "reversing": Kind(Reversing, reversing, cross),
    "tabular, silu": Kind(lambda: table(30, 2, nn.SiLU), of_cancer, cross),
    "tabular regression": Kind(lambda: table(10, 1, nn.ELU, (32, 32)), of_diabetes, square),
    "categories": Kind(Attributes, categories, cross),
    "autoencoder": Kind(autoencoder, themselves, square),
    "tanh autoencoder": Kind(lambda: autoencoder(nn.Tanh, nn.Identity), themselves, square),
    "adding": Kind(Adding, sums, square),
}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "nadam": lambda p, k: torch.optim.NAdam(p, lr=2e-3 * k),
    "nesterov": lambda p, k: torch.optim.SGD(p, lr=0.03 * k, momentum=0.9, nesterov=True, weight_decay=1e-4),
    "adamw, 0.98": lambda p, k: torch.optim.AdamW(p, lr=3e-3 * k, betas=(0.9, 0.98), weight_decay=0.1),
    "adagrad": lambda p, k: torch.optim.Adagrad(p, lr=0.02 * k),
    "radam": lambda p, k: torch.optim.RAdam(p, lr=3e-3 * k),
    "adamax": lambda p, k: torch.optim.Adamax(p, lr=4e-3 * k),
}
SCHEDULES: dict[str, Callable[[int], float]] = {
    "constant": lambda _step: 1.0,
    "warm-up": lambda step: min((step + 1) / 20, 1.0),
    "cosine": lambda step: 0.5 * (1 + math.cos(math.pi * min(step / 220, 1.0))),
    "one-cycle": lambda step: min(step / 50 + 0.04, 1.0) * min((240 - step) / 150, 1.0),
}


def job(
    name: str, optimizer: str, seed: int, *, factor: float = 1.0, size: int = 32, schedule: str = "constant"
) -> Job:
    """A training that is healthy if `factor`, of its rate, is about 1."""
    seed += SHIFT
    torch.manual_seed(seed)
    kind = KINDS[name]
    model = kind.build()
    if optimizer == "nesterov" and kind.loss is square:
        factor *= 2.0  # a mean over many outputs has small gradients
    made = OPTIMIZERS[optimizer](model.parameters(), factor * kind.factor)
    about = f"{name}, {optimizer}, {schedule}, seed {seed}, batch {size}"
    found = Job(model, made, kind.data(size, seed), about, loss=kind.loss)
    peaks = [group["lr"] for group in made.param_groups]

    def pace(step: int) -> None:
        for group, peak in zip(made.param_groups, peaks, strict=False):
            group["lr"] = peak * SCHEDULES[schedule](step)

    if schedule != "constant":
        found.event = pace
    return found


def healthy() -> Iterator[Job]:
    """100 trainings without a fault."""
    pairs = itertools.cycle(itertools.product(OPTIMIZERS, KINDS))
    for seed, (optimizer, name) in zip(range(100), pairs, strict=False):
        factor, size = (0.5, 1.0, 1.5)[seed % 3], (16, 32, 48)[seed // 3 % 3]
        schedule = tuple(SCHEDULES)[seed // 2 % 4]
        yield job(name, optimizer, 20_000 + seed, factor=factor, size=size, schedule=schedule)


# --- faults


def also(found: Job, event: Callable[[int], None]) -> None:
    """Something more that happens before a step."""
    before = found.event

    def both(step: int) -> None:
        before(step)
        event(step)

    found.event = both


def planted() -> Iterator[Job]:
    for plant in PLANTS:
        for seed in range(8):
            yield plant(seed)


def adam(parameters: Any, k: float = 1.0) -> torch.optim.Optimizer:
    return OPTIMIZERS["nadam"](parameters, k)


def _dead(seed: int) -> Job:
    """From the start, or at once in the middle of a training; 70 % of the units of one layer."""
    name, layer, fed = (
        ("resnet", "stages.1.bn1", "stages.1.conv1"),
        ("u-net", "norms.1", "second"),
        ("separable", "features.10", "features.9"),
        ("autoencoder", "2", "2"),
        ("u-net without norm", "up1", "up1"),
        ("categories", "body.1", "body.0"),
        ("resnet", "bn", "stem"),
        ("autoencoder", "4", "4"),
    )[seed]
    found = job(name, ("nadam", "nesterov")[seed % 2], 21_000 + seed)
    norm = found.model.get_submodule(layer)

    def event(step: int) -> None:
        if step == (0, 25)[seed // 4]:
            with torch.no_grad():
                norm.bias[: math.ceil(0.7 * len(norm.bias))] -= 40.0

    also(found, event)
    found.fault, found.where = "dead ReLU", (layer, fed)
    return found


def _deep(act: Callable[[], nn.Module], depth: int, scale: Callable[[Tensor], Any], seed: int) -> nn.Sequential:
    torch.manual_seed(21_100 + seed + SHIFT)
    parts: list[nn.Module] = []
    for a, b in itertools.pairwise((64, *[40] * depth)):
        layer = nn.Linear(a, b)
        scale(layer.weight)
        nn.init.zeros_(layer.bias)
        parts += [layer, act()]
    return nn.Sequential(nn.Flatten(), *parts, nn.Linear(40, 10))


class Chain(nn.Module):
    """Residual blocks without normalisation."""

    def __init__(self, depth: int, gain: float, width: int = 32):
        super().__init__()
        self.inputs, self.head = nn.Linear(64, width), nn.Linear(width, 10)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        for block in self.blocks:
            nn.init.normal_(block.weight, std=gain / math.sqrt(width))

    def forward(self, x: Tensor) -> Tensor:
        x = self.inputs(x.flatten(1))
        for block in self.blocks:
            x = x + torch.relu(block(x))
        found: Tensor = self.head(x)
        return found


def _layers(model: nn.Module) -> tuple[str, ...]:
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d, nn.RNN)
    return tuple(n for n, m in model.named_modules() if isinstance(m, kinds))


def _times(model: nn.Module, layer: str, factor: float) -> None:
    model.get_submodule(layer).register_forward_hook(lambda _layer, _given, out: factor * out)


def _vanishing(seed: int) -> Job:
    """Deep sigmoids, torch's own start of a deep ReLU net, too small a start; or one layer that passes little."""
    if seed < 4:
        small = partial(nn.init.normal_, std=0.3 / math.sqrt(40))
        model = (
            lambda: _deep(nn.Sigmoid, 10, nn.init.xavier_normal_, seed),
            lambda: _deep(nn.ReLU, 25, lambda w: nn.init.kaiming_uniform_(w, a=math.sqrt(5)), seed),
            lambda: _deep(nn.Tanh, 12, small, seed),
            lambda: _deep(nn.GELU, 14, small, seed),
        )[seed]()
        optimizer = OPTIMIZERS[("nesterov", "nadam")[seed % 2]](model.parameters(), 1.0)
        found = Job(model, optimizer, of_digits(32, seed + SHIFT), f"deep, seed {seed}", loss=cross)
        found.where = _layers(model)[:-1]
    else:
        name, layer = (
            ("u-net without norm", "third"),
            ("autoencoder", "2"),
            ("tabular, silu", "3"),
            ("tanh autoencoder", "4"),
        )[seed - 4]
        found = job(name, ("nadam", "nesterov")[seed % 2], 21_100 + seed)
        _times(found.model, layer, 1e-5)
        found.where = (layer,)
    found.fault = "vanishing signal|vanishing gradient"
    return found


def _exploding(seed: int) -> Job:
    """Residual sums without normalisation, too large a start, a recurrence that grows; or one layer that enlarges."""
    if seed < 4:
        large = partial(nn.init.normal_, std=3.0 / math.sqrt(40))
        torch.manual_seed(21_200 + seed + SHIFT)
        recurrent = Adding()
        recurrent.rnn = nn.RNN(2, 32, nonlinearity="relu", batch_first=True)
        with torch.no_grad():
            recurrent.rnn.weight_hh_l0 *= 20.0
        model: nn.Module = (
            lambda: Chain(24, 1.5),
            lambda: _deep(nn.ReLU, 12, large, seed),
            lambda: recurrent,
            lambda: _deep(nn.ELU, 14, large, seed),
        )[seed]()
        data, loss = (sums, square) if seed == 2 else (of_digits, cross)
        optimizer = OPTIMIZERS[("nesterov", "nadam")[seed // 2 % 2]](model.parameters(), 0.01)
        found = Job(model, optimizer, data(32, seed + SHIFT), f"growing, seed {seed}", loss=loss)
        found.where = _layers(model)
    else:
        name, layer = (
            ("u-net without norm", "second"),
            ("autoencoder", "4"),
            ("tabular, silu", "3"),
            ("tabular regression", "3"),
        )[seed - 4]
        found = job(name, ("nadam", "nesterov")[seed % 2], 21_200 + seed, factor=1e-3)
        _times(found.model, layer, 1e5)
        found.where = (layer,)
    found.fault = "exploding signal|exploding gradient"
    return found


def _frozen(seed: int) -> Job:
    """Left out of the optimizer, replaced after it was made, in a group of rate zero, or run without gradients."""
    name, layer = (
        ("vit", "layers.1.mlp.0"),
        ("resnet", "fc"),
        ("u-net", "third"),
        ("gru text", "table"),
        ("reversing", "core.encoder.layers.0.linear1"),
        ("tcn text", "head"),
        ("mixer", "along.0"),
        ("separable", "features.0"),
    )[seed]
    found = job(name, "nadam", 21_300 + seed)
    part = found.model.get_submodule(layer)
    mine = {id(p) for p in part.parameters()}
    others = [p for p in found.model.parameters() if id(p) not in mine]
    way = seed % 4
    if way == 0:
        found.optimizer = adam(others)
    elif way == 1:  # the optimizer holds the layer that was there before
        above = found.model.get_submodule(layer.rpartition(".")[0])
        fresh = nn.Linear(part.in_features, part.out_features)
        setattr(above, layer.rpartition(".")[2], fresh)
    elif way == 2:
        found.optimizer = adam([{"params": others}, {"params": list(part.parameters()), "lr": 0.0}])
    else:
        forward = part.forward

        def without(*given: Any) -> Any:
            with torch.no_grad():
                return forward(*given)

        part.forward = without
    found.fault, found.where = "frozen", (layer,)
    return found


class Root(nn.Module):
    """The root of a sum of squares, whose gradient at zero is infinite: a layer that breaks on the way back."""

    def __init__(self, width: int):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * x.abs().sqrt()


class Logarithm(nn.Module):
    """The logarithm of what may be negative."""

    def __init__(self, width: int):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))
        self.broken = False

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * (x.log() if self.broken else x.abs().log1p())


def _nan(seed: int) -> Job:
    """Weights that are broken, inputs that are, an overflow, a logarithm of a negative number, a root of zero."""
    name, layer = (
        ("vit", "layers.2.attn.qkv"),
        ("u-net", "inputs"),
        ("autoencoder", "3"),
        ("reversing", "core.decoder.layers.0.linear2"),
        ("resnet", "stages.1.conv2"),
        ("tabular regression", "inputs"),
        ("tabular, silu", "1"),
        ("gru text", "rnn"),
    )[seed]
    found = job(name, "nadam", 21_400 + seed)
    at = 15 + 7 * seed
    if layer == "inputs":
        found.batches = _spoiled(found.batches, at, (math.nan, math.inf)[seed % 2])
    elif seed in (2, 6):
        width = found.model[int(layer) - 1].out_features  # type: ignore[index]
        fresh: Any = Logarithm(width) if seed == 2 else Root(width)
        found.model[int(layer)] = fresh  # type: ignore[index]
        found.optimizer = adam(found.model.parameters())

        def switch(step: int) -> None:
            if step == at and seed == 2:
                fresh.broken = True
            elif step == at:
                with torch.no_grad():
                    found.model[0].weight.zero_(), found.model[0].bias.zero_()  # type: ignore[index,union-attr]

        also(found, switch)
    else:
        part = found.model.get_submodule(layer)

        def event(step: int) -> None:
            if step == at:
                with torch.no_grad():
                    next(part.parameters()).view(-1)[seed] = {3: 3e38, 4: -math.inf}.get(seed, math.nan)

        also(found, event)
    found.fault, found.where = "NaN", (layer,)
    return found


def _spoiled(batches: Iterator[Batch], at: int, value: float) -> Iterator[Batch]:
    for step, (x, y) in enumerate(batches):
        if step == at:
            x = x.clone()
            x.view(-1)[7] = value
        yield x, y


def _high(seed: int) -> Job:
    """Each of these ends with a higher loss than at its own rate."""
    names = ("vit", "resnet", "gru text", "u-net", "tabular, silu", "autoencoder", "tcn text", "reversing")
    optimizers = ("nadam", "nesterov", "nadam", "adamw, 0.98", "nadam", "nadam", "nesterov", "adamw, 0.98")
    found = job(names[seed], optimizers[seed], 21_500 + seed, factor=100.0)
    found.fault, found.where = "rate too high", ("model",)
    return found


def _low(seed: int) -> Job:
    names = ("resnet", "vit", "u-net", "gru text", "autoencoder", "tabular, silu", "mixer", "adding")
    found = job(names[seed], ("nadam", "nesterov", "radam", "adamw, 0.98")[seed % 4], 21_600 + seed, factor=0.01)
    found.fault, found.where = "rate too low", ("model",)
    return found


class Narrow(nn.Module):
    """A layer in bfloat16 within a net in float32."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner.to(torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.inner(x.to(torch.bfloat16))
        return found.to(x.dtype)


def _lost(seed: int) -> Job:
    """A whole net in bfloat16, or one layer of it, with steps that are too small for its digits."""
    name, layer = (
        ("resnet", ""),
        ("vit", ""),
        ("autoencoder", ""),
        ("mixer", ""),
        ("vit", "head"),
        ("resnet", "fc"),
        ("tabular, silu", "3"),
        ("u-net", "third"),
    )[seed]
    found = job(name, "nadam", 21_700 + seed)
    if layer:
        above = found.model.get_submodule(layer.rpartition(".")[0])
        wrapped = Narrow(found.model.get_submodule(layer))
        setattr(above, layer.rpartition(".")[2], wrapped)
        found.where = (f"{layer}.inner",)
    else:
        found.model.to(torch.bfloat16)
        kinds = (nn.Linear, nn.Conv2d, nn.LayerNorm, nn.BatchNorm2d)
        found.where = tuple(n for n, m in found.model.named_modules() if isinstance(m, kinds))
    found.optimizer = torch.optim.AdamW(found.model.parameters(), lr=(3e-5, 1.5e-5)[seed % 2], weight_decay=0.0)
    found.fault = "lost updates"
    return found


def _untied(seed: int) -> Job:
    """Loading that assigns, a copy in place of the weight, before or during the training."""
    name, head, tableau = (("lstm text, tied", "decode", "table"), ("reversing, tied", "head", "table"))[seed % 2]
    if name == "reversing, tied":
        torch.manual_seed(21_800 + seed + SHIFT)
        model: nn.Module = Reversing(tied=True)
        found = Job(model, adam(model.parameters()), reversing(32, seed + SHIFT), f"{name}, seed {seed}", loss=cross)
    else:
        found = job(name, "nadam", 21_800 + seed)
    layer = found.model.get_submodule(head)

    def untie() -> None:
        if seed // 2 % 2:
            layer.weight = nn.Parameter(found.model.get_submodule(tableau).weight.detach().clone())
        else:
            copies = {key: value.clone() for key, value in found.model.state_dict().items()}
            found.model.load_state_dict(copies, assign=True)

    if seed < 4:
        untie()
        found.optimizer = adam(found.model.parameters())
    else:

        def event(step: int) -> None:
            if step == 12 + seed:
                untie()
                found.optimizer.param_groups[0]["params"][:] = list(found.model.parameters())
                found.optimizer.state.clear()

        also(found, event)
    found.fault, found.where = "untied", (head,)
    return found


def _softmax(seed: int) -> Job:
    """A scale that is missing or wrong, or matrices that start far too large."""
    found = job(("vit", "reversing")[seed % 2], ("nadam", "nesterov")[seed // 4], 21_900 + seed)
    with torch.no_grad():
        if seed % 2 == 0:
            at = seed // 2 % 3
            mixing = found.model.layers[at].attn  # type: ignore[index,union-attr]
            if seed // 2 % 2:
                mixing.scale = 40.0
            else:
                mixing.qkv.weight[:80] *= 25.0
            found.where = (f"layers.{at}.attn", f"layers.{at}.attn.qkv")  # one matrix for all of it
        else:
            where = ("core.encoder.layers.0.self_attn", "core.decoder.layers.0.multihead_attn")[seed // 2 % 2]
            found.model.get_submodule(where).in_proj_weight[:64] *= 60.0
            found.where = (where,)
    found.fault = "saturated softmax"
    return found


def _drift(seed: int) -> Job:
    """Statistics that do not follow: another momentum, or data that change under them."""
    name, layer = (
        ("resnet", "stages.1.bn1"),
        ("separable", "features.4"),
        ("categories", "body.1"),
        ("resnet", "bn"),
        ("separable", "features.1"),
        ("resnet", "stages.0.bn2"),
        ("resnet", "bn"),
        ("separable", "features.1"),
    )[seed]
    found = job(name, ("nadam", "nesterov")[seed % 2], 22_000 + seed)
    norm = found.model.get_submodule(layer)
    norm.momentum = (0.0, 1e-3)[seed % 2] if seed < 6 else 1e-3
    if seed < 6:
        with torch.no_grad():  # statistics as of other data
            norm.running_mean += 2.0 * norm.running_var.sqrt() + 1.0
            norm.running_var *= 6.0
    else:
        found.batches = ((8.0 * x + 6.0, y) for x, y in found.batches)
    found.fault, found.where = "batch-norm drift", (layer,)
    return found


def _rows(seed: int) -> Job:
    """A table that is larger than what is looked up, or ids that are folded into half of it."""
    name = ("gru text", "categories", "tcn text", "reversing")[seed % 4]
    found = job(name, "nadam", 22_100 + seed)
    path = {"categories": "kinds"}.get(name, "table")
    old = found.model.get_submodule(path)
    if seed < 4:
        setattr(
            found.model, path, nn.Embedding(old.num_embeddings + max(6, old.num_embeddings // 4), old.embedding_dim)
        )
        found.optimizer = adam(found.model.parameters())
    else:
        batches = found.batches
        found.batches = ((x // 2, y) for x, y in batches)
    found.fault, found.where = "dead embedding rows", (path,)
    return found


def _shuffled(seed: int) -> Job:
    """Targets of other examples: drawn once for the whole data, or in each batch anew."""
    name = ("resnet", "vit", "tabular, silu", "mixer", "tabular regression", "u-net", "separable", "gru text")[seed]
    found = job(name, ("nadam", "nesterov")[seed % 2], 22_200 + seed)
    random = torch.Generator().manual_seed(seed + SHIFT)
    if seed < 5:
        x, y = {"tabular, silu": CANCER, "tabular regression": DIABETES}.get(name, DIGITS)
        found.batches = rows(x, y[torch.randperm(len(y), generator=random)], 32, seed + SHIFT)
    else:
        batches = found.batches
        found.batches = ((x, y.flatten(0, 1)[torch.randperm(y.flatten(0, 1).shape[0], generator=random)].view(y.shape)
                          if name == "gru text" else y[torch.randperm(len(y), generator=random)])
                         for x, y in batches)  # fmt: skip
    found.fault, found.where = "loss as of shuffled labels", ("model",)
    return found


PLANTS: tuple[Callable[[int], Job], ...]
PLANTS = _dead, _vanishing, _exploding, _frozen, _nan, _high, _low, _lost, _untied, _softmax, _drift, _rows, _shuffled


def check(steps: int = 200) -> None:
    """Train without a watch: the loss at the beginning and the end of each healthy training."""
    torch.set_num_threads(1)
    for found in healthy():
        losses = []
        for step in range(steps):
            found.event(step)
            x, y = next(found.batches)
            found.optimizer.zero_grad()
            loss = found.loss(found.model(x), y)
            loss.backward()
            found.optimizer.step()
            losses.append(loss.item())
        first, last = sum(losses[:5]) / 5, sum(losses[-10:]) / 10
        print(f"{first:8.3f} {last:8.3f}  {last / first:6.3f}  {found.about}", flush=True)


if __name__ == "__main__":
    check()
