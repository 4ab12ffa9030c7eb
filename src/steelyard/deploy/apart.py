"""ONNX files run by a process of their own: how fast they are, what memory they take, what they answer.

Decides how time and memory are taken. ``python -m steelyard.deploy.apart FOLDER`` does what ``FOLDER/asked.json`` says;
that process imports ONNX Runtime and numpy alone, so that what it holds is the model's. Knows nothing of metrics.

Time is processor seconds on one thread, which a machine that does other things, too, gives as a quiet one does. Files
take turns, so that what disturbs one disturbs all. Memory is the most that the process held above what it held before
it loaded the file (Linux alone says so).
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from steelyard.errors import ModelError

Arguments = Sequence[np.ndarray]  # of one call
ROUNDS = 31  # of a race: the median of so many, and an interval for it
_LEAST = 2e-3  # seconds of a turn: the clock and the scheduler are finer
_STATUS, _CPUINFO = Path("/proc/self/status"), Path("/proc/cpuinfo")


def session(file: str | Path) -> Any:
    """A session of ONNX Runtime on one thread of the processor."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def race(files: Sequence[Path], batch: Arguments, rounds: int = ROUNDS) -> np.ndarray:
    """Processor seconds of one call with `batch`: (files, rounds)."""
    return np.array(_ask({"do": "race", "files": [str(f) for f in files], "rounds": rounds}, [batch])[0])


def peak(file: Path, batch: Arguments) -> int | None:
    """The most bytes that loading the file and running it on `batch` took at any time; None: the system is mute."""
    found: int | None = _ask({"do": "peak", "files": [str(file)]}, [batch])[0]
    return found


def answers(file: Path, batches: Sequence[Arguments]) -> tuple[str, list[np.ndarray]]:
    """The SHA-256 of the file as the other process read it, and the first output for each batch."""
    return _ask({"do": "answers", "files": [str(file)]}, batches)


def digest(file: Path) -> str:
    """The SHA-256 of a file."""
    return sha256(file.read_bytes()).hexdigest()


def processor() -> str:
    """Its name, and whether it multiplies bytes at once, without which int8 gains little."""
    lines = _CPUINFO.read_text().splitlines() if _CPUINFO.exists() else []
    said = dict(line.partition(":")[::2] for line in lines)
    found = {key.strip(): value.strip() for key, value in said.items()}
    name = found.get("model name") or platform.processor() or platform.machine()
    if "flags" not in found:
        return name
    return f"{name}, {'with' if 'vnni' in found['flags'] else 'without'} VNNI"


def _ask(asked: dict[str, Any], batches: Sequence[Arguments]) -> tuple[Any, list[np.ndarray]]:
    with tempfile.TemporaryDirectory() as folder:
        room = Path(folder)
        (room / "asked.json").write_text(json.dumps(asked))
        for i, batch in enumerate(batches):
            np.savez(room / f"{i}.npz", *batch)
        command = [sys.executable, "-m", "steelyard.deploy.apart", folder]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise ModelError(f"the process that runs {Path(asked['files'][-1]).name} failed: {last}")
        outputs = [np.load(room / f"{i}.npy") for i in range(len(batches)) if (room / f"{i}.npy").exists()]
        return json.loads((room / "found.json").read_text()), outputs


def main(folder: str) -> None:
    """Do what is asked in a folder, and leave the answer there."""
    room = Path(folder)
    asked = json.loads((room / "asked.json").read_text())
    import onnxruntime  # noqa: F401  before memory is looked at

    batches = list(_batches(room))
    files = [Path(f) for f in asked["files"]]
    if asked["do"] == "race":
        found: Any = _race(files, batches[0], asked["rounds"])
    elif asked["do"] == "peak":
        found = _peak(files[0], batches[0])
    else:
        found = _answers(room, files[0], batches)
    (room / "found.json").write_text(json.dumps(found))


def _batches(room: Path) -> Iterator[list[np.ndarray]]:
    for i in range(len(list(room.glob("*.npz")))):
        with np.load(room / f"{i}.npz") as kept:
            yield [kept[name] for name in kept.files]


def _asked(running: Any, batch: Arguments) -> dict[str, np.ndarray]:
    return dict(zip((spec.name for spec in running.get_inputs()), batch, strict=True))


def _race(files: list[Path], batch: Arguments, rounds: int) -> list[list[float]]:
    """Each file as often in a turn as takes a while; one round is a turn of each, every second one from the end."""
    running = [session(file) for file in files]
    asked = [_asked(each, batch) for each in running]

    def turn(i: int, calls: int) -> float:
        began = time.process_time()
        for _ in range(calls):
            running[i].run(None, asked[i])
        return (time.process_time() - began) / calls

    order = list(range(len(files)))
    calls = [max(1, round(_LEAST / max(turn(i, 3), 1e-7))) for i in order]
    found: list[list[float]] = [[] for _ in order]
    for k in range(rounds):
        for i in order if k % 2 == 0 else reversed(order):
            found[i].append(turn(i, calls[i]))
    return found


def _peak(file: Path, batch: Arguments) -> int | None:
    if not _STATUS.exists():
        return None
    (_STATUS.parent / "clear_refs").write_text("5")  # the most so far is what there is now
    before = _status("VmRSS")
    running = session(file)
    for _ in range(3):
        running.run(None, _asked(running, batch))
    return _status("VmHWM") - before


def _status(name: str) -> int:
    """A line of what Linux says of the process, in bytes."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def _answers(room: Path, file: Path, batches: list[list[np.ndarray]]) -> str:
    read = digest(file)
    running = session(file)
    for i, batch in enumerate(batches):
        np.save(room / f"{i}.npy", running.run(None, _asked(running, batch))[0])
    return read


if __name__ == "__main__":
    main(sys.argv[1])
