"""One weight for each example through every loss, with the same mathematics however examples are batched.

Decides what each example adds to the numerator and to the denominator of a mean. Knows nothing of loops or tasks.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from steelyard.errors import ModelError, RecipeError, UnknownNameError, suggestion
from steelyard.learn.calling import calling
from steelyard.learn.labels import IGNORED, out_of_range, wrong_labels, wrong_type


@dataclass(frozen=True, eq=False)
class ExampleLoss:
    """A loss by its name in torch, of which every example can have a weight.

    The mean over examples i with weights w is sum_i w_i s_i / sum_i w_i c_i, where s_i sums the loss over the elements
    or positions of an example and c_i counts them as torch's reduction="mean" does: elements, positions that are
    not ignored, each as heavy as its class. So weight k is k copies, weight 0 is removed, and no weights are torch's
    mean (for kl_div: "batchmean", the divergence for each example).

    name: cross_entropy, nll, bce_with_logits, mse, l1, huber, smooth_l1, poisson_nll, kl_div, or focal (Lin et al.
    2017). options: those of the function in torch.nn.functional, such as weight (of classes), label_smoothing,
    ignore_index, pos_weight, delta; for focal: gamma (2) and alpha (weights of classes, or of the positive class).
    Outputs and targets have torch's shapes, examples first.

    Called with outputs and targets it gives the mean loss of each example, as `Task` wants it.

    >>> loss = ExampleLoss("cross_entropy", {"label_smoothing": 0.1})
    >>> outputs, targets = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0])
    >>> copies = loss.mean(outputs[[0, 1, 1]], targets[[0, 1, 1]])
    >>> bool(torch.isclose(loss.mean(outputs, targets, torch.tensor([1.0, 2.0])), copies))
    True

    Raises UnknownNameError for a name that is not there, RecipeError for an option that the loss does not have.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name not in LOSSES:
            raise UnknownNameError("loss", str(self.name), LOSSES)
        known = [p for p in inspect.signature(_function(self.name)).parameters if p not in RESERVED]
        for option in self.options:
            if option not in known:
                raise RecipeError(f"{self.name} has no option {option!r}; {suggestion(option, known)}")

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The loss of each example: (examples,); 0 for one of which nothing counts."""
        sums, counts = self.terms(outputs, targets)
        return sums / torch.where(counts > 0, counts, torch.ones_like(counts))

    def terms(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """(s, c) of each example: what it adds to the numerator and to the denominator. Both are (examples,)."""
        if not outputs.ndim or not targets.ndim or len(outputs) != len(targets):
            raise ModelError(
                f"{self.name}: outputs {list(outputs.shape)} and targets {list(targets.shape)} "
                "do not begin with the same number of examples"
            )
        what = f"{self.name}, called with {list(outputs.shape)} and {list(targets.shape)},"
        with calling(what, lambda: self._wrong(outputs, targets)):
            values = _function(self.name)(outputs, targets, reduction="none", **self.options)
        return _by_example(values), self.counts(targets).to(values)

    def _wrong(self, outputs: Tensor, targets: Tensor) -> str:
        if LOSSES[self.name] is not _classes and self.name != "focal":
            return ""
        return wrong_labels(outputs, targets, ignored=self.options.get("ignore_index", IGNORED))

    def counts(self, targets: Tensor) -> Tensor:
        """c of each example: (examples,), float64. It is known before any outputs are."""
        return _by_example(LOSSES[self.name](targets, self.options))

    def mean(self, outputs: Tensor, targets: Tensor, weight: Tensor | None = None) -> Tensor:
        """The weighted mean over the examples; raises ModelError for weights that are none, or if nothing counts."""
        sums, counts = self.terms(outputs, targets)
        return weighted_ratio(sums, counts, weight)


class GlobalMean:
    """The gradient of one weighted mean from several backward passes and processes: exact, not a mean of means.

    ::

        optimizer.zero_grad()
        mean = sy.GlobalMean(model)
        for x, y, w in micro_batches:
            mean.backward(*loss.terms(model(x), y), w)
        print(mean.finish())                        # divides the gradients by the global count; the global mean loss
        optimizer.step()

    Each pass adds sum_i w_i s_i to the gradients, and `finish` divides them by sum_i w_i c_i over all passes and
    processes. model: its gradients are those that are scaled; a DistributedDataParallel or FSDP model has averaged
    them over its processes already, the gradients of any other are summed here if torch.distributed runs.
    group: the processes that share the mean (None: all).
    """

    def __init__(self, model: nn.Module, group: Any = None):
        self.model, self.group = model, group
        self._sum: Tensor | None = None
        self._count: Tensor | None = None

    def backward(self, sums: Tensor, counts: Tensor, weight: Tensor | None = None) -> None:
        """Add the gradients of some examples; all three are (examples,), else ModelError."""
        if sums.ndim != 1 or sums.shape != counts.shape:
            raise ModelError(f"GlobalMean: sums of shape {list(sums.shape)} and counts of {list(counts.shape)}: "
                             "expected one of each for every example, as ExampleLoss.terms gives them")  # fmt: skip
        w = checked_weight(weight, sums)
        total, count = (w * sums).sum(), (w * counts).sum().detach().double()
        total.backward()
        self._sum = total.detach().double() + (0 if self._sum is None else self._sum)
        self._count = count + (0 if self._count is None else self._count)

    def finish(self) -> float:
        """Scale the gradients to those of the mean, and return the mean; raises ModelError if nothing counted."""
        if self._sum is None or self._count is None:
            raise ModelError("GlobalMean: nothing to finish: call backward for each part of the batch first")
        both = torch.stack([self._sum, self._count])
        processes, averaged = _processes(self.group), _averages(self.model)
        if processes > 1:
            torch.distributed.all_reduce(both, group=self.group)
        total, count = both.tolist()
        if not count > 0:
            raise ModelError("GlobalMean: the weights of the whole batch sum to 0: there is nothing to learn from")
        factor = (processes if averaged else 1) / count
        for parameter in self.model.parameters():
            if processes > 1 and not averaged and parameter.requires_grad:
                if parameter.grad is None:  # every process takes part in every sum
                    parameter.grad = torch.zeros_like(parameter)
                torch.distributed.all_reduce(parameter.grad, group=self.group)
            if parameter.grad is not None:
                parameter.grad.mul_(factor)
        self._sum = self._count = None
        return float(total / count)


def weighted_ratio(sums: Tensor, counts: Tensor, weight: Tensor | None) -> Tensor:
    """sum(w s) / sum(w c); raises ModelError for weights that are none, or if nothing counts."""
    w = checked_weight(weight, sums)
    total = (w * counts).sum()
    if not bool(total > 0):
        raise ModelError(f"the weights of the batch of {len(sums)} sum to 0: there is nothing to learn from")
    return (w * sums).sum() / total


def checked_weight(weight: Tensor | None, like: Tensor) -> Tensor:
    """Weights as the type of `like`, ones for None; raises ModelError unless each is one finite number, 0 or more."""
    if weight is None:
        return torch.ones_like(like)
    if weight.shape != like.shape:
        raise ModelError(f"weights of shape {list(weight.shape)}: expected one for each example, {list(like.shape)}")
    wrong = torch.nonzero(~(torch.isfinite(weight) & (weight >= 0)))
    if len(wrong):
        row = int(wrong[0])
        raise ModelError(f"the weight of example {row} of the batch is {float(weight[row])}: expected 0 or more")
    return weight.to(like)


def focal(
    outputs: Tensor,
    targets: Tensor,
    gamma: float = 2.0,
    alpha: Tensor | float | None = None,
    reduction: str = "none",
) -> Tensor:
    """-alpha (1 - p)^gamma log p with p the probability of the target (Lin et al. 2017): what is easy counts less.

    Class numbers: outputs (examples, classes, ...), alpha weights of the classes. Numbers in [0, 1] of the shape of
    the outputs: logits of independent labels, alpha the weight of the positive and 1 - alpha of the negative ones.

    >>> round(focal(torch.tensor([0.0]), torch.tensor([1.0])).item(), 4)  # 0.25 log 2
    0.1733
    """
    if reduction != "none":
        raise RecipeError(f"reduction={reduction!r}: focal gives one number for each position")
    if targets.is_floating_point():
        cross = functional.binary_cross_entropy_with_logits(outputs, targets, reduction="none")
        p = outputs.sigmoid() * targets + (1 - outputs.sigmoid()) * (1 - targets)
        share = 1.0 if alpha is None else alpha * targets + (1 - alpha) * (1 - targets)
    else:
        cross = functional.cross_entropy(outputs, targets, reduction="none")
        p = (-cross).exp()
        share = 1.0 if alpha is None else torch.as_tensor(alpha).to(outputs)[targets]
    return share * (1 - p).pow(gamma) * cross


def class_weights(targets: Tensor | Sequence[int], classes: int | None = None, *, beta: float | None = None) -> Tensor:
    """The weight of each class that makes up for how often it occurs; their mean over the examples is 1.

    n / (K n_k) for K classes of n_k examples; with `beta` proportional to (1 - beta) / (1 - beta^n_k), the inverse
    of the effective number (Cui et al. 2019). targets: class numbers, a tensor or a list. Raises ModelError for a class
    without examples, and for targets that are no class numbers.

    >>> class_weights(torch.tensor([0, 0, 0, 1]))
    tensor([0.6667, 2.0000])
    """
    targets = torch.as_tensor(targets)
    if targets.is_floating_point() or targets.is_complex() or bool((targets < 0).any()):
        raise ModelError("class_weights: expected class numbers, whole and from 0, one for each example")
    counts = torch.bincount(targets.flatten(), minlength=classes or 0).double()
    if not len(counts) or not counts.all():
        empty = int((counts == 0).nonzero()[0]) if len(counts) else 0
        raise ModelError(f"class {empty} has no example: its weight would be infinite; leave the class out")
    if beta is not None and not 0 <= beta < 1:
        raise ModelError(f"beta={beta!r}: expected a number from 0 to less than 1, such as 0.999")
    share = counts if beta is None else (1 - beta**counts) / (1 - beta)
    return (counts.sum() / share / (counts / share).sum()).float()


def importance_weights(log_ratio: Tensor, *, largest: float | None = None) -> Tensor:
    """exp(log p(x) / q(x)) with mean 1: examples drawn from q count as if drawn from p (Shimodaira 2000).

    log_ratio: (examples,). largest: no weight is more than so many times the mean before normalising, which trades
    variance for bias. Look at `effective_sample_size` of the result.

    >>> importance_weights(torch.tensor([0.0, 0.0, 1000.0]))
    tensor([0., 0., 3.])
    """
    if not bool(torch.isfinite(log_ratio).all()):
        raise ModelError("importance_weights: a ratio of densities is not finite: its example cannot be weighted")
    w = (log_ratio.double() - log_ratio.double().max()).exp()
    if largest is not None:
        w = w.clamp_max(largest * w.mean())
    return (w / w.mean()).to(log_ratio.dtype)


def effective_sample_size(weight: Tensor) -> float:
    """(sum w)^2 / sum w^2: how many equal examples give a mean of the same variance (Kish 1965).

    >>> effective_sample_size(torch.tensor([1.0, 1.0, 0.0]))
    2.0
    """
    w = weight.double()
    return float(w.sum() ** 2 / w.square().sum())


def _elements(targets: Tensor, options: Mapping[str, Any]) -> Tensor:  # noqa: ARG001
    return torch.ones_like(targets, dtype=torch.float64)


def _examples(targets: Tensor, options: Mapping[str, Any]) -> Tensor:  # noqa: ARG001
    return torch.ones(len(targets), dtype=torch.float64, device=targets.device)


def _classes(targets: Tensor, options: Mapping[str, Any]) -> Tensor:
    """Each position as heavy as its class, and nothing where it is ignored; for probabilities, one each."""
    if targets.is_floating_point():
        if targets.ndim < 2:
            raise ModelError(wrong_type(targets))
        return torch.ones_like(targets[:, 0], dtype=torch.float64)
    counted = targets != (ignored := options.get("ignore_index", IGNORED))
    heavy = options.get("weight")
    if heavy is None:
        return counted.double()
    if wrong := out_of_range(targets, len(heavy), ignored):
        raise ModelError(wrong)
    return heavy.to(targets.device, torch.float64)[targets.where(counted, 0)] * counted


LOSSES: Mapping[str, Callable[[Tensor, Mapping[str, Any]], Tensor]] = {  # name -> how much each position counts
    "cross_entropy": _classes,
    "nll": _classes,
    "bce_with_logits": _elements,
    "mse": _elements,
    "l1": _elements,
    "huber": _elements,
    "smooth_l1": _elements,
    "poisson_nll": _elements,
    "kl_div": _examples,
    "focal": _elements,
}
NAMES = {"bce_with_logits": "binary_cross_entropy_with_logits", "cross_entropy": "cross_entropy", "kl_div": "kl_div"}
RESERVED = ("input", "target", "outputs", "targets", "reduction", "size_average", "reduce")


def _function(name: str) -> Callable[..., Tensor]:
    found: Callable[..., Tensor] = focal if name == "focal" else getattr(functional, NAMES.get(name, f"{name}_loss"))
    return found


def _by_example(values: Tensor) -> Tensor:
    return values.reshape(len(values), math.prod(values.shape[1:])).sum(1)


def _processes(group: Any) -> int:
    running = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size(group) if running else 1


def _averages(model: nn.Module) -> bool:
    """Whether the gradients of the model are averaged over processes in its backward pass."""
    sharded = "FSDP" in type(model).__name__ or type(model).__name__ == "FullyShardedDataParallel"
    return sharded or isinstance(model, nn.parallel.DistributedDataParallel)
