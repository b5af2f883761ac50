"""The open port: who gets in, with what, how much of it, and what is said to the others."""

from __future__ import annotations

import base64
import io
import socket
import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from starlette.routing import BaseRoute, Mount, Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from minikin.errors import BadRecipe
from minikin.server import decode
from minikin.server.app import gated
from minikin.server.canary import Canary
from minikin.server.faults import Refused
from minikin.server.guard import OPEN, check_exposure
from minikin.server.limits import Limits
from servers import Served, served

KEY = "a-secret-key"


@pytest.fixture(scope="module")
def locked(tmp_path_factory: Any) -> Iterator[Served]:
    """With a key and small limits."""
    limits = Limits(body=200_000, receive_s=0.5, image=50_000, image_pixels=250_000)
    with served(Canary(), tmp_path_factory.mktemp("g") / "s", keys=[KEY], limits=limits) as s:
        yield s


@pytest.fixture(scope="module")
def open_(tmp_path_factory: Any) -> Iterator[Served]:
    with served(Canary(), tmp_path_factory.mktemp("g") / "s") as s:
        yield s


# ---- the key -----------------------------------------------------------------------------------


def walk(routes: list[BaseRoute], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every method and path of an app, of what is mounted on it, too."""
    for route in routes:
        path = prefix + getattr(route, "path", "")
        inner = getattr(route, "original_router", None) or getattr(route, "app", None)
        if isinstance(route, WebSocketRoute):
            yield "WEBSOCKET", path
        elif isinstance(route, Route):
            yield from ((m, path) for m in route.methods or {"GET"})
        elif isinstance(route, Mount) or hasattr(inner, "routes"):
            yield from walk(inner.routes, prefix if not isinstance(route, Mount) else path)


def unguarded(app: Any, guard: Any) -> list[str]:
    """Paths that answer without a key, but for those that may."""
    client, found = TestClient(guard, base_url="http://127.0.0.1", raise_server_exceptions=False), []
    for method, path in {*walk(app.routes), ("GET", "/nothing"), ("POST", "/v1/files")}:
        where = path.replace("{name:path}", "x").replace("{", "").replace("}", "")
        if method == "WEBSOCKET":
            try:
                with client.websocket_connect(f"ws://127.0.0.1{where}"):
                    found.append(where)
            except WebSocketDisconnect:
                pass
            except KeyError:  # it got as far as the route, which misses the client's name
                found.append(where)
        elif where not in OPEN and client.request(method, where).status_code != 401:
            found.append(f"{method} {where}")
    return found


def test_no_route_is_open(locked: Served) -> None:
    paths = {p for _, p in walk(locked.app.routes)}
    assert {"/livez", "/metrics", "/docs", "/openapi.json", "/api/paint", "/api/live", "/v1/models",
            "/sdapi/v1/txt2img", "/api/results/{id}"} <= paths  # fmt: skip
    assert len(paths) > 50
    assert unguarded(locked.app, gated(locked.app, keys=[KEY])) == []
    assert len(unguarded(locked.app, locked.app)) > 50, "without the gate the walk finds them"


@pytest.mark.parametrize(
    "headers",
    [{"Authorization": f"Bearer {KEY}"}, {"X-API-Key": KEY},
     {"Authorization": "Basic " + base64.b64encode(f"ann:{KEY}".encode()).decode()}],
)  # fmt: skip
def test_three_ways_to_give_the_key(locked: Served, headers: dict[str, str]) -> None:
    with locked.client() as c:
        assert c.get("/api/jobs", headers=headers).status_code == 200
        wrong = {k: v.replace(v[-4:], "xxxx") for k, v in headers.items()}
        told = c.get("/api/jobs", headers=wrong)
        assert told.status_code == 401 and KEY not in told.text
        assert c.get("/livez").status_code == 200


def test_other_addresses_need_a_key() -> None:
    for host in ("127.0.0.1", "localhost", "::1", "127.0.0.5"):
        check_exposure(host, ())
    check_exposure("0.0.0.0", ["k"])
    check_exposure("0.0.0.0", (), insecure=True)
    for host in ("0.0.0.0", "192.168.1.5", "::", "example.org"):
        with pytest.raises(BadRecipe, match="Refusing to listen"):
            check_exposure(host, ())


# ---- other web pages ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 421), ({"Host": "evil.example:80"}, 421), ({"Host": ""}, 421),
        ({"Origin": "http://evil.example"}, 403), ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403), ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
    ],
)  # fmt: skip
def test_web_pages_cannot_reach_in(open_: Served, headers: dict[str, str], status: int) -> None:
    with open_.client() as c:
        given = {"Content-Type": "application/json", **headers}
        told = c.post("/api/paint", content=b'{"prompt": "a"}', headers=given)
        assert told.status_code == status, told.text
        own = open_.url.removeprefix("http://")
        fine = {
            "Content-Type": "application/json",
            "Host": own,
            "Origin": open_.url,
            "Sec-Fetch-Site": "same-origin",
        }
        assert c.post("/api/paint?wait=true", content=b'{"prompt": "a"}', headers=fine).status_code == 200
        assert "access-control-allow-origin" not in told.headers


def test_websockets_have_the_same_gate(open_: Served) -> None:
    client = TestClient(gated(open_.app), base_url="http://127.0.0.1")
    with (
        pytest.raises(WebSocketDisconnect),
        client.websocket_connect("ws://127.0.0.1/api/live", headers={"Origin": "http://evil.example"}),
    ):
        pass


def test_live_painting_over_the_websocket(open_: Served) -> None:
    client = TestClient(gated(open_.app), base_url="http://127.0.0.1")
    with client.websocket_connect("ws://127.0.0.1/api/live") as w:
        w.send_json({"prompt": "a cat", "seed": 3})
        told = w.receive_json()
        assert told["number"] == 1 and told["seed"] == 3
        assert Image.open(io.BytesIO(base64.b64decode(told["image"]))).size == (64, 64)
        for wrong, words in (({"prompt": "<nobody>"}, "Unknown concept"), ({"colour": 1}, "colour"),
                             ({"strengths": {"tom": 9}}, "between 0 and 2")):  # fmt: skip
            w.send_json(wrong)
            assert words in w.receive_json()["problem"]
        w.send_text("{")
        assert "not valid JSON" in w.receive_json()["problem"]
        w.send_json({"prompt": "a dog"})
        assert w.receive_json()["prompt"] == "a dog"


# ---- too much ----------------------------------------------------------------------------------


def test_bodies_that_are_too_large(locked: Served) -> None:
    with locked.client(headers={"X-API-Key": KEY}) as c:
        big = b'{"prompt": "' + b"a" * 300_000 + b'"}'
        told = c.post("/api/paint", content=big, headers={"Content-Type": "application/json"})
        assert told.status_code == 413 and told.json()["error"]["code"] == "body_too_large"

        def pieces() -> Iterator[bytes]:
            for _ in range(30):
                yield b"a" * 10_000

        told = c.post("/api/paint", content=pieces(), headers={"Content-Type": "application/json"})
        assert told.status_code == 413
        assert c.post("/api/paint?wait=true", json={"prompt": "a"}).status_code == 200


def test_bodies_that_do_not_come(locked: Served) -> None:
    host, _, port = locked.url.removeprefix("http://").partition(":")
    head = f"POST /api/paint HTTP/1.1\r\nHost: {host}\r\nX-API-Key: {KEY}\r\nContent-Type: application/json\r\n"
    with socket.create_connection((host, int(port)), timeout=5) as s:
        begun = time.monotonic()
        s.sendall(f"{head}Content-Length: 1000\r\n\r\n{{".encode())
        answer = s.recv(4096).decode()
        assert answer.startswith("HTTP/1.1 408") and "x-should-retry: false" in answer.lower()
        assert time.monotonic() - begun < 3


# ---- pictures ----------------------------------------------------------------------------------


def png(width: int = 16, height: int = 16, **more: Any) -> bytes:
    file = io.BytesIO()
    Image.new(more.pop("mode", "RGB"), (width, height)).save(file, more.pop("format", "PNG"), **more)
    return file.getvalue()


def noise() -> bytes:
    file = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(file, "PNG")
    return file.getvalue()


def bomb() -> bytes:
    """A PNG of 16,000 x 16,000 pixels in a few KB."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 16_000, 16_000, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(2001) * 16_000, 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "status", "code"),
    [
        (bomb(), 413, "image_too_large"), (b"<svg/>", 415, "unsupported_image"),
        (b"", 415, "unsupported_image"),
        (png(format="GIF"), 415, "unsupported_image"), (png(format="BMP"), 415, "unsupported_image"),
        (noise()[:2000], 422, "image_corrupt"), (png(4, 4), 422, "image_too_small"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", 415, "unsupported_image"), (bytes(60_000_000), 413, "image_too_large"),
    ],
)  # fmt: skip
def test_pictures_that_are_refused(data: bytes, status: int, code: str) -> None:
    with pytest.raises(Refused) as caught:
        decode.decode(data, "image", Limits())
    assert (caught.value.status, caught.value.code) == (status, code), str(caught.value)


def test_pictures_lose_everything_but_their_pixels() -> None:
    exif = Image.Exif()
    exif[0x010E] = "SENTINEL"
    got = decode.decode(png(20, 10, format="JPEG", exif=exif, comment=b"SENTINEL"), "image", Limits())
    assert got.size == (20, 10) and got.mode == "RGB" and not got.info
    assert decode.decode(png(mode="CMYK", format="JPEG"), "image", Limits()).mode == "RGB"
    assert decode.decode(png(mode="I;16"), "image", Limits()).mode == "RGB"
    assert decode.decode(png(mode="RGBA"), "image", Limits()).mode == "RGBA"


def test_a_decoder_that_never_ends_is_ended(monkeypatch: Any) -> None:
    """Its positive control: the child is killed, and the caller told."""
    monkeypatch.setattr(decode, "_CHILD", "import time; time.sleep(60)")
    begun = time.monotonic()
    with pytest.raises(Refused, match="damaged"):
        decode.decode(png(), "image", Limits(decode_s=0.5))
    assert time.monotonic() - begun < 5


def test_memory_of_the_decoder_is_limited(monkeypatch: Any) -> None:
    greedy = decode._CHILD.replace("data = sys.stdin", "hog = bytearray(800 << 20)\ndata = sys.stdin")
    monkeypatch.setattr(decode, "_CHILD", greedy)
    with pytest.raises(Refused):
        decode.decode(png(), "image", Limits(decode_memory=512 << 20))


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1:22/", "https://example.org/a.png", "file:///etc/passwd", "ftp://x/y", "HTTP://[::1]/",
     " http://0x7f000001/"],
)  # fmt: skip
def test_no_addresses_are_fetched(open_: Served, url: str) -> None:
    with open_.client() as c:
        told = c.post("/sdapi/v1/png-info", json={"image": url})
        assert told.status_code == 400 and told.json()["error"] == "url_inputs_disabled"
        assert told.json()["detail"] == "Image URLs are disabled. Send base64 data."


# ---- what is told ------------------------------------------------------------------------------


def test_errors_in_the_dialect_that_was_spoken(open_: Served) -> None:
    with open_.client() as c:
        native, openai, a1111 = (c.get(f"{p}/nothing") for p in ("/api", "/v1", "/sdapi/v1"))
        assert set(native.json()["error"]) == {"code", "message", "param"}
        assert set(openai.json()["error"]) == {"message", "type", "param", "code"}
        assert set(a1111.json()) == {"error", "detail", "body", "errors"}
        for told in (native, openai, a1111):
            assert told.status_code == 404 and told.headers["x-request-id"]


def test_something_unexpected_is_told_by_its_reference(open_: Served, monkeypatch: Any) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("/home/somebody/secret")

    monkeypatch.setattr(open_.service.engine, "describe", broken)
    with open_.client() as c:
        told = c.get("/api/capabilities")
        assert told.status_code == 500 and "secret" not in told.text and "Traceback" not in told.text
        assert told.headers["x-request-id"] in told.json()["error"]["message"]
        assert told.headers["x-should-retry"] == "false"


def test_metrics_stay_few_and_equal_the_ledger(tmp_path: Path) -> None:
    with served(Canary(), tmp_path / "s") as s, s.client() as c:

        def count() -> float:
            lines = c.get("/metrics").text.splitlines()
            name = 'minikin_jobs_total{kind="paint",outcome="completed"}'
            return next((float(x.split()[-1]) for x in lines if x.startswith(name)), 0.0)

        before = count()
        for k in range(5):
            c.post("/api/paint?wait=true", json={"prompt": f"a {k}"}, headers={"X-Minikin-Client": f"c{k}"})
            c.get(f"/made/up/{k}")
        assert count() - before == 5
        text = c.get("/metrics").text
        assert "made/up" not in text and "c3" not in text and text.count("\n") < 500


def test_openapi_describes_the_recipes(open_: Served) -> None:
    with open_.client() as c:
        schema = c.get("/openapi.json").json()
        fields = schema["components"]["schemas"]["PaintRequest"]["properties"]
        assert {"prompt", "preset", "interval", "concepts", "task"} <= set(fields)
        assert fields["seed"]["description"] == "picture i uses seed + i"
        assert c.get("/docs").status_code == 200


def test_the_other_client_is_another_one(open_: Served) -> None:
    with open_.client() as c:
        told = c.post("/api/paint?wait=true", json={"prompt": "a"}, headers={"X-Minikin-Client": "ann"})
        url = told.json()["results"][0]["url"]
        assert c.get(url).status_code == 404
        assert c.get(url, headers={"X-Minikin-Client": "ann"}).status_code == 200
        assert c.get("/api/jobs", headers={"X-Minikin-Client": "a b"}).status_code == 400
        assert isinstance(c, httpx.Client)
