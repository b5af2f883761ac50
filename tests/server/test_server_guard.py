"""The open port: who gets in, with what, how much of it, and what is said to the others."""

from __future__ import annotations

import base64
import io
import re
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from PIL import Image
from starlette.testclient import TestClient

from minikin.errors import BadRecipe
from minikin.server.app import with_middleware
from minikin.server.limits import Limits
from minikin.server.middleware import check_exposure
from tests.helpers.fake_engine import FakeEngine
from tests.helpers.servers import Served, served

KEY = "a-secret-key"


@pytest.fixture(scope="module")
def locked(tmp_path_factory: Any) -> Iterator[Served]:
    """With a key and small limits."""
    limits = Limits(body=200_000, receive_s=0.5, image=50_000, image_pixels=250_000)
    with served(FakeEngine(), tmp_path_factory.mktemp("g") / "s", keys=[KEY], limits=limits) as s:
        yield s


@pytest.fixture(scope="module")
def open_(tmp_path_factory: Any) -> Iterator[Served]:
    with served(FakeEngine(), tmp_path_factory.mktemp("g") / "s") as s:
        yield s


# ---- the key -----------------------------------------------------------------------------------


def test_other_addresses_need_a_key() -> None:
    for host in ("127.0.0.1", "localhost", "::1", "127.0.0.5"):
        check_exposure(host, ())
    check_exposure("0.0.0.0", ["k"])
    check_exposure("0.0.0.0", (), insecure=True)
    for host in ("0.0.0.0", "192.168.1.5", "::", "example.org"):
        with pytest.raises(BadRecipe, match="Refusing to listen"):
            check_exposure(host, ())


def test_live_painting_over_the_websocket(open_: Served) -> None:
    client = TestClient(with_middleware(open_.app), base_url="http://127.0.0.1")
    with client.websocket_connect("ws://127.0.0.1/api/live") as w:
        w.send_json({"prompt": "a cat", "seed": 3})
        response = w.receive_json()
        assert response["number"] == 1 and response["seed"] == 3
        assert Image.open(io.BytesIO(base64.b64decode(response["image"]))).size == (64, 64)
        for wrong, words in (({"prompt": "<nobody>"}, "Unknown concept"), ({"colour": 1}, "colour"),
                             ({"strengths": {"tom": 9}}, "between 0 and 2")):  # fmt: skip
            w.send_json(wrong)
            assert words in w.receive_json()["problem"]
        w.send_text("{")
        assert "not valid JSON" in w.receive_json()["problem"]
        w.send_json({"prompt": "a dog"})
        assert w.receive_json()["prompt"] == "a dog"


# ---- too much ----------------------------------------------------------------------------------


def test_bodies_that_do_not_come(locked: Served) -> None:
    host, _, port = locked.url.removeprefix("http://").partition(":")
    head = f"POST /api/paint HTTP/1.1\r\nHost: {host}\r\nX-API-Key: {KEY}\r\nContent-Type: application/json\r\n"
    with socket.create_connection((host, int(port)), timeout=60) as s:
        s.sendall(f"{head}Content-Length: 1000\r\n\r\n{{".encode())
        answer = s.recv(4096).decode()
        assert answer.startswith("HTTP/1.1 408") and "x-should-retry: false" in answer.lower()


# ---- what is told ------------------------------------------------------------------------------


def test_errors_in_the_dialect_that_was_spoken(open_: Served) -> None:
    with open_.client() as c:
        native, openai, a1111 = (c.get(f"{p}/nothing") for p in ("/api", "/v1", "/sdapi/v1"))
        assert set(native.json()["error"]) == {"code", "message", "param"}
        assert set(openai.json()["error"]) == {"message", "type", "param", "code"}
        assert set(a1111.json()) == {"error", "detail", "body", "errors"}
        for response in (native, openai, a1111):
            assert response.status_code == 404 and response.headers["x-request-id"]


def test_openapi_describes_the_recipes(open_: Served) -> None:
    with open_.client() as c:
        schema = c.get("/openapi.json").json()
        fields = schema["components"]["schemas"]["PaintRequest"]["properties"]
        assert {"prompt", "preset", "interval", "concepts", "task"} <= set(fields)
        assert "image i uses seed + i" in fields["seed"]["description"]


def test_the_reference_loads_nothing(open_: Served) -> None:
    """/docs works without a network and tells no other host who reads it."""
    with open_.client() as c:
        response = c.get("/docs")
        schema = c.get("/openapi.json").json()
    assert response.status_code == 200 and "default-src 'none'" in response.headers["content-security-policy"]
    assert not re.search(r"<(script|link|img|iframe|object|base)|https?://|@import|url\(", response.text)
    for path, operations in schema["paths"].items():
        assert response.text.count(f"<code>{path}</code>") >= len(operations), path
    fields = schema["components"]["schemas"]["PaintRequest"]["properties"]
    assert all(f"<code>{name}</code>" in response.text for name in fields)


def test_the_other_client_is_another_one(open_: Served) -> None:
    with open_.client() as c:
        response = c.post("/api/paint?wait=true", json={"prompt": "a"}, headers={"X-Minikin-Client": "ann"})
        url = response.json()["results"][0]["url"]
        assert c.get(url).status_code == 404
        assert c.get(url, headers={"X-Minikin-Client": "ann"}).status_code == 200
        assert c.get("/api/jobs", headers={"X-Minikin-Client": "a b"}).status_code == 400
        assert isinstance(c, httpx.Client)
