"""What the verbs on models share: naming a model and a task on a command line. Torch is imported when they are made.

A name may carry options as a call: ``digits(classes=(0, 1, 2))``, ``mlp(widths=(64, 32))``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from steelyard.core.recipe import parse_call
from steelyard.errors import FormatError, ModelError, RecipeError, SteelyardError, quoted
from steelyard.formats.base import check_target
from steelyard.life.recipe import Named, split_name

if TYPE_CHECKING:
    from torch import nn

    from steelyard.core.weights import Weights
    from steelyard.learn.task import Task

WIDTHS = "widths"  # in metadata: "pruned" where layers are narrower than the model is built
_FILES = ("text:", "csv:")  # what follows is a path, and may have brackets of its own
F = TypeVar("F", bound=Callable[..., Any])

_MODEL = "linear, mlp, lenet-5, cnn, rnn, transformer, ..., or module:factory. Default: the task's own."


def model_option(function: F) -> F:
    """Add ``--model NAME`` and ``--seed N``; the verb receives ``model: Named | None`` and ``seed: int``."""
    function = click.option("--model", callback=_named, help=_MODEL)(function)
    return click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of all randomness.")(
        function
    )


def task_argument(function: F) -> F:
    """Add the argument TASK; the verb receives ``task: Named``."""
    return click.argument("task", callback=_named)(function)


def task_option(name: str, about: str) -> Callable[[F], F]:
    """Add an option that names a task; the verb receives it as a Named, or None."""
    return click.option(name, metavar="TASK", callback=_named, help=about)


def target_argument(function: F) -> F:
    """Add the argument TARGET and ``--force``; an existing file is refused before the work rather than after it."""

    @click.argument("target")
    @click.option("--force", is_flag=True, help="Replace TARGET if it exists.")
    @functools.wraps(function)
    def wrapped(*args: Any, target: str, force: bool, **options: Any) -> Any:
        check_new(target, options.get("weights"), force)
        return function(*args, target=target, **options)

    return wrapped  # type: ignore[return-value]


def check_new(target: str, source: str | None, force: bool) -> None:
    """Raise FormatError for a target that cannot be written, or that is there and not to be replaced."""
    path = Path(target)
    check_target(path, None if source is None else Path(source), force=force)
    if not path.parent.is_dir():
        raise FormatError(f"there is no folder {str(path.parent)!r}; make it first", path=path)


def keeping_options(function: F) -> F:
    """Add ``--checkpoint``, ``--every`` and ``--resume``; the verb receives ``keeping``: keywords of Run."""

    @click.option("--checkpoint", metavar="FOLDER", help="Keep the whole state here, for --resume after a kill.")
    @click.option("--every", type=click.IntRange(min=1), help="Updates between two states; else one after each epoch.")
    @click.option("--resume", is_flag=True, help="Go on with the run in the folder, bit for bit, if there is one.")
    @functools.wraps(function)
    def wrapped(*args: Any, checkpoint: str | None, every: int | None, resume: bool, **options: Any) -> Any:
        if checkpoint is None and (resume or every is not None):
            raise click.UsageError("--resume and --every need --checkpoint FOLDER", click.get_current_context())
        try:
            return function(*args, keeping={"checkpoint": checkpoint, "every": every, "resume": resume}, **options)
        except KeyboardInterrupt as interrupt:
            raise KeyboardInterrupt(_interrupted(checkpoint)) from interrupt

    return wrapped  # type: ignore[return-value]


def _interrupted(checkpoint: str | None) -> str:
    if checkpoint is None:
        return "interrupted, and nothing is kept: --checkpoint FOLDER keeps a state from which --resume goes on"
    return f"interrupted; the same command with --resume goes on from the state in {checkpoint}, if one was reached"


def _named(_ctx: click.Context, _param: click.Parameter, text: str | None) -> Named | None:
    return None if text is None else named(text)


def named(text: str) -> Named:
    """A name, or a name with options written as a call.

    >>> named("lenet-300-100"), named("breast-cancer(batch_size=16)")
    ('lenet-300-100', {'breast-cancer': {'batch_size': 16}})

    Raises RecipeError for a call that cannot be read.
    """
    name, bracket, rest = text.partition("(")
    path = name.startswith(_FILES) or ":" in rest.rpartition(")")[2]  # the bracket is part of a path
    if not bracket or (path and not rest.endswith(")")):
        return text
    if not name or not rest.endswith(")"):
        raise _unreadable(text)
    try:
        options = parse_call(f"options({rest}")
    except RecipeError:
        raise _unreadable(text) from None
    if options == "options":
        return name
    if not isinstance(options, dict) or not isinstance(options.get("options"), dict):
        raise _unreadable(text)
    return {name: options["options"]}


def spelled(given: Named) -> str:
    """What `named` reads as this.

    >>> spelled("mlp"), spelled(named("mlp(widths=(64, 32))"))
    ('mlp', 'mlp(widths=(64, 32))')
    """
    name, options = split_name(given)
    told = ", ".join(f"{key}={value!r}" for key, value in options.items())
    return f"{name}({told})" if told else name


def _unreadable(text: str) -> RecipeError:
    return RecipeError(
        f"cannot read {quoted(text)}: expected a name, or a call such as mlp(widths=(64, 32)) or, a text "
        "being in quotes, mnist(path='/data')"
    )


def loaded(task: Named, model: Named | None, seed: int, weights: Weights | None) -> tuple[Task, nn.Module]:
    """The task, and its model with all its weights from `weights` (None: as it is built from the seed).

    The weights of a structurally pruned model say so in their metadata: then its layers take their widths.
    Raises ModelError if they do not fit.
    """
    from steelyard.formats.module import from_module, into_module
    from steelyard.graph.skip import DROPPED
    from steelyard.learn.task import build_seeded
    from steelyard.life.record import make_task

    made = make_task(task, model, seed)
    module = build_seeded(made, seed)
    if weights is not None:
        if "graph.name" in weights.meta:  # an ONNX graph holds shapes and indices beside its weights
            known = from_module(module)
            weights = weights.with_items(w for w in weights.values() if w.name in known or w.spec.dtype.kind == "float")
        narrower = weights.meta.get(WIDTHS) == "pruned" or DROPPED in weights.meta
        try:
            into_module(weights, module, resize=narrower)
        except ModelError as error:
            raise _of_another(error, made, model, weights, type(module).__name__) from error
    return made, module


def _of_another(error: ModelError, task: Task, model: Named | None, weights: Weights, tried: str) -> ModelError:
    """The error, or that these are the weights of a built-in model which --model did not name."""
    from steelyard.formats.module import from_module
    from steelyard.learn import MODELS
    from steelyard.learn.models import model as make_model
    from steelyard.learn.task import build_seeded

    shapes = {name: weight.spec.shape for name, weight in weights.items()}
    for name in MODELS if task.interface is not None else ():
        try:
            made = task.with_model(functools.partial(make_model, name, task.interface))
            other = from_module(build_seeded(made, 0))
        except SteelyardError:  # not every model can be made for every task
            continue
        if {n: weight.spec.shape for n, weight in other.items()} == shapes:
            asked = "the task's own model" if model is None else "the one that was named"
            return ModelError(f"the weights are not those of {asked} ({tried}); they fit --model {name}: name that one")
    return error if model is not None else ModelError(f"{error}; --model names another model than the task's own")
