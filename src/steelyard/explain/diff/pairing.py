"""Which tensor of one file is which tensor of another, where names, ties and prefixes may have changed.

Decides by names first (the same, then the same behind a prefix), then by content of the same shape and dtype, then by
the renaming that these have shown, and last by alike values. Says how each pair was found. Compares nothing further.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from steelyard.core.weights import Weight, Weights
from steelyard.errors import SteelyardError
from steelyard.explain.diff.tally import surely_same, wide

WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # put in by torch
SAMPLE = 1024  # elements of a tensor that are looked at before its content is trusted to be that of another
ALIKE = 0.9  # cosine of samples from which two tensors of one shape are taken for each other
_CROWD = 512  # tensors of one shape among which alike values are looked for


@dataclass(frozen=True)
class Pair:
    """Two tensors that are taken for each other."""

    name: str  # in the second
    was: str  # in the first
    a: Weight
    b: Weight
    found: str = "name"  # "name", "prefix", "content", "pattern" or "values"
    tie: str = ""  # what changed about the ties of this name


@dataclass(frozen=True)
class Pairing:
    """All pairs, and what has no partner."""

    pairs: list[Pair]
    removed: list[Weight]
    added: list[Weight]
    ties: dict[str, str]  # names that are further names of a tensor on one side, and are not there on the other


def pair(a: Weights, b: Weights) -> Pairing:
    """Match the tensors of `a` and `b`.

    >>> import numpy as np
    >>> x = np.arange(6, dtype=np.float32).reshape(2, 3)
    >>> found = pair(Weights.of({"module.fc.weight": x}), Weights.of({"fc.weight": x + 1}))
    >>> [(p.was, p.name, p.found) for p in found.pairs]
    [('module.fc.weight', 'fc.weight', 'prefix')]
    """
    pairs, ties = _by_name(a, b)
    used_a, used_b = {p.a.name for p in pairs}, {p.b.name for p in pairs}
    rest_a = {name: item for name, item in a.items() if name not in used_a}
    rest_b = {name: item for name, item in b.items() if name not in used_b}
    steps: tuple[Callable[[dict[str, Weight], dict[str, Weight], list[Pair]], list[Pair]], ...]
    steps = (_by_suffix, _by_content, _by_pattern, _by_content_in_order, _by_values)
    renamed: list[Pair] = []
    for step in steps if rest_a and rest_b else ():
        for found in step(rest_a, rest_b, renamed):
            del rest_a[found.was], rest_b[found.name]
            renamed.append(found)
    order = {name: at for at, name in enumerate((*b, *b.ties))}
    pairs = sorted((*pairs, *renamed), key=lambda p: order[p.name])
    return Pairing(pairs, list(rest_a.values()), list(rest_b.values()), ties)


def _by_name(a: Weights, b: Weights) -> tuple[list[Pair], dict[str, str]]:
    """Pairs of the same name, and what happened to the ties of names that only one side knows."""
    shared = {name for name in (*a, *a.ties) if name in b}
    of_a, of_b = _tied(a, shared), _tied(b, shared)
    pairs: list[Pair] = []
    done: set[tuple[str, str]] = set()
    for name in (*b, *b.ties):
        if name not in shared:
            continue
        key = (a.ties.get(name, name), b.ties.get(name, name))
        aliased = name in a.ties or name in b.ties
        tie = "" if not aliased or of_a[key[0]] == of_b[key[1]] else _tie(name, a, b)
        if key in done and not tie:
            continue
        done.add(key)
        pairs.append(Pair(name, name, a[name], b[name], tie=tie))
    gone = {n: f"was a further name of {c}" for n, c in a.ties.items() if n not in shared}
    new = {n: f"is a further name of {c}" for n, c in b.ties.items() if n not in shared}
    return pairs, gone | new


def _tied(weights: Weights, shared: set[str]) -> dict[str, set[str]]:
    """The shared names of each tensor."""
    names: dict[str, set[str]] = {name: {name} & shared for name in weights}
    for alias, name in weights.ties.items():
        names[name] |= {alias} & shared
    return names


def _tie(name: str, a: Weights, b: Weights) -> str:
    if name in a.ties and name in b.ties:
        return f"was tied to {a.ties[name]}, is tied to {b.ties[name]}"
    return f"was tied to {a.ties[name]}, is a tensor of its own" if name in a.ties else f"is now tied to {b.ties[name]}"


def plain(name: str) -> str:
    """A name without what torch's wrappers put into it.

    >>> plain("module.layers._orig_mod.0.weight")
    'layers.0.weight'
    """
    return ".".join(part for part in name.split(".") if part not in WRAPPERS) or name


def _by_suffix(a: Mapping[str, Weight], b: Mapping[str, Weight], _known: list[Pair]) -> list[Pair]:
    """The same name behind another prefix, of the same shape, where only one can be meant."""
    ending: dict[str, list[str]] = {}
    for name in b:
        for end in _ends(name):
            ending.setdefault(end, []).append(name)
    found = []
    for name, item in a.items():
        for end in _ends(name):
            whole = end == plain(name)
            names = [n for n in ending.get(end, ()) if whole or end == plain(n)]
            names = [n for n in names if b[n].spec.shape == item.spec.shape]
            if len(names) == 1:
                found.append(Pair(names[0], name, item, b[names[0]], "prefix"))
            if names:
                break
    return _once(found)


def _ends(name: str) -> list[str]:
    """The plain name, and what is left of it without its first parts."""
    parts = plain(name).split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]


def _once(pairs: list[Pair]) -> list[Pair]:
    """Without those whose partner another one claims, too."""
    was, now = Counter(p.was for p in pairs), Counter(p.name for p in pairs)
    return [p for p in pairs if was[p.was] == 1 and now[p.name] == 1]


def _by_content(a: Mapping[str, Weight], b: Mapping[str, Weight], _known: list[Pair]) -> list[Pair]:
    """The same shape, dtype and content, where only one tensor of each side has it."""
    found = []
    for left, right in _alike(a, b):
        if len(left) == len(right) == 1:
            found.append(Pair(right[0].name, left[0].name, left[0], right[0], "content"))
    return found


def _by_content_in_order(a: Mapping[str, Weight], b: Mapping[str, Weight], _known: list[Pair]) -> list[Pair]:
    """The same content in as many tensors on both sides, such as fresh biases: in the order of the files."""
    found = []
    for left, right in _alike(a, b):
        if len(left) == len(right):
            found += [Pair(y.name, x.name, x, y, "content") for x, y in zip(left, right, strict=True)]
    return found


def _alike(a: Mapping[str, Weight], b: Mapping[str, Weight]) -> list[tuple[list[Weight], list[Weight]]]:
    """Groups of tensors of one shape, dtype and content: first by a sample, then by all bits."""
    sides = [_grouped(x.values(), lambda w: (w.spec.shape, w.spec.dtype)) for x in (a, b)]
    groups = []
    for key in sides[0].keys() & sides[1].keys():
        prints = [_grouped(side[key], _print) for side in sides]
        for digest in (d for d in prints[0] if d is not None and d in prints[1]):
            groups += _classes(prints[0][digest], prints[1][digest])
    return groups


def _grouped(items: Iterable[Weight], key: Callable[[Weight], Hashable]) -> dict[Hashable, list[Weight]]:
    groups: dict[Hashable, list[Weight]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def _classes(left: list[Weight], right: list[Weight]) -> list[tuple[list[Weight], list[Weight]]]:
    """Tensors with one fingerprint apart by all of their bits; a single pair is compared as a pair later on."""
    if len(left) == len(right) == 1:
        return [(left, right)]
    classes: list[tuple[list[Weight], list[Weight]]] = []
    for side, items in enumerate((left, right)):
        for item in items:
            for known in classes:
                if surely_same((known[0] or known[1])[0], item):
                    known[side].append(item)
                    break
            else:
                fresh: tuple[list[Weight], list[Weight]] = ([], [])
                fresh[side].append(item)
                classes.append(fresh)
    return [c for c in classes if c[0] and c[1]]


def sample(weight: Weight) -> np.ndarray:
    """A fixed choice of values: the first, the middle and the last ones. Without `fill`, the whole is read for it."""
    size = weight.spec.size
    if size <= 3 * SAMPLE or weight.fill is None:
        flat = weight.array().reshape(-1)
        return flat if size <= 3 * SAMPLE else np.concatenate([flat[at : at + SAMPLE] for at in _places(size)])
    values = np.empty(3 * SAMPLE, weight.spec.dtype.numpy)
    for i, at in enumerate(_places(size)):
        weight.fill(at, values[i * SAMPLE : (i + 1) * SAMPLE])
    return values


def _places(size: int) -> tuple[int, int, int]:
    return 0, size // 2 - SAMPLE // 2, size - SAMPLE


def _print(weight: Weight) -> bytes | None:
    """A digest of the sample; None for a tensor that is empty or cannot be read."""
    try:
        values = sample(weight)
    except SteelyardError:
        return None
    return (
        hashlib.blake2b(np.ascontiguousarray(values).view(np.uint8), digest_size=16).digest() if values.size else None
    )


def substitution(was: str, name: str) -> tuple[str, str]:
    """What a renaming did, with numbers as '*' and without the parts that stayed at the end.

    >>> substitution("h.3.attn.weight", "layers.3.attention.weight")
    ('h.*.attn', 'layers.*.attention')
    """
    old, new = (re.sub(r"(?<![^.])\d+(?![^.])", "*", text).split(".") for text in (was, name))
    while old and new and old[-1] == new[-1]:
        old.pop(), new.pop()
    return ".".join(old), ".".join(new)


def _by_pattern(a: Mapping[str, Weight], b: Mapping[str, Weight], known: list[Pair]) -> list[Pair]:
    """Renamed as the others were, of the same shape."""
    rules = [rule for rule, _ in Counter(substitution(p.was, p.name) for p in known).most_common()]
    found = []
    for name, item in a.items():
        for rule in rules:
            other = b.get(_applied(name, *rule))
            if other is not None and other.spec.shape == item.spec.shape:
                found.append(Pair(other.name, name, item, other, "pattern"))
                break
    return _once(found)


def _applied(name: str, old: str, new: str) -> str:
    """`name` with its beginning `old` made `new`; the numbers go where the stars are. '' where it does not fit."""
    parts, before, after = name.split("."), old.split(".") if old else [], new.split(".") if new else []
    head, rest = parts[: len(before)], parts[len(before) :]
    if any(o != h and not (o == "*" and h.isdigit()) for o, h in zip(before, head, strict=False)):
        return ""
    numbers = [h for o, h in zip(before, head, strict=False) if o == "*"]
    if len(head) < len(before) or len(numbers) != after.count("*"):
        return ""
    return ".".join([numbers.pop(0) if part == "*" else part for part in after] + rest)


def _by_values(a: Mapping[str, Weight], b: Mapping[str, Weight], _known: list[Pair]) -> list[Pair]:
    """The same shape and alike values: each the nearest of the other."""
    found = []
    sides = [_grouped(x.values(), lambda w: w.spec.shape) for x in (a, b)]
    for shape in sides[0].keys() & sides[1].keys():
        left, right = sides[0][shape], sides[1][shape]
        if max(len(left), len(right)) > _CROWD or left[0].spec.size < 16:
            continue
        cosines = _unit(left) @ _unit(right).T  # (left, right)
        for i, j in enumerate(cosines.argmax(axis=1)):
            if cosines[i, j] >= ALIKE and cosines[:, j].argmax() == i and np.sum(cosines[i] >= ALIKE) == 1:
                found.append(Pair(right[j].name, left[i].name, left[i], right[j], "values"))
    return _once(found)


def _unit(items: list[Weight]) -> np.ndarray:
    """The samples, each of length 1; zero for one that cannot be compared."""
    rows = []
    for item in items:
        try:
            stored = sample(item)
        except SteelyardError:
            stored = np.zeros(0)
        with np.errstate(over="ignore", invalid="ignore"):
            values = wide(stored).astype(np.float64)
            norm = float(np.sqrt(np.sum(values * values)))
        rows.append(values / norm if norm > 0 and np.isfinite(norm) else np.zeros(_length(item)))
    return np.stack(rows)


def _length(item: Weight) -> int:
    """The number of values in a sample; a complex number is two."""
    return min(item.spec.size, 3 * SAMPLE) * (2 if item.spec.dtype.kind == "complex" else 1)
