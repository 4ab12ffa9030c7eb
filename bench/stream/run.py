"""How much memory and time does a large checkpoint take, quantized to int4 without data and entropy-coded?

``python bench/stream/run.py --gb 10 --folder FOLDER``: a bfloat16 checkpoint of seeded normal numbers in the shapes of
a decoder (hidden 2048, vocabulary 32,000), through ``steelyard quantize --bits 4 --axis 0 --codes
"entropy(mode='static')"``: once in one go, once killed (SIGKILL) when a third of the large tensors is encoded and then
started again. Memory is the greatest resident set that the system saw; seconds are of the processor and of the wall.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import struct
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import ml_dtypes
import numpy as np

WIDE, INNER, WORDS = 2048, 5632, 32_000


def shapes(size: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of about so many bytes."""
    found: dict[str, tuple[int, ...]] = {"embed.weight": (WORDS, WIDE)}
    each = dict.fromkeys(("q", "k", "v", "o"), (WIDE, WIDE)) | {
        "up": (INNER, WIDE),
        "gate": (INNER, WIDE),
        "down": (WIDE, INNER),
    }
    layer = 2 * sum(a * b for a, b in each.values())
    for i in range(max(1, (size - 4 * WORDS * WIDE) // layer)):
        found |= {f"layers.{i}.{n}.weight": shape for n, shape in each.items()}
        found[f"layers.{i}.norm.weight"] = (WIDE,)
    return found | {"head.weight": (WORDS, WIDE)}


def make(path: Path, size: int) -> None:
    """Write the checkpoint; each row has a scale of its own."""
    header, at = {}, 0
    for name, shape in shapes(size).items():
        end = at + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for i, shape in enumerate(shapes(size).values()):
            rng = np.random.default_rng(i)
            for row in range(0, shape[0], 2048):
                part = (min(2048, shape[0] - row), *shape[1:])
                x = rng.standard_normal(part, np.float32)
                x *= np.exp(0.3 * rng.standard_normal((part[0], *[1] * (len(part) - 1)), np.float32)) / 50
                file.write(x.astype(ml_dtypes.bfloat16).tobytes())


def digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def command(source: Path, target: Path) -> list[str]:
    options = ["--bits", "4", "--axis", "0", "--codes", "entropy(mode='static')", "--json"]
    return [sys.executable, "-m", "steelyard", "quantize", str(source), str(target), *options]


def watched(words: list[str], kill_at: int | None = None, folder: Path | None = None) -> dict[str, float]:
    """Run a command; with `kill_at`, until the folder has so many encoded tensors."""
    began = time.perf_counter()
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    if kill_at is not None and folder is not None:
        while len(list(folder.glob("encoded-*"))) < kill_at and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    found = {
        "processor": used.ru_utime + used.ru_stime,
        "wall": time.perf_counter() - began,
        "MB": used.ru_maxrss / 1000,
    }
    return found | {"status": process.returncode}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gb", type=float, default=1.0)
    parser.add_argument("--folder", type=Path, required=True)
    options = parser.parse_args()
    source, whole, broken = (options.folder / f"{n}.safetensors" for n in ("source", "whole", "broken"))
    make(source, int(options.gb * 1e9))
    size = source.stat().st_size
    count = len(shapes(int(options.gb * 1e9)))
    once = watched(command(source, whole))
    folder = options.folder / f".{broken.name}.steelyard-part"
    killed = watched(command(source, broken), count * 7 // 8 // 3, folder)
    kept = len(list(folder.glob("encoded-*")))
    again = watched(command(source, broken))
    result = {
        "bytes": size, "largest tensor": 2 * WORDS * WIDE, "tensors": count, "bytes after": whole.stat().st_size,
        "in one go": once, "MB/s of the processor": size / 1e6 / once["processor"], "MB/s": size / 1e6 / once["wall"],
        "killed": killed, "tensors kept": kept, "again": again, "same bytes": digest(whole) == digest(broken),
    }  # fmt: skip
    for path in (source, whole, broken):
        path.unlink()
    print(json.dumps(result, indent=1))
    (Path(__file__).parent / "results" / f"{date.today()}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
