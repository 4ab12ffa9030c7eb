"""Objects as data and back: codecs, steps, selectors and any frozen dataclass, for files, YAML and options.

An object with a name in a table is ``{name: {field: value}}``, or just ``name`` where every field has its
default. The nested parts of a codec stand beside its fields: ``{"palette": {"k": 16, "codes": "entropy"}}``.
On a command line the same is a call, ``palette(k=16, codes=entropy)``; it is parsed, never run.
"""

from __future__ import annotations

import ast
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from typing import Any, Literal, TypeVar, Union

from steelyard.core.packed import Codec, Plan, Scheme, Smallest
from steelyard.core.transform import Chain, On, Step, Transform
from steelyard.core.weights import Weights
from steelyard.core.where import Both, Either, Match, Not, Where
from steelyard.errors import RecipeError, SteelyardError, suggestion

T = TypeVar("T")
MAX_DEPTH = 100  # of the places in data


def to_data(value: Any) -> Any:
    """Plain JSON-able data for a value; raises RecipeError for what cannot be written down."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Chain):
        return [to_data(step) for step in value.steps]
    if isinstance(value, Smallest):
        return {"smallest": [to_data(option) or "plain" for option in value.options]}
    if isinstance(value, Scheme):
        return _named(
            value.codec.name, {**_settings(value.codec), **{n: to_data(p) or "plain" for n, p in value.parts.items()}}
        )
    if isinstance(value, Match):
        settings = _settings(value)
        return settings["pattern"] if set(settings) == {"pattern"} else settings
    if isinstance(value, (Both, Either)):
        return {"both" if isinstance(value, Both) else "either": [to_data(value.a), to_data(value.b)]}
    if isinstance(value, Not):
        return {"not": to_data(value.a)}
    if isinstance(value, (Codec, Step)):
        return _named(value.name, _settings(value))
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_data(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping) and not isinstance(value, Weights):
        return {str(k): to_data(v) for k, v in value.items()}
    if isinstance(value, Sequence):
        return [to_data(v) for v in value]
    raise RecipeError(f"a {type(value).__name__} cannot be written into a recipe; save it and name the file instead")


def _settings(value: Any) -> dict[str, Any]:
    """The fields that differ from their defaults; a Match always says its pattern."""
    chosen = {f.name: getattr(value, f.name) for f in fields(value)}
    keep = {f.name for f in fields(value) if f.default is MISSING or chosen[f.name] != f.default or f.name == "pattern"}
    return {name: to_data(chosen[name]) for name in chosen if name in keep}


@cache
def _hints(cls: type) -> dict[str, Any]:
    """The types of fields by name: a file may hold a hundred thousand codecs of a few classes."""
    return typing.get_type_hints(cls)


def _named(name: str, settings: dict[str, Any]) -> Any:
    return {name: settings} if settings else name


@dataclass(frozen=True)
class Reader:
    """Turns data into objects by way of the tables of codecs and steps.

    Every method raises RecipeError (or UnknownNameError) saying where in the data it was and what is known.
    """

    codecs: Mapping[str, Any]
    steps: Mapping[str, Any]

    def plan(self, data: object, at: str = "$") -> Plan:
        """A codec, a nesting of codecs, ``{"smallest": [...]}``, or ``"plain"`` for none."""
        _check_depth(at)
        if data == "plain" or data is None:
            return None
        name, settings = _split(data, at)
        if name == "smallest":
            if not isinstance(settings, list) or not settings:
                raise RecipeError("expected a list of at least one option", at=f"{at}.smallest")
            return Smallest(tuple(self.plan(o, f"{at}.smallest[{i}]") for i, o in enumerate(settings)))
        cls = _look_up(self.codecs, name, at)
        settings = _mapping(settings, f"{at}.{name}")
        _known(settings, [*(f.name for f in fields(cls)), *cls.parts], f"{at}.{name}")
        below = {k: self.plan(v, f"{at}.{name}.{k}") for k, v in settings.items() if k in cls.parts}
        codec = self.build(cls, {k: v for k, v in settings.items() if k not in cls.parts}, f"{at}.{name}")
        return Scheme(codec, below) if below else codec

    def codec(self, data: object, at: str = "$") -> Codec:
        """One codec without nesting, as a file's metadata names it."""
        found = self.plan(data, at)
        if not isinstance(found, Codec):
            raise RecipeError(f"expected one codec, got {data!r}", at=at)
        return found

    def step(self, data: object, at: str = "$") -> Transform:
        """A step, or a list of steps as one chain."""
        _check_depth(at)
        if isinstance(data, list):
            return Chain(tuple(self.step(d, f"{at}[{i}]") for i, d in enumerate(data)))
        name, settings = _split(data, at)
        known = {Chain.name: Chain, On.name: On}
        cls = known[name] if name in known else _look_up(self.steps, name, at)
        step: Transform = self.build(cls, _mapping(settings, f"{at}.{name}"), f"{at}.{name}")
        return step

    def where(self, data: object, at: str = "$") -> Where:
        """A glob, the fields of a Match, or both / either / not of further conditions."""
        _check_depth(at)
        if isinstance(data, str):
            return Match(data)
        settings = _mapping(data, at)
        if len(settings) == 1:
            ((key, below),) = settings.items()
            if key == "not":
                return Not(self.where(below, f"{at}.not"))
            if key in ("both", "either"):
                if not isinstance(below, list) or len(below) != 2:
                    raise RecipeError("expected a list of two conditions", at=f"{at}.{key}")
                a, b = (self.where(d, f"{at}.{key}[{i}]") for i, d in enumerate(below))
                return Both(a, b) if key == "both" else Either(a, b)
        return self.build(Match, settings, at)

    def build(self, cls: type[T], data: object, at: str = "$") -> T:
        """An instance of a dataclass, every key and type checked; errors of its own check get the place."""
        settings = _mapping(data, at)
        known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
        _known(settings, known, at)
        missing = [
            n for n, f in known.items() if n not in settings and f.default is MISSING and f.default_factory is MISSING
        ]
        if missing:
            raise RecipeError(f"the setting {missing[0]!r} is missing", at=at)
        hints = _hints(cls)  # type: ignore[arg-type]
        values = {k: self.value(hints[k], v, f"{at}.{k}") for k, v in settings.items()}
        try:
            return cls(**values)
        except SteelyardError as error:
            raise RecipeError(str(error), at=at) from error

    def value(self, hint: Any, data: object, at: str) -> Any:
        """`data` as the type `hint`, with the few conversions that YAML makes necessary (1e-3 is text there)."""
        readers: dict[Any, Callable[[object, str], Any]] = {Plan: self.plan, Where: self.where}
        readers |= {Transform: self.step, Step: self.step}
        for special, read in readers.items():
            if hint == special:
                return read(data, at)
        origin, inner = typing.get_origin(hint), typing.get_args(hint)
        if origin in (Union, types.UnionType):
            return self._union(inner, data, at)
        if origin is Literal:
            if data not in inner:
                raise RecipeError(f"{data!r} is not a choice; {suggestion(str(data), map(str, inner))}", at=at)
            return data
        if origin is tuple:
            items = data if isinstance(data, (list, tuple)) else [data]
            each = inner[:1] * len(items) if inner[-1:] == (Ellipsis,) else inner
            if len(each) != len(items):
                raise RecipeError(f"expected {len(each)} values, got {len(items)}", at=at)
            return tuple(self.value(h, d, f"{at}[{i}]") for i, (h, d) in enumerate(zip(each, items, strict=True)))
        if origin is not None and issubclass(origin, Mapping):
            return {str(k): self.value(inner[1], v, f"{at}.{k}") for k, v in _mapping(data, at).items()}
        return self._scalar(hint, data, at)

    def _union(self, options: tuple[Any, ...], data: object, at: str) -> Any:
        if data is None and type(None) in options:
            return None
        tried = [o for o in options if o is not type(None)]
        for position, option in enumerate(tried):
            try:
                return self.value(option, data, at)
            except SteelyardError:
                if position == len(tried) - 1:
                    raise
        raise RecipeError(f"did not expect {data!r}", at=at)

    def _scalar(self, hint: Any, data: object, at: str) -> Any:
        if hint is Any:
            return data
        if hint is float and isinstance(data, (int, float, str)) and not isinstance(data, bool):
            try:
                return float(data)
            except ValueError:
                raise RecipeError(f"expected a number, got {data!r}", at=at) from None
        if isinstance(hint, type) and is_dataclass(hint):
            return data if isinstance(data, hint) else self.build(hint, data, at)
        if not isinstance(data, hint) or (isinstance(data, bool) and hint is not bool):
            raise RecipeError(f"expected {getattr(hint, '__name__', hint)}, got {data!r}", at=at)
        return data


def parse_call(text: str) -> Any:
    """The data of a call that stands for it: names, numbers, text, True/False and nested calls, nothing else.

    >>> parse_call("bitmask(mask=entropy, values=palette(k=16, codes=entropy))")
    {'bitmask': {'mask': 'entropy', 'values': {'palette': {'k': 16, 'codes': 'entropy'}}}}
    """
    try:
        return _call(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        why = error.msg if isinstance(error, SyntaxError) else error
        raise RecipeError(f"cannot read {text!r} as a call such as palette(k=16, codes=entropy): {why}") from None


def _call(node: ast.expr) -> Any:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and all(k.arg for k in node.keywords):
        if node.func.id == "smallest" and not node.keywords:
            return {"smallest": [_call(a) for a in node.args]}
        if not node.args:
            return _named(node.func.id, {str(k.arg): _call(k.value) for k in node.keywords})
    if isinstance(node, (ast.Constant, ast.UnaryOp, ast.Tuple, ast.List)):
        return ast.literal_eval(node)
    raise ValueError(f"expected a name, a value or name(setting=value), at column {node.col_offset}")


def _check_depth(at: str) -> None:
    """Raise before hostile data exhausts the stack."""
    if at.count(".") + at.count("[") > MAX_DEPTH:
        raise RecipeError(f"nested more than {MAX_DEPTH} deep", at=f"{at[:80]}...")


def _split(data: object, at: str) -> tuple[str, Any]:
    if isinstance(data, str):
        return data, {}
    if isinstance(data, dict) and len(data) == 1 and isinstance(next(iter(data)), str):
        name, settings = next(iter(data.items()))
        return name, {} if settings is None else settings
    raise RecipeError(f"expected a name, or a name with its settings, got {data!r}", at=at)


def _known(settings: Mapping[str, Any], names: Collection[str], at: str) -> None:
    for key in settings:
        if key not in names:
            raise RecipeError(f"there is no setting {key!r}; {suggestion(str(key), names)}", at=at)


def _mapping(data: object, at: str) -> Mapping[str, Any]:
    if not isinstance(data, Mapping):
        raise RecipeError(f"expected settings (key: value), got {data!r}", at=at)
    return data


def _look_up(table: Mapping[str, Any], name: str, at: str) -> Any:
    try:
        return table[name]
    except SteelyardError as error:
        if at == "$":
            raise
        raise RecipeError(str(error), at=at) from error
