"""Randomness from an explicit seed; the caller's global generators are left as they were.

Decides how a seed is derived for each purpose. Knows nothing of models or data.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b

import torch


def derive(seed: int, *purpose: object) -> int:
    """A seed of 63 bits for one purpose: a hash of ``seed`` and the words, so that their order of use is irrelevant.

    >>> derive(0, "train", 1) == derive(0, "train", 1), derive(0, "train", 1) == derive(0, "train", 2)
    (True, False)
    """
    text = "/".join(map(str, (seed, *purpose)))
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(seed: int, *purpose: object) -> torch.Generator:
    """A CPU generator of its own for one purpose."""
    return torch.Generator().manual_seed(derive(seed, *purpose))


@contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Within the block torch's default generators (CPU, and that of ``device``) start at ``seed``; then as before."""
    cuda = [device.index or 0] if device is not None and device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.default_generator.manual_seed(seed)
        for index in cuda:
            torch.cuda.default_generators[index].manual_seed(seed)
        yield


@contextmanager
def python_unmoved() -> Iterator[None]:
    """After the block Python's generator is as before: for imports of packages that draw from it."""
    before = random.getstate()
    try:
        yield
    finally:
        random.setstate(before)
