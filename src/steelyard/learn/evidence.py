"""Evidence: what data say about the weights of a model, as Weights with the names of the weights.

Decides what each kind of evidence is and how it is laid out. What the inputs of a weight are is `learn.inputs`; what
steps do with evidence is theirs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from steelyard.core.weights import Weight, Weights
from steelyard.core.where import Where
from steelyard.edit.evidence import sample
from steelyard.errors import ModelError, UnknownNameError
from steelyard.formats.module import to_array
from steelyard.learn.calling import calling
from steelyard.learn.finite import broken_weight
from steelyard.learn.inputs import Inputs, Site, watching_inputs
from steelyard.learn.parameters import Named, as_where, named_parameters
from steelyard.learn.passage import check_values
from steelyard.learn.task import Batch, Split, Task, objective
from steelyard.learn.task import apply as outputs_of
from steelyard.learn.unharmed import unfrozen, unmoved

Kind = Literal["norms", "moments", "hessian", "fisher", "gradient", "taylor"]
OF_INPUTS = ("norms", "moments", "hessian")
Loss = Callable[[nn.Module, Any], Tensor]
_DTYPES = {"float32": torch.float32, "float64": torch.float64}


def score(
    model: nn.Module,
    data: Task | Iterable[Any],
    kind: Kind = "hessian",
    *,
    where: Where | str | None = None,
    split: Split = "train",
    batches: int | None = None,
    precision: Literal["float32", "float64"] = "float32",
    loss: Loss | None = None,
) -> Weights:
    """Measure what `data` say about the weights of `model`: evidence by which to prune, quantize, share or factorise.

    With x the inputs of a weight at one position (a row of a batch, a token, a patch of a convolution), and the mean
    over all positions of all calls, the tensor for a weight W of shape (outputs, inputs, ...) is

    - ``norms``: sqrt(mean x²), which broadcasts against W: (1, inputs, ...). |W| times it is Wanda's score.
    - ``moments``: mean x and mean x², stacked: (2, 1, inputs, ...).
    - ``hessian``: mean x xᵀ: (blocks, inputs, inputs), the inputs of a kernel flattened. The mean squared error of the
      outputs of W + D is tr(D H Dᵀ).

    and with g the gradient of the loss, of the shape of any weight, biases included,

    - ``fisher``: mean over the examples of g²: the diagonal of the empirical Fisher information. One backward pass for
      each example.
    - ``gradient``: mean over the examples of g.
    - ``taylor``: mean over the batches of (w g)²: the squared first-order change of the loss without the weight.

    Where outputs have inputs of their own (groups of a convolution; queries, keys and values that are packed in one
    weight) norms and moments have a row for each output, and there are as many Hessians as blocks of outputs. A
    weight that is used several times, or under several names, counts all of its uses. The inputs of an embedding are
    the rows that were looked up: its norms are (rows, 1), and its Hessian, a row being as good as any other, is
    the mean of that over the rows, I / rows. Where the inputs are the first axis (transformers' Conv1D, transposed
    convolutions), so are they in norms and moments.

    The metadata name the kind, model and task, count examples and positions, and have a sample of each weight, by which
    evidence for other weights is refused. ``sy.write`` keeps it in a file.

    Args:
        model: run in evaluation mode, on its own device; left as it was.
        data: a Task, or what the model is called with: a Batch, a tensor, a tuple of arguments or a dict of keywords
            for each batch.
        kind: of the evidence.
        where: which weights; None: all that have a matrix (of the first three kinds), else all.
        split: of the Task.
        batches: at most so many.
        precision: of the sums.
        loss: of (model, batch), for the last three kinds where there is no Task: the mean over the batch, which
            then counts as one example.

    Raises ModelError if there is no data, if the model fails, if a chosen weight was never used, or if evidence is
    not finite.

    >>> x = torch.tensor([[3.0, 0.0], [4.0, 0.0]])
    >>> score(nn.Linear(2, 1), [x], "hessian")["weight"].array().tolist()
    [[[12.5, 0.0], [0.0, 0.0]]]

    Sources: norms: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models" (Wanda), 2023;
    hessian: Frantar et al., "GPTQ", 2022; fisher: Theis et al., "Faster gaze prediction with dense networks and Fisher
    pruning", 2018; taylor: Molchanov et al., "Importance Estimation for Neural Network Pruning", 2019.
    """
    if kind not in get_args(Kind):
        raise UnknownNameError("kind of evidence", str(kind), get_args(Kind))
    if precision not in _DTYPES:
        raise UnknownNameError("precision", str(precision), _DTYPES)
    check_values(model)
    model = getattr(model, "_orig_mod", model)  # a compiled model shows no operations
    chosen = _chosen(model, as_where(where), matrices=kind in OF_INPUTS)
    served = _Served(data.batches(split, 0) if isinstance(data, Task) else data, batches)
    with unmoved(model):
        if kind in OF_INPUTS:
            found, first = of_inputs(model, served, kind, chosen, _DTYPES[precision], where is not None)
        else:
            whole = _loss_of(data, loss)
            found, first = _of_gradients(model, served, kind, chosen, _DTYPES[precision], whole, data), frozenset()
    named = {name: n for n in chosen for name in [n.name] if name in found}
    about = {
        "kind": kind,
        "model": type(model).__name__,
        "task": data.name if isinstance(data, Task) else "",
        "split": split if isinstance(data, Task) else "",
        "examples": served.examples,
        "inputs first": sorted(first),
        "samples": {name: sample(to_array(n.parameter)) for name, n in named.items()},
    }
    return collected(model, found, named, about)


def collected(
    model: nn.Module, found: Mapping[str, np.ndarray], named: Mapping[str, Named], about: Mapping[str, Any]
) -> Weights:
    """Evidence by name as Weights with the ties of the parameters; raises ModelError for what is not finite."""
    for name, values in found.items():
        if not np.isfinite(values).all():
            if (broken := broken_weight(model)) is not None:  # which makes the evidence of others so
                raise ModelError(f"{type(model).__name__} has weights that are not finite, in {broken!r}: repair them, "
                                 "or take a file from before they broke")  # fmt: skip
            raise ModelError(f"the evidence for {name!r} is not finite, and all weights are: the inputs are not, or "
                             "what the model makes of them overflows")  # fmt: skip
    ties = {alias: name for name, n in named.items() for alias in list(n.names)[1:]}
    items = [Weight.of(name, values, origin=f"evidence {about['kind']}") for name, values in found.items()]
    return Weights(items, ties, {"evidence": json.dumps(about)})


def of_inputs(
    model: nn.Module,
    served: Iterable[Any],
    kind: str,
    chosen: Sequence[Named],
    dtype: torch.dtype,
    strict: bool,
    call: Callable[[nn.Module, Any], object] | None = None,
) -> tuple[dict[str, np.ndarray], frozenset[str]]:
    """Evidence of the inputs by name, and the names of which the inputs are the first axis.

    `strict`: raise ModelError for a chosen weight that no input reached.
    """
    inputs = Inputs({n.name: n.parameter for n in chosen}, full=kind == "hessian", dtype=dtype)
    with watching_inputs(model, inputs):
        for batch in served:
            (call or call_with)(model, batch)
    unseen = [site.name for site in inputs.sites if not site.seen]
    if (strict and unseen) or len(unseen) == len(inputs.sites):
        raise ModelError(
            f"{type(model).__name__} multiplies nothing by {unseen[0]!r} in these batches; choose weights that it uses "
            "(where=), and release constraints on weights first"
        )
    found = {site.name: _LAYOUTS[kind](site) for site in inputs.sites if site.seen}
    return found, frozenset(site.name for site in inputs.sites if site.first)


class _Served:
    """The batches, counted as they pass."""

    def __init__(self, batches: Iterable[Any], limit: int | None):
        if limit is not None and limit < 1:
            raise ModelError(f"batches={limit}: expected at least 1")
        if isinstance(batches, (Tensor, Batch, Mapping, str)) or not isinstance(batches, Iterable):
            raise ModelError(f"expected a Task or a list of batches, got a {type(batches).__name__}: put it in a list")
        self._batches, self._limit, self.examples = batches, limit, 0

    def __iter__(self) -> Iterator[Any]:
        for batch in islice(self._batches, self._limit):
            self.examples += _examples(batch)
            yield batch
        if not self.examples:
            raise ModelError("there are no examples to measure evidence on: give at least one batch")


def _examples(batch: Any) -> int:
    """The length of the first tensor."""
    if isinstance(batch, Batch):
        return len(batch)
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else (batch,)
    return next((len(x) if x.ndim else 1 for x in parts if isinstance(x, Tensor)), 0)


def call_with(model: nn.Module, batch: Any) -> object:
    """The model called with a batch of any kind; a ModelError if it fails."""
    with calling(f"{type(model).__name__}, called with a batch,"):
        if isinstance(batch, Mapping):
            return model(**batch)
        arguments = batch.arguments if isinstance(batch, Batch) else batch if isinstance(batch, tuple) else (batch,)
        return model(*arguments)


def _chosen(model: nn.Module, where: Where | None, *, matrices: bool) -> list[Named]:
    every = [n for n in named_parameters(model) if n.parameter.is_floating_point()]
    least = 2 if matrices else 0
    found = [n for n in every if n.parameter.ndim >= least and (where is None or n.fits(where))]
    if not found:
        known = ", ".join(n.name for n in every[:3]) or "none"
        kind = "weight matrix" if matrices else "weight"
        raise ModelError(f"nothing chooses a {kind} of {type(model).__name__}: its weights begin with {known}")
    return found


def _norms(site: Site) -> np.ndarray:
    return np.asarray(np.sqrt(_moments(site)[1]))


def _moments(site: Site) -> np.ndarray:
    shape = tuple(site.parameter.shape)
    total, square, count = (_spread(site, [_sum(block, what) for block in site.blocks()]) for what in _PARTS)
    if site.lookups is not None:
        looked = site.lookups.cpu().numpy().reshape(-1, *[1] * (len(shape) - 1))
        if not site.parts:
            total = square = looked
            count = np.full_like(looked[:1], looked.sum())
        else:
            total, square = total + looked, square + looked
    return np.stack([total / np.maximum(count, 1), square / np.maximum(count, 1)])


_PARTS = ("total", "square", "count")


def _sum(block: Sequence[Any], what: str) -> np.ndarray | float:
    """A sum over the calls that reach one block of outputs; 0 where none does."""
    found = [getattr(sums, what) for sums in block]
    return np.asarray(sum(x.cpu().numpy() if isinstance(x, Tensor) else float(x) for x in found))


def _spread(site: Site, blocks: list[Any]) -> np.ndarray:
    """Numbers for each block to what broadcasts against the weight: one row, or a row for each output."""
    dtype = np.float64 if site.dtype == torch.float64 else np.float32
    shape = tuple(site.parameter.shape)
    rows = np.stack([np.broadcast_to(np.asarray(b, dtype), (site.inputs,)) for b in blocks])
    if site.first:
        return rows[0].reshape(-1, *[1] * (len(shape) - 1))
    if len(blocks) > 1:
        rows = np.repeat(rows, site.outputs // len(blocks), axis=0)
    return rows.reshape(len(rows), *shape[1:])


def _hessian(site: Site) -> np.ndarray:
    dtype = np.float64 if site.dtype == torch.float64 else np.float32
    rows = len(site.parameter)
    if not site.parts:
        return np.eye(site.inputs, dtype=dtype)[None] / dtype(rows)
    found = np.zeros((len(site.blocks()), site.inputs, site.inputs), dtype)
    for h, block in zip(found, site.blocks(), strict=True):
        count = max(sum(sums.count for sums in block), 1)
        for sums in block:
            h += sums.square.cpu().numpy()
        if site.lookups is not None:
            h[np.diag_indices(site.inputs)] += float(site.lookups.sum()) / rows
        h /= count
    return found


_LAYOUTS: dict[str, Callable[[Site], np.ndarray]] = {"norms": _norms, "moments": _moments, "hessian": _hessian}


def _loss_of(data: Task | Iterable[Any], loss: Loss | None) -> Loss:
    """The mean loss of a batch."""
    if loss is not None:
        return loss
    if not isinstance(data, Task):
        raise ModelError("gradients need a loss: give a Task, or loss= as a function of (model, batch)")
    task = data
    return lambda model, batch: objective(task, outputs_of(model, batch), batch)


def _of_gradients(
    model: nn.Module,
    served: Iterable[Any],
    kind: str,
    chosen: Sequence[Named],
    dtype: torch.dtype,
    loss: Loss,
    data: Task | Iterable[Any],
) -> dict[str, np.ndarray]:
    """Evidence of gradients by name."""
    parameters = [n.parameter for n in chosen]
    sums = [torch.zeros_like(p, dtype=dtype) for p in parameters]
    weight = 0.0
    model.eval()
    with unfrozen(parameters):
        for batch in served:
            apart = kind == "fisher" and isinstance(data, Task)
            for one in _single(batch) if apart else (batch,):
                share = _share(one) if isinstance(data, Task) else 1.0
                with torch.enable_grad(), calling("the loss of a batch"):
                    found = torch.autograd.grad(loss(model, one), parameters, allow_unused=True)
                weight += share
                for total, p, g in zip(sums, parameters, found, strict=True):
                    if g is not None:
                        g = g.to(dtype)
                        total.add_(g if kind == "gradient" else _squared(kind, g, p), alpha=share)
    return {n.name: to_array(total / weight) for n, total in zip(chosen, sums, strict=True)}


def _share(batch: Batch) -> float:
    """How much a batch counts among the others: as the loss does, by the weights of its examples."""
    return float(len(batch)) if batch.weight is None else float(batch.weight.sum())


def _squared(kind: str, g: Tensor, p: Tensor) -> Tensor:
    return g.square() if kind == "fisher" else (g * p.detach().to(g.dtype)).square()


def _single(batch: Batch) -> Iterator[Batch]:
    """The examples of a batch one by one."""
    for i in range(len(batch)):
        inputs = tuple(x[i : i + 1] for x in batch.arguments)
        weight, groups = (None if t is None else t[i : i + 1] for t in (batch.weight, batch.groups))
        yield Batch(inputs if isinstance(batch.inputs, tuple) else inputs[0], batch.targets[i : i + 1], weight, groups)
