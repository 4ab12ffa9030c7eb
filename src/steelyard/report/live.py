"""The page of a log that still grows, served to browsers on this machine, and only to them.

Decides how a page stays up to date: its script asks for what is new, and puts figures, tables and key figures in their
places; the page is not loaded again. Nothing is read while nobody asks. Knows nothing of who writes the log.
"""

from __future__ import annotations

import hashlib
import threading
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from steelyard.errors import SteelyardError, WeightsError
from steelyard.learn.watch.course import Course
from steelyard.learn.watch.reading import LogFile
from steelyard.report import html
from steelyard.report.watched import page

PERIOD = 0.9  # seconds from one reading of the log to the next, at least, however many ask
ASKING = 5.0  # seconds since the last question for which a browser counts as there
LAST = 3.0  # seconds at most for which the end waits, so that a browser sees it


class Served:
    """A live page at `url`, which is on 127.0.0.1, until it is closed. Made by `serve`."""

    def __init__(self, log: LogFile, port: int, share: float):
        self._course, self._lock, self._share = Course(log), threading.Lock(), share
        self._page: html.Page | None = None
        self._parts: dict[str, Any] = {}
        self._due = self._asked = float("-inf")
        self._closing = self._told = False  # whether a browser knows that the end has come
        try:
            self._server = ThreadingHTTPServer(("127.0.0.1", port), partial(_Answer, self))
        except (OSError, OverflowError) as error:
            why = error.strerror if isinstance(error, OSError) else "expected 0 to 65535"
            raise WeightsError(f"port {port} of 127.0.0.1 for the live page: {why}; choose another, or 0") from error
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True)
        self._thread.start()

    @property
    def hosts(self) -> tuple[str, str]:
        """What a browser on this machine calls it; any other name is that of a page that pries."""
        port = self._server.server_address[1]
        return f"127.0.0.1:{port}", f"localhost:{port}"

    def document(self) -> str:
        """The page before anything is in it."""
        scripts = [*html.scripts(True), html.asset("live.js")]
        body = '<p id="live" role="status">Connecting</p>\n<div id="head"></div>\n<div id="content"></div>'
        return html.document("Training", body, scripts, more="; connect-src 'self'")

    def news(self, version: int, key: str) -> dict[str, Any] | None:
        """What has changed since that version of the page, of the structure `key`; None if nothing has."""
        with self._lock:
            self._asked = time.monotonic()
            if self._asked >= self._due or (self._closing and not self._parts.get("ended")):
                self._renew()
            self._told = bool(self._parts["ended"])
            if self._parts["version"] == version:
                return None
            if self._page is None or self._parts["key"] == key:
                return self._parts
            return self._parts | {"content": html.content(self._page, numbers=False)}

    def _renew(self) -> None:
        """Read what is new; the next time so much later that the share of the processor is kept."""
        start = time.thread_time()
        new = self._course.update()
        ended = self._closing or self._course.ended
        if new or not self._parts or ended != self._parts["ended"]:
            version = self._parts.get("version", 0) + 1
            self._page = page(self._course)
            self._parts = {"version": version, "ended": ended, **parts(self._page)}
        self._due = time.monotonic() + max(PERIOD, (time.thread_time() - start) / self._share)

    def close(self) -> None:
        """Tell a browser that is there that the training has ended, and serve no more."""
        self._closing = True
        end = time.monotonic() + LAST
        while not self._told and self._asked + ASKING > time.monotonic() and time.monotonic() < end:
            time.sleep(0.02)
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def wait(self) -> None:
        """Until the server has ended: for ever, or until Ctrl-C."""
        self._thread.join()

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def serve(log: LogFile, port: int = 0, share: float = 0.01) -> Served:
    """Serve the live page of a log to browsers on this machine::

        with serve(read_log("run.sqlite")) as live:
            print(live.url)
            live.wait()

    port: 0 takes one that is free. share: of one processor core that reading and drawing may take: what costs more is
    done less often. Raises WeightsError for a port that cannot be had.
    """
    return Served(log, port, share)


def parts(found: html.Page) -> dict[str, Any]:
    """What a browser puts into its places, and the key of the places: the same key, the same places.

    A live page shows no numbers behind its pictures; the report of the log does.
    """
    figures = [picture.figure() for section in found.sections for picture in section.pictures]
    for figure in figures:
        figure["layout"]["uirevision"] = "live"  # a view that was zoomed stays
    places = [(s.heading, s.text, bool(s.tables), [p.title for p in s.pictures]) for s in found.sections]
    return {
        "key": hashlib.sha256(repr(places).encode()).hexdigest()[:16],
        "head": html.head(found),
        "tables": [html.tables(section) for section in found.sections if section.tables],
        "figures": figures,
    }


class _Answer(BaseHTTPRequestHandler):
    """Answers GET / with the page and GET /state with what is new, and nothing else."""

    protocol_version = "HTTP/1.1"
    timeout = 30

    def __init__(self, served: Served, *given: Any):
        self._served = served
        super().__init__(*given)

    def do_GET(self) -> None:
        asked = urlsplit(self.path)
        if self.headers.get("Host") not in self._served.hosts:
            self._send(403, "text/plain", b"this page is for browsers on this machine")
        elif asked.path == "/":
            self._send(200, "text/html; charset=utf-8", self._served.document().encode())
        elif asked.path == "/state":
            self._state(parse_qs(asked.query))
        else:
            self._send(404, "text/plain", b"there is only / and /state")

    def _state(self, query: dict[str, list[str]]) -> None:
        version, key = query.get("version", ["-1"])[0], query.get("key", [""])[0]
        try:
            found = self._served.news(int(version) if version.isdecimal() else -1, key)
        except SteelyardError as error:
            self._send(503, "text/plain; charset=utf-8", str(error).encode())
            return
        if found is None:
            self._send(204, "text/plain", b"")
        else:
            self._send(200, "application/json", html.data(found).encode())

    def _send(self, status: int, kind: str, body: bytes) -> None:
        try:
            self.send_response(status)
            for name, value in (("Content-Type", kind), ("Content-Length", str(len(body))),
                                ("Cache-Control", "no-store"), ("X-Content-Type-Options", "nosniff")):  # fmt: skip
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # the browser has been closed

    def log_message(self, *_: Any) -> None:
        """Say nothing of each question."""
