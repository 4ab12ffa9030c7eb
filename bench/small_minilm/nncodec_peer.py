"""NNCodec on a safetensors file, in its own environment: ``nncodec_peer.py encode|decode SOURCE TARGET [QP]``.

Prints the CPU seconds of the call as JSON; reading and writing the other file is not counted. NNCodec imports
torchvision for data sets that are not used here; a stand-in saves matching its build to the one of torch.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np

for name in ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.models"):
    sys.modules[name] = MagicMock()


def main(verb: str, source: str, target: str, qp: str = "-32") -> None:
    from nncodec.nn import decode, encode

    if verb == "encode":
        head, data = Path(source).read_bytes(), {}
        length = int.from_bytes(head[:8], "little")
        for name, entry in json.loads(head[8 : 8 + length]).items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                kind = {"F32": "<f4", "I64": "<i8"}[entry["dtype"]]
                x = np.frombuffer(head[8 + length + begin : 8 + length + end], kind).reshape(entry["shape"])
                data[name] = x.astype(np.int32) if kind == "<i8" else x.copy()
        with tempfile.TemporaryDirectory() as folder:
            began = time.process_time()
            stream = encode(data, {"qp": int(qp), "results": folder, "verbose": False})
            spent = time.process_time() - began
        Path(target).write_bytes(bytes(stream))
    else:
        stream = bytearray(Path(source).read_bytes())
        began = time.process_time()
        found = decode(stream)
        spent = time.process_time() - began
        np.savez(target, **found)
    print(json.dumps({"seconds": spent}))


if __name__ == "__main__":
    main(*sys.argv[1:])
