"""The stages of a life: each is one function that does its part, measures it, and adds a chapter to the record.

Decides what is done in which order and what is measured after it. Knows nothing of how a page or a terminal looks.
"""

from __future__ import annotations

import copy
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from torch import nn

from steelyard import formats
from steelyard.core.table import Table
from steelyard.core.weights import Weights
from steelyard.deploy.onnx import export_onnx, require
from steelyard.errors import ModelError, RecipeError, VerdictError
from steelyard.explain.depth import against_depth
from steelyard.explain.inventory import inventory
from steelyard.explain.overview import signal_of
from steelyard.explain.sidebyside import bytes_by_tensor, distributions
from steelyard.formats.base import replacing
from steelyard.formats.module import from_module, into_module
from steelyard.init import scheme_of
from steelyard.learn.evaluate import compare, evaluate
from steelyard.learn.gauges import update_ratio
from steelyard.learn.run import Run
from steelyard.learn.task import Task, build_seeded, first_batch
from steelyard.life.fresh import measure
from steelyard.life.moving import moved
from steelyard.life.recipe import Recipe, Shrink, dump
from steelyard.life.record import Chapter, Life, fresh_start, make_task, trained_run
from steelyard.life.telling import explained
from steelyard.shrinking.deep import bears, deep_compression, lost
from steelyard.shrinking.promise import Promise
from steelyard.shrinking.settings import Settings
from steelyard.shrinking.within import shrink


def begin(recipe: Recipe, out: Path, say: Callable[[str], None]) -> Life:
    """Make everything that the recipe names, so that a mistake in it is found before anything is written."""
    task, told = make_task(recipe.task, recipe.model, recipe.seed), recipe.train
    scheme_of(recipe.start.scheme)
    if recipe.ship is not None and recipe.ship.onnx:
        require()
    Run(task, None, optimizer=told.optimizer, rate=told.rate, schedule=told.schedule, weight_decay=told.weight_decay)
    if told.goal is not None and task.headline == "accuracy" and not told.goal <= 1:
        raise RecipeError(f"accuracy is a fraction, so expected at most 1, got {told.goal:g}", at="$.train.goal")
    if recipe.shrink is not None and recipe.deep_compression is None:
        _check_provable(recipe.shrink, task)
    if recipe.move is not None:
        for named in filter(None, (recipe.move.source, recipe.move.target)):
            build_seeded(make_task(named, recipe.model, recipe.seed), recipe.seed)
    return Life(recipe, task, out, say)


def live(life: Life) -> Life:
    """Every stage of the recipe, in order; `life` is filled on the way."""
    recipe = life.recipe
    _make(life.out)
    write_text(life.out / "recipe.yaml", dump(recipe))
    model = started(life)
    at_start = from_module(model).settle()
    trained(life, model)
    explained(life, model)
    moved(life, model)
    small = shrunk(life, model, at_start)
    if recipe.ship is not None and recipe.ship.onnx:
        shipped(life, small)
    return life


def started(life: Life) -> nn.Module:
    """Build the model, start its weights by the scheme, and follow one batch through it and back."""
    since, recipe = time.perf_counter(), life.recipe
    model = fresh_start(life.task, recipe.start.scheme, recipe.seed)
    text = (
        f"{from_module(model, buffers=False).size:,} weights of {type(model).__name__} start by the scheme "
        f"'{recipe.start.scheme}' from seed {recipe.seed}. One batch runs forward and back: the scale of the "
        "activations and of their gradients says whether the net can learn."
    )
    tables: tuple[Table, ...] = ()
    drawn = {}
    try:
        tables = (signal_of(model, life.task, seed=recipe.seed),)
        drawn = {"depth": against_depth(tables[0])}
        text += f" Verdict: {tables[0].meta['verdict']}."
    except ModelError as error:  # a net of bare parameters has no layers to follow, and trains all the same
        text += f" No signal is shown: {error}."
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "start.safetensors"
        formats.write(from_module(model), file)
        life.add("started", file, evaluate(model, life.task), since, "(not kept)")
    life.chapters.append(Chapter("Start", text, tables, drawn))
    return model


def trained(life: Life, model: nn.Module) -> None:
    """Train in place, measure on held-out data, and write the original."""
    since, told = time.perf_counter(), life.recipe.train
    run = trained_run(life, life.task, model, told.epochs, told.rate, (update_ratio(),))
    measured = evaluate(model, life.task)
    file = life.out / "weights.safetensors"
    formats.write(from_module(model).with_meta(task=life.task.name, seed=str(life.recipe.seed)), file)
    life.add("trained", file, measured, since)
    found = life.score("trained")
    _check_direction(life.task, life.score("started"), found)
    text = (
        f"{len(run.log):,} updates in {told.epochs} epochs of {told.optimizer}, {told.schedule} schedule, highest rate "
        f"{told.rate:g}. The weights with the lowest validation loss are kept; what follows is measured on "
        f"{measured.column('examples')[0]} examples that neither training nor that choice has seen."
    )
    if told.goal is not None and lost(life.task, told.goal, found) > 0:
        life.failures.append(f"trained to {life.task.headline} {found:.4f}, the recipe's goal is {told.goal:g}")
    life.chapters.append(Chapter("Train", text, (measured,), {"history": run.history(), "steps": run.table()}))


def shrunk(life: Life, model: nn.Module, at_start: Weights) -> nn.Module:
    """The small weights: the smallest file within the tolerance, or as deep compression makes them; the model of it."""
    if life.recipe.deep_compression is not None:
        return compressed(life, model, at_start, life.recipe.deep_compression)
    told = life.recipe.shrink
    if told is None:
        return model
    since, small = time.perf_counter(), life.out / "small.safetensors"
    try:
        found = shrink(model, life.task, small, tolerance=told.tolerance, confidence=told.confidence,
                       epochs=told.epochs, seed=life.recipe.seed)  # fmt: skip
    except VerdictError as error:
        life.failures.append(str(error))
        life.chapters.append(Chapter("Shrink", f"No smaller file: {error}."))
        return model
    text = (
        f"The smallest file whose {life.task.headline} has fallen by no more than {told.tolerance:g} in truth, at "
        f"{told.confidence:.0%} confidence: validation data chose what the proof was asked, test examples proved it. "
        "The last row of the stages is what a fresh process measured on the file alone."
    )
    return _reread(life, model, at_start, since, text, (found.proof, found.why, found.curve))


def compressed(life: Life, model: nn.Module, at_start: Weights, told: Settings) -> nn.Module:
    """Prune, share, code; write each stage, re-read it, measure it; the last one in a fresh process."""
    reread, notes, since = copy.deepcopy(model), [], time.perf_counter()
    for stage in deep_compression(model, life.task, told, life.recipe.seed):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "stage.safetensors"
            formats.write(stage.weights, file)
            into_module(formats.open(file), reread)
            life.add(stage.name, file, evaluate(reread, life.task), since, "(not kept)")
        notes.append(f"- {stage.name}: {stage.note} ({life.task.headline} on validation data {stage.valid:.4f})")
        since = time.perf_counter()
    weights = stage.weights.with_meta(task=life.task.name, seed=str(life.recipe.seed))
    formats.write(weights, life.out / "small.safetensors")
    text = "\n".join(notes) + "\n\nThe last row of the stages is what a fresh process measured on the file alone."
    small = _reread(life, model, at_start, since, text, ())
    loss = lost(life.task, life.score("trained"), life.score("re-read"))
    if not bears(loss, told.tolerance):
        life.failures.append(f"small.safetensors loses {loss:.4f} of {life.task.headline} on held-out data, the "
                             f"tolerance is {told.tolerance:g}; lower the sparsity or raise k")  # fmt: skip
    return small


def _reread(
    life: Life, model: nn.Module, at_start: Weights, since: float, text: str, tables: tuple[Table, ...]
) -> nn.Module:
    """A model of the small file, which a fresh process has measured, and the chapter about it."""
    file, reread = life.out / "small.safetensors", copy.deepcopy(model)
    life.add("re-read", file, measure(life.out / "recipe.yaml", file), since)
    small = formats.open(file)
    into_module(small, reread)
    drawn = {
        "bytes": bytes_by_tensor({"trained": formats.open(life.out / "weights.safetensors"), "small": small}),
        "histograms": distributions({"start": at_start, "trained": from_module(model), "small": small}),
    }
    versus = compare(model, reread, life.task)
    life.chapters.append(Chapter("Shrink", text, (*tables, versus, inventory(small)), drawn))
    return reread


def shipped(life: Life, model: nn.Module) -> None:
    """Export to ONNX; ONNX Runtime has to agree on the test examples."""
    since, batch = time.perf_counter(), first_batch(life.task, "test")
    table = export_onnx(model, batch.arguments, life.out / "model.onnx")
    row = table.rows[0]
    seconds = time.perf_counter() - since
    apart = f"ONNX Runtime differs by at most {row['largest difference']:.1g}"
    life.say(f"shipped: model.onnx, {row['bytes']:,} bytes, {apart} ({seconds:.1f} s)")
    text = (
        "The small weights as a plain ONNX graph (the values are those of small.safetensors; the file holds them as "
        "float32). ONNX Runtime and PyTorch are compared on held-out examples before the file gets its name."
    )
    life.chapters.append(Chapter("Ship", text, (table,)))


def finish(life: Life) -> None:
    """Write every table and the page."""
    from steelyard.life.page import page, tables
    from steelyard.report.html import write_html

    write_text(life.out / "tables.json", json.dumps([t.to_data() for t in tables(life)], allow_nan=False) + "\n")
    write_html(page(life), life.out / "report.html")


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with replacing(path) as file:
        file.write(text.encode())


def _check_direction(task: Task, before: float, after: float) -> None:
    """Training that makes the headline metric worse most likely means that less of it is better, and nobody said so."""
    if lost(task, before, after) > 0:
        less = task.headline in task.lower_is_better
        raise ModelError(
            f"training made {task.headline!r} worse: {before:.4g} at the start, {after:.4g} trained, and "
            f"{'less' if less else 'more'} counts as better; if that is wrong, "
            + ("leave it out of" if less else "name it in")
            + " Task(lower_is_better=...), and else change how it is trained"
        )


def _check_provable(told: Shrink, task: Task) -> None:
    """A tolerance that the test examples cannot prove is said before anything is trained for it."""
    examples = sum(len(batch) for batch in task.batches("test", 0))
    least = Promise(told.tolerance, told.confidence).least(examples)
    if task.headline == "accuracy" and least > told.tolerance:
        raise RecipeError(
            f"{examples} test examples cannot prove {told.tolerance:g}, even if none of them changes: take at least "
            f"{least:.2g}, or name deep_compression, which proves nothing",
            at="$.shrink.tolerance",
        )


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(f"cannot be made: {(error.strerror or str(error)).lower()}; choose another --out",
                          at=str(folder)) from error  # fmt: skip
