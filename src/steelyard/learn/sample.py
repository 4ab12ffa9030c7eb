"""Text from a trained language model of characters, one character after the other.

Decides how the next character is drawn. Knows nothing of how the model was trained.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from steelyard.errors import ModelError, quoted
from steelyard.learn.evaluate import evaluating
from steelyard.learn.options import check_not_negative, check_whole
from steelyard.learn.seeding import generator
from steelyard.learn.task import Task, device_of
from steelyard.learn.tasks.text import UNKNOWN


def sample(
    model: nn.Module,
    task: Task,
    prompt: str = "\n",
    *,
    length: int = 500,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> str:
    """Characters that go on after the prompt, each drawn from what the model says about the last ``context`` before it.

    Args:
        model: maps (1, time) character numbers to logits at each time; it is run in evaluation mode.
        task: a task of text; it knows the characters and the context.
        prompt: at least one character, each of them known to the task.
        length: how many characters to draw.
        temperature: the logits are divided by it; 0 takes the likeliest character.
        top_p: draw among the fewest likeliest characters that have this probability together (nucleus sampling,
            Holtzman et al. 2020).
        seed: the same seed gives the same text.

    Raises ModelError for a task that is no text, a prompt that it cannot read, and numbers that cannot be.
    """
    check_whole(length=length)
    check_not_negative(temperature=temperature)
    if isinstance(top_p, bool) or not isinstance(top_p, (int, float)) or not 0 < top_p <= 1:
        raise ModelError(f"top_p={top_p!r}: expected a probability, more than 0 and at most 1")
    interface = task.interface
    if interface is None or not interface.vocabulary or len(task.classes) != interface.vocabulary:
        raise ModelError(f"{quoted(task.name)} has no characters to draw: take a task of text (text, or text:FILE)")
    numbers = {character: i for i, character in enumerate(task.classes)}
    strange = next((c for c in prompt if c not in numbers or c == UNKNOWN), None)
    if not prompt or strange is not None:
        found = "an empty prompt" if strange is None else f"{strange!r} in the prompt"
        raise ModelError(f"{found}: expected one or more of the {len(numbers)} characters of {quoted(task.name)}")
    device, random = device_of(model), generator(seed, "sample")
    barred = torch.tensor([c == UNKNOWN for c in task.classes])
    said = [numbers[c] for c in prompt]
    with evaluating(model):
        for _ in range(length):
            logits = model(torch.tensor([said[-interface.shape[0] :]], device=device))[0, -1].double().cpu()
            said.append(_drawn(logits.masked_fill(barred, -math.inf), temperature, top_p, random))
    return "".join(task.classes[i] for i in said[len(prompt) :])


def _drawn(
    logits: Tensor,  # (characters,)
    temperature: float,
    top_p: float,
    random: torch.Generator,
) -> int:
    if temperature == 0:
        return int(logits.argmax())
    probabilities, order = (logits / temperature).softmax(0).sort(descending=True, stable=True)
    before = probabilities.cumsum(0) - probabilities  # the probability of those that are likelier
    chosen = torch.multinomial(probabilities.masked_fill(before >= top_p, 0.0), 1, generator=random)
    return int(order[chosen])
