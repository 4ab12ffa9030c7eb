"""Small models and their data, healthy and with a fault planted in a known place; nothing here knows the watch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

Batch = tuple[Tensor, Tensor]
SHIFT = 0  # of all seeds: thresholds were chosen with others than those of the results
TEXT = (
    "a balance with one short arm and one long one weighs heavy loads with a small counterweight; what it says depends "
    "on where the weight hangs, and on nothing else. a network is weighed so, by what moves with a weight. "
)


def loss_of(output: Tensor, target: Tensor) -> Tensor:
    return functional.cross_entropy(output.float().flatten(0, -2), target.flatten())


@dataclass
class Job:
    """A training: what the watch sees, and, if a fault was planted, its name and the layers that count as right."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    batches: Iterator[Batch]
    about: str
    fault: str = ""
    where: tuple[str, ...] = ()
    event: Callable[[int], None] = field(default=lambda _step: None)  # what happens before a step
    loss: Callable[[Tensor, Tensor], Tensor] = loss_of


def digits() -> Batch:
    data = load_digits()
    x = torch.tensor(data.data, dtype=torch.float32)
    return (x - x.mean()) / x.std(), torch.tensor(data.target)


DIGITS = digits()
VOCABULARY = len(set(TEXT))


def images(size: int, seed: int, *, square: bool = False, shuffled: bool = False) -> Iterator[Batch]:
    """Random batches of handwritten digits."""
    random = torch.Generator().manual_seed(seed)
    x, y = DIGITS
    y = y[torch.randperm(len(y), generator=random)] if shuffled else y
    while True:
        for rows in torch.randperm(len(x), generator=random).split(size):
            if len(rows) == size:
                yield (x[rows].reshape(-1, 1, 8, 8) if square else x[rows]), y[rows]


def text(size: int, seed: int, time: int = 16) -> Iterator[Batch]:
    """Random pieces of a short text by characters: (batch, time) and the next ones."""
    known = sorted(set(TEXT))
    ids = torch.tensor([known.index(c) for c in TEXT * 20])
    random = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(ids) - time - 1, (size, 1), generator=random) + torch.arange(time + 1)
        pieces = ids[starts]
        yield pieces[:, :-1], pieces[:, 1:]


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        b, t, w = x.shape
        q, k, v = (f(x).view(b, t, self.heads, -1).transpose(1, 2) for f in (self.query, self.key, self.value))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        found: Tensor = self.out(mixed.transpose(1, 2).reshape(b, t, w))
        return found


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1, self.norm2, self.attention = nn.LayerNorm(width), nn.LayerNorm(width), Attention(width, heads)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        found: Tensor = x + self.down(functional.gelu(self.up(self.norm2(x))))
        return found


class Transformer(nn.Module):
    def __init__(self, width: int = 32, blocks: int = 2, tied: bool = False, vocabulary: int = VOCABULARY):
        super().__init__()
        self.embed, self.positions = nn.Embedding(vocabulary, width), nn.Parameter(0.1 * torch.randn(16, width))
        nn.init.normal_(self.embed.weight, std=0.1 if tied else 1.0)
        self.blocks = nn.ModuleList(Block(width, 4) for _ in range(blocks))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=not tied)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.positions
        for block in self.blocks:
            x = block(x)
        found: Tensor = self.head(self.norm(x))
        return found


class Torch(nn.Module):
    """torch's own encoder, whose layers start as copies of each other."""

    def __init__(self, width: int = 32):
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 4, 64, dropout=0.1, batch_first=True, norm_first=True)
        self.embed, self.encoder = (
            nn.Embedding(VOCABULARY, width),
            nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
        )
        self.head, self.positions = nn.Linear(width, VOCABULARY), nn.Parameter(torch.randn(16, width))

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        found: Tensor = self.head(self.encoder(self.embed(x) + self.positions, mask=mask, is_causal=True))
        return found


class Recurrent(nn.Module):
    def __init__(self, cell: Any = nn.LSTM, width: int = 32):
        super().__init__()
        self.embed, self.cell = nn.Embedding(VOCABULARY, 16), cell(16, width, batch_first=True)
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.cell(self.embed(x))[0])
        return found


class Residual(nn.Module):
    def __init__(self, width: int = 48, depth: int = 6):
        super().__init__()
        self.inputs, self.head = nn.Linear(64, width), nn.Linear(width, 10)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth))
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = self.inputs(x)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + torch.relu(layer(norm(x)))
        found: Tensor = self.head(x)
        return found


def mlp(depth: int = 3, width: int = 64, act: Any = nn.ReLU, norm: bool = False, dropout: float = 0.0) -> nn.Sequential:
    parts: list[nn.Module] = []
    sizes = [64, *[width] * depth]
    for a, b in itertools.pairwise(sizes):
        layer = nn.Linear(a, b)
        nn.init.kaiming_normal_(layer.weight) if act is nn.ReLU else nn.init.xavier_normal_(layer.weight)
        nn.init.zeros_(layer.bias)
        parts += [layer, *([nn.BatchNorm1d(b)] if norm else []), act(), *([nn.Dropout(dropout)] if dropout else [])]
    return nn.Sequential(*parts, nn.Linear(width, 10))


def cnn(norm: bool = True) -> nn.Sequential:
    parts: list[nn.Module] = []
    for a, b in ((1, 8), (8, 16)):
        conv = nn.Conv2d(a, b, 3, padding=1)
        nn.init.kaiming_normal_(conv.weight)
        parts += [conv, *([nn.BatchNorm2d(b)] if norm else []), nn.ReLU(inplace=norm)]
    return nn.Sequential(*parts, nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16 * 16, 10))


MODELS: dict[str, Callable[[], nn.Module]] = {  # healthy; every one learns
    "mlp": mlp,
    "deep mlp": lambda: mlp(8, 48),
    "tanh mlp": lambda: mlp(3, 64, nn.Tanh),
    "gelu mlp, dropout": lambda: mlp(3, 64, nn.GELU, dropout=0.2),
    "batch-norm mlp": lambda: mlp(4, 48, norm=True),
    "cnn": lambda: cnn(True),
    "plain cnn": lambda: cnn(False),
    "residual": Residual,
    "lstm": Recurrent,
    "gru": lambda: Recurrent(nn.GRU),
    "transformer": Transformer,
    "tied transformer": lambda: Transformer(tied=True),
    "torch's transformer": Torch,
}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p, k: torch.optim.SGD(p, lr=0.02 * k, momentum=0.9),
    "plain sgd": lambda p, k: torch.optim.SGD(p, lr=0.1 * k),
    "adam": lambda p, k: torch.optim.Adam(p, lr=2e-3 * k),
    "adamw": lambda p, k: torch.optim.AdamW(p, lr=2e-3 * k, weight_decay=0.05),
    "rmsprop": lambda p, k: torch.optim.RMSprop(p, lr=1e-3 * k),
}
WORDS = ("lstm", "gru", "transformer", "tied transformer", "torch's transformer")


def job(name: str, optimizer: str, seed: int, *, factor: float = 1.0, size: int = 32, shuffled: bool = False) -> Job:
    """A healthy training (unless `factor` scales its rate or its labels are shuffled)."""
    seed += SHIFT
    torch.manual_seed(seed)
    model = MODELS[name]()
    batches = text(size, seed) if name in WORDS else images(size, seed, square="cnn" in name, shuffled=shuffled)
    if name in WORDS and optimizer in ("sgd", "plain sgd"):
        factor *= 7.5  # recurrent nets and transformers learn slowly by plain descent
    made = OPTIMIZERS[optimizer](model.parameters(), factor)
    return Job(model, made, batches, f"{name}, {optimizer}, seed {seed}, batch {size}")


def healthy() -> Iterator[Job]:
    """100 trainings without a fault: every model with every optimizer, other seeds, rates and batch sizes."""
    pairs = itertools.cycle(itertools.product(MODELS, OPTIMIZERS))
    for seed, (name, optimizer) in zip(range(100), pairs, strict=False):
        factor = (0.5, 1.0, 2.0)[seed % 3] if optimizer != "plain sgd" else 1.0
        yield job(name, optimizer, 1000 + seed, factor=factor, size=(16, 32, 64)[seed // 3 % 3])


def planted() -> Iterator[Job]:
    """Trainings with one fault each."""
    for plant in PLANTS:
        for seed in range(8):
            yield plant(seed)


def _dead(seed: int) -> Job:
    found = job(("mlp", "cnn", "plain cnn", "residual")[seed % 4], ("adam", "sgd")[seed // 4], seed)
    name = ("2", "4", "2", "layers.3")[seed % 4]
    layer = found.model.get_submodule(name)
    with torch.no_grad():  # a bias far below zero; after a normalisation it is the normalisation's
        layer.bias[: math.ceil(0.8 * len(layer.bias))] -= 30.0
    found.fault, found.where = "dead ReLU", (name, "3") if name == "4" else (name,)
    return found


def _scaled(seed: int, scale: float, fault: str) -> Job:
    """Twelve layers: all hidden ones start at another scale, or the outputs of a single one are scaled, by more."""
    torch.manual_seed(seed + SHIFT)
    model = mlp(12, 48, nn.Tanh if seed % 2 and scale < 1 else nn.ReLU)
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)][1:-1]
    if seed >= 4:  # by a fixed factor: weights alone would grow back within a few steps
        layers, scale = [layers[seed]], scale**8
        model.get_submodule(layers[0]).register_forward_hook(lambda _layer, _given, out: scale * out)
    with torch.no_grad():
        for name in layers if seed < 4 else ():
            model.get_submodule(name).weight *= scale
    optimizer = OPTIMIZERS[("adam", "sgd")[seed // 2 % 2]](model.parameters(), 1.0)
    return Job(model, optimizer, images(32, seed), f"scaled by {scale:.2g}, seed {seed}", fault, tuple(layers))


def _vanishing(seed: int) -> Job:
    return _scaled(seed, 0.3, "vanishing signal|vanishing gradient")


def _exploding(seed: int) -> Job:
    found = _scaled(seed, 3.0, "exploding signal|exploding gradient")
    for group in found.optimizer.param_groups:
        group["lr"] *= 0.01  # so that the scale is the fault, not what the rate makes of it
    return found


def _frozen(seed: int) -> Job:
    name = ("mlp", "transformer", "cnn", "lstm")[seed % 4]
    found = job(name, "adam", seed)
    where = {"mlp": "2", "transformer": "blocks.1.up", "cnn": "3", "lstm": "cell"}[name]
    layer = found.model.get_submodule(where)
    if seed < 4:  # not given to the optimizer
        mine = {id(p) for p in layer.parameters()}
        found.optimizer = torch.optim.Adam([p for p in found.model.parameters() if id(p) not in mine], lr=2e-3)
    else:  # cut off from the gradient
        layer.register_forward_hook(
            lambda _m, _a, out: tuple(_cut(o) for o in out) if isinstance(out, tuple) else _cut(out)
        )
    found.fault, found.where = "frozen", (where,)
    return found


def _cut(x: Any) -> Any:
    return x.detach() if isinstance(x, Tensor) else tuple(_cut(part) for part in x)


def _nan(seed: int) -> Job:
    name = ("mlp", "transformer", "cnn", "lstm", "residual", "tanh mlp", "batch-norm mlp", "gru")[seed]
    found = job(name, "adam", seed)
    where = {"transformer": "blocks.1.down", "cnn": "3", "lstm": "head", "residual": "layers.2", "gru": "cell"}.get(
        name, "4"
    )
    if name == "batch-norm mlp":
        where = "3"
    layer = found.model.get_submodule(where)

    def event(step: int) -> None:
        if step == 20 + seed:
            with torch.no_grad():
                next(layer.parameters()).view(-1)[seed] = math.nan if seed % 2 else math.inf

    found.event, found.fault, found.where = event, "NaN", (where,)
    return found


def _rate(seed: int, factor: float, fault: str) -> Job:
    name = ("mlp", "transformer", "cnn", "lstm", "residual", "tanh mlp", "batch-norm mlp", "gru")[seed]
    found = job(name, ("adam", "sgd")[seed % 2], seed, factor=factor)
    found.fault, found.where = fault, ("model",)
    return found


def _lost(seed: int) -> Job:
    name = ("mlp", "residual", "transformer", "gelu mlp, dropout")[seed % 4]
    found = job(name, "adam", seed, factor=0.02)
    found.model.to(torch.bfloat16)
    found.optimizer = torch.optim.AdamW(found.model.parameters(), lr=4e-5 if seed < 4 else 2e-5, weight_decay=0.0)
    big = [n for n, m in found.model.named_modules() if isinstance(m, (nn.Linear, nn.LayerNorm, nn.Embedding))]
    found.fault, found.where = "lost updates", tuple(big)
    return found


def _untied(seed: int) -> Job:
    found = job("tied transformer", ("adam", "sgd")[seed % 2], seed)
    model = found.model

    def untie(step: int) -> None:
        if step == 30:
            model.head.weight = nn.Parameter(model.embed.weight.detach().clone())
            found.optimizer.add_param_group({"params": [model.head.weight]})

    if seed < 4:
        untie(30)
    else:
        found.event = untie
    found.fault, found.where = "untied", ("head",)
    return found


def _softmax(seed: int) -> Job:
    name = ("transformer", "torch's transformer")[seed % 2]
    found = job(name, "adam", seed)
    with torch.no_grad():
        if name == "transformer":
            attention = found.model.blocks[seed // 2 % 2].attention
            attention.query.weight *= 30.0
            attention.key.weight *= 30.0
            where = f"blocks.{seed // 2 % 2}.attention"
        else:
            attention = found.model.encoder.layers[seed // 2 % 2].self_attn
            attention.in_proj_weight[: 2 * 32] *= 100.0
            where = f"encoder.layers.{seed // 2 % 2}.self_attn"
    found.fault, found.where = "saturated softmax", (where,)
    return found


def _drift(seed: int) -> Job:
    name = ("batch-norm mlp", "cnn")[seed % 2]
    found = job(name, ("adam", "sgd")[seed // 2 % 2], seed)
    norms = [n for n, m in found.model.named_modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))]
    where = norms[seed % len(norms)]
    norm = found.model.get_submodule(where)
    norm.momentum = 1e-4 if seed < 4 else 0.0
    with torch.no_grad():
        norm.running_mean += 3.0
        norm.running_var *= 10.0
    found.fault, found.where = "batch-norm drift", (where,)
    return found


def _rows(seed: int) -> Job:
    found = job(("transformer", "lstm", "gru", "torch's transformer")[seed % 4], "adam", seed)
    extra = (8, 20)[seed // 4]  # ids that the data never have
    old = found.model.embed
    found.model.embed = nn.Embedding(old.num_embeddings + extra, old.embedding_dim)
    found.optimizer = torch.optim.Adam(found.model.parameters(), lr=2e-3)
    found.fault, found.where = "dead embedding rows", ("embed",)
    return found


def _shuffled(seed: int) -> Job:
    names = ("mlp", "cnn", "residual", "tanh mlp", "batch-norm mlp", "gelu mlp, dropout", "plain cnn", "deep mlp")
    found = job(names[seed], ("adam", "sgd")[seed % 2], seed, shuffled=True)
    found.fault, found.where = "loss as of shuffled labels", ("model",)
    return found


def _high(seed: int) -> Job:
    return _rate(seed, 100.0, "rate too high")


def _low(seed: int) -> Job:
    return _rate(seed, 0.01, "rate too low")


PLANTS: tuple[Callable[[int], Job], ...]
PLANTS = _dead, _vanishing, _exploding, _frozen, _nan, _high, _low, _lost, _untied, _softmax, _drift, _rows, _shuffled
