"""Connections fit what the process may open, whatever is sent over them."""

from __future__ import annotations

import resource
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from minikin.errors import BadRecipe
from minikin.server import protocol
from minikin.server.limits import Limits
from minikin.server.protocol import SPARE_FILES, fitted
from tests.helpers import loads
from tests.helpers.fake_engine import FakeEngine
from tests.helpers.servers import served

HALF = {
    "body": b"POST /api/paint HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    b"Content-Length: 500\r\n\r\n{",
    "head": b"POST /api/paint HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Ty", "line": b"GET /", "nothing": b"",
    "kept alive": b"GET /livez HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
}  # fmt: skip


@pytest.mark.parametrize("kind", HALF)
def test_half_sent_requests_make_room(tmp_path: Path, kind: str) -> None:
    """Whatever is not at work is closed for a new connection, the oldest first."""
    with served(FakeEngine(), tmp_path / "s", limits=Limits(connections=8)) as s, ExitStack() as stack:
        address = ("127.0.0.1", int(s.url.rpartition(":")[2]))
        for _ in range(30):
            connection = stack.enter_context(socket.create_connection(address, timeout=10))
            connection.sendall(HALF[kind])
            if kind == "kept alive":
                assert connection.recv(1000).startswith(b"HTTP/1.1 200")
        with s.client() as c:
            for _ in range(3):
                assert c.get("/livez").status_code == 200
        assert len(s.server.server_state.connections) <= 9


def test_a_new_connection_is_turned_away_when_all_are_at_work(tmp_path: Path) -> None:
    engine = FakeEngine()
    with served(engine, tmp_path / "s", limits=Limits(connections=2)) as s, ExitStack() as stack:
        engine.go.clear()
        address = ("127.0.0.1", int(s.url.rpartition(":")[2]))
        body = b'{"prompt": "a"}'
        ask = HALF["body"].partition(b"Content-Length")[0].replace(b"paint", b"paint?wait=true")
        for k in range(2):
            connection = stack.enter_context(socket.create_connection(address, timeout=10))
            connection.sendall(ask + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            while len(s.service._unfinished()) <= k:
                time.sleep(0.01)
        surplus = stack.enter_context(socket.create_connection(address, timeout=10))
        answer = b"".join(iter(lambda: surplus.recv(1000), b""))
        assert answer.startswith(b"HTTP/1.1 503") and b"retry-after" in answer and b"at work" in answer
        engine.go.set()
        s.drained()
    assert connection.fileno() == -1


def test_connections_fit_into_what_may_be_opened(monkeypatch: Any) -> None:
    """The soft limit is raised as far as the hard one allows; what is spared stays for files."""
    allowed, raised = [1024, 1024], list[tuple[int, int]]()
    monkeypatch.setattr(resource, "getrlimit", lambda _: tuple(allowed))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limit: raised.append(limit))
    monkeypatch.setattr(protocol, "_open_files", lambda: 12)
    assert fitted(Limits())[0] == Limits() and not raised
    allowed[:] = [64, 64]
    limits, accepted = fitted(Limits())
    assert limits.connections + accepted == 64 - 12 - SPARE_FILES and accepted == 7
    allowed[:] = [256, 4096]
    assert fitted(Limits())[0].connections == 512 and raised[-1] == (12 + SPARE_FILES + 512 + 128, 4096)
    allowed[:] = [256, resource.RLIM_INFINITY]
    assert fitted(Limits())[0].connections == 512
    allowed[:] = [40, 40]
    with pytest.raises(BadRecipe, match="ulimit -n 1024"):
        fitted(Limits())


@pytest.mark.slow
def test_more_half_sent_requests_than_files(tmp_path: Path) -> None:
    """80 of them with `ulimit -n 64`: /livez answers, and nothing is logged; it was 20,464 tracebacks."""
    port = loads.free_port()
    script = 'ulimit -n 64; exec "$0" -c "$@"'
    here = str(Path(__file__).parents[2])
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            ["bash", "-c", script, sys.executable, loads._SCRIPT, str(tmp_path / "s"), str(port), "{}", here],
            stdout=log, stderr=log,
        )  # fmt: skip
    connections = []
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, verify=False) as c:
            while process.poll() is None:
                try:
                    c.get("/livez")
                    break
                except httpx.TransportError:
                    time.sleep(0.05)
            for k in range(80):
                connections.append(socket.create_connection(("127.0.0.1", port), timeout=30))
                connections[-1].sendall([*HALF.values()][k % 4])
            for _ in range(5):
                with httpx.Client(trust_env=False, verify=False, timeout=30) as other:
                    assert other.get(f"http://127.0.0.1:{port}/livez").status_code == 200
    finally:
        process.terminate()
        for connection in connections:
            connection.close()
    assert process.wait(30) == 0
    assert (tmp_path / "log").read_text() == ""
