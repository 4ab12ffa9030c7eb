"""`watch`: what an optimizer does to a model's tensors, logged at each of its steps, in anybody's loop.

Decides when things are read: around the optimizer's step, by its own hooks, and in the model's, at some steps. Changes
nothing of model, optimizer, gradients or random generators. Knows nothing of how things are read, judged or kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from steelyard.errors import ModelError, WeightsError
from steelyard.learn.gauges import plain_name
from steelyard.learn.options import check_counts, check_lists
from steelyard.learn.passage import tensors_of
from steelyard.learn.watch.faults import Fault, Faults
from steelyard.learn.watch.livepage import LivePage
from steelyard.learn.watch.log import Log
from steelyard.learn.watch.looks import Noise, spread
from steelyard.learn.watch.norms import Norms, Readings, gradient_of, is_sharded
from steelyard.learn.watch.origin import origin
from steelyard.learn.watch.sinks import Sink, sink
from steelyard.learn.watch.suspects import NARROW, Lookups, Ties, decayed, layers_of, lost_share, reasons
from steelyard.learn.watch.taps import Taps

if TYPE_CHECKING:
    from steelyard.learn.run import Run


class Watch:
    """The watch over a model and its optimizer, as a context manager; see `watch`."""

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        *,
        path: str | Path | None = None,
        every: int = 50,
        tell: Callable[[Fault], None] | None = None,
        to: Sequence[str | Sink] = (),
        page: bool | int = False,
        run: Run | None = None,
    ):
        check_counts(every=every)
        check_lists(to=to)
        self.model, self.optimizers, self.every, self.tell, self.run = model, optimizers, every, tell, run
        tensors = _tensors(model, optimizers)
        self.norms, self.noise = Norms(tensors), Noise()
        self.faults = Faults(list(tensors), layers_of(model, tensors), np.array([p.ndim > 1 for p in tensors.values()]))
        self.ties, self.lookups = Ties(model), Lookups(model)
        names = ", ".join(type(optimizer).__name__ for optimizer in optimizers)
        meta = {"model": type(model).__name__, "optimizer": names, "torch": str(torch.__version__)}
        self.sinks = [sink(one) for one in to]
        self._page: LivePage | None = None
        try:
            if page is not False:
                self._page = LivePage(0 if page is True else page)
                path = self._page.path if path is None else path
            self.log = Log(path, meta)
        except WeightsError:
            self._close_sinks()
            raise
        self._taps: Taps | None = None
        self._call: tuple[tuple[Any, ...], dict[str, Any]] | None = None  # the last one of the model
        self._examples = 0  # that the model was called with since the last step
        self._step, self._start = 0, time.perf_counter()
        self._handles: list[Any] = []
        self._progress = None if run is None else run.progress

    def __enter__(self) -> Log:
        self._start = time.perf_counter()
        self.log.add("tensors", [(name, *_described(p)) for name, p in self.norms.tensors.items()])
        if self._page is not None:
            try:
                self._page.open(self.log)
            except WeightsError:
                self.__exit__(None, None, None)
                raise
        self.log.listener = self._noted
        self._handles = [
            self.model.register_forward_pre_hook(_Hook(self._ran), with_kwargs=True),
            self.model.register_forward_hook(_Hook(self._done), always_call=True),
            self.optimizers[0].register_step_pre_hook(self._before),
            self.optimizers[-1].register_step_post_hook(self._after),
        ]
        for name, table in self.lookups.tables.items():
            self._handles.append(table.register_forward_pre_hook(_Hook(_lookup(self.lookups, name))))
        if self.run is not None:
            self.run.progress = self._of_run
        return self.log

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._taps is not None:
            self._taps.remove()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self.run is not None:
            self.run.progress = self._progress
        self._call = self._taps = self.noise.held = self.log.listener = None
        self.norms.close()
        self.log.close()
        if self._page is not None:
            self._page.close(self.log)
        self._close_sinks()

    def _close_sinks(self) -> None:
        for one in self.sinks:
            one.close()

    @property
    def _due(self) -> bool:
        """Whether this step is looked at: 0, 1, 2, 4, 8, ... and then every so many."""
        return self._step % self.every == 0 or (self._step < self.every and self._step & (self._step - 1) == 0)

    @property
    def _rate(self) -> float:
        return float(self.optimizers[0].param_groups[0]["lr"])

    def _ran(self, _model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._taps is not None:
            self._taps.active = False  # one pass is enough
        if not torch.is_grad_enabled():
            return
        self.log.noted = self._step
        first, self._call = self._call is None or self._examples == 0, (args, kwargs)
        self._examples += _examples(args, kwargs)
        if first and self._due and self._taps is None and not _compiled(self.model):
            self._taps = Taps(self.model)
            self._taps.begin()

    def _done(self, _model: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        if self._call is not None and self.faults.pairing.asks:
            given, made = _first_tensor(*self._call), next((x for x in tensors_of(output) if x.ndim > 1), None)
            if given is not None and made is not None and made.requires_grad:
                made.register_hook(partial(self.faults.pairing.met, given, made.detach()))
        if self._taps is not None:
            self._taps.leave()

    def _before(self, *_: object) -> None:
        self.log.noted = self._step
        if self._taps is not None:
            self._taps.remove()
        self.norms.before()
        if not np.isfinite(self.norms.gradient).all():
            self._find_origin()
        gradients = {n: g for n, p in self.norms.tensors.items() if (g := gradient_of(p)) is not None}
        if self.noise.held is not None:
            square, variance, scale = self.noise.second(gradients, self._examples or None)
            self.log.add("noise", [(self._step, self._examples or None, square, variance, scale)])
            self.faults.agreed(self._step, square, self.noise.mean_square)
        if self._due:
            if not any(map(is_sharded, gradients.values())):
                self.noise.first(gradients)
            ready = {n: p for n, p in self.norms.tensors.items() if not is_lazy(p)}
            for what, values in (("weight", ready), ("gradient", gradients)):
                self.log.add("values", [(self._step, name, what, *spread(x)) for name, x in values.items()])

    def _after(self, *_: object) -> None:
        found = self.norms.after()
        self._record(found)
        tensors = self.norms.tensors
        trained = np.array([p.requires_grad and not is_lazy(p) for p in tensors.values()])
        shrunk = trained & found.learning & (found.gradient == 0) & (found.update > 0)
        for i, name in enumerate(tensors) if shrunk.any() else ():
            shrunk[i] = shrunk[i] and decayed(tensors[name], self.norms.copies[name])
        still = trained & ((found.update == 0) | shrunk)
        why = reasons(tensors, self.optimizers) if still.any() else [""] * len(tensors)
        self._tell(self.faults.stepped(self._step, self._rate, found.weight, found.update, trained, why, shrunk))
        if not np.isfinite(found.update).all() and np.isfinite(found.gradient).all():
            broken = next(i for i, x in enumerate(found.update) if not np.isfinite(x))
            self._tell(self.faults.overshot(self._step))
            text = f"the step made {self.faults.tensors[broken]} so, from a finite gradient"
            self._tell(self.faults.tell(self._step, "NaN", self.faults.layers[broken], text))
        if self._due:
            self._look()
        self._step, self._examples, self._taps = self._step + 1, 0, None

    def _look(self) -> None:
        step, faults = self._step, self.faults
        for i, (name, p) in enumerate(self.norms.tensors.items()):
            if p.dtype in NARROW and name in self.norms.copies:
                share = lost_share(p, self.norms.copies[name])
                if share is not None:
                    self._tell(faults.lost(step, i, share, str(p.dtype).removeprefix("torch.")))
        for where, text in self.ties.broken():
            self._tell(faults.tell(step, "untied", where, text))
        for table, rows, of, count in self.lookups.unseen():
            self._tell(faults.unseen(step, table, rows, of, count))
        layers = [] if self._taps is None else self._taps.layers()
        self._tell(faults.looked(step, layers))
        for layer in layers:
            dead = None if layer.dead is None or not layer.units else len(layer.dead) / layer.units
            scales = layer.rms, layer.spread, layer.gradient
            limits = dead, layer.saturated, layer.peaked, layer.drift
            self.log.add("layers", [(step, layer.name, layer.kind, faults.verdict(step, layer), *scales, *limits)])

    def _find_origin(self) -> None:
        if self._call is None or any(getattr(o, "found_inf", None) is not None for o in self.optimizers):
            return  # gradients that are still scaled may overflow: the scaler skips such a step
        if not self.faults.broken:
            self._tell(self.faults.overshot(self._step))
            where, text = origin(self.model, *self._call)
            self._tell(self.faults.tell(self._step, "NaN", where, text))

    def _tell(self, faults: Iterable[Fault]) -> None:
        for fault in faults:
            self.log.add("faults", [astuple(fault)])
            for one in self.sinks:
                one.fault(fault.step, fault.text)
            if self.tell is not None:
                self.tell(fault)

    def _send(self, found: Readings, total: float, ratio: float | None) -> None:
        """To the sinks: totals of every step, and at a look the norms of each tensor."""
        values = {"rate": self._rate, "gradient norm": total} | ({} if ratio is None else {"update ratio": ratio})
        if self._due:
            for i, name in enumerate(self.norms.tensors):
                values[f"weight norm/{name}"] = float(found.weight[i])
                if found.learning[i]:
                    values[f"gradient norm/{name}"] = float(found.gradient[i])
                if found.weight[i]:
                    values[f"update ratio/{name}"] = float(found.ratio[i])
        for one in self.sinks:
            one.numbers(self._step, values)

    def _record(self, found: Readings) -> None:
        size, ratio = _total(found.weight), None
        if size:
            ratio = _total(found.update) / size
        seconds, total = time.perf_counter() - self._start, _total(found.gradient)
        self.log.add("steps", [(self._step, seconds, self._rate, total, ratio)])
        if self.sinks:
            self._send(found, total, ratio)
        gradients = np.where(found.learning, found.gradient, None).tolist()
        ratios = np.where(found.weight != 0, found.ratio, None).tolist()
        cells = zip(self.norms.tensors, found.weight.tolist(), gradients, found.update.tolist(), ratios, strict=True)
        self.log.add("norms", [(self._step, *row) for row in cells])

    def _noted(self, what: str, value: float) -> None:
        if what == "loss":
            self.faults.noted(value)
        for one in self.sinks:
            one.numbers(self.log.noted, {what: value})

    def _of_run(self, run: Run) -> None:
        """Note the loss of a Run's step, and show its progress as before."""
        self.log.note(loss=run.log[-1]["loss"])
        if self._progress is not None:
            self._progress(run)


class _Hook:
    """A hook of a module. A copy of it, in a copy of the module, does nothing: the watch is over the original."""

    def __init__(self, call: Callable[..., None] | None = None):
        self.call = call

    def __call__(self, *given: Any) -> None:
        if self.call is not None:
            self.call(*given)

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        return _Hook, ()


def watch(
    model: nn.Module | Run,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
    *,
    path: str | Path | None = None,
    every: int = 50,
    tell: Callable[[Fault], None] | None = None,
    to: Sequence[str | Sink] = (),
    page: bool | int = False,
) -> Watch:
    """Log what each step of the optimizer does to each tensor of the model, in any loop::

        with sy.watch(model, optimizer) as log:
            for x, y in batches:
                optimizer.zero_grad()
                loss = criterion(model(x), y)
                loss.backward()
                optimizer.step()
                log.note(loss=loss)

    At every step and for every tensor: ||W|| before the step, ||g|| as the optimizer got it (after clipping), the
    exact ||W_after - W||, and its ratio to ||W||, all in float64 (off the processor in float32). The training is the
    same, bit for bit, with and without. A parameter that is tied is watched once. A trainable tensor is copied
    before each step: 4 bytes more for a float32 weight.

    At some steps, a look: how the values of each tensor are spread, what each layer does (scale of its activations and
    their gradients, dead units, activations and attention at their limits, the drift of batch normalisations), and
    the gradient noise scale, from the gradients of this step and the next. A look costs about one more reading of all
    activations and a copy of the gradients until the next step. A compiled model is not tapped. Of sharded tensors
    (FSDP2) norms are of the whole, values those of this process, and there is no noise scale.

    Faults are named, each with its layer, evidence and remedy: NaN with the first layer, signals and gradients that
    vanish or explode, dead ReLUs, saturated activations and attention, frozen layers, updates lost in bfloat16,
    broken ties, drift of batch normalisations, dead embedding rows, and, if losses are noted, a rate that is 100 times
    too high or too low and a loss as of shuffled labels. For that the outputs of a classifier are compared with their
    labels at each step until it is sure that they belong together: 1 to 2 ms a step, most often in some ten steps.

    Args:
        model: any module; or a Run, whose optimizer and losses are taken.
        optimizer: any torch optimizer over some or all of the model's parameters; several, such as one for matrices
            and one for the rest, in the order in which they step: together they make a step.
        path: an SQLite file for the log, which must not exist yet; None keeps it in memory.
        every: steps from one look to the next; before the first of them, steps 0, 1, 2, 4, 8, ... are looked at.
        tell: called with each fault when it is found, ``print`` for one; the loop goes on.
        to: further places for the totals of every step, notes, faults, and the norms of each tensor at looks:
            "terminal" (a live view), "tensorboard:FOLDER", "wandb:PROJECT", "mlflow:EXPERIMENT", or your own `Sink`.
        page: True shows the course of the training in a browser on this machine, as pictures that are renewed while it
            goes on; the address is on standard error and is `log.url`. A number is the port. It takes 1 % of a core at
            most while somebody looks, and nothing else; `steelyard watch LOG --live` does it in another process.

    Entering gives the `Log`: `log.table("norms")`, "steps", "values", "layers", "noise", "faults" and "notes", then
    and later; a file is read by `read_log`, and `log.to_parquet` hands it on. Examples are counted along the first axis
    of the model's first tensor.
    Raises ModelError if the optimizer holds none of the model's parameters, WeightsError if the file is there already.

    >>> model = nn.Linear(2, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> with watch(model, optimizer) as log:
    ...     model(torch.ones(1, 2)).sum().backward()
    ...     optimizer.step()
    >>> [round(x, 4) for x in log.table("norms").column("update norm")]
    [0.1414, 0.1]
    """
    from steelyard.learn.run import Run

    run = model if isinstance(model, Run) else None
    module = model.model if isinstance(model, Run) else model
    given = run.optimizer if optimizer is None and run is not None else optimizer
    if given is None:
        raise ModelError("watch: expected an optimizer beside the model: sy.watch(model, optimizer)")
    optimizers = tuple(given) if isinstance(given, (list, tuple)) else (given,)
    return Watch(module, optimizers, path=path, every=every, tell=tell, to=to, page=page, run=run)


def _tensors(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> Mapping[str, Tensor]:
    """The model's parameters by their plain names."""
    if not isinstance(model, nn.Module):
        raise ModelError(f"watch: expected a torch.nn.Module, got {type(model).__name__}")
    wrong = [type(one).__name__ for one in optimizers if not isinstance(one, torch.optim.Optimizer)]
    if wrong or not optimizers:
        raise ModelError(f"watch: expected a torch optimizer, got {', '.join(wrong) or 'none'}")
    tensors = {plain_name(name): p for name, p in model.named_parameters()}
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    if not held & {id(p) for p in tensors.values()}:
        text = "make it from model.parameters(), after the model was moved or wrapped"
        raise ModelError(f"watch: none of the model's {len(tensors)} parameters is in the optimizer: {text}")
    return tensors


def _lookup(lookups: Lookups, name: str) -> Callable[..., None]:
    def hook(_table: nn.Module, args: tuple[Any, ...]) -> None:
        if torch.is_grad_enabled():
            lookups.note(name, args[0] if args else None)

    return hook


def _first_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    return next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.ndim), None)


def _examples(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """The length of the first axis of the first tensor; 0 where there is none."""
    first = _first_tensor(args, kwargs)
    return 0 if first is None else len(first)


def _compiled(model: nn.Module) -> bool:
    """Whether hooks on its layers would make it compile anew."""
    return any(module._compiled_call_impl is not None or hasattr(module, "_orig_mod") for module in model.modules())


def _described(p: Tensor) -> tuple[str, str, int]:
    """Shape, dtype, and whether it is trained."""
    shape = "not known yet" if nn.parameter.is_lazy(p) else "x".join(map(str, p.shape)) or "scalar"
    return shape, str(p.dtype).removeprefix("torch."), int(p.requires_grad)


def _total(norms: np.ndarray) -> float:
    """The norm of all tensors together."""
    return float(np.sqrt(np.square(norms).sum()))
