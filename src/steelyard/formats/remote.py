"""Sources that lie elsewhere: https://host/path, hf://owner/name[@revision][/file], s3://bucket/key.

Decides what an address means. A model of the Hugging Face hub is read at the one commit that its revision named
when it was opened. Web servers are read by ``ranges``, object stores through fsspec; where a token of the hub
lies is known to huggingface_hub. Whatever of these is needed is imported here, and only when it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from urllib.parse import quote

from steelyard.errors import FormatError, MissingExtraError, printable, quoted, suggestion
from steelyard.formats.ranges import AHEAD, PIECE, Address, RemoteFile, web_file, web_text
from steelyard.formats.source import NAMES, Folder, Source, inside

ANSWER_LIMIT = 50_000_000  # bytes of what the hub says of a model
STORE = {"config_kwargs": {"connect_timeout": 10, "read_timeout": 30, "retries": {"max_attempts": 1}}}  # seconds
_HUB = re.compile(r"([\w.-]+/[\w.-]+)(?:@(refs/[\w.-]+/[^/]+|[^/@]+))?(?:/(.*))?")


def locate(address: str) -> Source | Folder:
    """The file or the folder at `address`; raises FormatError where there is none or the kind is not known."""
    kind, _, rest = address.partition("://")
    if kind not in KINDS:
        text = f"{quoted(kind)} is no kind of address that is read here; known are {', '.join(KINDS)}"
        raise FormatError(text)
    return KINDS[kind](rest)


def _web(scheme: str, rest: str) -> Source:
    return web_file(Address.of(f"{scheme}://{rest}"))


def _hub(rest: str) -> Source | Folder:
    """A model of the hub, or a file or folder in it."""
    shown = f"hf://{printable(rest[:200])}"
    parts = _HUB.fullmatch(rest.strip("/"))
    if parts is None or rest.startswith(("datasets/", "spaces/")):
        raise FormatError("expected hf://owner/name[@revision][/file] of a model", path=shown)
    try:
        from huggingface_hub import constants, get_token
    except ModuleNotFoundError as error:
        raise MissingExtraError("reading from the Hugging Face hub", error.name or "?", "remote") from error
    name, revision, inner = parts[1], parts[2] or "main", parts[3] or ""
    token = get_token()
    remedy = "check the name; a private or gated model needs its licence accepted and a token in HF_TOKEN"
    credentials = {"Authorization": f"Bearer {token}"} if token else {}
    api = f"{constants.ENDPOINT}/api/models/{name}/revision/{quote(revision, safe='')}"
    commit, files = _listed(Address(api, f"hf://{name}@{revision}", credentials, remedy))
    base = Address(f"{constants.ENDPOINT}/{name}/resolve/{commit}/", f"hf://{name}@{revision}/", credentials, remedy)
    if inner in files:
        return HubFolder(base, files, inner.rpartition("/")[0]).source(inner.rpartition("/")[2])
    if inner and not any(file.startswith(f"{inner}/") for file in files):
        raise FormatError(f"there is no such file; {suggestion(inner, files)}", path=shown)
    return HubFolder(base, files, inner)


def _listed(address: Address) -> tuple[str, list[str]]:
    """The commit and the files of a model, as the hub says; raises FormatError."""
    try:
        data = json.loads(web_text(address, ANSWER_LIMIT))
        commit, files = data["sha"], [file["rfilename"] for file in data["siblings"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise FormatError("the hub answered otherwise than expected; try again later", path=address.shown) from error
    if not isinstance(commit, str) or not re.fullmatch(r"[0-9a-f]{7,64}", commit):
        raise FormatError("the hub named no commit; try again later", path=address.shown)
    return commit, [file for file in files if isinstance(file, str)]


@dataclass(frozen=True)
class HubFolder(Folder):
    """A folder of a model of the hub, at one commit."""

    base: Address  # of the whole model, with a slash at its end
    files: list[str] = field(repr=False)  # of the whole model
    inner: str = ""  # the folder in it; '' = the model itself

    @property
    def path(self) -> str:  # type: ignore[override]
        """The address of the folder."""
        return f"{self.base.shown}{self.inner}".rstrip("/")

    def names(self) -> list[str]:
        """The files that lie directly in the folder."""
        start = f"{self.inner}/" if self.inner else ""
        found = [file.removeprefix(start) for file in self.files if file.startswith(start)]
        return sorted(name for name in found if "/" not in name)

    def source(self, name: str) -> RemoteFile:
        """The file `name` of the folder."""
        whole = f"{self.inner}/{inside(name, self.path)}" if self.inner else inside(name, self.path)
        if whole not in self.files:
            raise FormatError(f"there is no such file; {suggestion(whole, self.files)}", path=f"{self.path}/{name}")
        folder = HubFolder(self.base, self.files, whole.rpartition("/")[0])
        return web_file(self.base.beside(whole), folder)


def _store(kind: str, rest: str) -> Source | Folder:
    """A file or a folder of an object store."""
    path = rest.rstrip("/")
    shown = f"{kind}://{path}"
    try:
        import fsspec
        import s3fs  # noqa: F401 - fsspec finds it by its name
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"reading from {kind}://", error.name or "?", "remote") from error
    with _telling(shown):
        store = fsspec.filesystem(kind, **STORE)
        info = store.info(path, refresh=True)
    if info["type"] == "directory":
        return StoreFolder(shown, store)
    return StoreFolder(shown.rpartition("/")[0], store).source(shown.rpartition("/")[2])


@dataclass(frozen=True)
class StoreFolder(Folder):
    """A folder of an object store."""

    path: str
    store: Any = field(repr=False)  # a file system of fsspec

    def names(self) -> list[str]:
        """The files that lie directly in it; raises FormatError where it cannot be read."""
        with _telling(self.path):
            found = self.store.ls(self.path, detail=True, refresh=True)
        if len(found) > NAMES:
            raise FormatError(f"more than {NAMES} files in one folder; name the file", path=self.path)
        return sorted(entry["name"].rpartition("/")[2] for entry in found if entry["type"] == "file")

    def source(self, name: str) -> RemoteFile:
        """The file `name` of the folder."""
        path = f"{self.path}/{inside(name, self.path)}"
        stamp = _stamp(self.store, path)
        if stamp["type"] != "file":
            raise FormatError("expected a file, found a folder; name the file in it", path=path)
        if not stamp["size"]:
            raise FormatError("expected weights, found an empty file; write it again", path=path)
        folder = StoreFolder(path.rpartition("/")[0], self.store)
        head = bytearray(min(AHEAD, stamp["size"]))
        get = partial(_fetch, self.store, path, stamp)
        get(0, memoryview(head))
        return RemoteFile(path, stamp["size"], get, folder, bytes(head))


def _stamp(store: Any, path: str) -> Mapping[str, Any]:
    """What tells one state of a file in a store from another."""
    with _telling(path):
        info = store.info(path, refresh=True)
    return {key: info.get(key) for key in ("type", "size", "ETag", "LastModified", "VersionId")}


def _fetch(store: Any, path: str, stamp: Mapping[str, Any], start: int, buffer: memoryview) -> None:
    """Fill `buffer` from `start` on; raises FormatError if the file changed."""
    if _stamp(store, path) != stamp:
        raise FormatError("the file was changed since it was opened; open it again", path=path)
    for at in range(0, len(buffer), PIECE):
        piece = buffer[at : at + PIECE]
        with _telling(path):
            data = store.cat_file(path, start=start + at, end=start + at + len(piece))
        if len(data) != len(piece):
            text = f"asked for {len(piece)} bytes, {len(data)} came; open the file again"
            raise FormatError(text, path=path, offset=start + at)
        piece[:] = data


@contextmanager
def _telling(path: str) -> Iterator[None]:
    """The errors of an object store become FormatErrors; their own texts may carry keys, so that none is shown."""
    from botocore.exceptions import BotoCoreError

    try:
        yield
    except FileNotFoundError as error:
        raise FormatError("there is no such file; check the address", path=path) from error
    except PermissionError as error:
        remedy = "check your credentials, or set FSSPEC_S3_ANON=true for a public bucket"
        raise FormatError(f"the store refuses access; {remedy}", path=path) from error
    except (OSError, BotoCoreError, ValueError) as error:
        kind = type(error).__name__
        text = f"the store cannot be read ({kind}); check the network, the address and your credentials"
        raise FormatError(text, path=path) from error


KINDS: Mapping[str, Callable[[str], Source | Folder]] = {
    "https": partial(_web, "https"),
    "http": partial(_web, "http"),
    "hf": _hub,
    "s3": partial(_store, "s3"),
}
