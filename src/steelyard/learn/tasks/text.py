"""The next character of a text: windows of a file, or of the bundled novel, for a language model of characters.

Decides the vocabulary (the characters of the training part), the windows and what is scored. Knows nothing of models
but their names.
"""

from __future__ import annotations

import bz2
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from steelyard.errors import ModelError, printable
from steelyard.learn.data import Batches
from steelyard.learn.measures import IGNORED, accuracy, bits_per_character, cross_entropy
from steelyard.learn.models import model as build
from steelyard.learn.options import check_counts
from steelyard.learn.seeding import generator
from steelyard.learn.task import Batch, Checked, Interface, Split, Task

UNKNOWN = "\ufffd"  # stands for every character that the training part does not have
BUNDLED = "moby-dick"  # Herman Melville, 1851; in the public domain


def text(
    *,
    path: str | None = None,
    seed: int = 0,
    batch_size: int = 8,
    model: str = "transformer",
    context: int = 128,
    stride: int | None = None,
    valid: float = 0.05,
    test: float = 0.1,
    carry: bool | None = None,
) -> Task:
    """A language model of characters: the first part of the text to train, then validation, the end to prove.

    An example is a window of characters, its target the same window one character on. The training windows begin
    anywhere: in each epoch they are shifted together by a random number of characters. In the other two parts every
    character is scored once: a window of ``context`` moves by ``stride``, and only its last ``stride`` targets count,
    so that each is said from at least ``context - stride`` characters before it; what comes before a part is read, too.

    Args:
        path: a file in UTF-8; None: the bundled text, Moby-Dick (Melville 1851) in 1.19 million characters.
        seed: of the order and the shifts.
        batch_size: windows in a training batch; small ones learn sooner in the same time (bench/text).
        model: the name of the model.
        context: characters in a window.
        stride: None is a quarter of the context.
        valid, test: their shares of the text.
        carry: the text is cut into ``batch_size`` streams that are read in parallel from beginning to end, and a
            recurrent model goes on with its state from window to window. None: where the model is "rnn".

    Raises ModelError for a file that is missing, is not UTF-8 or is too short, RecipeError for a number that cannot be.

    >>> text(context=32).about["characters"]
    {'train': 1011773, 'valid': 59512, 'test': 119032}
    """
    stride = max(1, context // 4) if stride is None and isinstance(context, int) else stride
    check_counts(batch_size=batch_size, context=context, stride=stride)
    assert stride is not None
    name = BUNDLED if path is None else Path(path).name
    characters = np.array(list(bundled() if path is None else _read(path)))
    sizes = {split: _multiple(len(characters) * share, stride) for split, share in (("valid", valid), ("test", test))}
    sizes = {"train": len(characters) - sum(sizes.values()), **sizes}
    carried = model == "rnn" if carry is None else carry
    needed = (batch_size if carried else 1) * context + context + 1
    if stride > context or min(sizes.values()) < 1 or sizes["train"] < needed:
        raise ModelError(
            f"{printable(name)}: {len(characters)} characters, too few for windows of {context} that move by {stride} "
            f"in each of the three parts: give a longer text, a smaller context{' or batch' if carried else ''}"
        )
    known = characters[: sizes["train"]]
    vocabulary = sorted({UNKNOWN, *np.unique(known).tolist()})
    code = _encode(characters, vocabulary)
    data = Windows(code, sizes, batch_size, context, stride, seed, carried)
    return Task(
        name=f"text:{name}",
        build=partial(build, model, interface := Interface((context,), len(vocabulary), len(vocabulary), carried)),
        batches=data,
        loss=cross_entropy,
        metrics={"accuracy": accuracy, "bits per character": bits_per_character},
        interface=interface,
        classes=tuple(vocabulary),
        lower_is_better=("bits per character",),
        about={"seed": seed, "file": path or name, "context": context, "stride": stride, "characters": sizes},
        baselines=_frequencies(code, sizes, len(vocabulary)),
        ordered=True,
    )


def bundled() -> str:
    """The text that comes with the package."""
    packed = files("steelyard.learn.tasks").joinpath(f"{BUNDLED}.txt.bz2").read_bytes()
    return bz2.decompress(packed).decode("utf-8")


@dataclass(frozen=True)
class Windows(Checked):
    """The batches of a text; see `text`."""

    code: Tensor  # (characters,)
    sizes: Mapping[str, int]
    batch_size: int
    context: int
    stride: int
    seed: int
    carried: bool

    def __call__(self, split: Split, epoch: int) -> Batches | Sequence[Batch]:
        if split != "train":
            return self._scored(split)
        part = self.code[: self.sizes["train"]]
        shift = int(torch.randint(self.context, (1,), generator=generator(self.seed, "shift", epoch)))
        if self.carried:
            return self._streams(part, shift)
        count = (len(part) - self.context) // self.context  # the same for every shift
        inputs, targets = (part[shift + i : shift + i + count * self.context].view(count, -1) for i in (0, 1))
        order = torch.randperm(count, generator=generator(self.seed, "order", epoch))
        return Batches(inputs, targets, order, self.batch_size)

    def _streams(self, part: Tensor, shift: int) -> list[Batch]:
        """Batch k has the k-th window of each stream; the rows of the first are fresh."""
        steps = (len(part) - self.context) // (self.batch_size * self.context)
        length = steps * self.batch_size * self.context
        rows = [part[shift + i : shift + i + length].view(self.batch_size, steps, self.context) for i in (0, 1)]
        fresh = torch.zeros(steps, self.batch_size, dtype=torch.bool)
        fresh[0] = True
        return [Batch((rows[0][:, k], fresh[k]), rows[1][:, k]) for k in range(steps)]

    def _scored(self, split: Split) -> Batches | Sequence[Batch]:
        """Windows whose last ``stride`` targets are the characters of the split, each once."""
        first = self.sizes["train"] + (self.sizes["valid"] if split == "test" else 0)
        ends = torch.arange(first, first + self.sizes[split], self.stride) + self.stride - 1  # of the last target
        places = ends[:, None] + torch.arange(1 - self.context, 1)
        inputs, targets = self.code[places - 1], self.code[places]
        targets[:, : self.context - self.stride] = IGNORED
        found = Batches(inputs, targets, torch.arange(len(targets)), max(self.batch_size, 256))
        if not self.carried:
            return found
        return [Batch((b.inputs, torch.ones(len(b), dtype=torch.bool)), b.targets) for b in found]  # type: ignore[arg-type]


def _frequencies(code: Tensor, sizes: Mapping[str, int], vocabulary: int) -> dict[str, float]:
    """What the frequencies of characters alone give, from the training part, on the characters to prove."""
    counts = torch.bincount(code[: sizes["train"]], minlength=vocabulary).double() + 1  # Laplace
    rest = code[-sizes["test"] :]
    loss = float(-(counts / counts.sum()).log()[rest].mean())
    right = float((rest == counts.argmax()).double().mean())
    return {"accuracy": right, "bits per character": loss / math.log(2), "loss": loss}


def _multiple(size: float, of: int) -> int:
    """The nearest multiple, so that windows fill a part."""
    return round(size / of) * of


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
