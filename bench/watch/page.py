"""What a live page costs the training that it shows: processor seconds of the threads that serve it.

The transformer of loop.py is trained with a page, first while nobody asks, then while another process asks for what is
new once a second, as a browser does. On a CPU the training is the main thread; all else that the process spends is the
page.

    python bench/watch/page.py [--seconds 40]
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import platform
import time
import urllib.request
from pathlib import Path
from typing import Any

import loop
import torch
from torch import nn

import steelyard as sy

HERE = Path(__file__).parent


def browse(url: str, received: Any) -> None:
    version, key, size = -1, "", 0
    while True:
        with urllib.request.urlopen(f"{url}state?version={version}&key={key}", timeout=60) as answer:
            body = answer.read()
        if body:
            state = json.loads(body)
            version, key = state["version"], state["key"]
        size += len(body)
        received.value = size
        time.sleep(1)


def train(seconds: float, watched: bool) -> dict[str, float]:
    torch.manual_seed(0)
    model = loop.Transformer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    tokens = torch.randint(loop.VOCABULARY, (1, loop.TIME + 1))
    context = multiprocessing.get_context("spawn")
    received = context.Value("q", 0)
    with sy.watch(model, optimizer, page=True) as log:
        browser = context.Process(target=browse, args=(log.url, received), daemon=True)
        if watched:
            browser.start()
            time.sleep(2)
        start, process, main, steps = time.perf_counter(), time.process_time(), time.thread_time(), 0
        while time.perf_counter() - start < seconds:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            log.note(loss=loss)
            steps += 1
        wall, process, main = (
            time.perf_counter() - start, time.process_time() - process, time.thread_time() - main
        )  # fmt: skip
        if watched:
            browser.terminate()
            browser.join()
    page = process - main
    return {"steps": steps, "seconds": round(wall, 1), "processor seconds of the training": round(main, 2),
            "processor seconds of the page": round(page, 3), "share of the training": round(page / main, 4),
            "share of a core": round(page / wall, 4), "bytes received": received.value}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=40)
    given = parser.parse_args()
    torch.set_num_threads(1)
    figures = {name: train(given.seconds, name == "somebody looks") for name in ("nobody looks", "somebody looks")}
    print(json.dumps(figures, indent=1))
    machine = {"cpus": os.cpu_count(), "python": platform.python_version(), "machine": platform.machine()}
    result = {"date": datetime.date.today().isoformat(), "machine": machine, "figures": figures}
    (HERE / "results" / f"{result['date']}-page.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
