"""The next character of a text: windows of a file, for a language model of characters.

Decides the vocabulary (the characters of the training part) and the windows. Knows nothing of models but their names.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from steelyard.errors import ModelError, printable
from steelyard.learn.data import Examples
from steelyard.learn.measures import accuracy, bits_per_character, cross_entropy
from steelyard.learn.models import model as build
from steelyard.learn.task import SPLITS, Interface, Task

UNKNOWN = "\ufffd"  # stands for every character that the training part does not have


def text(
    *,
    path: str,
    seed: int = 0,
    batch_size: int = 32,
    model: str = "transformer",
    context: int = 64,
    valid: float = 0.05,
    test: float = 0.1,
) -> Task:
    """A language model of characters: the first part of the file to train, then validation, the end to prove.

    An example is a window of ``context`` characters, its target the same window one character on. Windows do not
    overlap. Raises ModelError for a file that is missing, is not UTF-8 or is too short.
    """
    characters = np.array(list(_read(path)))
    cuts = [round(len(characters) * (1 - valid - test)), round(len(characters) * (1 - test))]
    parts = dict(zip(SPLITS, np.split(characters, cuts), strict=True))
    if context < 1 or min(len(part) for part in parts.values()) <= context:
        raise ModelError(
            f"{printable(path)}: {len(characters)} characters, too few for windows of {context} "
            f"in each of the three parts: give a longer text or a smaller context"
        )
    vocabulary = sorted({UNKNOWN, *np.unique(parts["train"]).tolist()})
    codes = {split: _encode(part, vocabulary) for split, part in parts.items()}
    windows = {split: _windows(code, context) for split, code in codes.items()}
    interface = Interface((context,), len(vocabulary), len(vocabulary))
    data = Examples(
        {split: window[0] for split, window in windows.items()},
        {split: window[1] for split, window in windows.items()},
        batch_size,
        seed,
    )
    return Task(
        name=f"text:{Path(path).name}",
        build=partial(build, model, interface),
        batches=data,
        loss=cross_entropy,
        metrics={"accuracy": accuracy, "bits per character": bits_per_character},
        interface=interface,
        classes=tuple(vocabulary),
        lower_is_better=("bits per character",),
        about={"seed": seed, "file": path, "context": context, "examples": data.sizes},
    )


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ModelError(f"{printable(path)}: not UTF-8 at byte {error.start}: convert it to UTF-8 first") from error
    except OSError as error:
        raise ModelError(f"{printable(path)}: {error.strerror or error}: give the path of a text file") from error


def _encode(part: np.ndarray, vocabulary: list[str]) -> Tensor:
    known = np.array(vocabulary)
    found = np.searchsorted(known, part).clip(max=len(known) - 1)
    found[known[found] != part] = vocabulary.index(UNKNOWN)
    return torch.from_numpy(found.astype(np.int64))


def _windows(code: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """Consecutive windows (n, context) and the same one character on."""
    count = (len(code) - 1) // context
    first, second = code[: count * context], code[1 : count * context + 1]
    return first.view(count, context), second.view(count, context)
