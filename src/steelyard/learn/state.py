"""The state of a training, taken and put back bit for bit: weights, buffers, optimizer, gauges, generators.

Decides what belongs to that state. States are plain trees of dictionaries, lists, numbers and tensors; knows nothing
of files or of the loop.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from steelyard.errors import ModelError, quoted
from steelyard.formats._sharded import like

State = dict[str, Any]


def random_state() -> State:
    """The states of the global generators of Python, numpy and torch, those of every CUDA device included."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": [kind, torch.from_numpy(np.array(keys, np.int64)), position, has_gauss, gauss],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def set_random_state(state: State) -> None:
    """Put the global generators into a state that `random_state` gave."""
    kind, keys, *rest = state["numpy"]
    random.setstate(state["python"])
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside torch.compile, DataParallel and DistributedDataParallel."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(inner := model._modules.get("_orig_mod"), nn.Module):
            model = inner
        else:
            return model


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer, also those that state_dict leaves out, by its name without wrappers.

    A tied tensor is there once, under its first name.
    """
    model = unwrapped(model)
    found = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name.replace("_orig_mod.", ""): tensor for name, tensor in found.items()}


def model_state(model: nn.Module) -> State:
    """All tensors of the model, not copied, and what its modules keep besides (``get_extra_state``)."""
    extra = {}
    for name, module in unwrapped(model).named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            extra[name] = module.get_extra_state()
    return {"tensors": {n: t.detach() for n, t in tensors_of(model).items()}, "extra": extra}


def set_model_state(model: nn.Module, state: State) -> None:
    """Copy a state of `model_state` into the model, in place: whoever holds its tensors sees the old values again.

    Raises ModelError, with the model untouched, if names, shapes or dtypes are others.
    """
    own = tensors_of(model)
    check_same(_specs(state["tensors"]), _specs(own), "the model")
    modules = dict(unwrapped(model).named_modules())
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(like(tensor, state["tensors"][name]))
    for name, extra in state["extra"].items():
        modules[name].set_extra_state(extra)


def set_optimizer_state(optimizer: torch.optim.Optimizer, state: State) -> None:
    """Put a ``state_dict()`` back, with the dtypes that it has.

    torch's own load_state_dict rounds the state to the dtype of the parameter: float32 moments of bfloat16 weights
    would not come back as they were. What has the shape of a sharded parameter is sharded like it.
    """
    optimizer.load_state_dict(copied(state))
    saved = [number for group in state["param_groups"] for number in group["params"]]
    own = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, parameter in zip(saved, own, strict=True):
        for key, value in state["state"].get(number, {}).items():
            held = optimizer.state[parameter][key]
            if isinstance(value, Tensor) and held.dtype != value.dtype:
                held = optimizer.state[parameter][key] = value.to(held.device, copy=True)
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                optimizer.state[parameter][key] = like(parameter, held)


@runtime_checkable
class Remembering(Protocol):
    """A gauge whose readings depend on earlier ones, so that a checkpoint holds its state."""

    def state(self) -> State:
        """What `load` goes on from."""

    def load(self, state: State, model: nn.Module) -> None:
        """Go on from what `state` gave, with the model as it was then."""


def gauge_states(gauges: Sequence[object]) -> dict[str, State]:
    """The states of those gauges that have one, by kind and place."""
    return {f"{type(g).__name__} {i}": g.state() for i, g in enumerate(gauges) if isinstance(g, Remembering)}


def set_gauge_states(gauges: Sequence[object], states: Mapping[str, State], model: nn.Module) -> None:
    """Put states of `gauge_states` back; a gauge that was not there then begins with the next step."""
    for i, gauge in enumerate(gauges):
        name = f"{type(gauge).__name__} {i}"
        if isinstance(gauge, Remembering) and name in states:
            gauge.load(states[name], model)


def copied(tree: Any) -> Any:
    """The same tree with a copy of every tensor, on the device where it is."""
    if isinstance(tree, Tensor):
        return tree.detach().clone()
    if isinstance(tree, Mapping):
        return {key: copied(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(copied(value) for value in tree)
    return tree


def check_same(saved: Mapping[str, Any], now: Mapping[str, Any], whose: str) -> None:
    """Raise ModelError that names the first key at which what was saved differs from what there is now."""
    for name in dict.fromkeys((*saved, *now)):
        was, found = (repr(of[name]) if name in of else "none" for of in (saved, now))
        if was != found:
            raise ModelError(f"{quoted(name)} of {whose} was {was} when the checkpoint was written and is {found} now: "
                             "go on with what the run began with, or begin anew in another folder")  # fmt: skip


def check_fits(held: Mapping[str, Tensor], own: Mapping[str, Tensor], whose: str, model: str) -> None:
    """Raise ModelError that names the first tensor that one of two collections lacks, or has in another shape."""
    for name in dict.fromkeys((*own, *held)):
        was, found = (f"of shape {list(of[name].shape)}" if name in of else "absent" for of in (held, own))
        if was != found:
            raise ModelError(f"{whose} does not fit the model, {model}: {quoted(name)} is {was} in the one and "
                             f"{found} in the other")  # fmt: skip


def _specs(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    return {name: f"{t.dtype}{list(t.shape)}".removeprefix("torch.") for name, t in tensors.items()}
