"""Files of ours whose metadata another program has lost, or whose key is spelled otherwise: nobody wants their parts.

Decides what is surely such a file, by its header and, where its only array is `all`, by how that begins.
"""

from __future__ import annotations

from collections.abc import Mapping

from steelyard.core.weights import Weight
from steelyard.errors import FormatError, SteelyardError, quoted
from steelyard.formats._folded import ARRAY, MARK, lost
from steelyard.formats.layout import sum_of_all
from steelyard.formats.manifest import JOINED, KEY, load_json
from steelyard.formats.source import Source

OWN = (MARK, '{"version":')  # how our texts begin


def check_named(meta: Mapping[str, str], arrays: Mapping[str, Weight], path: object) -> None:
    """Raise FormatError for the text of this very file under a key that is not ours, though nearly."""
    for key, text in meta.items():
        if text.startswith(OWN) and (key.strip().casefold() == KEY or _sealing(text, arrays)):
            found = f"the key {quoted(key)} has what is written as {KEY!r} in the metadata"
            raise FormatError(f"{found}: rename it, or fetch the file again", path=path)


def check_there(arrays: Mapping[str, Weight], source: Source, start: int) -> None:
    """Raise FormatError for a file that has no text of ours, and whose arrays need one; its data begins at `start`."""
    if JOINED in arrays and arrays[JOINED].spec.dtype.name == "uint8":
        text = f"its array {JOINED!r} is several packed tensors, and the metadata {KEY!r} that tell of them are lost"
        raise FormatError(f"{text}: fetch the file again, and copy it as it is", path=source.path)
    if len(arrays) == 1 and ARRAY in arrays and arrays[ARRAY].spec.dtype.name == "uint8":
        count = lost(source, start)
        if count is not None:
            text = f"its only array, {ARRAY!r}, begins with a folded header, and the metadata that tell of it are lost"
            raise FormatError(f"{text}: write {KEY!r}: '{MARK}{count}', or fetch the file again", path=source.path)


def _sealing(text: str, arrays: Mapping[str, Weight]) -> bool:
    """Whether a text has the sum of itself and of these arrays."""
    try:
        told = load_json(text)
        if not isinstance(told, dict) or not isinstance(told.get("sum"), int):
            return False
        expected: int = told.pop("sum")
        return expected == sum_of_all(told, ((key, array.spec) for key, array in arrays.items()))
    except (SteelyardError, RecursionError):  # a text of somebody else
        return False
