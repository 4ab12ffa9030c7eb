"""``steelyard finetune TASK WEIGHTS TARGET``: carry trained weights to a new task."""

from __future__ import annotations

from typing import Any

import click

from steelyard.cli.models import keeping_options, model_option, target_argument, task_argument
from steelyard.cli.options import Number, Output, output, show
from steelyard.cli.training import Training, find_rate, rate_options, tell_of_start, training_options
from steelyard.core.where import where
from steelyard.life.recipe import Named


@click.command("finetune")
@task_argument
@click.argument("weights")
@target_argument
@model_option
@click.option("--head", default="new", show_default=True, help="new, keep, or a glob of what starts anew.")
@click.option("--freeze", help="body (all but the head), or a glob of what is not trained.")
@click.option("--start", metavar="SCHEME", help="he, xavier, ... for what starts anew. Default: the model's own.")
@click.option("--epochs", type=click.IntRange(min=1), default=20, show_default=True, help="Passes over the data.")
@click.option("--rate", type=Number(), default=1e-3, show_default=True, help="The highest learning rate.")
@rate_options
@training_options
@keeping_options
@output
def verb(
    task: Named,
    weights: str,
    target: str,
    model: Named | None,
    seed: int,
    head: str,
    freeze: str | None,
    start: str | None,
    epochs: int,
    rate: float,
    find_lr: str | None,
    training: Training,
    keeping: dict[str, Any],
    output: Output,
) -> None:
    """Load what fits of WEIGHTS into the model of TASK, train it there, and write TARGET.

    --penalty l2-sp=0.1 keeps the weights near those that were loaded; --watch LOG and --live show the training.

    The account says of every tensor on either side whether it was loaded, is new, or did not fit.

    \b
    Example:
      steelyard finetune breast-cancer trained.safetensors tuned.safetensors --head keep --epochs 3
    """
    from steelyard import formats
    from steelyard.formats.module import from_module
    from steelyard.learn.evaluate import evaluate
    from steelyard.learn.finetune import carry
    from steelyard.learn.record import objective_table
    from steelyard.learn.run import train
    from steelyard.life.record import fresh_start, make_task

    made, options = training.of(make_task(task, model, seed)), training.options()
    net, account = carry(
        made, formats.open(weights), fresh_start(made, start, seed),
        head=head if head in ("new", "keep") else where(head),
        freeze=None if freeze is None else "body" if freeze == "body" else where(freeze),
    )  # fmt: skip
    rates = find_rate(net, made, effort=find_lr, epochs=epochs, seed=seed) if find_lr else None
    rate = rate if rates is None else rates.meta["rate"]
    run = train(made, net, rate=rate, epochs=epochs, seed=seed, **options, **keeping)
    tell_of_start(run)
    formats.write(from_module(run.model).with_meta(task=made.name, seed=str(seed)), target)
    tables = [evaluate(run.model, made), account, run.history(), objective_table(run.table()), rates]
    show([table for table in tables if table is not None], output)
