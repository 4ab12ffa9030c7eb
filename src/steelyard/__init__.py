"""Steelyard: weigh, train, explain, shrink, move and ship the weights of neural networks.

>>> import steelyard as sy

Names are imported when they are first used; importing the package imports neither torch nor numpy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS: dict[str, str] = {
    # the nouns
    "DType": "core.spec",
    "Spec": "core.spec",
    "dtype": "core.spec",
    "Weight": "core.weights",
    "Weights": "core.weights",
    "Packed": "core.packed",
    "Codec": "core.packed",
    "nest": "core.packed",
    "smallest": "core.packed",
    "pack": "core.packed",
    "Table": "core.table",
    "where": "core.where",
    "chain": "core.transform",
    "on": "core.transform",
    "each": "core.transform",
    "SteelyardError": "errors",
    # files and models
    "open": "formats",
    "write": "formats",
    "from_module": "formats.module",
    "into_module": "formats.module",
}

if TYPE_CHECKING:
    from steelyard.core.packed import Codec as Codec
    from steelyard.core.packed import Packed as Packed
    from steelyard.core.packed import nest as nest
    from steelyard.core.packed import pack as pack
    from steelyard.core.packed import smallest as smallest
    from steelyard.core.spec import DType as DType
    from steelyard.core.spec import Spec as Spec
    from steelyard.core.spec import dtype as dtype
    from steelyard.core.table import Table as Table
    from steelyard.core.transform import chain as chain
    from steelyard.core.transform import each as each
    from steelyard.core.transform import on as on
    from steelyard.core.weights import Weight as Weight
    from steelyard.core.weights import Weights as Weights
    from steelyard.core.where import where as where
    from steelyard.errors import SteelyardError as SteelyardError

__all__ = sorted(_EXPORTS)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'steelyard' has no attribute {name!r}")
    return getattr(import_module(f"steelyard.{_EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
