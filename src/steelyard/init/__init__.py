"""What weights are before anything is learned. Decides which tensors a scheme speaks of, and where chance comes from.

Every tensor has its own random stream, made from the seed and its name: the result depends neither on the
order of the tensors nor on which others there are. Knows nothing of models: a tensor is a name and a spec.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from steelyard.core.recipe import Reader, parse_call
from steelyard.core.registry import Registry, Row
from steelyard.core.weights import Weight, Weights
from steelyard.errors import UnknownNameError
from steelyard.init.base import Init, generator

if TYPE_CHECKING:
    import numpy as np

__all__ = ["INITS", "Init", "generator", "scheme_of", "start"]

INITS: Registry[type[Init]] = Registry(
    "initialiser",
    "inits",
    {
        "zeros": Row("steelyard.init.constant:Zeros", "all zero"),
        "constant": Row("steelyard.init.constant:Constant", "all the same value"),
        "normal": Row("steelyard.init.normal:Normal", "normal with a given standard deviation"),
        "uniform": Row("steelyard.init.uniform:Uniform", "uniform between two bounds"),
        "truncated_normal": Row("steelyard.init.truncated_normal:TruncatedNormal", "normal without its tails"),
        "xavier": Row("steelyard.init.xavier:Xavier", "variance 2 / (fan in + fan out): for tanh and linear units"),
        "he": Row("steelyard.init.he:He", "variance 2 / fan in: for rectified units"),
        "lecun": Row("steelyard.init.lecun:LeCun", "variance 1 / fan in: for scaled tanh and SELU units"),
        "orthogonal": Row("steelyard.init.orthogonal:Orthogonal", "orthonormal rows or columns"),
        "delta_orthogonal": Row(
            "steelyard.init.delta_orthogonal:DeltaOrthogonal", "orthonormal at the kernel's centre"
        ),
        "identity": Row("steelyard.init.identity:Identity", "what goes in comes out"),
        "sparse": Row("steelyard.init.sparse:Sparse", "few weights into each unit, the others zero"),
    },
)


ELSEWHERE = {"glorot": "xavier", "kaiming": "he", "xavier": "xavier", "he": "he", "lecun": "lecun"}  # with a suffix


def scheme_of(text: str, **settings: Any) -> Init:
    """An initialiser from its name, or from a call with settings; `settings` replace those in the call.

    >>> scheme_of("he(slope=0.1)", mode="fan_out")
    He(slope=0.1, mode='fan_out', distribution='normal')

    Raises UnknownNameError for a name that is not in INITS, RecipeError for a setting that does not exist.
    """
    data = parse_call(text)
    name, called = next(iter(data.items())) if isinstance(data, dict) else (str(data), {})
    if name not in INITS and (ours := _ours(name)):
        raise UnknownNameError("initialiser", name, INITS, f"did you mean {ours!r}?")
    found: Init = Reader({}, {}).build(INITS[name], {**called, **settings}, name)
    return found


def _ours(name: str) -> str:
    """What an initialiser of torch or Keras is called here; '' if it is not known.

    >>> _ours("kaiming_uniform_"), _ours("glorot"), _ours("GlorotNormal")
    ('he(distribution=uniform)', 'xavier', 'xavier(distribution=normal)')
    """
    plain = name.lower().replace("_", "")
    for theirs, ours in ELSEWHERE.items():
        shape = plain.removeprefix(theirs)
        if shape in ("normal", "uniform"):
            return f"{ours}(distribution={shape})"
        if not shape:
            return ours
    return ""


def start(weights: Weights, scheme: str | Init, seed: int = 0) -> Weights:
    """The same names and specs with starting values; nothing is read, and values are drawn at each read.

    By what a tensor is: floating point with two axes or more gets the `scheme`. Floating point with one
    axis becomes zero if the last part of its name is 'bias', starts with 'bias_' or ends in '_bias'.
    Everything else stays as it is: the gains of norms (one axis, 'weight'), running statistics, counters.
    Embeddings and tables with two axes are started, too; choose others with
    ``on(where("!*.embed.weight"), lambda w: start(w, "he"))``.

    Args: `scheme` is a row of INITS, a call such as 'he(slope=0.1)', or an initialiser; `seed` any integer.

    >>> import numpy as np
    >>> w = Weights.of({"fc.weight": np.ones((300, 200), np.float32), "fc.bias": np.ones(300, np.float32)})
    >>> w = start(w, "he", seed=1)
    >>> abs(float(w["fc.weight"].array().std()) - 0.1) < 1e-3, float(w["fc.bias"].array().any())
    (True, 0.0)

    Raises what `scheme_of` raises.
    """
    init = scheme_of(scheme) if isinstance(scheme, str) else scheme
    return weights.with_items(_start(item, init, seed) for item in weights.values())


def _start(weight: Weight, init: Init, seed: int) -> Weight:
    if weight.spec.dtype.kind != "float" or not weight.spec.shape:
        return weight
    if len(weight.spec.shape) >= 2:
        return _drawn(weight, init, seed)
    leaf = weight.name.rpartition(".")[2]
    if leaf == "bias" or leaf.startswith("bias_") or leaf.endswith("_bias"):
        return _drawn(weight, INITS["zeros"](), seed)
    return weight


def _drawn(weight: Weight, init: Init, seed: int) -> Weight:
    def draw() -> np.ndarray:
        return init(weight.spec, generator(seed, weight.name))

    return replace(weight, read=draw, stored=None, scheme=None, fill=None, origin=f"start(seed={seed})")
