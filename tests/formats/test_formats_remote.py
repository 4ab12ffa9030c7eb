"""Sources elsewhere: only what is needed travels, what changed is refused, and failures are one line without secrets."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from steelyard import formats
from steelyard.cli import main
from steelyard.core.weights import Weights
from steelyard.errors import FormatError, SteelyardError
from steelyard.formats import open, ranges, remote, write
from steelyard.formats.sharded import Sharded

HAS_S3 = importlib.util.find_spec("s3fs") and importlib.util.find_spec("moto") and importlib.util.find_spec("flask")
HAS_HUB = importlib.util.find_spec("huggingface_hub")
INDEX = "model.safetensors.index.json"


@dataclass
class Web:
    """A server of files that can send ranges, what it was asked for, and how it should misbehave."""

    port: int = 0
    files: dict[str, bytes] = field(default_factory=dict)
    redirects: dict[str, str] = field(default_factory=dict)
    ranges: bool = True
    change: Callable[[dict[str, str], int], int] = lambda headers, status: status  # of the headers and the status
    breaks: list[int] = field(default_factory=list)  # after how many bytes the next answers break off
    asked: list[tuple[str, dict[str, str]]] = field(default_factory=list)  # paths and headers
    sent: int = 0  # bytes of bodies

    def url(self, path: str = "", user: str = "") -> str:
        return f"http://{user}127.0.0.1:{self.port}/{path}"

    def put(self, weights: Weights, path: str, folder: Path) -> None:
        (folder / path).parent.mkdir(exist_ok=True, parents=True)
        write(weights, folder / path, Sharded(shard_size=30) if path.endswith("index.json") else None)
        for file in (folder / path).parent.iterdir():
            self.files[str(file.relative_to(folder))] = file.read_bytes()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    web: Web

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].lstrip("/")
        self.web.asked.append((path, dict(self.headers)))
        if path in self.web.redirects:
            self.answer(302, {"Location": self.web.redirects[path]}, b"")
        elif path not in self.web.files:
            self.answer(404, {}, b"nothing here")
        else:
            self.send_file(self.web.files[path])

    def send_file(self, data: bytes) -> None:
        headers = {"ETag": '"' + hashlib.sha256(data).hexdigest()[:16] + '"'}
        said = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if not self.web.ranges or said is None:
            self.answer(200, headers, data)
            return
        first, last = int(said[1]), min(int(said[2]), len(data) - 1)
        if first > last:
            self.answer(416, headers, b"")
            return
        headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        self.answer(206, headers, data[first : last + 1])

    def answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        headers["Content-Length"] = str(len(body))
        self.send_response(self.web.change(headers, status))
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if self.web.breaks:
            body = body[: self.web.breaks.pop(0)]
            self.close_connection = True
        try:
            for at in range(0, len(body), 1 << 16):
                self.web.sent += len(body[at : at + (1 << 16)])  # before whoever asked has it
                self.wfile.write(body[at : at + (1 << 16)])
        except OSError:
            self.close_connection = True  # whoever asked has gone

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def webs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Web]]:
    servers = []
    monkeypatch.setattr(ranges, "PAUSES", (0.01, 0.01, 0.01))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    ranges._opener.cache_clear()

    def make() -> Web:
        web = Web()
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("OneHandler", (Handler,), {"web": web}))
        server.daemon_threads = True
        web.port = server.server_address[1]
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        servers.append(server)
        return web

    yield make
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def web(webs: Callable[[], Web]) -> Web:
    return webs()


def some(count: int = 3) -> Weights:
    return Weights.of(
        {f"layer.{i}": np.arange(6, dtype=np.float32) * (i + 1) for i in range(count)}, meta={"author": "É"}
    )


def same(found: Weights, expected: Weights) -> bool:
    return (
        list(found) == list(expected)
        and dict(found.meta) == dict(expected.meta)
        and all(np.array_equal(found[name].array(), expected[name].array()) for name in expected)
    )


@pytest.mark.parametrize("name", ["m.safetensors", "m.npz", "m.npy", "a b%20ü.safetensors", INDEX])
def test_every_format_is_read_over_the_web(web: Web, tmp_path: Path, name: str) -> None:
    weights = Weights.of({"m": np.arange(6, dtype=np.float32)}) if name.endswith(".npy") else some()
    web.put(weights, name, tmp_path)
    web.files = {remote.quote(path): data for path, data in web.files.items()}
    found = open(web.url(remote.quote(name)))
    assert same(found, weights)
    assert next(iter(found.values())).origin.startswith(web.url())


def test_inspecting_100_megabytes_moves_less_than_200_kilobytes(web: Web, tmp_path: Path, capsys) -> None:
    weights = Weights.of({f"layers.{i}.weight": np.zeros((1 << 18,), np.float32) for i in range(100)})
    web.put(weights, "big.safetensors", tmp_path)
    assert len(web.files["big.safetensors"]) > 100_000_000
    assert main(["inspect", web.url("big.safetensors"), "--json"]) == 0
    tables = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(tables[0]["rows"]) == 100
    assert len(web.asked) == 1
    assert web.sent <= ranges.AHEAD


def test_a_long_header_is_asked_for_as_a_whole_and_tensors_only_when_they_are_read(web: Web, tmp_path: Path) -> None:
    weights = Weights.of({f"{i:0500}": np.full(50_000, i, np.float32) for i in range(300)})
    web.put(weights, "m.safetensors", tmp_path)
    found = open(web.url("m.safetensors"))
    header = struct.unpack("<Q", web.files["m.safetensors"][:8])[0]
    assert header > 2 * ranges.AHEAD
    assert len(web.asked) == 2
    assert web.sent == header + 8
    assert np.array_equal(found[f"{7:0500}"].array(), weights[f"{7:0500}"].array())
    assert len(web.asked) == 3
    assert web.sent == header + 8 + 200_000


def test_a_tensor_is_read_in_pieces_and_in_blocks(web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "PIECE", 100_000)
    weights = Weights.of({"w": np.arange(100_000, dtype=np.float32)})
    web.put(weights, "m.safetensors", tmp_path)
    found = open(web.url("m.safetensors"))
    assert np.array_equal(found["w"].array(), weights["w"].array())
    assert np.array_equal(np.concatenate([b.copy() for b in found["w"].blocks(999)]), weights["w"].array())


def test_a_scattered_header_costs_little_and_a_long_one_few_requests(web: Web, tmp_path: Path) -> None:
    web.put(Weights.of({f"{i}": np.full(100_000, i, np.float32) for i in range(30)}), "m.npz", tmp_path)
    found = open(web.url("m.npz"))
    assert len(found) == 30
    assert web.sent < 500_000 < len(web.files["m.npz"]) // 20
    web.files["long"] = bytes(range(256)) * 20_000
    file = ranges.web_file(ranges.Address.of(web.url("long")))
    web.asked.clear()
    with file.reading() as opened:
        assert b"".join(iter(lambda: opened.read(1000), b"")) == web.files["long"]
    assert len(web.asked) < 12


def test_a_checkpoint_of_torch_is_read_over_the_web(web: Web, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.save({f"layers.{i}": torch.full((1 << 18,), float(i)) for i in range(100)}, tmp_path / "m.pt")
    web.files["m.pt"] = (tmp_path / "m.pt").read_bytes()
    found = open(web.url("m.pt"))
    assert len(web.files["m.pt"]) > 100_000_000
    assert web.sent < 200_000
    assert found["layers.7"].array()[-1] == 7
    assert web.sent < 200_000 + (1 << 20)


def test_a_file_that_is_read_on_and_on_takes_few_requests(web: Web, tmp_path: Path) -> None:
    weights = Weights.of({f"{i}": np.arange(i, i + 1_000_000, dtype=np.float32) for i in range(8)})
    web.put(weights, "m.safetensors", tmp_path)
    found = open(web.url("m.safetensors"))
    web.asked.clear()
    for name, item in found.items():
        got = np.concatenate([block.copy() for block in item.blocks(1 << 15)])
        assert np.array_equal(got, weights[name].array())
    assert len(web.asked) < 12, "244 blocks of 128 KiB"
    assert web.sent < len(web.files["m.safetensors"]) + 200_000, "no byte travels twice"
    before = web.sent
    backwards = [found["3"].array(), found["2"].array(), found["7"].array()]
    assert [array[0] for array in backwards] == [3, 2, 7]
    assert web.sent == before + 3 * 4_000_000


def test_converting_from_the_web(web: Web, tmp_path: Path, capsys) -> None:
    web.put(some(), f"x/{INDEX}", tmp_path)
    target = tmp_path / "out.safetensors"
    assert main(["convert", web.url(f"x/{INDEX}"), str(target), "--json"]) == 0
    assert same(open(target), some())
    assert json.loads(capsys.readouterr().out.splitlines()[0])["rows"]


def test_a_file_that_changed_is_refused(web: Web, tmp_path: Path) -> None:
    web.put(Weights.of({"w": np.zeros(100_000, np.float32)}), "m.safetensors", tmp_path)
    found = open(web.url("m.safetensors"))
    web.files["m.safetensors"] = web.files["m.safetensors"][:-1] + b"\1"
    with pytest.raises(FormatError, match=r"/m\.safetensors: the file was changed since it was opened"):
        found["w"].array()


def test_a_server_that_sends_whole_files_is_an_error_unless_they_are_small(web: Web, tmp_path: Path) -> None:
    web.ranges = False
    web.put(Weights.of({"w": np.zeros(4_000_000, np.float32)}), "big.safetensors", tmp_path)
    web.put(some(), "small.safetensors", tmp_path)
    with pytest.raises(FormatError, match=r"sends whole files only.*download the file"):
        open(web.url("big.safetensors"))
    assert web.sent < 16_000_000, "it is not read to its end"
    assert same(open(web.url("small.safetensors")), some())


def lying(**changes: str | int | None) -> Callable[[dict[str, str], int], int]:
    def change(headers: dict[str, str], status: int) -> int:
        for key, value in changes.items():
            if value is None:
                headers.pop(key.replace("_", "-"), None)
            elif key != "status":
                headers[key.replace("_", "-")] = str(value)
        return int(changes.get("status") or status)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lying(status=404), r"no such file \(404\); check the address"),
        (lying(status=401), r"refuses access \(401\); check the address and your permissions"),
        (lying(status=403), r"refuses access \(403\)"),
        (lying(status=500), r"not able to answer now \(500\); try again later"),
        (lying(status=429), r"\(429\); try again later"),
        (lying(status=416), r"empty file \(416\)"),
        (lying(status=418), r"answered 418; check"),
        (lying(status=302, Location="file:///etc/passwd"), r"answered 302"),
        (lying(status=302, Location="/m.safetensors"), r"answered 302"),
        (lying(Content_Range="bytes 5-9/100"), "asked for bytes 0 to 99, the server sent 5 to 9"),
        (lying(Content_Range="bytes 0-99999/*"), "expected a part of the file and its size"),
        (lying(Content_Range="bytes 0-65535/" + "9" * 400), "expected a part of the file and its size"),
        (lying(Content_Range=None), "expected a part of the file and its size"),
        (lying(Content_Encoding="gzip"), "expected a part of the file and its size"),
        (lying(Content_Length="10"), "broke off .* bytes too early"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_a_server_says_is_checked(web: Web, tmp_path: Path, change: Callable, message: str, capsys) -> None:
    web.put(Weights.of({"w": np.zeros(100_000, np.float32)}), "m.safetensors", tmp_path)
    web.change = change
    start = time.monotonic()
    with pytest.raises(FormatError, match=message) as caught:
        open(web.url("m.safetensors?key=secret", user="anne:secret@"))
    assert str(caught.value).startswith(web.url("m.safetensors"))
    assert main(["inspect", web.url("m.safetensors?key=secret", user="anne:secret@")]) == 2
    for text in (str(caught.value), capsys.readouterr().err.strip()):
        assert "secret" not in text
        assert "\n" not in text
    assert time.monotonic() - start < 2


def test_no_network_is_one_line(capsys, monkeypatch: pytest.MonkeyPatch, web: Web, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"127\.0\.0\.1:1 cannot be reached .*; check the network and the address"):
        open("http://127.0.0.1:1/m.safetensors")
    web.put(some(), "m.safetensors", tmp_path)
    monkeypatch.setattr(ranges, "TIMEOUT", 0.1)
    web.change = lambda headers, status: (time.sleep(0.3), status)[1]
    with pytest.raises(FormatError, match=r"no answer within 0.1 seconds; try again later"):
        open(web.url("m.safetensors"))
    for address, message in [
        ("ftp://host/x", "'ftp' is no kind of address .* known are https, http, hf, s3"),
        ("https://", "expected https://host/path"),
        ("https://anne:secret@", "expected https://host/path"),
        ("http://host:port/x", "is no address"),
        ("http://[::1/x", "is no address"),
        ("http://127.0.0.1/a\nb", "expected https://host/path"),
        ("hf://x", "expected hf://owner/name"),
        ("hf://datasets/a/b", "expected hf://owner/name"),
    ]:
        with pytest.raises(FormatError, match=message) as caught:
            open(address)
        assert "secret" not in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("address", "package"), [("hf://a/b", "huggingface_hub"), ("s3://a/b", "s3fs")])
def test_a_missing_package_is_named_with_its_remedy(
    address: str, package: str, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["inspect", address]) == 2
    assert f"needs the package '{package}': pip install 'steelyard[remote]'" in capsys.readouterr().err


def test_a_connection_that_breaks_is_taken_up_where_it_broke(web: Web, tmp_path: Path) -> None:
    weights = Weights.of({"w": np.arange(100_000, dtype=np.float32)})
    web.put(weights, "m.safetensors", tmp_path)
    found = open(web.url("m.safetensors"))
    web.breaks = [1000, 0, 200_000]
    assert np.array_equal(found["w"].array(), weights["w"].array())
    web.breaks = [1000] * 9
    with pytest.raises(FormatError, match="broke off"):
        found["w"].array()


def test_credentials_go_to_their_host_only(webs: Callable[[], Web], tmp_path: Path) -> None:
    first, second = webs(), webs()
    second.put(some(), "m.safetensors", tmp_path)
    first.redirects = {"here": "/there", "there": second.url("m.safetensors?signature=x")}
    assert same(open(first.url("here", user="anne:pa%3Ass@")), some())
    assert [headers.get("Authorization") for _, headers in first.asked][:2] == ["Basic YW5uZTpwYTpzcw=="] * 2
    assert {headers.get("Authorization") for _, headers in second.asked} == {None}


def test_a_web_server_lists_nothing_and_a_name_leads_nowhere_else(web: Web, tmp_path: Path) -> None:
    web.put(some(), f"x/{INDEX}", tmp_path)
    folder = formats.locate(web.url(f"x/{INDEX}")).folder
    assert folder.find("nothing.json") is None
    assert folder.find(INDEX) is not None
    with pytest.raises(FormatError, match="does not list its files; name the file"):
        folder.names()
    for name in ("../secret", "//other/secret", "http://other/x", "/secret"):
        data = json.loads(web.files[f"x/{INDEX}"])
        web.files["y/" + INDEX] = json.dumps({**data, "weight_map": {"w": name}}).encode()
        before = len(web.asked)
        with pytest.raises(FormatError, match="leads out of the folder"):
            open(web.url(f"y/{INDEX}"))
        assert len(web.asked) == before + 1


# the hub


@pytest.fixture
def hub(web: Web, webs: Callable[[], Web], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Web, Web]:
    """A hub with the model anne/tiny, whose large files lie on another server."""
    if not HAS_HUB:
        pytest.skip("huggingface_hub is not installed")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", web.url()[:-1])
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    far = webs()
    far.put(some(), INDEX, tmp_path / "whole")
    write(Weights.of({"x": np.zeros(2)}), tmp_path / "whole" / "other.safetensors")
    far.files["other.safetensors"] = (tmp_path / "whole" / "other.safetensors").read_bytes()
    commit = "0123456789abcdef0123456789abcdef01234567"
    names = [*(name for name in far.files if name != "other.safetensors"), "config.json", "sub/other.safetensors"]
    said = json.dumps({"id": "anne/tiny", "sha": commit, "siblings": [{"rfilename": name} for name in names]}).encode()
    for revision in ("main", "v1", "refs%2Fpr%2F1"):
        web.files[f"api/models/anne/tiny/revision/{revision}"] = said
    start = f"anne/tiny/resolve/{commit}"
    for name in far.files:
        if name.endswith(".safetensors"):
            web.redirects[f"{start}/{name}"] = far.url(f"{name}?signature=secret")
    web.redirects[f"{start}/sub/other.safetensors"] = far.url("other.safetensors")
    web.files[f"{start}/{INDEX}"] = far.files[INDEX]
    web.files[f"{start}/config.json"] = b"{}"
    return web, far


@pytest.mark.parametrize("address", ["hf://anne/tiny", "hf://anne/tiny@v1", f"hf://anne/tiny@refs/pr/1/{INDEX}"])
def test_a_model_of_the_hub_is_read_at_one_commit(hub: tuple[Web, Web], address: str) -> None:
    web, far = hub
    found = open(address)
    assert same(found, some())
    assert found["layer.1"].origin.startswith(f"{address.removesuffix('/' + INDEX)}".partition("@")[0])
    assert {headers.get("Authorization") for _, headers in web.asked} == {"Bearer hf_secret"}
    assert {headers.get("Authorization") for _, headers in far.asked} == {None}
    assert all("/resolve/0123456789abcdef" in path for path, _ in web.asked[1:])


def test_a_file_or_a_folder_of_a_model_of_the_hub(hub: tuple[Web, Web]) -> None:
    for address in ("hf://anne/tiny/sub/other.safetensors", "hf://anne/tiny/sub", "hf://anne/tiny@main/sub/"):
        assert list(open(address)) == ["x"]


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("hf://anne/tinny", r"hf://anne/tinny@main: there is no such file \(404\)"),
        ("hf://anne/tiny@v2", r"hf://anne/tiny@v2: there is no such file \(404\)"),
        ("hf://anne/tiny/other.safetensors", "did you mean 'sub/other.safetensors'"),
    ],
)
def test_what_the_hub_does_not_have(hub: tuple[Web, Web], address: str, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        open(address)


def test_a_hub_that_refuses_or_answers_nonsense(hub: tuple[Web, Web]) -> None:
    web, _ = hub
    for said in (
        b"[]",
        b"{",
        b"[" * 100_000,
        b'{"sha": "../x", "siblings": []}',
        b'{"sha": 3, "siblings": []}',
        b"\xff",
    ):
        web.files["api/models/anne/tiny/revision/main"] = said
        with pytest.raises(FormatError, match=r"^hf://anne/tiny@main"):
            open("hf://anne/tiny")
    web.change = lying(status=401)
    with pytest.raises(FormatError, match=r"refuses access \(401\); .* a token in HF_TOKEN") as caught:
        open("hf://anne/tiny")
    assert "secret" not in str(caught.value)


# an object store


@pytest.fixture(scope="module")
def store() -> Iterator[object]:
    if not HAS_S3:
        pytest.skip("s3fs or moto[server] is not installed")
    from moto.server import ThreadedMotoServer

    patch = pytest.MonkeyPatch()
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for key, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "AKIDSECRET",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "no_proxy": "127.0.0.1",
    }.items():
        patch.setenv(key, value)
    import fsspec

    files = fsspec.filesystem("s3", **remote.STORE)
    files.mkdir("weights")
    yield files
    server.stop()
    patch.undo()


def test_an_object_store_is_read_by_ranges(store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    weights = Weights.of({f"layers.{i}": np.full(300_000, i, np.float32) for i in range(20)})
    write(weights, tmp_path / INDEX, Sharded(shard_size=5_000_000))
    for path in tmp_path.iterdir():
        store.put_file(str(path), f"weights/model/{path.name}")
    moved, cat_file = [], store.cat_file

    def counted(*arguments: object, **options: object) -> bytes:
        data = cat_file(*arguments, **options)
        moved.append(len(data))
        return data

    monkeypatch.setattr(store, "cat_file", counted)
    found = open("s3://weights/model")
    assert sum(moved) < 6 * ranges.AHEAD
    assert same(found, weights)
    assert found["layers.3"].origin.startswith("s3://weights/model/model-00001-of-00005.safetensors @")
    assert main(["inspect", f"s3://weights/model/{INDEX}", "--json"]) == 0
    store.pipe_file("weights/model/model-00001-of-00005.safetensors", b"x" * 4_800_000)
    with pytest.raises(FormatError, match="changed since it was opened"):
        found["layers.3"].array()


def test_what_an_object_store_does_not_have(store, monkeypatch: pytest.MonkeyPatch) -> None:
    for address in ("s3://weights/nothing.safetensors", "s3://nobucket/x", "s3://weights/no/"):
        with pytest.raises(FormatError, match=f"^{address.rstrip('/')}: there is no such file"):
            open(address)
    store.pipe_file("weights/empty.safetensors", b"")
    with pytest.raises(FormatError, match="empty"):
        open("s3://weights/empty.safetensors")
    for address in ("s3://", "s3:///x", "s3://../x"):
        with pytest.raises(SteelyardError) as caught:
            open(address)
        assert "secret" not in str(caught.value).lower()


def test_a_source_elsewhere_is_converted(web: Web, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from steelyard.cli import main

    web.put(some(), INDEX, tmp_path)
    target = tmp_path / "to.safetensors"
    assert main(["convert", web.url(INDEX), str(target), "--verify", "--split", "layer.0=a,b"]) == 0
    assert capsys.readouterr().err == ""
    found = open(target)
    assert list(found) == ["a", "b", "layer.1", "layer.2"]
    assert found["b"].array().tolist() == [3, 4, 5]
    assert main(["convert", web.url(INDEX), str(target)]) == 2
    assert "--force" in capsys.readouterr().err
