"""What can be read off a Step: functions that return a Gauge. They know nothing of the loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from steelyard.learn.alarm import Alarm, Found
from steelyard.learn.step import Gauge, Step


def update_ratio() -> Gauge:
    """||W_after - W_before|| / ||W_before|| for each trainable tensor: how strongly a step tweaks it.

    A tensor that was all zeros before (a new bias) has no ratio and is left out.
    """

    def gauge(step: Step) -> Mapping[str, float]:
        readings = {}
        for name, after in step.model.named_parameters():
            before = step.before[name]
            size = before.norm().item()
            if after.requires_grad and size > 0:
                readings[f"update ratio {plain_name(name)}"] = (after.detach() - before).norm().item() / size
        return readings

    return gauge


def gradient_norm() -> Gauge:
    """The Euclidean norm of the gradient of each tensor, and over all of them."""

    def gauge(step: Step) -> Mapping[str, float]:
        norms = {n: p.grad.norm().item() for n, p in step.model.named_parameters() if p.grad is not None}
        total = sum(norm * norm for norm in norms.values()) ** 0.5
        return {"gradient norm": total, **{f"gradient norm {plain_name(n)}": norm for n, norm in norms.items()}}

    return gauge


def weight_norm() -> Gauge:
    """The Euclidean norm of each tensor after the step."""

    def gauge(step: Step) -> Mapping[str, float]:
        return {f"norm {plain_name(n)}": p.detach().norm().item() for n, p in _named(step.model)}

    return gauge


def alarm(steps: int = 20, say: Callable[[Found], None] | None = None) -> Gauge:
    """The `Alarm` on the first steps of a Run, from the second on: how many kinds of trouble it has found so far.

    ``say`` is called with each `Found`; by default it becomes a TrainingWarning.
    """
    watch: Alarm | None = None

    def gauge(step: Step) -> Mapping[str, float]:
        nonlocal watch
        if step.index >= steps:  # also of a run that goes on
            return {}
        if watch is None:
            watch = Alarm(step.model, step.optimizer, steps=steps, say=say)
            watch.step = step.index + 1  # is over
        return {"alarms": float(len(watch.found))}

    return gauge


def plain_name(name: str) -> str:
    """The name of a parameter as it is without a constraint on it, and without `torch.compile`.

    >>> plain_name("conv1.parametrizations.weight.original"), plain_name("_orig_mod.conv1.weight")
    ('conv1.weight', 'conv1.weight')
    """
    return name.replace("_orig_mod.", "").replace("parametrizations.", "").removesuffix(".original")


def _named(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(model.named_parameters())
