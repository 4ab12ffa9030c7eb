"""What a file asked for besides its tensors, and did not get: the globals of a pickle, tensors that are not held.

Nothing of it was looked up, imported or called. Whether a name is harmless is not judged here: a class of the
user's own and a command for the shell are both only listed.
"""

from __future__ import annotations

import json

from steelyard.core.table import Column, Table
from steelyard.core.weights import Weights

GLOBALS, SKIPPED = "pickle.globals", "pickle.skipped"  # the keys of the metadata; each a JSON list of texts


def wanted(weights: Weights) -> Table | None:
    """One row for each global that the pickle named and each tensor that was left out; None where there is none.

    >>> w = Weights([], meta={"pickle.globals": '["posix.system@27"]'})
    >>> wanted(w).rows[0]["name"], wanted(w).rows[0]["byte"], wanted(Weights([]))
    ('posix.system', 27, None)
    """
    rows = []
    for text in _listed(weights, GLOBALS):
        name, _, at = text.rpartition("@")
        byte = int(at) if name and at.isdecimal() and len(at) < 20 else None
        rows.append({"name": text if byte is None else name, "byte": byte, "what": "named by the pickle, not imported"})
    for text in skipped(weights):
        name, _, why = text.rpartition(": ")
        rows.append({"name": name, "byte": None, "what": f"a tensor that is not held: {why}"})
    columns = [Column("name"), Column("byte", "", "where the pickle names it first"), Column("what")]
    return Table.of("besides the tensors", columns, rows) if rows else None


def skipped(weights: Weights) -> list[str]:
    """The tensors of a checkpoint that are not held, each with the reason: "name: sparse"."""
    return _listed(weights, SKIPPED)


def _listed(weights: Weights, key: str) -> list[str]:
    """The texts under a key; none where the file itself has something else there."""
    try:
        found = json.loads(weights.meta.get(key, "[]"))
    except (ValueError, RecursionError):
        return []
    return [text for text in found if isinstance(text, str)] if isinstance(found, list) else []
