"""MiniLM-L6 as a function of its weights by name, and sentence embeddings: means over tokens of the last layer.

Needs the tokenizer of the package (``pip install --no-deps --target peer tokenizers``, then ``PYTHONPATH=peer``).
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

import steelyard as sy
from steelyard.learn.task import Batch
from steelyard.shrinking.sensitivity import sensitivity

Tensors = dict[str, Tensor]
LAYERS, HEADS, WIDTH = 6, 12, 384


def linear(w: Tensors, name: str, x: Tensor) -> Tensor:
    return functional.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])


def norm(w: Tensors, name: str, x: Tensor) -> Tensor:
    return functional.layer_norm(x, (WIDTH,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-12)


def hidden(w: Tensors, ids: Tensor, mask: Tensor) -> Tensor:
    """The last layer: (sentences, tokens, 384) for ids and mask (sentences, tokens)."""
    tables = {kind: w[f"embeddings.{kind}_embeddings.weight"] for kind in ("word", "position", "token_type")}
    x = functional.embedding(ids, tables["word"]) + tables["position"][: ids.shape[1]] + tables["token_type"][0]
    x = norm(w, "embeddings.LayerNorm", x)
    seen = mask[:, None, None, :].bool()
    for layer in range(LAYERS):
        at = f"encoder.layer.{layer}"
        split = (*ids.shape, HEADS, -1)
        parts = [
            linear(w, f"{at}.attention.self.{n}", x).view(split).transpose(1, 2) for n in ("query", "key", "value")
        ]
        mixed = functional.scaled_dot_product_attention(*parts, attn_mask=seen).transpose(1, 2).flatten(2)
        x = norm(w, f"{at}.attention.output.LayerNorm", x + linear(w, f"{at}.attention.output.dense", mixed))
        inner = functional.gelu(linear(w, f"{at}.intermediate.dense", x))
        x = norm(w, f"{at}.output.LayerNorm", x + linear(w, f"{at}.output.dense", inner))
    return x


def pooled(w: Tensors, ids: Tensor, mask: Tensor) -> Tensor:
    weight = mask[..., None].to(torch.float32)
    return (hidden(w, ids, mask) * weight).sum(1) / weight.sum(1)


def batches(folder: Path, sentences: list[str], size: int = 32) -> list[tuple[Tensor, Tensor]]:
    """Ids and masks; sentences are sorted by length, alike for every model."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(128)
    rows = sorted((tokenizer.encode(text).ids for text in sentences), key=len)
    found = []
    for at in range(0, len(rows), size):
        some = rows[at : at + size]
        ids = torch.zeros(len(some), max(map(len, some)), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(some):
            ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
        found.append((ids, mask))
    return found


class Encoder(nn.Module):
    """The encoder with its weights under their own names, dots aside; its embeddings have length 1."""

    def __init__(self, weights: Tensors):
        super().__init__()
        floats = {name.replace(".", "/"): x for name, x in weights.items() if x.is_floating_point()}
        self.held = nn.ParameterDict({name: nn.Parameter(x) for name, x in floats.items()})

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        found = pooled({name.replace("/", "."): x for name, x in self.held.items()}, ids, mask)
        return nn.functional.normalize(found, dim=1)


def what_errors_cost(weights: Tensors, data: list[tuple[Tensor, Tensor]]) -> sy.Weights:
    """Evidence of pairs from ids and masks, under the names of the file; no labels, nothing trained."""
    asked = [Batch(batch, batch[0]) for batch in data]
    found = sensitivity(Encoder(weights), asked, classes=False, most=len(asked))
    items = [sy.Weight.of(n.removeprefix("held.").replace("/", "."), w.array()) for n, w in found.items()]
    return sy.Weights(items, {}, found.meta)


def random_tokens(weights: Tensors, batches: int, size: int, length: int) -> list[tuple[Tensor, Tensor]]:
    """Sequences of tokens that are drawn from the whole vocabulary, all alike: no data."""
    generator, words = torch.Generator().manual_seed(0), len(weights["embeddings.word_embeddings.weight"])
    drawn = [torch.randint(words, (size, length), generator=generator) for _ in range(batches)]
    return [(ids, torch.ones_like(ids)) for ids in drawn]


@torch.no_grad()
def embed(w: Tensors, data: list[tuple[Tensor, Tensor]]) -> Tensor:
    return torch.cat([pooled(w, ids, mask) for ids, mask in data])
