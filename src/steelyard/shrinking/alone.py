"""Weights alone, without data: as coarse as one error for all of them allows, measured in the finished file.

Decides what is promised where nothing can be said of a metric, and what a folder keeps beside its weights. How bits are
shared among tensors is `edit.ratedistortion`.

A matrix whose relative error is e gives outputs that are wrong by the share e of their root mean square, over inputs
whose elements are independent and of one variance. That, and nothing of a metric, follows from weights alone.
"""

from __future__ import annotations

import filecmp
import glob
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steelyard import formats
from steelyard.core.spec import dtype
from steelyard.core.table import Column, Table
from steelyard.core.weights import Weights
from steelyard.core.where import where
from steelyard.edit.ratedistortion import RateDistortion
from steelyard.edit.transfer import Transferred, Watch, transfer, unwatched
from steelyard.errors import FormatError, ModelError, RecipeError, SteelyardError, VerdictError, quoted
from steelyard.explain.account import account
from steelyard.explain.roles import role
from steelyard.formats.base import check_target, writing

ATTENTION = 0.1  # what a squared error of queries and keys counts: they reach the output through a softmax alone
ATTEMPTS = 3  # the error is foreseen to a few per cent, and measured
PACKED_ALONE = ("after", "ratio", "held")  # what is not so of weights that are plain floats again
PACKED = "packed.safetensors"  # in a folder: other readers do not take it for plain weights
MATRICES = where(min_ndim=2, kind="float")
QUERIES = ("attention query", "attention key")
NOTHING = "of the weights alone: nothing was measured on data, and nothing is said of any metric"
Row = dict[str, Any]  # of an account
# What a folder has beside config and tokenizer: the same weights in other containers, and what lists their pieces.
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".npz", ".ot",
           ".tflite", ".index.json")  # fmt: skip


@dataclass(frozen=True)
class Alone:
    """What came out: the weights as the file holds them, and what they lost."""

    weights: Weights
    summary: Table  # one row: bytes before and after, the error of the whole and of the worst matrix
    why: Table  # a row for each tensor

    def __str__(self) -> str:
        """What is promised."""
        return str(self.summary)


def shrink_weights(
    source: str | Path,
    target: str | Path,
    *,
    error: float = 0.1,
    attention: float = ATTENTION,
    force: bool = False,
    watch: Watch = unwatched,
) -> Alone:
    """Write the weights of `source` as small as an error allows; without data, model code or labels.

    Every floating-point tensor is rounded to a grid and entropy-coded (`RateDistortion`). The target is written beside
    its place and read back bit for bit; another process, which has the two files and nothing else, measures the errors
    of all tensors, before it gets its name. One tensor is in memory at a time; a job that was broken off goes on.

    Args:
        source: a file of weights, an address, or a folder of the Hugging Face libraries.
        target: a ``.safetensors`` file with packed tensors, which `sy.open` reads; or, where `source` is a folder, a
            new folder with all of it (config, tokenizer) but other files of weights, and the packed ones in
            ``packed.safetensors``; or, where `source` is ONNX, an ``.onnx`` file: the same graph with the rounded
            weights as plain floats, no smaller, which runs everywhere.
        error: the root of the mean over all weights of their tensor's relative squared error, at most.
        attention: what a squared error of queries and keys counts beside that of other tensors, by the roles that
            their names tell; 1: the same.
        force: replace a file.
        watch: is told what begins, and how many bytes it will take.

    Raises FormatError for files that cannot be read or written, ModelError where there is no matrix, RecipeError for
    numbers out of range, VerdictError where the file does not come out smaller or its error is larger.

    >>> shrink_weights("nowhere.safetensors", "small.safetensors")
    Traceback (most recent call last):
    ...
    steelyard.errors.FormatError: nowhere.safetensors: there is no such file; check the path
    """
    for what, path in (("source", source), ("target", target)):
        if not isinstance(path, (str, os.PathLike)) or not str(path):
            raise FormatError(f"{what}: expected a path, found {path!r}")
    began, source, target = time.perf_counter(), str(source), Path(target)
    RateDistortion(error=error)  # refuses what is no error, before a file is opened
    if isinstance(attention, str) or not 0 < attention <= 1:
        raise RecipeError(f"attention is {attention}, expected above 0 and at most 1")
    before = formats.open(source)
    if not before.select(MATRICES):
        raise ModelError(f"{source}: there is no matrix or filter of floating-point numbers to shrink; vectors "
                         "and whole numbers stay as they are")  # fmt: skip
    whole = _whole(source, target)
    if not whole:
        check_target(target, Path(source), force=force)
    with _room(target) as room:
        draft = room / PACKED
        done, rows = _rounded(source, draft, error, _counted(before, attention), watch)
        meta = {"promise": NOTHING}
        if whole:
            left_out = _folder(Path(source), draft, target)
            meta |= {"left out": ", ".join(left_out)} if left_out else {}
            meta["plain again"] = f"steelyard convert {target} {target / 'model.safetensors'} --codec plain"
            final = target / PACKED
        elif target.suffix == ".onnx":
            final, meta["packed"] = target, f"as .safetensors it would take {done.files[1]:,} bytes"
            _graph(source, done, room / "model.onnx", target)
        else:
            final = target
            formats.move(draft, target)
            meta["plain again"] = f"steelyard convert {target} plain.safetensors --codec plain"
    columns = _columns() if final.suffix != ".onnx" else [c for c in _columns() if c.name not in PACKED_ALONE]
    rows = [{c.name: row[c.name] for c in columns} for row in rows]
    sizes = (done.files[0], final.stat().st_size)
    summary = _summary(source, rows, error, sizes, time.perf_counter() - began, meta)
    return Alone(formats.open(final), summary, Table.of("what each tensor lost", columns, rows))


def _whole(source: str, target: Path) -> bool:
    """Whether the target is a folder, too. Raises FormatError for one that cannot be made of this source."""
    if os.path.isdir(source) and not target.suffix:
        if target.exists():
            raise FormatError("exists already; name a new folder", path=target)
        if Path(source).resolve() in target.resolve().parents:
            raise FormatError("lies in the source, which would be copied into itself; name a folder beside it",
                              path=target)  # fmt: skip
        return True
    if target.suffix == ".onnx":
        found = formats.detect(source)
        if found != "onnx":
            raise FormatError(f"the graph of an .onnx file is that of its source, which is {found}; "
                              "name a .safetensors file", path=target)  # fmt: skip
    elif target.suffix != ".safetensors":
        raise FormatError("packed tensors are held by safetensors; name a .safetensors file", path=target)
    return False


def _rounded(
    source: str, draft: Path, error: float, counts: Mapping[str, float], watch: Watch
) -> tuple[Transferred, list[Row]]:
    """What was written to `draft`, and what another process says of each tensor; no more than the error together."""
    asked = error
    for _ in range(ATTEMPTS):
        step = RateDistortion(error=asked, importance=counts)
        done = transfer(source, draft, step, force=True, verified=True, resumed=True, watch=watch)
        before, after = done.files
        if before is not None and after >= before:
            raise VerdictError(f"{source}: at an error of {error:g} it would take {after:,} bytes instead of "
                               f"{before:,}: there is nothing to gain, and nothing is written")  # fmt: skip
        rows = _errors(source, draft)
        found = together(rows)
        if found <= error:
            return done, rows
        asked *= 0.995 * error / found
    raise VerdictError(f"{source}: the error of the file is {found:.4g}, more than {error:g}: nothing is written")


def together(rows: Sequence[Row]) -> float:
    """The root of the mean over all floating-point weights of their tensor's relative squared error.

    >>> rows = [{"shape": [9], "dtype": "float32", "error": 0.2}, {"shape": [3, 9], "dtype": "float32", "error": 0.0}]
    >>> round(together(rows), 6)
    0.1
    """
    floats = [row for row in rows if dtype(row["dtype"]).kind == "float"]
    sizes = [math.prod(row["shape"]) for row in floats]
    squares = [n * row["error"] ** 2 for n, row in zip(sizes, floats, strict=True)]
    return math.sqrt(math.fsum(squares) / max(sum(sizes), 1))


def _counted(weights: Weights, attention: float) -> dict[str, float]:
    """What squared errors count, by the names of the tensors: less for queries and keys."""
    found = [
        item.name for item in weights.select(MATRICES).values() if role(item.name, len(item.spec.shape)) in QUERIES
    ]
    return {glob.escape(name): attention for name in found}


def _errors(source: str, file: Path) -> list[Row]:
    """The rows of the account of all tensors, by a process that has both files and nothing else."""
    command = [sys.executable, "-m", "steelyard.shrinking.alone", source, str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise VerdictError(f"the process that re-read the file failed: {last}")
    found: list[Row] = json.loads(done.stdout)
    return found


@contextmanager
def _room(target: Path) -> Iterator[Path]:
    """A hidden folder beside the target. It stays where the work was broken off, for the same command to go on."""
    room = target.absolute().parent / f".{target.name}.shrinking"
    with writing(target):
        room.mkdir(exist_ok=True)
    try:
        yield room
    except Exception:
        shutil.rmtree(room, ignore_errors=True)
        raise
    shutil.rmtree(room)


def _folder(source: Path, packed: Path, target: Path) -> list[str]:
    """Make `target` of the packed weights and of what `source` has beside its weights; the names that were left out."""
    ready, left_out = packed.parent / "ready", []
    shutil.rmtree(ready, ignore_errors=True)
    ready.mkdir()
    for folder, inner, files in os.walk(source):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        place = Path(folder).relative_to(source)
        for name in sorted(files):
            if name.startswith(".") or name.lower().endswith(WEIGHTS) or not (Path(folder) / name).is_file():
                left_out.append(str(place / name))
                continue
            (ready / place).mkdir(parents=True, exist_ok=True)
            with writing(target):
                shutil.copyfile(Path(folder) / name, ready / place / name)
            if not filecmp.cmp(Path(folder) / name, ready / place / name, shallow=False):
                raise VerdictError(f"{place / name} was read back with other bytes than it has in {source}: "
                                   "nothing is written")  # fmt: skip
    formats.move(packed, ready / PACKED)
    with writing(target):
        ready.rename(target)
    return left_out


def _graph(source: str, done: Transferred, draft: Path, target: Path) -> None:
    """Write the graph of `source` with the rounded weights in plain floats, and read it back, bit for bit."""
    from steelyard.deploy.graft import same_but_values, with_weights

    with_weights(source, done.after, draft)
    if not same_but_values(source, draft):
        raise VerdictError(f"{target.name} was read back with another graph than that of {source}: nothing is written")
    found = formats.open(draft)
    for name, item in done.after.items():
        if found.find(name).array().tobytes() != item.array().tobytes():
            raise VerdictError(f"{quoted(name)} comes out of {target.name} with other values than went in")
    with writing(target):
        draft.replace(target)


def _summary(
    source: str, rows: list[Row], error: float, sizes: tuple[int | None, int], seconds: float, meta: dict[str, str]
) -> Table:
    columns = [
        Column("bytes before", "B", "of all files of the weights"),
        Column("bytes", "B", "of the finished file"),
        Column("smaller", "x"),
        Column("error", "%", "of all weights together, relative to their tensor, as another process read them"),
        Column("error at most", "%", "that was asked for"),
        Column("largest error", "%", "of a tensor"),
        Column("tensor", "", "that has it"),
        Column("seconds", "s"),
    ]
    worst = max(rows, key=lambda row: row["error"])
    before, after = sizes
    row = {"bytes before": before, "bytes": after, "smaller": None if before is None else before / after}
    row |= {"error": together(rows), "error at most": error, "largest error": worst["error"], "tensor": worst["name"]}
    return Table.of(f"{Path(source).name}: weights alone", columns, [row | {"seconds": seconds}], meta)


def _columns() -> list[Column]:
    return [
        Column("name"),
        Column("shape"),
        Column("dtype", "", "in the file"),
        Column("before", "B"),
        Column("after", "B"),
        Column("ratio", "x"),
        Column("zeros", "%"),
        Column("error", "%", "relative; of what a matrix makes of inputs without structure, too"),
        Column("held"),
    ]


def main(source: str, file: str) -> int:
    """Print the rows of the account of `file` against `source`; 0, or 2 with the error as a line."""
    try:
        tensors, _ = account(formats.open(source), formats.open(file))
    except SteelyardError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write(json.dumps([dict(row) for row in tensors.rows]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2]))
