"""Adapters as the library PEFT saves them: ``adapter_config.json`` beside ``adapter_model.safetensors`` or ``.bin``.

Decides that the tensors are those of the file, under their own names, and that what the config says of them
becomes metadata under ``peft.``. Does not know the model that the adapter belongs to.

Description: https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from steelyard.core.weights import Weights
from steelyard.errors import FormatError
from steelyard.formats.base import Format
from steelyard.formats.config import LIMIT, document, texts
from steelyard.formats.source import Source

CONFIG = "adapter_config.json"
FILES = ("adapter_model.safetensors", "adapter_model.bin")


@dataclass(frozen=True)
class Peft(Format):
    """A folder with an adapter: LoRA and the like."""

    name: ClassVar[str] = "peft"
    entries: ClassVar[tuple[str, ...]] = (CONFIG,)
    several: ClassVar[bool] = True

    def claims(self, head: bytes, source: Source, /) -> bool:
        """A JSON object under the name of a config of an adapter."""
        return source.name == CONFIG and head.lstrip()[:1] == b"{"

    def open(self, source: Source, /) -> Weights:
        """The tensors of the adapter; its rank, its scale and whatever else is said are in `meta`."""
        from steelyard.formats import part

        data = document(source, LIMIT, "config of an adapter")
        said = {key: value for key, value in data.items() if value not in (None, "", [], {})}
        meta = texts(said, "peft.", source)
        for name in FILES:
            found = source.folder.find(name)
            if found is not None:
                weights = part(found)
                return Weights(weights.values(), weights.ties, {**weights.meta, **meta})
        text = f"expected {' or '.join(FILES)} beside it, found neither; fetch the adapter again"
        raise FormatError(text, path=source.path)
