"""A model compressed block by block, each on what the compressed blocks before it give: evidence for one at a time.

Decides the order of the work and what is kept between blocks. Knows nothing of how a block is compressed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from steelyard.core.transform import Transform
from steelyard.core.weights import Weight, Weights
from steelyard.edit.evidence import sample
from steelyard.errors import ModelError, UnknownNameError
from steelyard.formats.module import from_module, to_array, to_tensor
from steelyard.learn.calling import calling
from steelyard.learn.evaluate import evaluating
from steelyard.learn.evidence import call_with, collected, of_inputs
from steelyard.learn.parameters import Named, named_parameters
from steelyard.learn.passage import check_values
from steelyard.learn.unharmed import unmoved

Method = Callable[[Weights], Transform]  # evidence -> what compresses the weights that it speaks of
Progress = Callable[[int, int], None]  # blocks done, and all of them


def blockwise(
    model: nn.Module,
    batches: Iterable[Any],
    method: Method,
    *,
    blocks: str | None = None,
    kind: str = "hessian",
    precision: torch.dtype = torch.float32,
    progress: Progress | None = None,
) -> Weights:
    """Compress the weights of `model` with evidence measured block by block, as GPTQ does.

    The inputs of the first block are kept. Then for each block in turn: evidence for its weights is measured on the
    inputs, ``method(evidence)`` compresses them, and the block with the compressed weights turns the inputs into those
    of the next. Last come the weights outside of the blocks, on what the last block gave. So later layers are fitted
    to what earlier ones have become, and in memory are the model, what the batches are at one place of it, and the
    evidence and weights of one block.

    Args:
        model: one that calls the modules of one nn.ModuleList or nn.Sequential one after the other, each with what the
            one before gave as its first argument (or hidden_states), and the same other arguments. Run in
            evaluation mode, and left as it was.
        batches: what the model is called with: see `score`. Each block is called several times with the same
            arguments, so that a cache among them must be switched off (use_cache=False).
        method: such as ``lambda evidence: Gptq(3, group=64, by=evidence)``.
        blocks: the name of the list; None: the one with the most weights.
        kind: of the evidence: norms, moments or hessian.
        progress: is told of each block.

    Returns the weights of the model, compressed, in memory as the method holds them.

    Raises ModelError for a model without such a list or with weights that are shared between blocks.

    >>> from steelyard.edit.gptq import Gptq
    >>> net = nn.Sequential(nn.Sequential(*[nn.Linear(4, 4) for _ in range(3)]), nn.Linear(4, 2))
    >>> found = blockwise(net, [torch.randn(9, 4)], lambda evidence: Gptq(4, by=evidence))
    >>> [item.scheme.codec.name for item in found.values() if item.scheme]
    ['affine', 'affine', 'affine', 'affine']

    Source: Frantar et al., "GPTQ", ICLR 2023, section 4.
    """
    check_values(model)
    name, modules = _find(model, blocks)
    batches = list(batches)
    if not batches:
        raise ModelError("there are no batches to measure evidence on: give at least one")
    about = {"kind": kind, "model": type(model).__name__, "task": "", "split": "", "examples": len(batches)}
    work = _Work(method, kind, precision, about)
    done: dict[str, Weight] = {}
    with unmoved(model), evaluating(model):
        calls = [_first_call(model, modules[0], batch) for batch in batches]
        for i, block in enumerate(modules):
            prefix = f"{name}.{i}." if name else f"{i}."
            done |= work.compress(
                block, named_parameters(block), prefix, calls, lambda b, call: b(*call.args, **call.kwargs)
            )
            values = {n: to_tensor(done[prefix + n].array()) for n, _ in block.named_parameters() if prefix + n in done}
            outputs = [_call(block, values, call) for call in calls]
            if i + 1 < len(modules):
                calls = [call.followed(output) for call, output in zip(calls, outputs, strict=True)]
            if progress is not None:
                progress(i + 1, len(modules))
        inner = {id(p) for block in modules for p in block.parameters()}
        rest = [n for n in named_parameters(model) if id(n.parameter) not in inner]
        with _answering(modules, outputs):
            done |= work.compress(model, rest, "", batches, call_with)
    return from_module(model).with_items(done.get(n, item) for n, item in from_module(model).items())


@dataclass(frozen=True)
class _Work:
    """How the weights of one module are compressed."""

    method: Method
    kind: str
    precision: torch.dtype
    about: Mapping[str, Any]

    def compress(
        self, module: nn.Module, named: list[Named], prefix: str, served: list[Any], call: Callable[[Any, Any], object]
    ) -> dict[str, Weight]:
        """The matrices among `named` that inputs reach, compressed, by their names with the prefix."""
        chosen = [n for n in named if n.parameter.is_floating_point() and n.parameter.ndim >= 2]
        if not chosen:
            return {}
        found, first = of_inputs(module, served, self.kind, chosen, self.precision, False, call)
        own = {n.name: n for n in chosen if n.name in found}
        samples = {name: sample(to_array(n.parameter)) for name, n in own.items()}
        evidence = collected(module, found, own, {**self.about, "inputs first": sorted(first), "samples": samples})
        weights = Weights([n.weight() for n in own.values()])
        return {
            prefix + n: replace(item, name=prefix + n) for n, item in self.method(evidence)(weights).settle().items()
        }


@dataclass(frozen=True)
class _Arguments:
    """What a block is called with."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def followed(self, output: Any) -> _Arguments:
        """What the next block is called with after this output."""
        hidden = output[0] if isinstance(output, tuple) else output
        if self.args:
            return _Arguments((hidden, *self.args[1:]), self.kwargs)
        return _Arguments((), {**self.kwargs, "hidden_states": hidden})


class _StopError(Exception):
    """The first block was reached."""


def _first_call(model: nn.Module, block: nn.Module, batch: Any) -> _Arguments:
    """What the first block is called with for this batch."""
    found: list[_Arguments] = []

    def note(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(_Arguments(args, dict(kwargs)))
        raise _StopError

    handle = block.register_forward_pre_hook(note, with_kwargs=True)
    try:
        call_with(model, batch)
    except ModelError as error:
        if not isinstance(error.__cause__, _StopError):
            raise
    finally:
        handle.remove()
    if not found:
        raise ModelError(
            "the model does not call the first of its blocks; name the list of those that it calls (blocks=)"
        )
    return found[0]


def _block_with(block: nn.Module, call: _Arguments) -> object:
    return block(*call.args, **call.kwargs)


def _call(block: nn.Module, values: dict[str, Tensor], call: _Arguments) -> Any:
    with calling("a block with compressed weights"):
        return functional_call(block, values, call.args, dict(call.kwargs))


@contextmanager
def _answering(modules: list[nn.Module], outputs: list[Any]) -> Iterator[None]:
    """Within the block each module gives back its first argument, and the last one the next of `outputs`."""
    queue = iter(outputs)

    def through(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *outputs[0][1:]) if isinstance(outputs[0], tuple) else hidden

    try:
        for module in modules[:-1]:
            module.forward = through
        modules[-1].forward = lambda *_args, **_kwargs: next(queue)
        yield
    finally:
        for module in modules:
            module.__dict__.pop("forward", None)


def _find(model: nn.Module, name: str | None) -> tuple[str, list[nn.Module]]:
    """The name of the list of blocks, and they."""
    lists = {
        n: m for n, m in model.named_modules()
        if isinstance(m, (nn.ModuleList, nn.Sequential)) and len(m) and (n or isinstance(m, nn.ModuleList))
    }  # fmt: skip
    if name is None and lists:
        name = max(lists, key=lambda n: sum(p.numel() for p in lists[n].parameters()))
    if name is None:
        raise ModelError(f"{type(model).__name__} has no list of blocks; measure all at once (score)")
    if name not in lists:
        raise UnknownNameError("list of blocks", name, lists)
    modules = list(lists[name])
    every = [id(p) for m in modules for p in {id(p): p for p in m.parameters()}.values()]
    if len(every) != len(set(every)):
        raise ModelError(f"blocks of {name!r} share weights; measure all at once (score)")
    return name, modules
