"""Starting the weights of a module in place: by a scheme, or by what a batch of data does to them.

Decides which parameters of which layers are started, in what order the layers count (that of execution, never
that of registration), and that a module is left exactly as it was where anything fails. How a layer is taken
apart into matrices is in ``matrices``; which values a scheme draws is in ``init``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from steelyard.core.spec import Spec
from steelyard.core.table import Column, Table
from steelyard.errors import ModelError, RecipeError
from steelyard.init import Init, generator, scheme_of
from steelyard.init.delta_orthogonal import DeltaOrthogonal
from steelyard.init.orthogonal import Orthogonal
from steelyard.learn.gains import asks_for_gain, known_flow, with_gain
from steelyard.learn.matrices import ATTENTION, WEIGHTED, Matrix, biases, forget_gates, is_started, layers, matrices
from steelyard.learn.pairs import Halves
from steelyard.learn.residual import check_rule, scale_branches
from steelyard.learn.unharmed import unharmed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import numpy as np

    from steelyard.learn.flow import Flow

NORMS = (
    *(nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
)

BY_DATA = ("data", "auto")


COLUMNS = (
    Column("layer"),
    Column("kind"),
    Column("order", "", "of the first call"),
    Column("activation", "", "that follows the layer, and what lies between"),
    Column("done"),
)


def init_(
    model: nn.Module,
    scheme: str | Init = "he",
    batch: Any = None,
    *,
    seed: int = 0,
    passes: int = 2,
    residual: str | None = None,
) -> Table:
    """Start every weight of `model` in place, and say of each layer what was done.

    A scheme draws each matrix by itself: the gates of an LSTM, packed queries, keys and values, and the groups of a
    convolution are matrices of their own, and a transposed convolution has its fans the right way round. Recurrent
    matrices become orthogonal, embeddings normal of variance 1, biases 0 (1 for the forget gate of an LSTM), and
    norms the identity. A parameter with several names is one parameter and stays so: one that is looked up and also
    multiplies is drawn as what multiplies, and the padding row of an embedding stays 0. Frozen parameters
    (``requires_grad`` off), whole numbers and parameters of other layers keep their values, and are listed; but
    where a start by data meets such a parameter as it is added to the signal, or put beside it (positions, a class
    token), it gets 0.3 of the scale of the signal, with the pattern that it has.

    With ``gain=auto``, as in 'lecun(gain=auto)' or 'orthogonal(gain=auto)', each layer has the gain of the activation
    that follows it, whatever that is (`steelyard.gain`); it is found by the batch, or without one by torch.fx.

    The scheme 'data' starts with orthogonal matrices and rescales them, so that the output of every layer has
    standard deviation 1 over `batch`; see `steelyard.learn.datadriven.scale_by_data`. The scheme 'auto' also finds
    what follows each layer and how many stand in series; it scales residual branches down, makes deep nets without
    norms almost linear at their start, says why of each layer, and proves it on the batch (``meta['proved']``); see
    `steelyard.learn.auto.start_auto`.

    Args:
        model: any module on a real device.
        scheme: 'data', 'auto', a row of INITS, a call such as 'he(slope=0.1)', or an initialiser.
        batch: inputs of the model: a tensor, a tuple of several arguments, a dict of keywords, or a Batch. 'data' and
            'auto' need one; other schemes tell by it the order of execution and the activations.
        seed: of all values; each tensor has a stream of its own, so that the order of layers never matters.
        passes: forward passes that the scaling may take, at least 1.
        residual: how residual branches are scaled by depth after a scheme: 'gpt2', 'rezero', 'fixup' or 't-fixup'; see
            `steelyard.learn.residual.scale_branches`. They are found by the batch, or without one by torch.fx.

    Returns a table of layer, kind, what was done; for 'data' with the standard deviation and the gradient's scale.

    Raises ModelError for a model without layers with weights, on the meta device, with lazy parameters, or that
    fails on the batch; the model is then as it was before.

    >>> net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
    >>> table = init_(net, "data", torch.randn(64, 8, generator=torch.Generator().manual_seed(0)))
    >>> [round(std, 5) for std in table.column("std")]
    [1.0, 1.0]

    Source: Glorot and Bengio 2010, He et al. 2015, Saxe et al. 2013 (schemes); Mishkin and Matas, "All you need is a
    good init", ICLR 2016 (data); Gers et al. 2000 and Jozefowicz et al. 2015 (the forget gate).
    """
    data = scheme in BY_DATA
    if data and batch is None:
        raise RecipeError(f"a start by data needs a batch: init_(model, {scheme!r}, batch)")
    if passes < 1:
        raise RecipeError(f"a start by data takes at least 1 pass, not {passes}")
    if residual is not None:
        check_rule(residual)
        if data:
            raise RecipeError("a start by data gives every layer its scale; residual= goes with the other schemes")
    found = _checked(model)
    init = _parsed("orthogonal" if data else scheme)
    automatic = asks_for_gain(init)
    wanted = "gain='auto'" if automatic else f"residual={residual!r}" if residual else ""
    seen = known_flow(model, batch, wanted) if wanted or (batch is not None and not data) else None
    chosen = {name: with_gain(init, seen.layers.get(name)) for name in found} if seen and automatic else {}
    with unharmed(model):
        if scheme == "auto":
            from steelyard.learn.auto import start_auto

            return _with_kept(start_auto(model, found, batch, passes, seed), model)
        said = draw(model, found, init, seed, chosen)
        if data:
            from steelyard.learn.datadriven import scale_by_data

            return _with_kept(scale_by_data(model, found, batch, passes, seed, said), model)
        if residual is not None and seen is not None:
            scale_branches(model, found, seen, residual, said)
    return _with_kept(_table(found, said, seen, seed), model)


def draw(
    model: nn.Module,
    found: Mapping[str, nn.Module],
    init: Init,
    seed: int,
    chosen: Mapping[str, Init] | None = None,
    halves: Mapping[str, Halves] | None = None,
) -> dict[str, str]:
    """Put starting values into all layers, by `init` or what is `chosen` for a layer; what was done, by layer.

    Layers with `halves` are drawn as mirrored pairs.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    owner_of = owners(found)
    said = {}
    for name, layer in found.items():
        notes = []
        for matrix in matrices(layer):
            parameter = getattr(layer, matrix.parameter)
            if not is_started(parameter):
                notes.append(f"{matrix.parameter} kept: {_reason(parameter)}")
            elif (owner := owner_of[id(parameter)]) != name:
                notes.append(f"{matrix.parameter} is that of {owner}")
            else:
                scheme, mirror = (chosen or {}).get(name, init), (halves or {}).get(name, Halves())
                notes.append(_drawn(matrix, scheme, seed, f"{names[id(parameter)]}#{matrix.index}", mirror))
        for bias, values in biases(layer):
            if is_started(getattr(layer, bias)):
                values.zero_()
        for gate in forget_gates(layer):
            gate.fill_(1.0)
        said[name] = "; ".join(dict.fromkeys(notes))
    for layer in found.values():
        if getattr(layer, "padding_idx", None) is not None and is_started(layer.weight):
            layer.weight.detach()[layer.padding_idx] = 0
    for layer in model.modules():
        if isinstance(layer, NORMS) and all(is_started(p) for p in layer.parameters(recurse=False)):
            for leaf, p in layer.named_parameters(recurse=False):
                p.detach().fill_(1.0 if leaf == "weight" else 0.0)
    return said


def _with_kept(table: Table, model: nn.Module) -> Table:
    """The table with the names of the parameters outside of layers with weights and of norms that stay as they are."""
    scaled = {row["layer"] for row in table.rows if row["kind"] == "Parameter"}
    kept = [
        f"{name}.{leaf}" if name else leaf
        for name, layer in model.named_modules()
        if not isinstance(layer, (*WEIGHTED, *ATTENTION, *NORMS))
        for leaf, _ in layer.named_parameters(recurse=False)
        if (f"{name}.{leaf}" if name else leaf) not in scaled
    ]
    return replace(table, meta={**table.meta, "kept": kept}) if kept else table


def owners(found: Mapping[str, nn.Module]) -> dict[int, str]:
    """The layer that says how a parameter is drawn: of those that share it the first that multiplies by it."""
    found_owners: dict[int, str] = {}
    for tables in (False, True):
        for name, layer in found.items():
            for matrix in matrices(layer):
                if (matrix.role == "table") == tables:
                    found_owners.setdefault(id(getattr(layer, matrix.parameter)), name)
    return found_owners


def _reason(parameter: Tensor) -> str:
    """Why a parameter is not started."""
    if not isinstance(parameter, nn.Parameter):
        return "computed from other parameters"
    return "frozen" if parameter.is_floating_point() else "not floating point"


def _table(found: Mapping[str, nn.Module], said: Mapping[str, str], seen: Flow | None, seed: int) -> Table:
    """A row for each layer: as registered, or where the flow is known in the order of execution."""
    rows: list[dict[str, Any]] = []
    for name, layer in found.items():
        row: dict[str, Any] = {"layer": name, "kind": type(layer).__name__, "done": said[name]}
        place = seen.layers.get(name) if seen else None
        if place is not None:
            row |= {"order": place.order, "activation": " after ".join((place.name, *reversed(place.between)))}
        elif seen:
            row["done"] += "; not executed by this batch"
        rows.append(row)
    if seen is None:
        return Table.of("start", [c for c in COLUMNS if c.name not in ("order", "activation")], rows, {"seed": seed})
    rows.sort(key=lambda row: row.get("order", len(rows) + 1))
    return Table.of("start", COLUMNS, rows, {"seed": seed})


def scheme_for(matrix: Matrix, init: Init) -> Init:
    """The initialiser of one matrix: recurrent ones are orthogonal, tables of variance 1, and all others `init`."""
    return {"recurrent": scheme_of("orthogonal"), "table": scheme_of("normal(std=1)")}.get(matrix.role, init)


def _drawn(matrix: Matrix, init: Init, seed: int, stream: str, halves: Halves) -> str:
    """Fill one matrix; what was done."""
    role = scheme_for(matrix, init)
    shape = halves.shape(tuple(matrix.values.shape))
    spec, chance = Spec.of(shape, "float64"), generator(seed, stream)
    values = (
        role.drawn(spec, chance, _qr(matrix)) if isinstance(role, (Orthogonal, DeltaOrthogonal)) else role(spec, chance)
    )
    matrix.values.copy_(halves.mirrored(torch.from_numpy(values)))
    gain = getattr(role, "gain", 1.0)
    return f"{matrix.parameter} {role.name}" + (f", gain {gain:.4g}" if gain != 1 else "")


def _qr(matrix: Matrix) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """torch's QR in the precision of the matrix: in float32 four times as fast as numpy's in float64."""
    precise = torch.float64 if matrix.values.dtype == torch.float64 else torch.float32

    def qr(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        q, r = torch.linalg.qr(torch.from_numpy(x).to(precise))
        return q.numpy(), r.numpy()

    return qr


def _checked(model: nn.Module) -> dict[str, nn.Module]:
    """The layers to start; raises ModelError for a model that cannot be started."""
    check_values(model)
    found = layers(model)
    if not found:
        raise ModelError(f"{type(model).__name__} has no layer with weights; there is nothing to start")
    return found


def check_values(model: nn.Module) -> None:
    """Raise ModelError for what is no module, and for a parameter or buffer that has no shape or no values yet."""
    if not isinstance(model, nn.Module):
        raise ModelError(f"expected a torch.nn.Module, got {'the class ' * isinstance(model, type)}{_type(model)}")
    for name, p in (*model.named_parameters(), *model.named_buffers()):
        if isinstance(p, nn.parameter.UninitializedTensorMixin):
            raise ModelError(f"{name!r} has no shape yet; run the model once on a batch before it is started")
        if p.is_meta:
            raise ModelError(f"{name!r} is on the meta device, without values; call model.to_empty(device='cpu') first")


def _type(value: object) -> str:
    return value.__name__ if isinstance(value, type) else type(value).__name__


def _parsed(scheme: object) -> Init:
    """The initialiser that a scheme is or names; raises RecipeError for anything else."""
    if isinstance(scheme, Init):
        return scheme
    if not isinstance(scheme, str):
        raise RecipeError(f"a scheme is a name, a call such as 'he(slope=0.1)' or an initialiser, not {_type(scheme)}")
    return scheme_of(scheme)
