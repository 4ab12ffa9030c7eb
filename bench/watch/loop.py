"""One watcher in one process: a transformer of 19 M parameters is trained, every other step watched.

    python loop.py none|steelyard|tensorboard|wandb FOLDER STEPS SEQUENCES

Prints processor seconds of the steps, watched and not, and within the watcher's own code, as JSON. Needs torch and the
watcher, nothing else.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

INSIDE = [0.0]  # processor seconds in the watcher's own code, by watched step
LOOK = -1  # the step at which ours takes a look
VOCABULARY, WIDTH, LAYERS, TIME = 256, 512, 6, 128


class Transformer(nn.Module):
    """Pre-norm, causal, GELU, learned positions: GPT-2's form."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Parameter(0.02 * torch.randn(TIME, WIDTH))
        options: dict[str, Any] = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(WIDTH, 8, 4 * WIDTH, **options) for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (batch, time) -> (batch, time, vocabulary)
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        x = self.embed(x) + self.positions[: x.shape[1]]
        for block in self.blocks:
            x = block(x, src_mask=mask, is_causal=True)
        found: torch.Tensor = self.head(self.norm(x))
        return found


Step = Callable[[int], float]


def steelyard(model: nn.Module, optimizer: torch.optim.Optimizer, folder: str, step: Step) -> Step:
    import steelyard as sy

    session = sy.watch(model, optimizer, path=f"{folder}/log.sqlite")
    log = session.__enter__()
    session._step = 10  # past the looks at steps 0, 1, 2, 4 and 8; what one costs is measured at the end
    hooks = optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks
    kept = [{key: timed(hook) for key, hook in one.items()} for one in hooks]
    note = timed(log.note)

    def watched(index: int) -> float:
        if index == LOOK:
            session._step = 50
        for one, was in zip(hooks, kept, strict=True):
            one.update(was)
        loss = step(index)
        note(loss=loss)
        for one in hooks:
            one.clear()
        return loss

    for one in hooks:
        one.clear()
    return watched


def timed(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, whose processor seconds are added to those of the step's INSIDE."""

    def run(*values: Any, **named: Any) -> Any:
        start = time.process_time()
        result = function(*values, **named)
        INSIDE[-1] += time.process_time() - start
        return result

    return run


def tensorboard(model: nn.Module, _optimizer: torch.optim.Optimizer, folder: str, step: Step) -> Step:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(folder)

    @timed
    def histograms(index: int, loss: float) -> None:
        writer.add_scalar("loss", loss, index)
        for name, p in model.named_parameters():
            writer.add_histogram(name, p, index)
            writer.add_histogram(f"{name} gradient", p.grad, index)

    def watched(index: int) -> float:
        loss = step(index)
        histograms(index, loss)
        return loss

    return watched


def wandb(model: nn.Module, _optimizer: torch.optim.Optimizer, folder: str, step: Step) -> Step:
    import wandb as wb

    run = wb.init(mode="offline", dir=folder, project="watch")

    def watched(index: int) -> float:
        wb.watch(model, log="all", log_freq=1)
        loss = step(index)
        run.log({"loss": loss})
        wb.unwatch(model)
        return loss

    return watched


def main() -> None:
    which, folder, steps, sequences = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Transformer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    tokens = torch.randint(VOCABULARY, (sequences, TIME + 1))

    def step(_index: int) -> float:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        return loss.item()

    watched = {"none": lambda *_: step, "steelyard": steelyard, "tensorboard": tensorboard, "wandb": wandb}[which](
        model, optimizer, folder, step
    )
    seconds: dict[str, list[float]] = {"plain": [], "watched": []}
    losses = []
    for one in (step, watched):
        losses.append(one(0))  # what is made once: copies, state of the optimizer, compiled loops
    for index in range(1, steps + 1):
        for name, one in (("plain", step), ("watched", watched))[:: 1 if index % 2 else -1]:
            INSIDE.append(0.0)
            start = time.process_time()
            losses.append(one(index))
            seconds[name].append(time.process_time() - start)
    looks = []
    for _ in range(3 if which == "steelyard" else 0):
        start = time.process_time()
        watched(LOOK)
        looks.append(time.process_time() - start)
    size = sum(p.numel() for p in model.parameters())
    inside = statistics.median(t for t in INSIDE[1:] if t) if any(INSIDE[1:]) else None
    found = {"parameters": size, "tensors": len(list(model.parameters())), "losses": losses, "inside": inside}
    found["looks"] = looks
    print(json.dumps(found | seconds))


if __name__ == "__main__":
    main()
