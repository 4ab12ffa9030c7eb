"""A Run: one readable training loop. It is iterated; each Step is a plain record; gauges are functions of a Step.

Decides the order of events in a step and what a run remembers. Knows nothing of what gauges measure, of files,
or of how its progress is shown.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Unpack, get_args

import torch
from torch import nn

from steelyard.core.table import Table
from steelyard.errors import ModelError
from steelyard.formats._sharded import whole
from steelyard.learn.average import Ema, Swa, kind_of
from steelyard.learn.checkpoint import Checkpoint
from steelyard.learn.decay import Decay
from steelyard.learn.evaluate import training_mode
from steelyard.learn.feed import Feed
from steelyard.learn.finite import of_split, of_step, of_weights
from steelyard.learn.gradients import Gradients, NotFiniteLoss, Precision
from steelyard.learn.interrupt import Interrupt
from steelyard.learn.kept import Keep, Kept
from steelyard.learn.optimizers import Optimizers, optimizer_for
from steelyard.learn.options import (
    check_choice,
    check_lists,
    check_not_negative,
    check_positive,
    check_whole,
)
from steelyard.learn.penalize import own_decay, penalize
from steelyard.learn.penalties import Penalty
from steelyard.learn.processes import Processes
from steelyard.learn.progress import progress_bar
from steelyard.learn.record import epochs_table, steps_table
from steelyard.learn.runoptions import RunOptions
from steelyard.learn.schedules import Pace, Schedule, Scheduler
from steelyard.learn.seeding import derive, seeded
from steelyard.learn.state import (
    check_same,
    gauge_states,
    model_state,
    set_gauge_states,
    set_model_state,
    set_optimizer_state,
)
from steelyard.learn.step import Gauge, Step, readings
from steelyard.learn.task import Batch, Task, build_seeded, check_model, check_task, device_of


class Run:
    """Training of a model on a task, one step at each turn of a loop.

    ::

        with Run(task, model, rate=1e-3, epochs=20) as run:
            for step in run:
                print(step.index, step.loss)

    model: the module to train, in place (None: a new one of the task, from the seed). optimizer: a name, a function
    from parameter groups, which carry the rate and the decay of this run, to a torch optimizer, or an optimizer of the
    model, with its own rates and decay. rate: the highest learning rate. schedule: a name, a function from the fraction
    done to a factor of the rate, or a Scheduler of torch. weight_decay: the optimizer's own, for what decays by
    `decay_groups`. penalties: L1, GroupL1, Decay, ...: each is a column of the table, and so is the objective.
    keep: "best" ends with the weights of the epoch with the lowest validation loss, "last" with the final ones.
    average: Ema() or Swa(), or "ema", "ema=0.99", "swa", "swa=0.5": measures, and ends with, an average of the weights;
    the steps stay the same, and "best" is the best of the averages once there is one.
    patience: stop after so many epochs without a lower validation loss (None: never).
    after_step: called with the model after each update. progress: called with the run after each step.

    accumulate: so many batches make one update, exactly as if they were one batch (dropout and batch norm see each
    on its own). clip: the largest norm of the gradient over all parameters. precision: "bfloat16" runs the model
    under torch.autocast; weights, loss and updates stay as they are. compiled: run it through torch.compile, True or
    its keywords. Under torchrun each process takes its share of every batch, with the gradients of one process alone;
    a model that is sharded (`shard`, or FSDP2's fully_shard) stays so, and its checkpoint is that of the whole model.

    checkpoint: a folder that from the start holds the whole state of the run (weights, buffers, optimizer, the place
    in the data, generators, the best weights, the log, gauges that have a `state`), renewed after each epoch, at
    Ctrl-C, and after each ``every`` updates. resume: go on with the run in that folder, if there is one, bit for bit
    as if it had never been broken off; the task, the model and the options must be those that it began with. The
    global generators of Python, numpy and torch go on, too, from where they were.

    The same seed gives the same bits; the loop itself leaves the global generators untouched. Within a ``with``
    block Ctrl-C takes effect between two steps, so that the model is whole. Batches of which no example has a weight
    make no step. Raises ModelError for a loss, a validation loss or weights that are not finite, code of the task or
    the model that fails, an empty split or a model without anything to train, UnknownNameError for an optimizer, a
    schedule or an average that is not there.
    """

    def __init__(
        self,
        task: Task,
        model: nn.Module | None = None,
        *,
        optimizer: str | Optimizers | torch.optim.Optimizer = "adamw",
        rate: float = 3e-3,
        epochs: int = 20,
        schedule: str | Schedule | Scheduler = "one-cycle",
        weight_decay: float = 0.01,
        penalties: Sequence[Penalty | Decay] = (),
        seed: int = 0,
        gauges: Sequence[Gauge] = (),
        keep: Keep = "best",
        average: Ema | Swa | str | None = None,
        patience: int | None = None,
        accumulate: int = 1,
        clip: float | None = None,
        precision: Precision = "full",
        compiled: bool | Mapping[str, Any] = False,
        after_step: Callable[[nn.Module], None] | None = None,
        progress: Callable[[Run], None] | None = None,
        checkpoint: str | Path | None = None,
        every: int | None = None,
        resume: bool = False,
    ):
        check_task(task)
        check_lists(penalties=penalties, gauges=gauges)
        check_positive(rate=rate, clip=clip)
        check_not_negative(weight_decay=weight_decay)
        check_whole(epochs=epochs, accumulate=accumulate, every=every, patience=patience)
        check_choice("way to keep weights", keep, get_args(Keep))
        check_choice("precision", precision, get_args(Precision))
        self.task, self.epochs, self.seed, self.keep = task, epochs, seed, keep
        self.patience, self.accumulate = patience, accumulate
        self.model = build_seeded(task, seed) if model is None else model
        check_model(self.model)
        self.optimizer = optimizer_for(self.model, optimizer, rate, weight_decay)
        self.penalized = penalize(self.model, self.optimizer, *penalties)
        with ExitStack() as undone:  # by whatever is wrong below: the optimizer may be the user's
            undone.callback(self.penalized.remove)
            self._pace = Pace(schedule, self.optimizer)
            self.gauges, self.after_step, self.progress = tuple(gauges), after_step, progress
            self.log: list[dict[str, Any]] = []  # a row for each step
            self.epoch_log: list[dict[str, Any]] = []  # a row for each epoch; epoch 0 is before the first step
            self.done = 0.0  # the fraction of the run
            self._kept = Kept(task, self.model, keep, None if average is None else kind_of(average))
            self._device = device_of(self.model)
            self._losses = [0.0, 0]  # of this epoch: their sum over examples, the number of examples
            self._feed = Feed(task, tracked=checkpoint is not None)
            self._checkpoint, self._every = None if checkpoint is None else Checkpoint(checkpoint), every
            self._decay = [group.get("weight_decay") for group in self.optimizer.param_groups]
            self._whole = True  # between two steps, not inside one
            self._saved = -1  # the number of steps when the checkpoint was written
            self._processes = Processes.join(self._device)
            self._clip, self._precision = clip, precision
            self._begin(resume)
            self._gradients = Gradients(task, self.model, self._device, clip, precision, compiled, self._processes)
            self._interrupt = Interrupt()
            self._steps = self._all_steps()
            undone.pop_all()

    def __iter__(self) -> Iterator[Step]:
        return self._steps

    def __enter__(self) -> Run:
        self._interrupt.hold()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._interrupt.release()
        self._steps.close()
        if self._whole and self._saved < len(self.log):
            self._save()
        self._kept.finish()
        self._gradients.release()
        self.penalized.remove()
        if kind is None:
            self._interrupt.check()

    def _all_steps(self) -> Generator[Step, None, None]:
        training_mode(self.model)
        if not self.epoch_log:
            self._whole = False
            self._feed.count()
            self._end_epoch()
            self._save()
        while self._feed.epoch < self.epochs and not self._stalled():
            rest = self._feed.rest()
            while batches := tuple(batch.to(self._device) for batch in islice(rest, self.accumulate)):
                self._whole = False
                self._pace.before_step(self.done)
                self.penalized.at(self.done)
                step = self._step(len(self.log), self._feed.epoch, batches)
                self.done = self._fraction()
                if step is None:
                    self._whole = True
                    continue
                self._pace.after_step()
                self._kept.after_step()
                examples = sum(map(len, batches))
                self._losses = [self._losses[0] + step.loss * examples, self._losses[1] + examples]
                self._record(step)
                self._whole = True
                yield step
                self._between_steps()
            self._whole = False
            self._feed.end_epoch()
            self._end_epoch()
            self._save()
            self._interrupt.check()
        self._feed.end()
        self._kept.finish()
        self.penalized.remove()

    def _between_steps(self) -> None:
        """Write the checkpoint if it is time to, and let Ctrl-C take effect."""
        asked = self._processes.any(self._interrupt.asked, self._device)
        if asked or (self._every is not None and len(self.log) % self._every == 0):
            self._save()
        self._interrupt.asked = asked
        self._interrupt.check()

    def _step(self, index: int, epoch: int, batches: tuple[Batch, ...]) -> Step | None:
        """One update; None, with nothing changed, if no example of its batches has a weight."""
        start = time.perf_counter()
        before = {n: p.detach().clone() for n, p in self.model.named_parameters()} if self.gauges else {}
        purpose = ("step", index) if self._processes.count == 1 else ("step", index, self._processes.rank)
        try:
            with seeded(derive(self.seed, *purpose), self._device):  # for dropout
                self.optimizer.zero_grad(set_to_none=True)
                loss = self._gradients(batches)
                if loss is None:
                    return None
                self._gradients.clipped()
                penalties = self.penalized.values() | own_decay(self.optimizer)
                self.optimizer.step()
        except NotFiniteLoss as error:
            why = f"the loss is {error.loss}: {of_step(self.model, batches, index)}"
            raise ModelError(f"{self._place(index, len(batches))}: {why}") from None
        except ModelError as error:
            raise ModelError(f"{self._place(index, len(batches))}: {error}") from error.__cause__
        if self.after_step is not None:
            self.after_step(self.model)
        rate, seconds = self.optimizer.param_groups[0]["lr"], time.perf_counter() - start
        return Step(index, epoch, loss, rate, seconds, batches, self.model, self.optimizer, before, penalties)

    def _place(self, index: int, batches: int) -> str:
        """The step and its batches, for errors."""
        last = self._feed.served - 1
        which = f"batch {last}" if batches == 1 else f"batches {last - batches + 1} to {last}"
        return f"step {index} ({which} of epoch {self._feed.epoch})"

    def _record(self, step: Step) -> None:
        row: dict[str, Any] = {"step": step.index, "epoch": step.epoch, "loss": step.loss, "rate": step.rate}
        row["seconds"] = step.seconds
        if step.penalties:
            row |= {**step.penalties, "objective": step.objective}
        row.update(readings(self.gauges, step))
        self.log.append(row)
        if self.progress is not None:
            self.progress(self)

    def _end_epoch(self) -> None:
        """Measure on the validation split, note the epoch, remember the best weights."""
        total, examples = self._losses
        if self._feed.epoch and not examples:
            raise ModelError(f"epoch {self._feed.epoch - 1} has no example of a weight above 0: nothing to learn from")
        self._losses = [0.0, 0]
        self._check_weights()
        found = self._kept.after_epoch(self.done, self._feed.epoch, required=self.patience is not None)
        valid, seconds = found.get("loss"), sum(row["seconds"] for row in self.log)
        if valid is not None and math.isnan(valid):
            when = f"after epoch {self._feed.epoch - 1}" if self._feed.epoch else "before the first step"
            raise ModelError(f"the validation loss {when} is nan: {of_split(self.task, 'valid')}")
        row = {"epoch": self._feed.epoch, "train loss": total / examples if examples else None, "valid loss": valid}
        self.epoch_log.append(row | {self.task.headline: found.get(self.task.headline), "seconds": seconds})
        if self._feed.epoch:
            self._pace.after_epoch(valid)
        self._whole = True

    def _stalled(self) -> bool:
        """Whether the validation loss has not fallen for as long as patience lasts."""
        losses = [row["valid loss"] for row in self.epoch_log]
        return self.patience is not None and len(losses) - 1 - losses.index(min(losses)) >= self.patience

    def _fraction(self) -> float:
        """The fraction of the run that is done, in updates: also in those that nothing counted in."""
        each = math.ceil(self._feed.count() / self.accumulate)
        here = min(math.ceil(self._feed.served / self.accumulate), each)
        return min((self._feed.epoch * each + here) / (self.epochs * each), 1.0)

    def _begin(self, resume: bool) -> None:
        """Take the state from the checkpoint, or make the folder for one; raises ModelError if it does not fit."""
        if self._checkpoint is None:
            if self._every is not None:
                raise ModelError(
                    f"every={self._every} says when a checkpoint is written: name its folder (checkpoint=)"
                )
            if resume:
                raise ModelError("there is nothing to resume from: name the folder (checkpoint=, or --checkpoint)")
            return
        found = self._checkpoint.load() if resume else None
        if found is None:
            if self._processes.rank == 0:
                self._checkpoint.begin()
            return
        state, self.log = found
        check_same(state["settings"], self._identity(), "the run")
        set_model_state(self.model, {**state["model"], "extra": self._processes.mine(state["extras"])})
        set_optimizer_state(self.optimizer, state["optimizer"])
        self._pace.load(state["schedule"])
        self._feed.load(state["feed"])
        self.epoch_log, self.done, self._losses = state["epochs"], state["done"], state["losses"]
        self._kept.load(state["kept"])
        set_gauge_states(self.gauges, state.get("gauges", {}), self.model)
        set_gauge_states((self.task.loss,), state.get("loss", {}), self.model)
        self._saved = len(self.log)

    def _save(self) -> None:
        """Write the checkpoint, if there is one to write; raises ModelError for weights that are not finite."""
        if self._checkpoint is None:
            return
        self._check_weights()
        state = {"settings": self._identity(), "model": model_state(self.model), "feed": self._feed.state()}
        state |= {"optimizer": self.optimizer.state_dict(), "kept": self._kept.state(), "epochs": self.epoch_log}
        state |= {"done": self.done, "losses": self._losses, "schedule": self._pace.state()}
        state["extras"] = self._processes.gathered(state["model"]["extra"])  # a carried state is each process's own
        state = whole(state | {"gauges": gauge_states(self.gauges), "loss": gauge_states((self.task.loss,))})
        if self._processes.rank == 0:
            self._checkpoint.save(state, self.log)
        self._processes.wait()
        self._saved = len(self.log)

    def _check_weights(self) -> None:
        """Raise ModelError for weights that are not finite: a finite loss does not tell."""
        if found := of_weights(self.model, len(self.log)):
            kept = "; the checkpoint is left as it was before" if self._saved >= 0 else ""
            raise ModelError(f"{found}{kept}")

    def _identity(self) -> dict[str, Any]:
        """What a run that goes on must have in common with the one that began."""
        more = {"schedule": self._pace.name, "batches in an epoch": self._feed.count(), "patience": self.patience}
        more |= {"average": repr(self._kept.kind), "weight_decay": self._decay}
        gradients = {"accumulate": self.accumulate, "clip": self._clip, "precision": self._precision}
        return self._settings() | more | gradients

    @property
    def kept_epoch(self) -> int:
        """The epoch whose weights the run ends with; 0 is the start, where no epoch had a lower validation loss."""
        return self._feed.epoch if self._kept.epoch is None else self._kept.epoch

    def table(self) -> Table:
        """A row for each step: loss, rate, seconds, each penalty and the objective, and what the gauges said."""
        return steps_table(self.task, self.log, self._settings())

    def history(self) -> Table:
        """A row for each epoch: mean training loss, validation loss, headline metric, seconds of training so far."""
        return epochs_table(self.task, self.epoch_log, self._settings())

    def _settings(self) -> dict[str, Any]:
        told = {"task": self.task.name, "optimizer": type(self.optimizer).__name__, "rate": self._pace.rates[0]}
        told |= {"epochs": self.epochs, "seed": self.seed, "keep": self.keep}
        return told | {"penalties": ", ".join(self.penalized.names) or "none"}


def train(
    task: Task,
    model: nn.Module | None = None,
    *,
    progress: bool | Callable[[Run], None] = True,
    within: Callable[[Run], AbstractContextManager[Any]] | None = None,
    **options: Unpack[RunOptions],
) -> Run:
    """A Run, run to its end; the keywords are those of Run. ``progress``: True shows a bar on a terminal only.

    within: makes, of the run, a context in which it runs: ``lambda run: sy.watch(run, path="run.sqlite")``.

    >>> from steelyard.learn.tasks import task
    >>> run = train(task("breast-cancer"), epochs=20, progress=False)
    >>> run.history().column("accuracy")[-1] > 0.9
    True
    """
    check_task(task)
    with progress_bar(f"training on {task.name}", progress) as shown:
        run = Run(task, model, progress=shown, **options)
        with nullcontext() if within is None else within(run), run:
            for _ in run:
                pass
    return run
