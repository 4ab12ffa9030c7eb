"""Files that are not trusted, opened in a process of their own that may take little memory and do nothing but read."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

CODE = """
import json, resource, sys, time
import ml_dtypes, numpy, zipfile
from steelyard.errors import SteelyardError
from steelyard.formats import FORMATS, open as open_weights
for name in json.loads(sys.argv[2]):
    __import__(name)
for format in FORMATS.values():
    format()
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + int(sys.argv[1]),) * 2)
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
def watch(event, args):
    if event.startswith(("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess", "socket", "pickle")):
        raise RuntimeError("the file made the reader do " + event)
sys.addaudithook(watch)
for path in map(str.strip, sys.stdin):
    start, text, kind, count = time.process_time(), "", "", 0
    try:
        for item in open_weights(path).values():
            item.array()
            count += 1
    except SteelyardError as error:
        text = str(error)
    except BaseException as error:
        kind, text = type(error).__name__, str(error)
    print(json.dumps([path, count, text, kind, time.process_time() - start]), flush=True)
"""


@dataclass(frozen=True)
class Verdict:
    """What became of one file: how many tensors were read, or the one line that refused it."""

    count: int
    refusal: str
    untyped: str  # the type of an exception that is no error of ours
    seconds: float  # of the processor


def judged(paths: Iterable[Path], memory: int, imports: tuple[str, ...] = ()) -> dict[Path, Verdict]:
    """A verdict for each file, all opened and read in one process with `memory` bytes more than its imports take."""
    command = [sys.executable, "-c", CODE, str(memory), json.dumps(imports)]
    text = "".join(f"{path}\n" for path in paths)
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.returncode, done.stdout[-300:], done.stderr[-2000:])
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return {Path(path): Verdict(*rest) for path, *rest in found}
