"""The live page of a watch: opened when it begins, closed when it ends. Knows nothing of what is on it."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from steelyard.learn.watch.log import Log
from steelyard.learn.watch.reading import read_log


class LivePage:
    """A page that reads the file of the log; a log that has no file of its own gets one for the time being."""

    def __init__(self, port: int):
        self._port = port
        self._folder: TemporaryDirectory[str] | None = None
        self._served: Any = None

    @property
    def path(self) -> Path:
        """Where a log without a place of its own is kept while the page is there."""
        if self._folder is None:
            self._folder = TemporaryDirectory(prefix="steelyard-watch-")
        return Path(self._folder.name) / "log.sqlite"

    def open(self, log: Log) -> None:
        """Serve the page, and say where. Raises WeightsError for a port that cannot be had."""
        log.write()
        assert log.path is not None
        serve = import_module("steelyard.report.live").serve  # by its name: reports stand above learning
        self._served = serve(read_log(log.path), self._port)
        log.url = self._served.url
        sys.stderr.write(f"live page: {log.url}\n")

    def close(self, log: Log) -> None:
        """Show the end to who looks, and serve no more."""
        if self._served is not None:
            self._served.close()
        if self._folder is not None:
            log.into_memory()
            self._folder.cleanup()
