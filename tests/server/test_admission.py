"""Keys, and what one key or one client name may hold: places in the queue, turns, streams, live sessions."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from minikin.errors import BadRecipe
from minikin.recipes import Paint
from minikin.server.admission import Places
from minikin.server.app import with_middleware
from minikin.server.engine import PreparedRequest
from minikin.server.errors import RequestRejected
from minikin.server.jobs import Job, JobRequest
from minikin.server.limits import Limits
from minikin.server.middleware import AccessMiddleware, check_keys, keys_of
from minikin.server.queue import JobQueue
from tests.helpers.fake_engine import FakeEngine
from tests.helpers.servers import served

KEYS = ("the-first-key-of-two", "the-second-key-of-two")


# ---- keys --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key", ["", " ", "short", "fifteen-letters", "a key that ends in a line\n", "schlüssel" * 3]
)
def test_keys_that_are_none_are_refused_with_what_to_do(key: str, monkeypatch: Any) -> None:
    with pytest.raises(BadRecipe, match="secrets.token_urlsafe"):
        check_keys([KEYS[0], key])
    monkeypatch.setenv("MINIKIN_API_KEY", key)
    with pytest.raises(BadRecipe, match="MINIKIN_API_KEY"):
        keys_of(None)
    assert keys_of([KEYS[0]]) == [KEYS[0]], "options come first"


def test_the_environment_variable_is_one_key(monkeypatch: Any) -> None:
    monkeypatch.setenv("MINIKIN_API_KEY", "one key of several words")
    assert keys_of(None) == keys_of([]) == ["one key of several words"]
    monkeypatch.delenv("MINIKIN_API_KEY")
    assert keys_of(None) == []


@pytest.mark.parametrize("how", [["--api-key", ""], ["--api-key", KEYS[0], "--api-key", "x"], []])
def test_a_server_does_not_start_with_such_keys(how: list[str]) -> None:
    code = "from minikin.cli.app import main; main()"
    env = {**os.environ, "MINIKIN_API_KEY": "" if not how else KEYS[0]}
    response = subprocess.run(
        [sys.executable, "-c", code, "serve", *how], capture_output=True, text=True, check=False, env=env
    )
    assert response.returncode == 2 and "16 are the least" in response.stderr.replace("\n", " "), (
        response.stderr
    )


def test_no_request_carries_an_empty_key() -> None:
    with pytest.raises(BadRecipe, match="empty"):
        AccessMiddleware(lambda *_: None, keys=[""])  # type: ignore[arg-type, return-value]


# ---- places in the queue -------------------------------------------------------------------------


def put(queue: JobQueue, client: str, n: int = 1) -> None:
    prepared = PreparedRequest(Paint(prompt="x"), {}, "same", 1, 1000)
    queue.put(Job(JobRequest("paint", client), prepared, list(range(n))))


def test_one_key_cannot_take_all_places() -> None:
    """Under however many names; whoever has another key finds a place."""
    queue, codes = JobQueue(Limits()), Counter[str]()
    for k in range(100):
        try:
            put(queue, f"first name{k % 10}")
        except RequestRejected as e:
            codes[e.code] += 1
            assert e.status == 429 and e.retry_s
    assert codes == {"client_queue_full": 68}
    for _ in range(16):
        put(queue, "second")
    with pytest.raises(RequestRejected, match="16 of your requests"):
        put(queue, "second")
    put(queue, "third")
    for client in ("local a", "local b", "local c", "local d"):  # no keys: names alone
        for _ in range(3):
            put(queue, client)


def test_on_a_server_without_keys_names_share_all_places() -> None:
    queue = JobQueue(Limits())
    for k in range(64):
        put(queue, f"local name{k % 4}")
    with pytest.raises(RequestRejected, match="64 requests are waiting"):
        put(queue, "local name5")


def taken(queue: JobQueue, **limits: Any) -> list[str]:
    order = []
    while batch := queue.take(0):
        order += [item.job.request.client for item in batch]
    return order


@pytest.mark.parametrize("batch", [1, 4])
def test_keys_take_turns_then_names(batch: int) -> None:
    """Five names of one key get as many turns as the one of the other."""
    queue = JobQueue(Limits(batch=batch))
    for name in "abcde":
        put(queue, f"first {name}", 4)
    put(queue, "second", 4)
    order = taken(queue)
    assert Counter(client.split()[0] for client in order[:8]) == {"first": 4, "second": 4}
    assert sorted(order[:8:2] + order[1:8:2]) == [*(f"first {n}" for n in "abcd"), *["second"] * 4]
    assert Counter(order) == {**{f"first {n}": 4 for n in "abcde"}, "second": 4}


def test_images_of_one_key_leave_memory_to_others(tmp_path: Path) -> None:
    from minikin.server.service import Service
    from tests.server.test_finishing import sent

    service = Service([FakeEngine()], tmp_path / "s", limits=Limits(waiting_pixels=10 * 64 * 64))

    def submit(client: str) -> None:
        values = {"prompt": "a cat", "seed": 1}
        service.submit(JobRequest("refine", client), values, None, sent())

    for k in range(5):
        submit(f"first {k}")
    with pytest.raises(RequestRejected, match="input images"):
        submit("first 6")
    submit("second")
    service.close(drain_s=0)


# ---- streams and live sessions -------------------------------------------------------------------


def test_places_are_counted_by_key_then_by_client() -> None:
    places = Places(8, "streams", "too_many")
    leave = [places.enter("first a") for _ in range(3)]
    with pytest.raises(RequestRejected, match="8 in all, 4 of one key, 3 of one client"):
        places.enter("first a")
    leave.append(places.enter("first b"))
    with pytest.raises(RequestRejected):
        places.enter("first c")
    leave += [places.enter(f"key{k}") for k in range(4)]
    with pytest.raises(RequestRejected):
        places.enter("another")
    leave[0]()
    leave[0]()  # once
    assert len(places) == 7
    for each in leave:
        each()
    assert len(places) == 0
    local = [places.enter("local") for _ in range(6)]
    assert len(local) == 6
    places.enter("local other")


def test_streams_count_from_their_admission(tmp_path: Path) -> None:
    """Not from their first event: a hundred at once were all let in. Those that never start leave no trace."""
    engine = FakeEngine()
    with served(engine, tmp_path / "s", limits=Limits(event_streams=4), keys=KEYS) as s, s.client() as c:
        engine.go.clear()
        headers = [{"X-API-Key": key} for key in KEYS]
        job = c.post("/api/paint", json={"prompt": "a"}, headers=headers[0]).json()["id"]
        app: Any = with_middleware(s.app, keys=KEYS)
        heads: list[int] = []

        async def ask() -> None:
            gone, first = asyncio.Event(), True

            async def receive() -> dict[str, Any]:
                nonlocal first
                if first:
                    first = False
                    return {"type": "http.request", "body": b""}
                await gone.wait()
                return {"type": "http.disconnect"}

            async def send(message: dict[str, Any]) -> None:
                if message["type"] == "http.response.start":
                    heads.append(message["status"])
                    if message["status"] == 200:
                        await asyncio.sleep(0)

            scope = {
                "type": "http", "method": "GET", "path": f"/api/jobs/{job}/events", "raw_path": b"",
                "root_path": "", "query_string": b"", "http_version": "1.1", "scheme": "http",
                "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80),
                "headers": [(b"host", b"127.0.0.1"), (b"x-api-key", KEYS[0].encode())],
            }  # fmt: skip
            asyncio.get_running_loop().call_later(0.2, gone.set)
            await app(scope, receive, send)

        async def many() -> None:
            await asyncio.gather(*(ask() for _ in range(10)))

        asyncio.run(many())
        assert Counter(heads) == {200: 1, 429: 9}, "two of a key, three quarters of them for one name"
        assert len(s.service.streams) == 0
        engine.go.set()
        assert "event: end" in c.get(f"/api/jobs/{job}/events", headers=headers[0]).text


def test_live_sessions_count_from_their_admission(tmp_path: Path) -> None:
    with served(FakeEngine(), tmp_path / "s", limits=Limits(live_sessions=2), keys=KEYS) as s:
        client = TestClient(with_middleware(s.app, keys=KEYS), base_url="http://127.0.0.1")

        def connect(k: int) -> Any:
            return client.websocket_connect("ws://127.0.0.1/api/live", headers={"x-api-key": KEYS[k]})

        with connect(0) as w:
            with pytest.raises(WebSocketDisconnect) as e, connect(0):
                pass
            assert e.value.code == 4429 and "live sessions" in e.value.reason
            with connect(1):
                assert len(s.service.live_sessions) == 2
            w.send_json({"prompt": "a cat"})
            assert w.receive_json()["prompt"] == "a cat"
        assert len(s.service.live_sessions) == 0
        with connect(0):
            pass
