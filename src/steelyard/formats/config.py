"""What stands beside weights in a folder: small JSON documents, such as the config.json of the Hugging Face libraries.

Decides which of it becomes metadata, as text, and that a head which the model shares with its embedding is a tie.
Knows nothing of any container.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import islice
from typing import Any

from steelyard.core.weights import Weight, Weights
from steelyard.errors import FormatError
from steelyard.formats.base import check_text
from steelyard.formats.layout import compact_json
from steelyard.formats.manifest import load_json
from steelyard.formats.source import Folder, Source

CONFIG = "config.json"
LIMIT = 10_000_000  # bytes of a config
OBJECTS = 100_000  # objects and lists in one document
_OPENED = re.compile(r"[\[{,:]\s*[\[{]")  # one that is opened where a value stands, and not within a name
KEPT = ("model_type", "architectures", "torch_dtype", "dtype")  # what of a config describes the weights
HEAD = "lm_head.weight"
HEADED = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")  # how models that have a head are called
EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "shared")


def described(weights: Weights, folder: Folder) -> Weights:
    """The weights of a folder with what its config.json says of them, under keys such as ``config.model_type``.

    Where the config says that embeddings are tied and the head is not there, it becomes a tie to the embedding.
    Raises FormatError for a config that cannot be read.
    """
    source = folder.find(CONFIG)
    if source is None:
        return weights
    data = document(source, LIMIT, "config")
    said = {key: data[key] for key in KEPT if data.get(key) is not None}
    told = weights.with_meta(**texts(said, "config.", source))
    named = data.get("architectures")
    headed = any(str(name).endswith(HEADED) for name in named) if isinstance(named, list) else False
    shared = embedding(weights) if headed and data.get("tie_word_embeddings") is True else None
    return told if shared is None else told.with_ties({HEAD: shared.name})


def embedding(weights: Weights) -> Weight | None:
    """The one embedding of words whose head is not there; None where there is a head, or no only one embedding.

    >>> import numpy as np
    >>> embedding(Weights.of({"model.embed_tokens.weight": np.zeros((9, 4))})).name
    'model.embed_tokens.weight'
    """
    if any(name.endswith(HEAD) for name in (*weights, *weights.ties)):
        return None
    names = [name for name in weights if name.split(".")[-2:-1] and name.split(".")[-2] in EMBEDDINGS]
    found = weights[names[0]] if len(names) == 1 and names[0].endswith(".weight") else None
    return found if found is not None and len(found.spec.shape) == 2 else None


def document(source: Source, limit: int, what: str) -> dict[str, Any]:
    """The JSON object in a file of at most `limit` bytes; raises FormatError, which calls it `what`."""
    if source.size > limit:
        text = f"{what}: it takes {source.size} bytes, the limit is {limit}; it is something else"
        raise FormatError(text, path=source.path, offset=0)
    try:
        data = load_json(_flat(source.bytes(0, source.size).decode("utf-8")))
    except UnicodeDecodeError as error:
        raise FormatError(f"{what}: it is not UTF-8; save it anew", path=source.path, offset=error.start) from error
    except FormatError as error:
        if error.path is not None:
            raise
        raise FormatError(f"{what}: {error}; save it anew", path=source.path, offset=0) from error
    if not isinstance(data, dict):
        raise FormatError(f"{what}: expected a JSON object; save it anew", path=source.path, offset=0)
    return data


def _flat(text: str) -> str:
    """`text`, checked not to take much more memory than it has bytes, as many small objects would."""
    if text.count("{") + text.count("[") > OBJECTS and next(islice(_OPENED.finditer(text), OBJECTS, None), None):
        raise FormatError(f"more than {OBJECTS} objects and lists")
    return text


def texts(data: Mapping[str, Any], prefix: str, source: Source) -> dict[str, str]:
    """Values of a document as texts under `prefix`: names in a list are joined, anything else is JSON.

    Raises FormatError for what no file can hold as text.
    """
    found = {f"{prefix}{key}": _text(value, source) for key, value in data.items()}
    for text in (*found, *found.values()):
        check_text(text, "the text", source.path)
    return found


def _text(value: Any, source: Source) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return ", ".join(value)
    try:
        return compact_json(value)
    except (ValueError, RecursionError) as error:
        text = "a value is no number, or nested too deep; save it anew"
        raise FormatError(text, path=source.path, offset=0) from error
