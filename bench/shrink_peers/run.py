"""How large is the finished file of `shrink` beside those of the tools that take a tolerance, and of single methods?

    python bench/shrink_peers/run.py --data FOLDER --work FOLDER --nncf PYTHON --inc PYTHON [--epochs 0 30]

The twenty nets of bench/promise/real.py, a split of each (1,500 train, 600 choose, 1,000 prove; all that is left is the
truth), the same tolerance of accuracy for everybody. Three rivals:

- NNCF: `quantize_with_accuracy_control` of an OpenVINO and of an ONNX model, calibrated on training examples, with the
  tolerance as `max_drop` on the validation examples; and its `compress_weights`. PYTHON is that of an environment with
  nncf, openvino, onnx, onnxruntime and zstandard.
- Neural Compressor: `autotune` of the PyTorch model on the validation examples, the tolerance made relative as it asks:
  its documented configurations for weights, static int8, and rounding from 2 to 8 bits, the smallest first. PYTHON is
  that of an environment with neural-compressor, zstandard, torch and what Steelyard needs.
- Single methods (singles.py): each over a grid of its one parameter.

Of what a rival wrote, the smallest file counts whose loss on validation examples is within the tolerance: as it was
saved, and, as OpenVINO and ONNX files have a graph and ours has not, its weights alone, without names and shapes and
after zstd -19. Ours counts as it lies there, and once more without its header. Of single methods there is a second
answer, with the same promise as ours: the proof examples are asked about a method's settings from the finest on, until
one fails; the best method of six counts, as if it had been known: each of its files is proven, the choice is not.
A third answer is what somebody may know who goes by our rule: validation puts the settings in order as in `shrink`, and
as many as its search asks, five, are proven in sequence. "By our rule": of all six methods together, which is one
promise as ours is; "each by our rule": of each method, and the best of six counts as if known. Looks at validation
cost them nothing. What each loses in truth is measured for all.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import time
from datetime import date
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import steelyard as sy
from steelyard import formats
from steelyard.deploy.onnx import write_onnx
from steelyard.errors import ModelError, VerdictError
from steelyard.learn.evaluate import evaluating, outcomes
from steelyard.learn.task import first_batch
from steelyard.shrinking import within
from steelyard.shrinking.budget import Budget
from steelyard.shrinking.order import SURE, Step, evidence, ordered
from steelyard.shrinking.promise import Promise

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "promise"))

import real  # noqa: E402
import singles  # noqa: E402

Row = dict[str, Any]


def main() -> None:
    """Go on where an earlier call ended; print a row for each net, and write all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("data", "work"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    for name in ("nncf", "inc"):
        parser.add_argument(f"--{name}", help="its Python; left out: no such rows")
    parser.add_argument("--split", type=int, default=0)
    parser.add_argument("--training", type=int, default=6, help="epochs of each net; four times as many of tables")
    parser.add_argument("--epochs", type=int, nargs="+", default=[0], help="of `shrink`")
    parser.add_argument("--tolerance", type=float, default=0.02)
    parser.add_argument("--only", nargs="+", default=[""], help="nets whose name begins so")
    told = parser.parse_args()
    torch.set_num_threads(1)
    within.reread = lambda file, _meant: formats.open(file).settle()  # type: ignore[attr-defined]  # one process
    data = real.sources(told.data)
    kinds = real.models(data["table"][0].shape[1], int(data["text"][1].max()) + 1)
    rows = []
    for name, build in kinds.items():
        if name.startswith(tuple(told.only)):
            tasks = real.tasks(name, build, *data[name.partition(",")[0]], told.split)
            rows.append(net(name, tasks, told))
            print(json.dumps(rows[-1], default=short), flush=True)
    if told.only == [""]:
        said = {"told": {k: v for k, v in vars(told).items() if k in ("split", "training", "epochs", "tolerance")}}
        said |= {"summary": summary(rows, told), "rows": rows}
        print(json.dumps(said["summary"], indent=1, default=short))
        place = HERE / "results" / f"{date.today()}-tolerance-{told.tolerance:g}-split-{told.split}.json"
        place.write_text(json.dumps(said, indent=1, default=short) + "\n")


def net(name: str, tasks: tuple[sy.Task, sy.Task], told: argparse.Namespace) -> Row:
    """All files of one net."""
    place = told.work / f"{told.split}" / name.replace(", ", "-").replace(" ", "-")
    place.mkdir(parents=True, exist_ok=True)
    given, truth = tasks
    model = trained(name, given, truth, place, told)
    before = {split: right(model, given, split) for split in ("valid", "test")} | {"truth": right(model, truth, "test")}
    row: Row = {"net": name, "bytes before": (place / "weights.safetensors").stat().st_size}
    row["accuracy"] = before["truth"].mean()
    for epochs in told.epochs:
        file = place / f"shrink-{told.tolerance:g}-{epochs}.json"
        row[f"shrink, {epochs} epochs"] = kept(file, lambda e=epochs: ours(model, given, truth, before, e, told))
    row["singles"] = kept(place / f"singles-{told.tolerance:g}.json", lambda: alone(model, given, truth, before, told))
    for peer in ("nncf", "inc"):
        if getattr(told, peer):
            row[peer] = kept(place / f"{peer}-{told.tolerance:g}.json", lambda p=peer: rival(p, place, before, told))
    return row


def summary(rows: list[Row], told: argparse.Namespace) -> Row:
    """In how many nets ours is smaller, and how much; a net that ours refuses is lost."""
    found: Row = {}
    for epochs in told.epochs:
        ours = {row["net"]: row[f"shrink, {epochs} epochs"] for row in rows}
        for rival, theirs in rivals(rows, told.tolerance).items():
            kind = "weights" if rival.endswith("weights") else "bytes"
            ratios = {net: other["bytes"] / ours[net][kind] for net, other in theirs.items() if kind in ours[net]}
            lost = [net for net in theirs if ratios.get(net, 0.0) <= 1]
            found[f"{epochs} epochs, {rival}"] = {
                "nets": len(theirs), "smaller": len(theirs) - len(lost), "lost": lost,
                "times, median": float(np.median(list(ratios.values()))),
                "above the tolerance in truth": above(list(theirs.values()), told.tolerance),
            }  # fmt: skip
        files = [row for row in ours.values() if "bytes" in row]
        found[f"{epochs} epochs"] = {"files": len(files), "above the tolerance in truth": above(files, told.tolerance)}
    return found


def above(files: list[Row], tolerance: float) -> int:
    """How many lose more than the tolerance in truth."""
    return sum(row["lost in truth"] > tolerance for row in files)


def rivals(rows: list[Row], tolerance: float) -> dict[str, dict[str, Row]]:
    """The file of each rival that counts, by net."""
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        for peer in ("nncf", "inc"):
            for kind in ("saved", "weights"):
                borne = [way for way in row.get(peer, ()) if way.get("valid loss", 1) <= tolerance]
                if best := smallest([{**way, "bytes": way[kind]} for way in borne]):
                    found.setdefault(f"{peer}, {kind}", {})[row["net"]] = best
        for by in ("by validation", "by proof", "by our rule", "each by our rule"):
            if row["singles"][by]:
                found.setdefault(f"single {by}", {})[row["net"]] = row["singles"][by]
    return found


def kept(file: Path, made: Any) -> Any:
    """The answer of an earlier call, or a new one."""
    if not file.exists():
        file.write_text(json.dumps(made(), indent=1, default=short))
    return json.loads(file.read_text())


def trained(name: str, given: sy.Task, truth: sy.Task, place: Path, told: argparse.Namespace) -> nn.Module:
    """The net, trained once, and all that rivals are given of it: examples, ONNX, PyTorch."""
    file = place / "weights.safetensors"
    if file.exists():
        model = given.build()
        sy.into_module(sy.open(file), model)
        return model
    epochs = 4 * told.training if name.startswith("table") else told.training
    model = sy.train(given, epochs=epochs, seed=told.split, progress=False).model
    arrays: dict[str, np.ndarray] = {}
    for part, task, split in (("train", given, "train"), ("valid", given, "valid"), ("test", given, "test"),
                              ("truth", truth, "test")):  # fmt: skip
        batches = list(task.batches(split, 0))  # type: ignore[arg-type]
        arrays[f"{part} x"] = torch.cat([b.arguments[0] for b in batches]).numpy()
        arrays[f"{part} y"] = torch.cat([b.targets for b in batches]).numpy()
    np.savez(place / "data.npz", **arrays)  # type: ignore[arg-type]
    with evaluating(model):
        write_onnx(model, first_batch(given, "valid").arguments, place / "model.onnx")
        torch.save(model, place / "model.pt")
    sy.write(sy.from_module(model), file)
    return model


def right(model: nn.Module, task: sy.Task, split: Any) -> np.ndarray:
    """Whether each example of a split comes out right."""
    return outcomes(model, task, split)["accuracy"]


def ours(model: nn.Module, given: sy.Task, truth: sy.Task, before: dict[str, np.ndarray], epochs: int,
         told: argparse.Namespace) -> Row:  # fmt: skip
    """What `shrink` finds."""
    began = time.process_time()
    try:
        found = within.shrink(model, given, tolerance=told.tolerance, epochs=epochs, seed=told.split)
    except (VerdictError, ModelError) as error:
        return {"failed": str(error)[:200]}
    cpu, said = time.process_time() - began, found.proof.rows[0]
    student = copy.deepcopy(model)
    sy.into_module(found.weights, student)
    row = {name: said[name] for name in ("bytes", "loss", "loss at most")}
    row["weights"] = sum(part["bytes"] for part in found.why.rows)
    row |= {"lost in truth": (before["truth"] - right(student, truth, "test")).mean(), "cpu": cpu}
    return row | {"candidate": found.why.meta["candidate"], "evaluations": found.proof.meta["evaluations"]}


def alone(model: nn.Module, given: sy.Task, truth: sy.Task, before: dict[str, np.ndarray],
          told: argparse.Namespace) -> Row:  # fmt: skip
    """The best of the single methods, by validation and by proof; and the best of each."""
    promise, found = Promise(told.tolerance), []
    student, chances = copy.deepcopy(model), {}
    for row in singles.files(model, given, student):
        lost = {split: before[split] - row.pop(split) for split in ("valid", "test")}
        seen = evidence(lost["valid"], shares=True)
        chances[row["method"], row["setting"]] = promise.chance(*seen, *map(len, lost.values()), shares=True)
        row |= {"valid loss": lost["valid"].mean(), "loss at most": promise.bound(lost["test"])}
        row["lost in truth"] = (before["truth"] - right(student, truth, "test")).mean()
        found.append(row)
    each = {method: in_sequence([row for row in found if row["method"] == method], told.tolerance)
            for method in {row["method"]: None for row in found}}  # fmt: skip
    proven = [row for row in each.values() if row is not None]
    whole, free = sum(w.spec.nbytes for w in sy.from_module(model).values()), Budget.of(12, training=False)

    def by_rule(rows: list[Row], proofs: int) -> Row | None:
        steps = [Step(row["bytes"], chances[row["method"], row["setting"]], i, False) for i, row in enumerate(rows)]
        first = [step for step in steps if step.chance >= SURE] or [max(steps, key=lambda step: step.chance)]
        return in_sequence([rows[step.index] for step in ordered(steps, first, proofs, whole)], told.tolerance)

    ruled = [by_rule([row for row in found if row["method"] == method], free.proofs) for method in each]
    return {
        "by our rule": by_rule(found, free.proofs),
        "each by our rule": smallest([row for row in ruled if row is not None]),
        "by validation": smallest([row for row in found if row["valid loss"] <= told.tolerance]),
        "by proof": smallest(proven),
        "each by proof": each,
    }


def in_sequence(rows: list[Row], tolerance: float) -> Row | None:
    """The smallest of a method's files before the first that the proof does not accept; the finest come first."""
    return smallest(list(takewhile(lambda row: row["loss at most"] <= tolerance, rows)))


def smallest(rows: list[Row]) -> Row | None:
    """The least bytes."""
    return min(rows, key=lambda row: row["bytes"], default=None)


def rival(peer: str, place: Path, before: dict[str, np.ndarray], told: argparse.Namespace) -> list[Row]:
    """What a rival makes of the net, in its own environment."""
    paths = [str(HERE.parents[1] / "src"), str(HERE.parent / "promise")]
    command = [getattr(told, peer), str(HERE / f"{peer}_peer.py"), str(place), str(told.tolerance)]
    done = subprocess.run(command, capture_output=True, text=True, check=False,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)})  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{peer} at {place.name}: {done.stderr[-2000:]}")
    rows: list[Row] = json.loads((place / f"{peer}.json").read_text())
    answers = np.load(place / f"{peer}.npz")
    for row in rows:
        if "failed" not in row:
            lost = {split: (before[split] - answers[f"{row['method']} {split}"]) for split in before}
            row |= {"valid loss": lost["valid"].mean(), "loss at most": Promise(told.tolerance).bound(lost["test"])}
            row["lost in truth"] = lost["truth"].mean()
    return rows


def short(value: Any) -> float:
    """Numbers that stay readable."""
    return float(f"{value:.6g}")


if __name__ == "__main__":
    main()
