"""The parameters of a module by their plain names, and which of them decay unless told otherwise.

Decides what counts as a norm, a bias or an embedding. Knows nothing of optimizers or of penalties.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from steelyard.core.spec import Spec
from steelyard.core.spec import dtype as find_dtype
from steelyard.core.weights import Weight
from steelyard.core.where import Where, where
from steelyard.errors import ModelError
from steelyard.formats.module import to_array

CONNECTIONS = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)
NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
LOOKED_UP = ("*pos*", "*embed*", "*token*")  # names of bare parameters of two axes that are no connections


@dataclass(frozen=True, eq=False)
class Named:
    """A parameter, each plain name that it has with the module that owns it there, and whether it decays."""

    names: Mapping[str, nn.Module]
    parameter: nn.Parameter

    @property
    def name(self) -> str:
        """The first of its names."""
        return next(iter(self.names))

    @property
    def decays(self) -> bool:
        """Whether it holds strengths of connections, under each of its names."""
        return all(_connects(name, owner, self.parameter) for name, owner in self.names.items())

    def weight(self) -> Weight:
        """What a `Where` looks at."""
        spec = Spec(tuple(self.parameter.shape), find_dtype(str(self.parameter.dtype)))
        return Weight(self.name, spec, lambda: to_array(self.parameter.detach()), origin=self.name)

    def fits(self, chosen: Where) -> bool:
        """Whether it is chosen, under any of its names."""
        weight = self.weight()
        return chosen(weight) or any(chosen.under(weight, name) for name in self.names)


def named_parameters(model: nn.Module) -> list[Named]:
    """Every parameter once, under its plain names: without the prefixes of wrappers and of constraints.

    >>> [p.name for p in named_parameters(nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))) if p.decays]
    ['0.weight']
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    found: dict[int, tuple[dict[str, nn.Module], nn.Parameter]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        # a constrained tensor: layer.parametrizations.weight.original
        owner, _, computed = f".{name}".partition(".parametrizations.")
        owner = owner[1:]
        plain = f"{owner}.{computed}".removeprefix(".").removesuffix(".original") if computed else name
        found.setdefault(id(parameter), ({}, parameter))[0][_unwrapped(plain, model)] = modules[
            owner if computed else name.rpartition(".")[0]
        ]
    return [Named(names, parameter) for names, parameter in found.values()]


def choose_parameters(model: nn.Module, chosen: Where | str | None, what: str) -> list[Named]:
    """The trainable parameters that `chosen` names; None: those that decay.

    Raises ModelError, saying `what` is without parameters, if there are none.
    """
    everything = [p for p in named_parameters(model) if p.parameter.requires_grad]
    asked = as_where(chosen)
    found = [p for p in everything if (p.decays if asked is None else p.fits(asked))]
    if not found:
        known = ", ".join(p.name for p in everything[:3]) + (", ..." if len(everything) > 3 else "")
        raise ModelError(
            f"{what} chooses no trainable parameter of {type(model).__name__}: it has {known or 'none'}; "
            "choose from these with where="
        )
    return found


def as_where(chosen: Where | str | None) -> Where | None:
    """A pattern as the condition that it means."""
    return where(chosen) if isinstance(chosen, str) else chosen


def decay_groups(
    model: nn.Module,
    weight_decay: float = 0.01,
    *,
    decay: Where | str | None = None,
    keep: Where | str | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """The trainable parameters in two groups for any torch optimizer: those that decay and those that do not.

    Decay pulls towards zero. For the strength of a connection zero is the simpler value; for a bias, the gain of a
    norm or the row of an embedding it is no simpler than another, and a row that no batch looks up would fade away
    (Goodfellow et al. 2016, 7.1). So weights of linear, convolutional, recurrent and attention layers decay, and other
    parameters of two axes or more that are not named like embeddings; the rest does not. A weight that is also
    an embedding (a tied head) is one.

    Args:
        model: its parameters that require a gradient are taken.
        weight_decay: of the first group.
        decay: what decays besides; a condition or a pattern of names.
        keep: what does not decay, whatever else is said.
        options: of both groups, such as lr.

    Raises ModelError if nothing is trainable or `weight_decay` is no number that is 0 or more.

    >>> from torch import optim
    >>> model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.LayerNorm(4))
    >>> optimizer = optim.AdamW(decay_groups(model, 0.1), lr=1e-3)
    >>> [(len(g["params"]), g["weight_decay"]) for g in optimizer.param_groups]
    [(1, 0.1), (4, 0.0)]
    """
    if isinstance(weight_decay, bool) or not isinstance(weight_decay, (int, float)) or not 0 <= weight_decay < 1e30:
        raise ModelError(f"weight_decay={weight_decay!r}: expected a finite number, 0 or more")
    trainable = [p for p in named_parameters(model) if p.parameter.requires_grad]
    if not trainable:
        raise ModelError("the model has nothing to train: it has no parameters, or all of them are frozen")
    more, less = as_where(decay), as_where(keep)
    for condition, name in ((more, "decay"), (less, "keep")):
        if condition is not None and not any(p.fits(condition) for p in trainable):
            raise ModelError(f"{name}= chooses no trainable parameter of {type(model).__name__}: mend its pattern")
    decaying = {
        id(p.parameter)
        for p in trainable
        if (p.decays or (more is not None and p.fits(more))) and not (less is not None and p.fits(less))
    }
    groups = [
        {"params": _of(trainable, decaying, True), "weight_decay": float(weight_decay), **options},
        {"params": _of(trainable, decaying, False), "weight_decay": 0.0, **options},
    ]
    return [group for group in groups if group["params"]]


def _of(trainable: Iterable[Named], decaying: set[int], wanted: bool) -> list[nn.Parameter]:
    return [p.parameter for p in trainable if (id(p.parameter) in decaying) == wanted]


def _connects(name: str, owner: nn.Module, parameter: Tensor) -> bool:
    leaf = name.rpartition(".")[2]
    if parameter.ndim < 2 or leaf.startswith("bias"):
        return False
    if isinstance(owner, CONNECTIONS):
        return True
    kind = type(owner).__name__.lower()
    if isinstance(owner, (*NORMS, nn.Embedding, nn.EmbeddingBag)) or kind.endswith("norm") or "embedding" in kind:
        return False
    return not any(fnmatchcase(leaf.lower(), pattern) for pattern in LOOKED_UP)


def _unwrapped(name: str, model: nn.Module) -> str:
    """The name without what torch.compile and the wrappers for several processes put before it."""
    name = name.replace("_orig_mod.", "")
    wrapped = isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel))
    return name.removeprefix("module.") if wrapped else name
