"""Is the header of a GGUF file with a large vocabulary opened at once, and are its block types those of the peer?

A file of 339 tensors (a hole) whose vocabulary has 151,936 tokens with scores and types, and 151,387 merges: opened and
every tensor looked at, each way in a fresh process, by turns; processor time of the whole process and from after the
first import (here that of the format and of numpy counts), peak memory above what it was then. Then, for each block
type, a matrix decoded and encoded by turns here and by gguf-py in one process: processor rates in bytes of float32, and
whether the bits are the same. Then a whole file written by both. With --model, every tensor of a real file as well.

    python bench/gguf/run.py [--repeats 5] [--model FILE.gguf]
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import random
import resource
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
TOKENS, MERGES = 151_936, 151_387
BLOCKS = ("q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs", "mxfp4")
BLOCKS += ("tq1_0", "tq2_0")

PROBE = """
import json, sys, time
{imports}
def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))
path = sys.argv[1]
rss, start = status("VmRSS"), time.process_time()
{work}
cpu = time.process_time() - start
print(json.dumps({{"cpu": cpu, "rss": (status("VmHWM") - rss) * 1024, "found": found}}))
"""
WAYS = {
    "steelyard": (
        "import steelyard as sy",
        "found = sum(item.stored > 0 for item in sy.open(path).values())",
    ),
    "steelyard, and the tokens": (
        "import steelyard as sy",
        'weights = sy.open(path)\nfound = len(json.loads(weights.meta["tokenizer.ggml.tokens"]))',
    ),
    "gguf-py": ("from gguf import GGUFReader", "found = sum(t.n_bytes > 0 for t in GGUFReader(path).tensors)"),
}


def text(content: str) -> bytes:
    raw = content.encode()
    return struct.pack("<Q", len(raw)) + raw


def array(kind: int, count: int, raw: bytes) -> bytes:
    return struct.pack("<IIQ", 9, kind, count) + raw


def large(path: Path) -> int:
    """Write the file with the vocabulary; the bytes of its header."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyzĠ", k=rng.choice((5, 8, 11, 13)))) for _ in range(TOKENS)]
    merges = [f"{rng.choice(words)[:8]} {rng.choice(words)[:8]}" for _ in range(MERGES)]
    entries = [
        text("general.architecture") + struct.pack("<I", 8) + text("qwen2"),
        text("tokenizer.ggml.tokens") + array(8, TOKENS, b"".join(map(text, words))),
        text("tokenizer.ggml.scores") + array(6, TOKENS, struct.pack(f"<{TOKENS}f", *range(TOKENS))),
        text("tokenizer.ggml.token_type") + array(5, TOKENS, struct.pack(f"<{TOKENS}i", *[1] * TOKENS)),
        text("tokenizer.ggml.merges") + array(8, MERGES, b"".join(map(text, merges))),
    ]
    tensors, at = [], 0
    for i in range(339):
        tensors.append(text(f"blk.{i}.weight") + struct.pack("<IQQIQ", 2, 4096, 4096, 12, at))
        at += 4096 * 4096 // 256 * 144
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(entries)) + b"".join(entries) + b"".join(tensors)
    with path.open("wb") as file:
        file.write(head)
        file.truncate(len(head) + -len(head) % 32 + at)
    return len(head)


def probe(way: str, path: Path) -> dict[str, float]:
    imports, work = WAYS[way]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-c", PROBE.format(imports=imports, work=work), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    whole = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {**json.loads(done.stdout), "whole": whole}


def headers(repeats: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "large.gguf"
        size = large(path)
        runs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for i in range(repeats):
            for way in WAYS:
                if way != "gguf-py" or i < 2:  # it takes its time
                    runs[way].append(probe(way, path))
    found: dict[str, Any] = {"bytes of the header": size}
    for way, rows in runs.items():
        found[way] = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    return found


def rate(work: Callable[[], np.ndarray], repeats: int, nbytes: int) -> tuple[float, np.ndarray]:
    """The best MB per processor second, and the result."""
    best, result = 0.0, np.zeros(0)
    for _ in range(repeats):
        start = time.process_time()
        result = work()
        best = max(best, nbytes / 1e6 / (time.process_time() - start))
    return best, result


def block_types(repeats: int) -> dict[str, Any]:
    """Rates and equality of each block type, here and there."""
    import gguf

    from steelyard.codecs import CODECS
    from steelyard.core.spec import Spec

    rng = np.random.default_rng(0)
    x = rng.standard_normal((1024, 2048), np.float32) / 50
    spec, found = Spec.like(x), {}
    for name in BLOCKS:
        codec, kind = CODECS[name](), gguf.GGMLQuantizationType[name.upper()]
        raw = rng.integers(0, 256, (x.size // codec.block, codec.width), np.uint8)
        row: dict[str, Any] = {}
        ours, y = rate(lambda codec=codec, raw=raw: codec.decode({"blocks": raw}, spec), repeats, x.nbytes)
        with np.errstate(all="ignore"):
            theirs, z = rate(
                lambda raw=raw, kind=kind: gguf.quants.dequantize(raw.reshape(-1), kind), repeats, x.nbytes
            )
        y, z = y.reshape(-1), z.reshape(-1)
        same = (y.view(np.uint32) == z.view(np.uint32)) | (np.isnan(y) & np.isnan(z))
        row |= {"decode, MB/s": ours, "gguf-py decode, MB/s": theirs, "decoded the same": bool(same.all())}
        if codec.encodes:
            ours, y = rate(lambda codec=codec: codec.encode(x)["blocks"], repeats, x.nbytes)
            back = codec.decode({"blocks": y}, spec)
            row |= {"encode, MB/s": ours, "error over rms": float(np.linalg.norm(back - x) / np.linalg.norm(x))}
            try:
                theirs, z = rate(lambda kind=kind: gguf.quants.quantize(x, kind), repeats, x.nbytes)
                row |= {"gguf-py encode, MB/s": theirs, "encoded the same": y.tobytes() == z.tobytes()}
            except NotImplementedError:
                row["encoded the same"] = "gguf-py encodes no such type"
        found[name] = row
    return found


def whole_files() -> dict[str, bool]:
    """Whether a file written here is that of gguf-py, byte for byte."""
    import gguf

    import steelyard as sy
    from steelyard.codecs import CODECS
    from steelyard.core.spec import DTYPES
    from steelyard.edit.pack import Pack

    rng, found = np.random.default_rng(1), {}
    values = {f"blk.{i}.weight": rng.standard_normal((64, 512), np.float32) / 30 for i in range(4)}
    plain = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"):
            theirs, ours, kind = Path(folder) / "t.gguf", Path(folder) / "o.gguf", gguf.GGMLQuantizationType[name]
            writer = gguf.GGUFWriter(theirs, "llama")
            for key, x in values.items():
                writer.add_tensor(key, gguf.quants.quantize(x, kind), raw_dtype=kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
            meta = {"general.architecture": "llama"}
            if name in plain:
                weights = sy.Weights.of({k: x.astype(DTYPES[plain[name]].numpy) for k, x in values.items()}, meta=meta)
            else:
                weights = Pack(CODECS[name.lower()]())(sy.Weights.of(values, meta=meta))
            sy.write(weights, ours)
            found[name] = ours.read_bytes() == theirs.read_bytes()
    return found


def real(path: Path) -> dict[str, Any]:
    """Every tensor of a real file, here and by gguf-py; and the file written again."""
    import gguf

    import steelyard as sy

    start = time.process_time()
    weights = sy.open(path)
    list(weights.values())
    opened = time.process_time() - start
    same = [
        weights[t.name].array().tobytes() == gguf.quants.dequantize(t.data, t.tensor_type).tobytes()
        for t in gguf.GGUFReader(path).tensors
    ]
    with tempfile.TemporaryDirectory() as folder:
        sy.write(weights, Path(folder) / "again.gguf")
        again = (Path(folder) / "again.gguf").read_bytes() == path.read_bytes()
    figures = {"tensors": len(same), "decoded the same": sum(same), "written the same": again}
    return {"file": path.name, "open, cpu s": opened, **figures}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--model", type=Path)
    options = parser.parse_args()
    import gguf  # noqa: F401 - so that a missing peer is told at once

    figures: dict[str, Any] = {"header": headers(options.repeats), "block types": block_types(options.repeats)}
    figures["whole file the same"] = whole_files()
    if options.model is not None:
        figures["model"] = real(options.model)
    ours, theirs = figures["header"]["steelyard"], figures["header"]["gguf-py"]
    figures["header, gguf-py over steelyard, whole process"] = theirs["whole"] / ours["whole"]
    print(json.dumps(figures, indent=1))
    (HERE / "results").mkdir(exist_ok=True)
    machine = {"cpus": os.cpu_count(), "python": platform.python_version(), "machine": platform.machine()}
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": machine,
        "repeats": options.repeats,
        "figures": figures,
    }
    (HERE / "results" / f"{result['date']}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
