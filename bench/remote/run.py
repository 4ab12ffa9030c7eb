"""What travels when a file on a web server is inspected: requests and bytes, for the header and for one tensor.

Each model has 100 tensors of 1 MiB, 105 MB in all; the server is on this machine and counts what it sends. The
measure is the file itself, which tools without ranges download.

    python bench/remote/run.py
"""

from __future__ import annotations

import datetime
import json
import platform
import re
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

HERE = Path(__file__).parent


class Handler(BaseHTTPRequestHandler):
    """Sends ranges of the files in a folder, and counts."""

    protocol_version = "HTTP/1.1"
    root: Path
    requests = 0
    sent = 0

    def do_GET(self) -> None:
        path = self.root / self.path.lstrip("/")
        size = path.stat().st_size
        said = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"])
        assert said is not None, "a request for a whole file"
        first, last = int(said[1]), min(int(said[2]), size - 1)
        with path.open("rb") as file:
            file.seek(first)
            body = file.read(last + 1 - first)
        Handler.requests += 1
        Handler.sent += len(body)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{path.stat().st_mtime_ns}"')
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def write_models(folder: Path) -> list[str]:
    import h5py
    import numpy as np
    import torch

    import steelyard as sy
    from steelyard.formats.sharded import Sharded

    weights = sy.Weights.of({f"layers.{i}.weight": np.full((512, 512), i, np.float32) for i in range(100)})
    index = "set/model.safetensors.index.json"
    (folder / "set").mkdir()
    sy.write(weights, folder / "model.safetensors")
    sy.write(weights, folder / index, Sharded(shard_size=20_000_000))
    sy.write(weights, folder / "model.npz")
    sy.write(weights, folder / "model.gguf")
    with h5py.File(folder / "model.h5", "w") as file:
        for name, item in weights.items():
            file[name.replace(".", "/")] = item.array()
    torch.save({name: torch.from_numpy(item.array()) for name, item in weights.items()}, folder / "model.pt")
    return ["model.safetensors", index, "model.gguf", "model.pt", "model.npz", "model.h5"]


def main() -> None:
    import steelyard as sy

    figures: dict[str, dict[str, int]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = write_models(folder)
        Handler.root = folder
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for file in files:
            whole = sum(path.stat().st_size for path in (folder / file).parent.iterdir() if "/" in file) or (
                (folder / file).stat().st_size
            )
            Handler.requests = Handler.sent = 0
            weights = sy.open(f"http://127.0.0.1:{server.server_address[1]}/{file}")
            assert len(weights) == 100
            opened = (Handler.requests, Handler.sent)
            assert next(item for name, item in weights.items() if "7" in name).array()[0, 0] == 7
            figures[file] = {
                "bytes of all files": whole,
                "requests of the header": opened[0],
                "bytes of the header": opened[1],
                "requests of one tensor more": Handler.requests - opened[0],
                "bytes of one tensor more": Handler.sent - opened[1],
            }
            print(file, figures[file])
        server.shutdown()
    (HERE / "results").mkdir(exist_ok=True)
    result = {"date": datetime.date.today().isoformat(), "python": platform.python_version(), "figures": figures}
    (HERE / "results" / f"{result['date']}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
