"""A file on a web server, read by byte ranges: only the bytes that are asked for travel.

Decides that a file which changed between two reads is refused, that a server which cannot send ranges is an
error rather than a download, that credentials go to the host they are meant for and into no message. Knows
nothing of any container. It stands on the standard library: what other clients hide (the status, the range that
was really sent, the tag of the file) is what must be checked here.

HTTP semantics: https://www.rfc-editor.org/rfc/rfc9110#name-range-requests
"""

from __future__ import annotations

import base64
import http.client
import io
import re
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import IO, TYPE_CHECKING, cast
from urllib.parse import quote, unquote, urljoin, urlsplit, urlunsplit

from steelyard.errors import FormatError, printable
from steelyard.formats.source import Folder, Source, inside

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

AHEAD = 1 << 16  # bytes of the first request: most headers come with it
NEAR = 1 << 13  # bytes that are asked for when fewer are needed somewhere else in the file
KEPT = 16  # blocks that are kept while a file is open
FAR = 1 << 20  # bytes that are asked for at most when a file is read on and on in small pieces
PIECE = 1 << 23  # bytes of one request at most
TIMEOUT = 30.0  # seconds without a byte
PAUSES = (0.1, 0.5, 2.0)  # seconds before a request is made again
AGAIN = frozenset({429, 500, 502, 503, 504})  # what a server answers when another try may help
_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19})")


class MissingFileError(FormatError):
    """There is no such file on the server."""


class Trail:
    """Where the last large read of a file ended, and what was fetched beyond it.

    A tensor that is read in blocks, and the one after it, then take few requests: what is fetched at once doubles
    for as long as each read begins where the one before ended. A block goes when all of it was passed on.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._at, self._next, self._start, self._block = -1, 0, 0, memoryview(b"")

    def leads_to(self, at: int) -> bool:
        """Whether what begins at `at` was fetched, or would be next."""
        return at == self._at or 0 <= at - self._start < len(self._block)

    def read(self, file: RemoteFile, at: int, rest: memoryview) -> int:
        """Fill the beginning of `rest` from `at` on; the number of bytes."""
        with self._lock:
            offset = at - self._start
            if not 0 <= offset < len(self._block):
                self._next = min(PIECE, 2 * max(self._next, len(rest), AHEAD)) if at == self._at else 0
                if self._next <= len(rest):
                    got = min(PIECE, len(rest))
                    file.get(at, rest[:got])
                    self._at = at + got
                    return got
                block = memoryview(bytearray(min(self._next, file.size - at)))
                file.get(at, block)
                self._start, self._block, offset = at, block, 0
            got = min(len(rest), len(self._block) - offset)
            rest[:got] = self._block[offset : offset + got]
            self._at = at + got
            if offset + got == len(self._block):
                self._block = memoryview(b"")
            return got


@dataclass(frozen=True)
class RemoteFile(Source):
    """A file elsewhere. ``get(start, buffer)`` fills a buffer, and raises FormatError if the file changed."""

    path: str
    size: int
    get: Callable[[int, memoryview], None] = field(repr=False)
    place: Folder = field(repr=False)
    head: bytes = field(repr=False, default=b"")  # its first bytes, which came when it was opened
    trail: Trail = field(repr=False, compare=False, default_factory=Trail)

    @contextmanager
    def reading(self) -> Iterator[IO[bytes]]:
        """The open file; what lies close together is asked for at once."""
        yield cast("IO[bytes]", Ranges(self))

    @property
    def folder(self) -> Folder:
        """The folder of the file."""
        return self.place


class Ranges(io.RawIOBase):
    """A file that is read by ranges. Small reads are served from the last blocks that were asked for ahead."""

    def __init__(self, file: RemoteFile):
        self._file, self._at = file, 0
        self._blocks = deque([(0, file.head)], KEPT)  # where each begins, and its bytes; the last one is first
        self._ahead = NEAR

    def readable(self) -> bool:
        """It can be read."""
        return True

    def seekable(self) -> bool:
        """It can be read at any place."""
        return True

    def tell(self) -> int:
        """Where the next byte comes from."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to `offset`."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._file.size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: WriteableBuffer) -> int:
        """Fill `buffer` as far as the file goes; the number of bytes."""
        rest = memoryview(buffer).cast("B")
        rest = rest[: max(0, self._file.size - self._at)]
        count = len(rest)
        while len(rest):
            got = self._ready(rest)
            if not got and (len(rest) >= AHEAD or self._file.trail.leads_to(self._at)):
                got = self._file.trail.read(self._file, self._at, rest)
            elif not got:
                self._look_ahead(len(rest))
            self._at += got
            rest = rest[got:]
        return count

    def _look_ahead(self, count: int) -> None:
        """Fetch a block with the next `count` bytes: the more, the longer the file has been read without a jump."""
        start, block = self._blocks[0]
        goes_on = self._at == start + len(block)
        self._ahead = min(FAR, max(AHEAD, 2 * self._ahead)) if goes_on else NEAR
        fetched = bytearray(min(max(count, self._ahead), self._file.size - self._at))
        self._file.get(self._at, memoryview(fetched))
        self._blocks.appendleft((self._at, bytes(fetched)))

    def _ready(self, rest: memoryview) -> int:
        """Fill the beginning of `rest` from a block; the number of bytes."""
        for start, block in self._blocks:
            if 0 <= self._at - start < len(block):
                ready = block[self._at - start : self._at - start + len(rest)]
                rest[: len(ready)] = ready
                return len(ready)
        return 0


@dataclass(frozen=True)
class Address:
    """Where a file lies on the web, and what to call it where others may read along."""

    url: str = field(repr=False)  # without credentials
    shown: str
    credentials: Mapping[str, str] = field(repr=False, default_factory=dict)  # headers for this host only
    remedy: str = "check the address and your permissions"  # where access is refused

    @staticmethod
    def of(text: str) -> Address:
        """The address that a URL means; raises FormatError."""
        try:
            parts = urlsplit(text)
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise FormatError(f"{text.partition('?')[0][:100]!r} is no address: {error}") from error
        if not host or parts.scheme not in ("http", "https") or re.search(r"[\0-\x20\x7f]", text):
            raise FormatError(f"expected https://host/path, found {printable(text.rpartition('@')[2][:100])}")
        where = (f"[{host}]" if ":" in host else host) + (f":{port}" if port else "")
        credentials = {}
        if parts.username is not None:
            pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            credentials["Authorization"] = f"Basic {base64.b64encode(pair.encode()).decode()}"
        path = quote(parts.path, safe="/%:@!$&'()*+,;=~-._")
        shown = urlunsplit((parts.scheme, where, parts.path, "", ""))
        return Address(urlunsplit((parts.scheme, where, path, parts.query, "")), shown, credentials)

    def beside(self, name: str) -> Address:
        """The file `name` in the folder of this one."""
        parts = urlsplit(self.url)
        path = urljoin(parts.path, "./") + quote(name)
        shown = self.shown.rpartition("/")[0] + f"/{name}"
        return replace(self, url=urlunsplit(parts._replace(path=path)), shown=shown)


@dataclass(frozen=True)
class WebFolder(Folder):
    """The folder of a file on a web server, which does not say what else lies in it."""

    address: Address  # of a file in it

    @property
    def path(self) -> str:  # type: ignore[override]
        """The address without its last part."""
        return self.address.shown.rpartition("/")[0]

    def names(self) -> list[str]:
        """Nobody can know; raises FormatError."""
        raise FormatError("a web server does not list its files; name the file", path=self.path)

    def source(self, name: str) -> RemoteFile:
        """The file `name` beside this one."""
        return web_file(self.address.beside(inside(name, self.path)))

    def find(self, name: str) -> RemoteFile | None:
        """The file `name`, or None where the server has none."""
        try:
            return self.source(name)
        except MissingFileError:
            return None


def web_file(address: Address, place: Folder | None = None) -> RemoteFile:
    """The file at `address`: asks for its first bytes, with which its size comes.

    Raises FormatError where there is none, or the server does not send parts of it.
    """
    with _answer(address, 0, AHEAD) as answer:
        if answer.status == 200 and 0 < (answer.length or 0) <= AHEAD:  # all of a small file
            stamp, count = _Stamp.of(answer, answer.length or 0), answer.length or 0
        else:
            stamp, count = _checked(address, answer, 0, AHEAD)
        head = bytearray(count)
        _receive(address, answer, memoryview(head), 0)
    get = partial(_get, address, stamp)
    return RemoteFile(address.shown, stamp.size, get, place or WebFolder(address), bytes(head))


def web_text(address: Address, limit: int) -> str:
    """The text at `address`, at most `limit` bytes; raises FormatError."""
    with _answer(address) as answer:
        data = answer.read(limit + 1)
    if len(data) > limit:
        raise FormatError(f"the answer takes more than {limit} bytes", path=address.shown)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError("the answer is not UTF-8", path=address.shown, offset=error.start) from error


@dataclass(frozen=True)
class _Stamp:
    """What tells one state of a file from another."""

    size: int
    tag: str | None
    changed: str | None

    @staticmethod
    def of(answer: http.client.HTTPResponse, size: int) -> _Stamp:
        tag = answer.headers.get("ETag")
        return _Stamp(size, tag, answer.headers.get("Last-Modified") if tag is None else None)


def _get(address: Address, stamp: _Stamp, start: int, buffer: memoryview) -> None:
    """Fill `buffer` from `start` on; goes on where a connection broke. Raises FormatError if the file changed."""
    got, pauses = 0, iter(PAUSES)
    while got < len(buffer):
        with _answer(address, start + got, start + len(buffer)) as answer:
            found, _ = _checked(address, answer, start + got, start + len(buffer))
            if found != stamp:
                raise FormatError("the file was changed since it was opened; open it again", path=address.shown)
            got += _receive(address, answer, buffer[got:], start + got, next(pauses, None))


def _receive(
    address: Address, answer: http.client.HTTPResponse, buffer: memoryview, start: int, pause: float | None = None
) -> int:
    """Read the body into `buffer`; the bytes that came. With a `pause`, a body that breaks off is no error yet."""
    got = 0
    try:
        while got < len(buffer):
            count = answer.readinto(buffer[got:])
            if not count:
                raise http.client.IncompleteRead(b"", len(buffer) - got)
            got += count
    except (OSError, http.client.HTTPException) as error:
        if pause is None:
            text = f"the answer broke off {len(buffer) - got} bytes too early; try again"
            raise FormatError(text, path=address.shown, offset=start + got) from error
        time.sleep(pause)
    return got


def _checked(address: Address, answer: http.client.HTTPResponse, start: int, end: int) -> tuple[_Stamp, int]:
    """The state of the file and the number of bytes that an answer brings; raises FormatError if it is no such part."""
    if answer.status == 200:
        text = "the server sends whole files only, not the part that was asked for; download the file and open the copy"
        raise FormatError(text, path=address.shown)
    said = _RANGE.fullmatch(answer.headers.get("Content-Range", ""))
    if answer.status != 206 or said is None or answer.headers.get("Content-Encoding", "identity") != "identity":
        text = f"expected a part of the file and its size, the server answered {answer.status} otherwise"
        raise FormatError(f"{text}; download the file and open the copy", path=address.shown)
    first, last, size = map(int, said.groups())
    if first != start or last != min(end, size) - 1:
        text = f"asked for bytes {start} to {min(end, size) - 1}, the server sent {first} to {last}"
        raise FormatError(f"{text}; download the file and open the copy", path=address.shown)
    return _Stamp.of(answer, size), last + 1 - first


@contextmanager
def _answer(address: Address, start: int = 0, end: int | None = None) -> Iterator[http.client.HTTPResponse]:
    """The answer to a request for a part of a file, or for all of it; every failure becomes a FormatError."""
    from steelyard import __version__

    headers = {"Accept-Encoding": "identity", "User-Agent": f"steelyard/{__version__}"}
    if end is not None:
        headers["Range"] = f"bytes={start}-{end - 1}"
    request = urllib.request.Request(address.url, headers=headers)
    for key, value in address.credentials.items():
        request.add_unredirected_header(key, value)
    for pause in (*PAUSES, None):
        try:
            answer = _opener().open(request, timeout=TIMEOUT)
            break
        except urllib.error.HTTPError as error:
            error.close()
            if error.code not in AGAIN or pause is None:
                raise _refused(error.code, address) from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = getattr(error, "reason", error)
            if pause is None or not isinstance(reason, ConnectionResetError):
                raise _unreachable(reason, address) from None
        time.sleep(pause)
    with answer:
        yield answer


def _refused(status: int, address: Address) -> FormatError:
    """What an error says of a status: its remedy, and no address that could carry a secret."""
    if status in (404, 410):
        return MissingFileError(f"there is no such file ({status}); check the address", path=address.shown)
    if status in (401, 403):
        return FormatError(f"the server refuses access ({status}); {address.remedy}", path=address.shown)
    if status == 416:
        return FormatError("expected weights, found an empty file (416); write it again", path=address.shown)
    if status in AGAIN:
        return FormatError(f"the server is not able to answer now ({status}); try again later", path=address.shown)
    return FormatError(f"the server answered {status}; check the address", path=address.shown)


def _unreachable(reason: object, address: Address) -> FormatError:
    if isinstance(reason, TimeoutError):
        return FormatError(f"no answer within {TIMEOUT:g} seconds; try again later", path=address.shown)
    text = getattr(reason, "strerror", None) or type(reason).__name__
    host = urlsplit(address.url).netloc
    return FormatError(f"{host} cannot be reached ({text}); check the network and the address", path=address.shown)


class _Redirect(urllib.request.HTTPRedirectHandler):
    """Follows a server to another address, without the credentials where that is another host."""

    max_redirections = 8

    def redirect_request(self, req, fp, code, msg, headers, newurl):  # type: ignore[no-untyped-def]
        """The request to `newurl`; None where it must not be made."""
        old, new = urlsplit(req.full_url), urlsplit(newurl)
        if new.scheme not in ("http", "https") or (old.scheme, new.scheme) == ("https", "http"):
            return None
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        if request is not None and (old.scheme, old.netloc) == (new.scheme, new.netloc):
            for key in set(req.unredirected_hdrs) - {"Host"}:
                request.add_unredirected_header(key, req.unredirected_hdrs[key])
        return request


@cache
def _opener() -> urllib.request.OpenerDirector:
    """What makes requests: HTTP and nothing else, through the proxies that the environment names."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
        _Redirect(),
    ):
        opener.add_handler(handler)
    return opener
