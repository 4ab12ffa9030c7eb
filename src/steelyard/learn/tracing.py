"""The operations of one forward pass, and which of them feeds which: as a batch meets them, or without a batch.

Decides what one operation is: a call of a layer with weights, of another module with one tensor in and one out, or of
a torch function outside of both. Knows nothing of what an operation means.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from steelyard.errors import ModelError
from steelyard.learn.calling import calling
from steelyard.learn.evaluate import unfused
from steelyard.learn.matrices import layers
from steelyard.learn.task import called
from steelyard.learn.unharmed import unmoved

FUNCTIONS = ("linear", "bilinear", "embedding", "embedding_bag")  # besides conv1d, conv_transpose2d, ...
FRESH = ("zeros", "ones", "full", "empty", "rand", "randn", "randint")  # ..._like(x) and x.new_...() hold nothing of x


@dataclass(eq=False)
class Operation:
    """One operation; in ``args`` and ``kwargs`` an Operation stands for the tensor that it returned."""

    order: int
    name: str  # without underscores at its ends: 'relu' for relu_, 'add' for __iadd__
    call: Callable[..., Any] | None = None  # None: an input of the model
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    layer: str | None = None  # the layer with weights whose call it is; the model itself has the name ''
    module: str = ""  # the other module whose call it is
    sources: tuple[Operation, ...] = ()
    uses: list[Operation] = field(default_factory=list)


class Graph:
    """Operations in the order of execution."""

    def __init__(self) -> None:
        self.operations: list[Operation] = []
        self.outputs: list[Operation] = []  # those whose tensors the model returns

    def calls(self) -> dict[str, list[Operation]]:
        """Those of each layer with weights, in the order of their first calls."""
        found: dict[str, list[Operation]] = {}
        for op in self.operations:
            if op.layer is not None:
                found.setdefault(op.layer, []).append(op)
        return found

    def add(
        self,
        name: str,
        call: Any = None,
        args: Any = (),
        kwargs: Any = None,
        *,
        layer: str | None = None,
        module: str = "",
    ) -> Operation:
        """One more operation; its sources are the operations among its arguments."""
        kwargs = kwargs or {}
        sources = tuple(dict.fromkeys(_operations((args, kwargs))))
        made = Operation(len(self.operations), plain(name), call, tuple(args), kwargs, layer, module, sources)
        for source in sources:
            source.uses.append(made)
        self.operations.append(made)
        return made

    def add_layer(self, name: str, layer: nn.Module, args: Any = (), kwargs: Any = None) -> Operation:
        """The call of a layer with weights; attention ends with the layer inside it, which it never calls itself."""
        made = self.add(type(layer).__name__, layer, args, kwargs, layer=name)
        if isinstance(layer, nn.MultiheadAttention):
            inner = f"{name}.out_proj" if name else "out_proj"
            return self.add("Linear", layer.out_proj, (made,), layer=inner)
        return made


def record(model: nn.Module, arguments: tuple[Any, ...]) -> Graph:
    """Of one forward pass in evaluation mode without gradients; buffers, modes and random numbers are as before.

    Raises ModelError if the model fails.
    """
    recorder = _Recorder(model)
    with unmoved(model), unfused(), torch.no_grad(), recorder.hooks(), recorder:
        for layer in model.modules():
            layer.training = False  # not by eval(), which some models take as a sign to merge their weights
        recorder.inputs(arguments)
        with calling("the model, on the batch that shows its order,"):
            output = called(model, arguments)
        recorder.graph.outputs += [recorder.made[t] for t in tensors(output) if t in recorder.made]
    return recorder.graph


def symbolic(model: nn.Module) -> Graph:
    """The same without a batch, by torch.fx; raises ModelError where that cannot follow the model."""
    found = layers(model)
    graph = Graph()
    if "" in found:  # the model is a layer itself
        graph.outputs.append(graph.add_layer("", model, (graph.add("input"),)))
        return graph
    try:
        with unmoved(model):
            traced = _Tracer(found).trace(model)
    except Exception as error:  # torch.fx runs the user's code on stand-ins; it may raise anything
        raise ModelError(f"torch.fx cannot follow {type(model).__name__}: {_first_line(error)}") from error
    made: dict[fx.Node, Any] = {}
    owners = _owners(found)
    for node in traced.nodes:
        args, kwargs = swap((node.args, node.kwargs), lambda n: made.get(n) if isinstance(n, fx.Node) else n)
        if node.op == "placeholder":
            made[node] = graph.add(node.name)
        elif node.op == "get_attr":
            made[node] = _attribute(model, node.target)
        elif node.op == "call_module" and node.target in found:
            made[node] = graph.add_layer(node.target, found[node.target], args, kwargs)
        elif node.op == "call_module":
            module = model.get_submodule(node.target)
            made[node] = graph.add(type(module).__name__, module, args, kwargs, module=node.target)
        elif node.op == "output":
            graph.outputs += _operations(args)
        elif node.op in ("call_function", "call_method"):
            call = getattr(Tensor, node.target) if node.op == "call_method" else node.target
            name = getattr(call, "__name__", str(call))
            if any(True for _ in _operations((args, kwargs))) and not is_fresh(name):
                made[node] = graph.add(name, call, args, kwargs, layer=_owner(name, args, owners))
            else:
                made[node] = _computed(call, args, kwargs)
    return graph


class _Recorder(TorchFunctionMode):  # type: ignore[misc]
    """Hooks note the calls of modules, the mode those of functions that no noted module calls."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.layers, self.graph = model, layers(model), Graph()
        self.made: Any = WeakTensorKeyDictionary()  # what returned a tensor that is still alive
        self.within: list[nn.Module] = []  # the noted module that runs
        self.given: tuple[Any, Any] = ((), {})
        self.owners = _owners(self.layers)

    def inputs(self, arguments: tuple[Any, ...]) -> None:
        for i, value in enumerate(tensors(arguments)):
            self.made[value] = self.graph.add(f"input {i}")

    def hooks(self) -> _Hooks:
        weighted = {id(layer): name for name, layer in self.layers.items()}
        noted = []
        for name, module in self.model.named_modules():
            if id(module) in weighted or (module is not self.model and not _has_layers(module, weighted)):
                noted.append(module.register_forward_pre_hook(self._before(id(module) in weighted), with_kwargs=True))
                noted.append(module.register_forward_hook(self._after(name, id(module) in weighted), with_kwargs=True))
        return _Hooks(noted)

    def _before(self, weighted: bool) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            if not self.within and (weighted or len(list(tensors((args, kwargs)))) == 1):
                self.within.append(module)
                self.given = self._swapped(args), self._swapped(kwargs)

        return hook

    def _after(self, name: str, weighted: bool) -> Callable[..., None]:
        def hook(module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
            if not self.within or self.within[-1] is not module:
                return
            self.within.pop()
            args, kwargs = self.given
            if weighted:
                self._note(output, self.graph.add_layer(name, module, args, kwargs))
            elif any(True for _ in _operations((args, kwargs))):
                self._note(output, self.graph.add(type(module).__name__, module, args, kwargs, module=name))

        return hook

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if self.within or is_fresh(name):
            return func(*args, **kwargs)
        swapped = self._swapped(args), self._swapped(kwargs)
        result = func(*args, **kwargs)
        layer = _owner(name, args, self.owners)
        if (layer is not None or any(True for _ in _operations(swapped))) and any(True for _ in tensors(result)):
            self._note(result, self.graph.add(name, func, *swapped, layer=layer))
        return result

    def _swapped(self, value: Any) -> Any:
        return swap(value, lambda x: self.made.get(x, x) if isinstance(x, Tensor) else x)

    def _note(self, output: Any, operation: Operation) -> None:
        for tensor in tensors(output):
            self.made[tensor] = operation


class _Hooks:
    """Hooks that are removed at the end of a with block."""

    def __init__(self, handles: list[Any]):
        self.handles = handles

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()


class _Tracer(fx.Tracer):  # type: ignore[misc]
    """Goes into every module that has layers with weights inside."""

    def __init__(self, found: Mapping[str, nn.Module]):
        super().__init__()
        self.weighted = {id(layer): name for name, layer in found.items()}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:  # noqa: ARG002
        return id(m) in self.weighted or not _has_layers(m, self.weighted)


def _has_layers(module: nn.Module, weighted: Mapping[int, str]) -> bool:
    return any(id(m) in weighted for m in module.modules())


def _owners(found: Mapping[str, nn.Module]) -> dict[int, str]:
    """The layer of each matrix, for functions that are given it directly; the first of those that share it."""
    owners: dict[int, str] = {}
    for name, layer in found.items():
        for _, parameter in layer.named_parameters(recurse=False):
            owners.setdefault(id(parameter), name)
    return owners


def _owner(name: str, args: Any, owners: Mapping[int, str]) -> str | None:
    if name in FUNCTIONS or name.startswith("conv"):
        return next((owners[id(a)] for a in args if isinstance(a, Tensor) and id(a) in owners), None)
    return None


def is_fresh(name: str) -> bool:
    """Whether what a function of that name returns holds nothing of what it is given."""
    return name.startswith("new_") or (name.endswith("_like") and name.startswith(FRESH))


def plain(name: str) -> str:
    """The name without underscores at its ends, and of what is done in place without the i: 'add' for __iadd__."""
    bare = name.strip("_")
    return bare[1:] if bare in ("iadd", "isub", "imul", "idiv", "itruediv", "ipow", "imatmul") else bare


def _attribute(model: nn.Module, path: str) -> Any:
    found: Any = model
    for part in path.split("."):
        found = getattr(found, part)
    return found


def _computed(call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """What a function of constants returns; None where it is not known without a batch."""
    try:
        with torch.no_grad():
            return call(*args, **kwargs)
    except Exception:  # noqa: BLE001 - it has been given a stand-in for a shape, say
        return None


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}" if str(error).strip() else repr(error)


def swap(value: Any, how: Callable[[Any], Any]) -> Any:
    if isinstance(value, (tuple, list)):
        parts = [swap(part, how) for part in value]
        return tuple(parts) if isinstance(value, tuple) else parts
    if isinstance(value, dict):
        return {key: swap(part, how) for key, part in value.items()}
    return how(value)


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (tuple, list)):
        for part in value:
            yield from _leaves(part)
    elif isinstance(value, Mapping):
        yield from _leaves(list(value.values()))
    else:
        yield value


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in a value: in tuples, lists and mappings within each other."""
    return (leaf for leaf in _leaves(value) if isinstance(leaf, Tensor))


def _operations(value: Any) -> Iterator[Operation]:
    return (leaf for leaf in _leaves(value) if isinstance(leaf, Operation))
