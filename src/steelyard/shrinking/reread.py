"""A finished file against what it was meant to hold, read by a process that knows nothing but the file.

``python -m steelyard.shrinking.reread FILE OUT`` decodes every tensor of FILE and writes it plain to OUT.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from steelyard import formats
from steelyard.core.weights import Weight, Weights
from steelyard.errors import SteelyardError, VerdictError, quoted


def reread(file: Path, meant: Weights) -> Weights:
    """The weights that another process found in `file`, in memory.

    Raises VerdictError, naming the tensor, unless they are those of `meant`, bit for bit, and no others.
    """
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "plain.safetensors"
        command = [sys.executable, "-m", "steelyard.shrinking.reread", str(file), str(plain)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise VerdictError(f"the process that re-read the file failed: {last}")
        found = formats.open(plain).settle()
    _compare(found, meant)
    return found


def _compare(found: Weights, meant: Weights) -> None:
    names, wanted = {*found, *found.ties}, {*meant, *meant.ties}
    for name in sorted(names ^ wanted):
        raise VerdictError(f"{quoted(name)} is {'missing from' if name in wanted else 'found in'} the file")
    for name, weight in meant.items():
        a, b = weight.array(), found.find(name).array()
        if a.shape != b.shape or a.dtype != b.dtype or a.tobytes() != b.tobytes():
            raise VerdictError(f"{quoted(name)} comes out of the file with other values than went in")
    for alias, name in meant.ties.items():
        if found.find(alias).array().tobytes() != meant[name].array().tobytes():
            raise VerdictError(f"{quoted(alias)} is tied to {quoted(name)}, and another tensor in the file")


def main(file: str, out: str) -> int:
    """Decode `file` into `out`; 0, or 2 with the error as a line."""
    try:
        weights = formats.open(file)
        formats.write(weights.with_items(Weight.of(w.name, w.array(), w.origin) for w in weights.values()), out)
    except SteelyardError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2]))
