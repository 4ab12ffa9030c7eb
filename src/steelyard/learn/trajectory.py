"""The way of the weights: how long it is for each layer, how far from the start it leads, and when it has settled.

Decides what is kept of a way that is too long to keep, and what "settled" means. Knows nothing of the loop, or of what
a layer computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from steelyard.core.table import Column, Table
from steelyard.errors import ModelError
from steelyard.kernels.sketch import sketch
from steelyard.learn.gauges import plain_name
from steelyard.learn.options import check_whole
from steelyard.learn.seeding import derive
from steelyard.learn.state import State, check_same, unwrapped
from steelyard.learn.step import Step
from steelyard.learn.watch.norms import Norms, is_sharded
from steelyard.learn.watch.suspects import layers_of

WHOLE = "all"  # the row of all layers together
SEED = 0  # of the sketches: those of two runs can be compared
PART = 1 << 19  # elements that are sketched at a time


@dataclass(frozen=True)
class _Point:
    """Where the weights were after so many updates."""

    step: int
    path: np.ndarray  # (layers + 1,): how long the way was so far
    net: np.ndarray  # (layers + 1,): how far the start is
    place: tuple[np.ndarray, ...]  # for each layer the way from the start: itself, or its sketch


class Trajectory:
    """The way of a model's weights in training, for each layer: its length, how far it leads, when it has settled.

    As a gauge of a Run, or in a loop of your own::

        way = sy.Trajectory()                                way = sy.Trajectory(model)
        sy.train(task, model, gauges=[way])                  for x, y in batches:
        way.table()                                              ...
                                                                 optimizer.step()
                                                                 way.update()

    The *path* is the sum of ||W_t - W_(t-1)|| over the updates, the *net* distance ||W_T - W_0||: a way that is many
    times as long as it leads far goes to and fro. A layer has *settled* at the first step after which it stays within
    ``share`` of its net distance from where it ends (the layer-wise distance of Chen et al. 2023, relative to the whole
    way): the ranking of layers by that step says which learns first. "Where it ends" is the last update that was
    measured, also where the Run then goes back to its best weights.

    Path and net distance are exact: differences and sums of squares in float64 (off the processor in float32), from a
    copy of the weights at the start and one at the last update: 8 bytes for a float32 weight. Distances between other
    points of the way, which settling and `history` need, come from sketches of ``size`` numbers for each layer and
    point, at most ``keep`` points: they are right to 1 / sqrt(2 size), 3 % for 512 (one standard deviation), and exact
    for layers of no more weights than that. When there are more points, every second one is dropped, so that the step
    of settling is known to 2 / ``keep`` of the run at worst. ``meta["memory"]`` has the bytes.

    Args:
        model: what is followed; None: the model of the Run that it is a gauge of, from where it is at the first step.
        every: measure after so many updates; the path then is that of the polygon through these points, which is
            shorter, and the cost falls by that factor.
        share: of the net distance, within which a layer has settled.
        keep, size: see above.

    A Run that is resumed from its checkpoint goes on with the way; in a loop of your own keep `state` and `load` it.

    Reads only: the training is the same bit for bit. Raises ModelError for a model whose parameters have no values yet
    or are sharded over processes, and for a step of another model.

    Source: Chen, Yuille and Zhou, Which layer is learning faster?, ICLR 2023; Raghu et al., SVCCA, 2017 (layers
    converge bottom-up); Hoffer et al., Train longer, generalize better, 2017 (the distance from the start).

    >>> import torch
    >>> way = Trajectory(layer := nn.Linear(1, 1, bias=False))
    >>> for move in (3.0, -1.0, 0.01):
    ...     with torch.no_grad(): _ = layer.weight.add_(move)
    ...     way.update()
    >>> [round(way.table().rows[0][name], 2) for name in ("path", "net", "settled")]
    [4.01, 2.01, 2]
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        *,
        every: int = 1,
        share: float = 0.1,
        keep: int = 200,
        size: int = 512,
    ):
        check_whole(every=every, keep=keep, size=size)
        if not 0 < share < 1:
            raise ModelError(f"share={share}: expected a share of the net distance, more than 0 and less than 1")
        if keep < 8:
            raise ModelError(f"keep={keep}: expected at least 8 points of the way to find where it settles")
        self.every, self.share, self.keep, self.size = every, share, keep, size
        self.model: nn.Module | None = None
        self.steps = 0  # updates so far
        self._points: list[_Point] = []
        self._apart = 1  # measured updates from one point to the next
        self._measured = self._last = 0
        if model is not None:
            self._begin(model, {})

    def __call__(self, step: Step) -> Mapping[str, float]:
        """As a gauge: follow the step, and give the path of all weights so far."""
        if self.model is None:
            self.steps = self._last = step.index
            self._begin(step.model, step.before)
        elif unwrapped(step.model) is not self.model:
            raise ModelError("the trajectory follows another model: make one for each run, sy.Trajectory()")
        self.update()
        return {"path": float(self._path[-1])}

    def update(self) -> None:
        """Follow an update that the optimizer has just made."""
        if self.model is None:
            raise ModelError("the trajectory follows no model yet: sy.Trajectory(model) before the loop")
        self.steps += 1
        if self.steps % self.every:
            return
        self._path += self._by_layer(self._norms.renew())
        self._last, self._measured = self.steps, self._measured + 1
        if self._measured % self._apart == 0:
            self._points.append(self._point())
            if len(self._points) > self.keep:
                del self._points[1::2]
                self._apart *= 2

    def table(self) -> Table:
        """A row for each layer: weights, size at the start, path, net distance, their ratio, the step of settling."""
        points, away = self._ways()
        end = points[-1]
        rows = []
        for i, layer in enumerate((*self._layers, WHOLE)):
            path, net, start = float(end.path[i]), float(end.net[i]), float(self._start_norm[i])
            row = {"layer": layer, "weights": self._counts[i], "start": start, "path": path, "net": net}
            row |= {"path / net": path / net if net else None, "net / start": net / start if start else None}
            step = self._settled(points, away[:, i], net)
            row |= {"settled": step, "of the run": None if step is None else self._share_of_run(step)}
            rows.append(row)
        columns = [
            Column("layer"),
            Column("weights"),
            Column("start", "", "norm of the weights at the start"),
            Column("path", "", "sum of the lengths of the updates"),
            Column("net", "", "distance from the start to the end"),
            Column("path / net", "x", "1 for a straight way"),
            Column("net / start", "x"),
            Column("settled", "", f"the step after which it stays within {self.share:.0%} of net from the end"),
            Column("of the run", "%", "that step"),
        ]
        return Table.of("the way of the weights", columns, rows, self._meta())

    def history(self) -> Table:
        """A row for each kept point and layer: path and net distance so far, and how far the end is as a share of net.

        A picture of it is ``steelyard.report.plots.Line(history, "step", ("to the end",), by="layer")``.
        """
        points, away = self._ways()
        rows = []
        for t, point in enumerate(points):
            for i, layer in enumerate((*self._layers, WHOLE)):
                net = points[-1].net[i]
                row = {"step": point.step, "layer": layer, "path": float(point.path[i]), "net": float(point.net[i])}
                rows.append(row | {"to the end": float(away[t, i] / net) if net else None})
        columns = [
            Column("step", "", "updates"),
            Column("layer"),
            Column("path", "", "sum of the lengths of the updates so far"),
            Column("net", "", "distance from the start"),
            Column("to the end", "%", "distance to the last point, of that of the start"),
        ]
        return Table.of("the way of the weights, by step", columns, rows, self._meta())

    def state(self) -> State:
        """What `load` goes on from: a tree of numbers and tensors, not copied; a Run writes it with its checkpoint."""
        if self.model is None:
            return {}
        points = {
            "step": [point.step for point in self._points],
            "path": _stacked([point.path for point in self._points]),
            "net": _stacked([point.net for point in self._points]),
            "place": [_stacked([p.place[i] for p in self._points]) for i in range(len(self._layers))],
        }
        found = {"settings": self._settings(), "steps": self.steps, "last": self._last, "measured": self._measured}
        found |= {"apart": self._apart, "path": torch.from_numpy(self._path.copy()), "points": points}
        return found | {"start": dict(self._start), "copies": dict(self._norms.copies)}

    def load(self, state: State, model: nn.Module | None = None) -> None:
        """Go on from a state that `state` gave, with the model as it was then, as if it had never been broken off.

        model: as that of the trajectory, which may be without one. Raises ModelError for other layers or settings.
        """
        if (model := self.model or model) is None:
            raise ModelError("the trajectory follows no model yet: give load the model, too")
        if not state:  # of a trajectory that had followed nothing
            return
        self._points = []
        self._begin(model, {})
        check_same(state["settings"], self._settings(), "the trajectory")
        for own, saved in ((self._start, state["start"]), (self._norms.copies, state["copies"])):
            for name, tensor in own.items():
                tensor.copy_(saved[name])
        self._start_norm = self._by_layer(np.array([float(_wide(x).norm()) for x in self._start.values()]))
        self.steps, self._last, self._measured = state["steps"], state["last"], state["measured"]
        self._apart, self._path = state["apart"], state["path"].numpy().copy()
        points = state["points"]
        path, net, place = points["path"].numpy(), points["net"].numpy(), [x.numpy() for x in points["place"]]
        ways = zip(points["step"], path, net, zip(*place, strict=True), strict=True)
        self._points = [_Point(step, along, away, tuple(at)) for step, along, away, at in ways]

    def _settings(self) -> dict[str, Any]:
        """What a trajectory that goes on must have in common with the one that began."""
        layers = dict(zip(self._layers, self._counts, strict=False))
        return {"every": self.every, "keep": self.keep, "size": self.size, "layers": layers}

    def _begin(self, model: nn.Module, before: Mapping[str, Tensor]) -> None:
        """Take the start from `before`, names as in the model, where it is there; else the weights as they are."""
        found = {n: p for n, p in model.named_parameters() if is_lazy(p) or p.is_floating_point()}
        for name, p in found.items():
            if is_lazy(p) or p.is_meta:
                raise ModelError(f"{name!r} has no values yet; run the model once on a batch before it is followed")
            if is_sharded(p):
                raise ModelError(f"{name!r} is sharded over processes; follow a model that is whole in each process")
        if not found:
            raise ModelError(f"{type(model).__name__} has no parameters whose way could be followed")
        self.model = unwrapped(model)
        layers = layers_of(model, found)
        self._layers = list(dict.fromkeys(layers))
        places = [self._layers.index(layer) for layer in layers]
        self._member = np.zeros((len(self._layers) + 1, len(found)))  # (layers + 1, tensors): 1 for its own
        self._member[places, np.arange(len(found))] = self._member[-1] = 1
        self._tensors = {plain_name(name): p for name, p in found.items()}
        self._counts = [int(count) for count in self._member @ [p.numel() for p in found.values()]]
        self._norms = Norms(self._tensors)
        self._norms.hold()
        for name in found:
            if name in before:
                self._norms.copies[plain_name(name)].copy_(before[name])
        self._start = {name: copy.clone() for name, copy in self._norms.copies.items()}
        self._start_norm = self._by_layer(np.array([float(_wide(x).norm()) for x in self._start.values()]))
        self._path = np.zeros(len(self._layers) + 1)
        self._points.append(self._point())

    def _by_layer(self, norms: np.ndarray) -> np.ndarray:
        """Norms of tensors put together, (layers + 1,)."""
        whole: np.ndarray = np.sqrt(self._member @ np.square(norms))
        return whole

    def _point(self) -> _Point:
        """The weights as they were measured last."""
        places = [np.zeros(min(count, self.size)) for count in self._counts[:-1]]
        offsets = [0] * len(places)
        net = np.zeros(len(self._tensors))
        part = max(1, PART // self.size) * self.size
        for k, (name, start) in enumerate(self._start.items()):
            layer, square = int(np.argmax(self._member[:, k])), 0.0
            whole = self._counts[layer] <= self.size
            for a, b in zip(_flat(self._norms.copies[name]).split(part), _flat(start).split(part), strict=True):
                away = _wide(a) - _wide(b)
                square += float(away.square().sum())
                values, at = away.float().cpu().numpy(), offsets[layer]
                if whole:
                    places[layer][at : at + len(values)] = values
                    offsets[layer] += len(values)
                else:
                    sketch(values, derive(SEED, "way"), places[layer], at)
                    offsets[layer] += -(-len(values) // self.size) * self.size
            net[k] = square**0.5
        kept = tuple(place.astype(np.float32) for place in places)
        return _Point(self._last, self._path.copy(), self._by_layer(net), kept)

    def _ways(self) -> tuple[list[_Point], np.ndarray]:
        """The kept points and the last one, and how far each layer was from its end at each of them."""
        if not self._points:
            raise ModelError("the trajectory has followed no step yet")
        points = self._points if self._points[-1].step == self._last else [*self._points, self._point()]
        squares = np.zeros((len(points), len(self._layers) + 1))
        for i in range(len(self._layers)):
            places = np.stack([point.place[i] for point in points]).astype(float)
            squares[:, i] = np.square(places - places[-1]).sum(1)
        squares[:, -1] = squares[:, :-1].sum(1)
        away: np.ndarray = np.sqrt(squares)
        return points, away

    def _settled(self, points: list[_Point], away: np.ndarray, net: float) -> int | None:
        """The first kept step from which on all distances to the end are small; None for a layer that never moved."""
        far = np.flatnonzero(away > self.share * net)
        return points[int(far.max()) + 1].step if net and len(far) else None

    def _share_of_run(self, step: int) -> float:
        first = self._points[0].step
        return (step - first) / (self._last - first)

    def _meta(self) -> dict[str, Any]:
        copies = 2 * sum(x.numel() * x.element_size() for x in self._start.values())
        kept = sum(place.nbytes for point in self._points for place in point.place)
        return {
            "steps": self._last,
            "first step": self._points[0].step,
            "measured every": self.every,
            "points": len(self._points),
            "resolution": self._apart * self.every,
            "error of a distance": (2 * self.size) ** -0.5,
            "memory": copies + kept,
        }


def _stacked(rows: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(rows))


def _flat(x: Tensor) -> Tensor:
    return x.detach().reshape(-1)


def _wide(x: Tensor) -> Tensor:
    return x.double() if x.device.type == "cpu" else x.float()
