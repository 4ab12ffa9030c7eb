"""The live page: what a browser gets and when, who may ask, and that a training does not care who looks."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

import steelyard as sy
from steelyard.errors import WeightsError
from steelyard.learn.watch.log import Log
from steelyard.report import live as module
from steelyard.report.live import serve


def more(log, steps):
    for step in steps:
        log.add("steps", [(step, 0.5 * step, 0.1, 1.0, 1e-3)])
        log.add("norms", [(step, "a.weight", 1.0, 2.0, 0.5, 1e-3)])
        log.add("notes", [(step, "loss", 2.0)])
    log.write()


@pytest.fixture
def log(tmp_path):
    log = Log(tmp_path / "log", {"model": "Net"})
    log.add("tensors", [("a.weight", "2x3", "float32", 1)])
    more(log, range(3))
    return log


@pytest.fixture
def page(log, monkeypatch):
    monkeypatch.setattr(module, "PERIOD", 0.0)
    with serve(sy.read_log(log.path), share=1e9) as served:
        yield served


def get(page, path="", **headers):
    request = urllib.request.Request(page.url + path, headers=headers)
    with urllib.request.urlopen(request, timeout=20) as answer:
        return answer.status, answer.read()


def state(page, version=-1, key=""):
    status, body = get(page, f"state?version={version}&key={key}")
    return json.loads(body) if status == 200 else None


def test_the_page_loads_nothing_from_elsewhere(page):
    text = get(page)[1].decode()
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', text)[1]
    assert "default-src 'none'" in policy
    assert "connect-src 'self'" in policy
    assert not re.search(r'(src|href)="?(https?:)?//', text.split("<script>")[0])
    assert text.count("<script>") == policy.count("'sha256-") == 3


def test_news_come_once_and_places_only_when_they_change(page, log):
    first = state(page)
    assert first["tables"]
    assert 'id="f0"' in first["content"]
    assert "Training of Net" in first["head"]
    same = first["version"], first["key"]
    assert state(page, *same) is None
    more(log, [3])
    second = state(page, *same)
    assert "content" not in second
    assert second["key"] == first["key"]
    assert len(second["figures"][0]["data"][0]["x"]) == 4
    assert len(first["figures"][0]["data"][0]["x"]) == 3
    log.add("faults", [(3, "dead ReLU", "<a>", "warning", "seen", "mend")])
    log.write()
    third = state(page, second["version"], second["key"])
    assert third["key"] != first["key"]
    assert "dead ReLU" in third["content"]
    assert "<a>" not in json.dumps(third["content"] + "".join(third["tables"])).replace("<a href", "")
    assert not third["ended"]
    log.close()
    assert state(page, third["version"], third["key"])["ended"]


def test_only_this_machine_may_ask(page):
    with pytest.raises(urllib.error.HTTPError, match="403"):
        get(page, Host="example.com")
    with pytest.raises(urllib.error.HTTPError, match="404"):
        get(page, "etc/passwd")
    assert page.url.startswith("http://127.0.0.1:")
    assert state(page, "nonsense", "../..")["version"] >= 1


def test_a_browser_that_goes_away_is_no_matter(page):
    port = int(page.url.rsplit(":", 1)[1].strip("/"))
    for _ in range(5):
        with socket.create_connection(("127.0.0.1", port)) as browser:
            browser.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # a reset, not an end
            browser.sendall(f"GET / HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode())
    assert state(page)["version"] >= 1


def test_what_costs_much_is_done_less_often(log):
    with serve(sy.read_log(log.path), share=1e-6) as served:
        first = state(served)
        more(log, [3])
        assert state(served, first["version"], first["key"]) is None
        assert served._due - time.monotonic() > 10


def test_a_log_that_is_gone_is_said_and_not_the_end(page, log, tmp_path):
    state(page)
    log.close()
    (tmp_path / "log").rename(tmp_path / "other")
    with pytest.raises(urllib.error.HTTPError, match="503"):
        state(page)
    (tmp_path / "other").rename(tmp_path / "log")
    assert state(page)["ended"]


def test_a_port_that_is_taken_is_one_line(page, log):
    port = int(page.url.rsplit(":", 1)[1].strip("/"))
    with pytest.raises(WeightsError, match=rf"port {port} of 127.0.0.1 for the live page: .*; choose another, or 0"):
        serve(sy.read_log(log.path), port)


def test_the_verb_serves_until_it_is_interrupted(log):
    log.close()
    command = [sys.executable, "-m", "steelyard", "watch", str(log.path), "--live"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    said = process.stderr.readline()
    url = re.fullmatch(r"live page: (http://127.0.0.1:\d+/) \(Ctrl-C ends it\)\n", said)[1]
    with urllib.request.urlopen(f"{url}state", timeout=20) as answer:
        assert json.loads(answer.read())["ended"]
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 0
    assert process.stderr.read() == ""
    process.stderr.close()
