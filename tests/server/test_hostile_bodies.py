"""No allowed body stops the server: what is counted, what is parsed off the event loop, whose turn it is."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import sys
import threading
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from minikin import strict_json
from minikin.server import decode
from minikin.server.admission import Turns
from minikin.server.app import with_middleware
from minikin.server.errors import RequestRejected
from minikin.server.http import MAX_VALUES, SMALL
from minikin.server.limits import MIB, Limits
from tests.helpers.fake_engine import FakeEngine
from tests.helpers.servers import Served, served

LIMITS = Limits(body=4 * MIB)  # an eighth of the server's, for the time this takes; more than any piece's size
MOST_CALLS = 40_000  # of Python and C functions, in one turn of the event loop: some milliseconds
WITH_IMAGES = {"/api/refine", "/api/inpaint", "/sdapi/v1/img2img", "/sdapi/v1/png-info"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: Any) -> Iterator[Served]:
    with served(FakeEngine(), tmp_path_factory.mktemp("h") / "s", limits=LIMITS) as s:
        yield s


class Counter:
    """Counts function calls of one thread between two turns of its event loop; `worst` of all turns."""

    def __init__(self) -> None:
        self.worst = self._now = 0

    def __call__(self, frame: Any, event: str, arg: Any) -> None:
        if event == "call" and frame.f_code is asyncio.Handle._run.__code__:
            self._now = 0
        elif event in ("call", "c_call"):
            self._now += 1
            self.worst = max(self.worst, self._now)


def requested(s: Served, path: str, content_type: str, body: bytes) -> tuple[int, int]:
    """(status, most calls in a turn of the event loop) of a request whose body comes in pieces of 64 KiB."""
    counter, statuses = Counter(), list[int]()
    app: Any = with_middleware(s.app)
    pieces = [body[k : k + 65_536] for k in range(0, len(body), 65_536)] or [b""]

    async def run() -> None:
        left = iter(range(len(pieces)))

        async def receive() -> dict[str, Any]:
            await asyncio.sleep(0)
            k = next(left, None)
            if k is None:
                await asyncio.sleep(60)
            assert k is not None
            return {"type": "http.request", "body": pieces[k], "more_body": k + 1 < len(pieces)}

        async def send(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])

        scope = {
            "type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "root_path": "",
            "query_string": b"", "http_version": "1.1", "scheme": "http", "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80), "app": s.app,
            "headers": [(b"host", b"127.0.0.1"), (b"content-type", content_type.encode()),
                        (b"content-length", str(len(body)).encode())],
        }  # fmt: skip
        sys.setprofile(counter)
        try:
            await app(scope, receive, send)
        finally:
            sys.setprofile(None)

    asyncio.run(run())
    return statuses[0], counter.worst


def filled(piece: bytes, size: int, first: bytes = b"[", last: bytes = b"]") -> bytes:
    """JSON of this size: the piece again and again, with commas."""
    n = (size - len(first) - len(last)) // (len(piece) + 1)
    return first + b",".join([piece] * n) + last


@cache
def bodies(size: int) -> dict[str, bytes]:
    keys = b",".join(b'"k%d":0' % k for k in range(MAX_VALUES // 2))
    return {
        "objects": filled(b"{}", size), "numbers": filled(b"1", size), "deep": b"[" * (size - 1),
        "keys": b'{"prompt":"a",' + keys + b"}",
        "init images": filled(b"1", MAX_VALUES, b'{"prompt":"a","init_images":[', b"]}"),
        "concepts": b'{"prompt":"a","concepts":{' + keys + b"}}",
        "text": b'{"prompt":"' + b"a" * (size - 20) + b'"}',
        "image": b'{"image":"' + b"A" * (size - 20) + b'"}',
    }  # fmt: skip


@cache
def form(size: int, piece: bytes = b"\r\n--x") -> bytes:
    head = b'--xx\r\nContent-Disposition: form-data; name="photos"; filename="a"\r\n\r\n'
    body = piece * (size // len(piece))
    return head + body[: size - 200] + b"\r\n--xx--\r\n"


def posted(s: Served) -> list[tuple[str, bool]]:
    """Every route that takes a body, and whether it takes forms."""
    return [
        (path.replace("{id}", "0" * 32), "multipart" in str(operations["post"].get("requestBody", "")))
        for path, operations in s.app.openapi()["paths"].items() if "post" in operations
    ]  # fmt: skip


def test_no_route_keeps_the_event_loop(server: Served, monkeypatch: Any) -> None:
    """The largest allowed bodies of every route: nothing large is parsed on the event loop, where all wait.

    Counted in function calls, not in seconds: a body of `[{},{},...]` kept /livez waiting for 42 s.
    """
    on_loop: list[str] = []

    def off_loop(module: Any, name: str) -> None:
        real = getattr(module, name)

        def watched(data: Any, *args: Any, **kwargs: Any) -> Any:
            if threading.current_thread() is threading.main_thread() and len(data) > SMALL:
                on_loop.append(f"{name} of {len(data)}")
            return real(data, *args, **kwargs)

        monkeypatch.setattr(module, name, watched)

    for module, name in (
        (strict_json, "loads"), (json, "loads"), (base64, "b64decode"), (decode, "decode"),
        (decode, "from_base64"),
    ):  # fmt: skip
        off_loop(module, name)
    routes = posted(server)
    assert {path for path, _ in routes} >= {*WITH_IMAGES, "/api/concepts/teach", "/v1/images/edits"}
    for path, takes_forms in routes:
        size = LIMITS.body if takes_forms or path in WITH_IMAGES else LIMITS.text_body
        if takes_forms:
            kind = "multipart/form-data; boundary=xx"
            for piece in (b"\r\n--x", b"a", b"\r"):
                status, worst = requested(server, path, kind, form(size // 2, piece))
                assert 400 <= status < 500 and worst < MOST_CALLS, (path, piece, status, worst)
            continue
        for name, body in bodies(size).items():
            status, worst = requested(server, path, "application/json", body)
            assert worst < MOST_CALLS, (path, name, status, worst)
            assert status < 500 or status == 501, (path, name, status)
    assert not on_loop, on_loop


def test_bodies_of_calls_without_images_are_small(server: Served) -> None:
    """1 MiB, told by its length or as soon as too much has come; calls that carry images read more."""
    text = b'{"prompt": "' + b"a" * MIB + b'"}'

    def pieces() -> Iterator[bytes]:
        for k in range(0, len(text), 50_000):
            yield text[k : k + 50_000]

    with server.client(headers={"Content-Type": "application/json"}) as c:
        for path in ("/api/paint", "/v1/images/generations", "/sdapi/v1/txt2img", "/sdapi/v1/options"):
            for content in (text, pieces()):
                response = c.post(path, content=content)
                assert response.status_code == 413, response.text
                assert "1 MiB" in response.text and "no image" in response.text
        for path in WITH_IMAGES:
            image = "A" * MIB
            response = c.post(path, json={"image": image, "init_images": [image], "prompt": "a"})
            assert response.status_code in (415, 422), response.text
        assert c.post("/sdapi/v1/interrogate", content=text).status_code == 501


@pytest.mark.parametrize(
    "body", [b"[{},{},{}]", b"[" + b"1," * 20_000 + b"1]", b'{"a":[' + b"[]," * 9_999 + b"[]]}"]
)
def test_values_are_counted(server: Served, body: bytes) -> None:
    with server.client(headers={"Content-Type": "application/json"}) as c:
        response = c.post("/api/paint", content=body)
        many = len(body) > 1000
        assert response.status_code == (400 if many else 422)
        assert ("more than 5,000 values" in response.text) == many


@pytest.mark.parametrize(
    ("content", "headers", "status", "words"),
    [
        (b"", {}, 422, "The body is missing: send the fields as"),
        (b"[]", {}, 422, "The body is not an object of JSON: send the fields as"),
        (b'{"n": ' + b"9" * 5000 + b"}", {}, 400, "a number in it has too many digits."),
        (b'{"prompt": "a", "water": 1}', {}, 422, "water: not known here; leave it out"),
        (b'{"prompt": "a", "\\u001b[2J": 1}', {}, 422, "x1b[2J: not known here"),
        (b'{"prompt": "a", "n": 1.5}', {}, 422, "n: must be a whole number (it is 1.5)."),
        (b'{"prompt": ["a"]}', {}, 422, "prompt: must be a text."),
        (b"{}", {}, 422, "prompt: missing."),
        (b"{}", {"Content-Encoding": "gzip"}, 415, "The body is compressed ('gzip')"),
        (b"{}", {"Content-Type": ""}, 415, "The body has no Content-Type; send application/json"),
        (b"{}", {"Host": ""}, 421, "header Host is empty or missing"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_plain_words(
    server: Served, content: bytes, headers: dict[str, str], status: int, words: str
) -> None:
    with server.client(headers={"Content-Type": "application/json"}) as c:
        response = c.post("/api/paint", content=content, headers=headers)
        assert (response.status_code, words in response.text) == (status, True), response.text


def test_methods_of_a_route(server: Served) -> None:
    with server.client() as c:
        assert [c.head(path).status_code for path in ("/livez", "/readyz")] == [200, 200]
        response = c.put("/api/paint", json={})
        assert response.status_code == 405 and "PUT does not work at /api/paint" in response.text


# ---- images --------------------------------------------------------------------------------------


def test_clients_take_turns_at_the_decoder() -> None:
    """One with slow images, under whatever names, leaves a place; who has less at work comes first."""
    turns, order = Turns(3, 60), list[str]()

    async def work(client: str, go: asyncio.Event) -> None:
        async with turns.turn(client):
            order.append(client)
            await go.wait()

    async def scenario() -> None:
        go = [asyncio.Event() for _ in range(12)]
        clients = ["first a", "first b", "first c", "first d", "second", "second x"]
        tasks = []
        for client, event in zip(clients, go, strict=False):
            tasks.append(asyncio.create_task(work(client, event)))
            await asyncio.sleep(0.01)
        assert order == ["first a", "first b", "second"]
        go[0].set()
        await tasks[0]
        await asyncio.sleep(0.01)
        assert len(order) == 3, "the last place is for a key that has none at work"
        go[1].set()
        await tasks[1]
        await asyncio.sleep(0.01)
        assert order[3:] == ["first c"]
        for event in go:
            event.set()
        await asyncio.gather(*tasks)
        local = [asyncio.create_task(work(c, go[9])) for c in ("local", "local", "local", "local b")]
        await asyncio.gather(*local)

    asyncio.run(scenario())
    assert not turns._at_work and not turns._waiting


def test_who_waits_too_long_for_the_decoder_is_told() -> None:
    async def scenario() -> None:
        turns = Turns(1, 0.05)
        async with turns.turn("a"):
            with pytest.raises(RequestRejected, match="try again") as e:
                async with turns.turn("b"):
                    raise AssertionError
            assert e.value.status == 503 and e.value.retry_s
            gone = asyncio.create_task(turns.turn("c").__aenter__())
            await asyncio.sleep(0.01)
            gone.cancel()
            await asyncio.gather(gone, return_exceptions=True)
        async with turns.turn("b"):
            assert turns._at_work == ["b"]

    asyncio.run(scenario())


def test_slow_images_of_one_client_keep_no_other_waiting(server: Served, monkeypatch: Any) -> None:
    go, started = threading.Event(), threading.Semaphore(0)
    real = decode.decode

    def slow(data: bytes, what: str, limits: Limits) -> Image.Image:
        if len(data) > 200:
            started.release()
            assert go.wait(30)
        return real(data, what, limits)

    monkeypatch.setattr(decode, "decode", slow)
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    large = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(large, "PNG")
    answers = list[int]()

    def send(data: bytes, name: str) -> None:
        body = {"image": base64.b64encode(data).decode()}
        with server.client(headers={"X-Minikin-Client": name}) as c:
            answers.append(c.post("/sdapi/v1/png-info", json=body).status_code)

    many = [threading.Thread(target=send, args=(large.getvalue(), "slow")) for _ in range(9)]
    for thread in many:
        thread.start()
    assert all(started.acquire(timeout=30) for _ in range(2))
    send(file.getvalue(), "quick")
    assert answers == [200]
    go.set()
    for thread in many:
        thread.join(30)
    assert set(answers) <= {200, 503}, "503 where a busy machine decodes for longer than the rest waits"


def test_bodies_of_all_requests_fit_into_memory(tmp_path: Path) -> None:
    """512 connections with 32 MiB each are 16 GiB. One key gets half, and what has ended counts no more."""
    keys = ("the-first-key-of-two", "the-second-key-of-two")
    with served(FakeEngine(), tmp_path / "s", limits=Limits(bodies=400_000), keys=keys) as s:
        guard: Any = s.server.config.app

        def sent(size: int) -> int:
            with s.client(headers={"X-API-Key": keys[0]}) as c:
                return c.post("/api/recipe", files={"file": b"x" * size}).status_code

        assert [sent(150_000) for _ in range(3)] == [415] * 3, "one after the other"
        assert sent(250_000) == 503, "more than half of it"
        guard._bodies["another key"] = 300_000  # of its requests under way
        assert [sent(150_000), sent(50_000)] == [503, 415]
        del guard._bodies["another key"]
        assert sent(150_000) == 415 and not guard._bodies
