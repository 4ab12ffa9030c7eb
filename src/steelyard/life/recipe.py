"""The recipe of a run: what is said in the YAML file, checked key by key, and written back complete.

Decides names, types and defaults; knows nothing of how a stage is done.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from steelyard.core.recipe import Reader, to_data
from steelyard.errors import RecipeError, SteelyardError
from steelyard.shrinking.settings import Settings

Named = str | Mapping[str, Any]  # a name, or one name with its options: {digits: {classes: [0, 1]}}


@dataclass(frozen=True)
class Start:
    """How the weights begin."""

    scheme: str = "he"


@dataclass(frozen=True)
class Train:
    """How the weights are learned; rates are per step, decay is decoupled."""

    epochs: int = 20
    rate: float = 3e-3
    optimizer: str = "adamw"
    schedule: Literal["one-cycle", "cosine", "constant"] = "one-cycle"
    weight_decay: float = 0.01
    goal: float | None = None  # the held-out headline metric to reach; missed: the run says so and ends with status 1


@dataclass(frozen=True)
class Explain:
    """What is said of the trained weights."""

    strongest: int = 10  # rows of the largest, smallest and most negative weights in the report


@dataclass(frozen=True)
class Move:
    """Carry weights learned on `source` to `target`, against training `target` from scratch."""

    target: Named
    source: Named | None = None  # None: the net that was just trained
    epochs: int = 60
    rate: float = 3e-3
    head_rate: float = 3e-2  # where a new head alone is trained


@dataclass(frozen=True)
class Shrink:
    """The smallest file within a tolerance, with proof: `steelyard shrink`."""

    tolerance: float = 0.02  # how much worse the headline metric may be in truth, in its own unit
    confidence: float = 0.95
    epochs: int = 20  # of training for size; 0: rounding alone

    def __post_init__(self) -> None:
        if not self.tolerance > 0:
            raise RecipeError(f"expected tolerance to be more than 0, got {self.tolerance:g}")
        if not 0.5 <= self.confidence < 1:
            raise RecipeError(f"expected 0.5 <= confidence < 1, got {self.confidence:g}")
        if self.epochs < 0:
            raise RecipeError(f"expected epochs to be 0 or more, got {self.epochs}")


@dataclass(frozen=True)
class Ship:
    """What is exported beside the weights."""

    onnx: bool = True


@dataclass(frozen=True)
class Recipe:
    """A run. A section that is null is left out of it."""

    task: Named
    model: Named | None = None  # None: the task's own
    seed: int = 0
    threads: int = 1  # more are faster for larger nets; bytes repeat for one seed and one number of threads
    start: Start = field(default_factory=Start)
    train: Train = field(default_factory=Train)
    explain: Explain | None = field(default_factory=Explain)
    move: Move | None = None
    shrink: Shrink | None = field(default_factory=Shrink)
    deep_compression: Settings | None = None  # prune, share, code as in the paper, instead of `shrink`
    ship: Ship | None = field(default_factory=Ship)


def embedded() -> str:
    """The text of the recipe that runs where none is named."""
    return files("steelyard.life").joinpath("digits.yaml").read_text(encoding="utf-8")


def load(path: str | Path | None = None) -> Recipe:
    """Read and check a recipe file, or the embedded one.

    >>> load().task
    'digits'

    Raises RecipeError naming file, line or key, and the nearest right key.
    """
    if path is None:
        return parse(embedded(), "the embedded recipe")
    path = Path(path)
    if path.is_dir():
        raise RecipeError("expected a recipe file, found a directory; name a .yaml file", at=str(path))
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError("there is no such recipe; `steelyard run --print-recipe` prints one to start from",
                          at=str(path)) from None  # fmt: skip
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot be read as text: {error}", at=str(path)) from error
    return parse(text, str(path))


def parse(text: str, source: str) -> Recipe:
    """A Recipe from YAML text; `source` is named in errors."""
    import yaml

    try:
        data = yaml.load(text, Loader=_strict_loader())
    except yaml.YAMLError as error:
        problem = " ".join(str(error).split())
        raise RecipeError(f"is not YAML: {problem}", at=source) from error
    if not isinstance(data, dict):
        raise RecipeError("expected keys such as task and model; `steelyard run --print-recipe` shows them", at=source)
    try:
        return _checked(Reader({}, {}).build(Recipe, data, "$"))
    except SteelyardError as error:
        raise RecipeError(str(error), at=source) from error


def _strict_loader() -> Any:
    """YAML's safe loader, which also refuses a key that is given twice; plain YAML takes the last one silently."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            for position, key in enumerate(keys):
                if key in keys[:position]:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key!r} is given twice", node.start_mark
                    )
            return super().construct_mapping(node, deep)

    return Loader


def _checked(recipe: Recipe) -> Recipe:
    """Ranges that types cannot say."""
    positive: dict[str, float] = {"$.train.epochs": recipe.train.epochs, "$.train.rate": recipe.train.rate}
    positive |= {"$.threads": recipe.threads}
    if recipe.explain is not None:
        positive |= {"$.explain.strongest": recipe.explain.strongest}
    if recipe.move is not None:
        positive |= {"$.move.epochs": recipe.move.epochs, "$.move.rate": recipe.move.rate}
        positive |= {"$.move.head_rate": recipe.move.head_rate}
    for at, value in positive.items():
        if not value > 0:
            raise RecipeError(f"expected more than 0, got {value:g}", at=at)
    for at, named in (("$.task", recipe.task), ("$.model", recipe.model)):
        if isinstance(named, Mapping) and len(named) != 1:
            raise RecipeError("expected one name with its options, as in {digits: {batch_size: 32}}", at=at)
    return recipe


def dump(recipe: Recipe) -> str:
    """The complete recipe as YAML, every default spelled out: what was run."""
    import yaml

    return yaml.safe_dump(to_data(recipe), sort_keys=False, allow_unicode=True)


def split_name(named: Named) -> tuple[str, dict[str, Any]]:
    """The name and the options of a task or model as the recipe names it."""
    if isinstance(named, str):
        return named, {}
    (name, options), = named.items()  # fmt: skip
    return name, dict(options or {})
