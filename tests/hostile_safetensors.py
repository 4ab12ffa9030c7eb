"""Damaged and hostile safetensors files, made on demand: what every entry point must refuse, and what it must bear.

Each case is the bytes of a file, or a function that writes one (a sparse or a large file), and a piece of the
message that must come. Kept apart from the tests so that API, command line and fuzzing share one list.
"""

from __future__ import annotations

import json
import struct
from typing import Any

F32 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


def blob(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A file of a header (an object, or its bytes), and of data; `length` lies about the header."""
    text = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data
