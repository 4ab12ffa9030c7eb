"""``steelyard train TASK TARGET``: start a model's weights, train them, write them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import click

from steelyard.cli.models import keeping_options, model_option, target_argument, task_argument
from steelyard.cli.options import Number, Output, output, show
from steelyard.cli.training import Training, find_rate, rate_options, tell_of_start, training_options
from steelyard.life.recipe import Named

if TYPE_CHECKING:
    from steelyard.core.table import Table
    from steelyard.learn.step import Gauge
    from steelyard.report.html import Page
    from steelyard.report.plots import Picture


@click.command("train")
@task_argument
@target_argument
@model_option
@click.option(
    "--start", metavar="SCHEME", help="he, xavier, orthogonal, ... for every matrix. Default: the model's own."
)
@click.option("--epochs", type=click.IntRange(min=1), default=20, show_default=True, help="Passes over the data.")
@click.option("--rate", type=Number(), default=3e-3, show_default=True, help="The highest learning rate.")
@rate_options
@click.option("--optimizer", default="adamw", show_default=True, help="adamw, adam, sgd, ...")
@click.option(
    "--schedule", default="one-cycle", show_default=True, help="one-cycle, cosine, warm-up-cosine, plateau, ..."
)
@click.option("--weight-decay", type=Number(), default=0.01, show_default=True, help="Decoupled; matrices only.")
@click.option("--patience", type=click.IntRange(min=1), help="Stop after so many epochs without a lower loss.")
@click.option("--accumulate", type=click.IntRange(min=1), default=1, show_default=True, help="Batches in an update.")
@click.option("--clip", type=Number(), help="The largest norm of the gradient over all weights.")
@click.option("--precision", type=click.Choice(["full", "bfloat16"]), default="full", show_default=True,
              help="bfloat16 runs the model in it; weights and updates stay as they are.")  # fmt: skip
@click.option("--trajectory", is_flag=True, help="Also the way of each layer, and what it knew in between.")
@click.option("--folds", type=click.IntRange(min=2), help="Also the gap between seen and unseen, over so many folds.")
@click.option("--shard", "sharded", is_flag=True, help="Under torchrun: each process holds a share of the weights.")
@training_options
@keeping_options
@output
def verb(
    task: Named,
    target: str,
    model: Named | None,
    seed: int,
    start: str | None,
    epochs: int,
    rate: float,
    find_lr: str | None,
    optimizer: str,
    schedule: str,
    weight_decay: float,
    patience: int | None,
    accumulate: int,
    clip: float | None,
    precision: Literal["full", "bfloat16"],
    trajectory: bool,
    folds: int | None,
    sharded: bool,
    training: Training,
    keeping: dict[str, Any],
    output: Output,
) -> None:
    """Train a model on TASK and write its weights to TARGET.

    TASK is digits, breast-cancer, mnist, fashion-mnist, text, text:FILE, csv:FILE:COLUMN, adding:LENGTH,
    copying:LENGTH or module:task; options are written as a call: "mnist(path='/data')". The weights with the lowest
    validation loss are kept, and measured on examples that training has not seen. What goes wrong in the first steps
    is said on standard error, with the layer, the cause and the cure. Several processes, started by
    torchrun -m steelyard train ..., share each batch, and with --shard the weights as well.

    --penalty l1=1e-4@*.weight adds to the loss, and the table of the objective says what: data term + each penalty.
    --watch LOG and --live show every tensor at every step, and faults are said on standard error as they are found.

    --trajectory says, of each layer, how long its way was and how far it led, after which step it stayed within a
    tenth of that from where it ended, and how well a linear probe reads the targets off it; --html draws both.
    --folds 5 trains five times more, with each fifth of all examples left out in turn: mean and spread of the test.

    \b
    Example:
      steelyard train breast-cancer weights.safetensors --epochs 5
    """
    from steelyard import formats
    from steelyard.explain.probes import Probes
    from steelyard.formats.module import from_module
    from steelyard.learn.evaluate import evaluate
    from steelyard.learn.folds import cross_validate
    from steelyard.learn.gauges import alarm
    from steelyard.learn.generalization import generalization
    from steelyard.learn.processes import first, shard
    from steelyard.learn.record import objective_table
    from steelyard.learn.run import train
    from steelyard.learn.trajectory import Trajectory
    from steelyard.life.record import fresh_start, make_task

    if sharded and (trajectory or folds is not None):
        raise click.UsageError("--trajectory and --folds want whole weights: leave out --shard")
    if folds is not None and training.balanced:
        raise click.UsageError("--folds divides the rows that --balanced serves: use --class-weights balanced")
    made, options = training.of(make_task(task, model, seed)), training.options(sharded=sharded)
    net = fresh_start(made, start, seed)
    told: Any = {"optimizer": optimizer, "epochs": epochs, "schedule": schedule, "weight_decay": weight_decay}
    rates = find_rate(net, made, effort=find_lr, seed=seed, **told) if find_lr else None
    told |= {"rate": rate if rates is None else rates.meta["rate"], "patience": patience, "accumulate": accumulate}
    told |= {"clip": clip, "precision": precision, "penalties": options["penalties"], "average": options["average"]}
    way, knows = Trajectory(), Probes(made)
    gauges: list[Gauge] = [way, knows] if trajectory else []
    if not training.watched and first():  # a watch says the same, and more
        gauges.append(alarm(say=lambda found: click.echo(f"alarm, {found}", err=True)))
    run = train(
        made, shard(net) if sharded else net, seed=seed, gauges=gauges, within=options["within"], **told, **keeping
    )
    trained = from_module(run.model)  # every process has a part of what is sharded
    tables, pictures = [evaluate(run.model, made), run.history()], {}
    tables += [table for table in (objective_table(run.table()), rates) if table is not None]
    if trajectory:
        tables += [way.table(), knows.table()]
        pictures = {tables[-2].title: _way(way.history()), tables[-1].title: _known(tables[-1])}
    if folds is not None:  # by all processes
        tables.append(generalization(run.model, made))
        tables.append(cross_validate(made, folds, model=fresh_start(made, start, seed), seed=seed, **told))
    if not first():
        return
    tell_of_start(run)
    formats.write(trained.with_meta(task=made.name, seed=str(seed)), target)
    show(tables, output, _page(tables, pictures))


def _page(tables: list[Table], pictures: Mapping[str, Picture]) -> Page:
    """The tables, some with a picture, by the title."""
    from steelyard.report.html import Page

    page = Page.of(tables)
    drawn = [[pictures[t.title]] if t.title in pictures else [] for t in tables]
    return replace(page, sections=[replace(s, pictures=d) for s, d in zip(page.sections, drawn, strict=True)])


def _way(history: Table) -> Picture:
    from steelyard.report.plots import Line

    return Line(history, "step", ("to the end",), by="layer", title="distance to the end, of that of the start")


def _known(table: Table) -> Picture:
    from steelyard.report.plots import Line

    return Line(table, "epoch", ("known",), by="layer", title="what a linear probe reads off", marks=True)
