"""Rows H12 and H14-H21 of docs/robustness.md: how much, how large, how often, and what is told of it.

Slow and broken HTTP (H13): test_wire.py. Who gets at what (H1-H8): test_open_port.py.
What it may be asked (H9-H11): test_open_port_values.py.
"""

from __future__ import annotations

import base64
import io
import json
import logging
import random
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from minikin.errors import BaseMismatch
from minikin.server import concept_store, decode
from minikin.server.errors import RequestRejected
from minikin.server.jobs import JobRequest
from minikin.server.limits import Limits
from tests.helpers.clocks import Ticks, cpu
from tests.helpers.fake_engine import FakeEngine, digest, read
from tests.helpers.raw import Wire
from tests.helpers.servers import Served, concept, served

SMALL = Limits(body=200_000, image=50_000, image_pixels=250_000, parts=8)
JSON = "Content-Type: application/json"


@pytest.fixture(scope="module")
def small(tmp_path_factory: Any) -> Iterator[Served]:
    with served(FakeEngine(), tmp_path_factory.mktemp("small") / "s", limits=SMALL) as s:
        yield s


# ---- H12 ---------------------------------------------------------------------------------------


def test_h12_bodies_that_are_too_large(small: Served) -> None:
    """Told by its length before a byte is read, or as soon as too much has come; the next one is served."""
    with small.client() as c:
        big = b'{"prompt": "' + b"a" * 300_000 + b'"}'
        response = c.post("/api/paint", content=big, headers={"Content-Type": "application/json"})
        assert response.status_code == 413 and response.json()["error"]["code"] == "body_too_large"

        def pieces() -> Iterator[bytes]:
            for _ in range(30):
                yield b"a" * 10_000

        response = c.post("/api/paint", content=pieces(), headers={"Content-Type": "application/json"})
        assert response.status_code == 413
        assert c.post("/api/paint?wait=true", json={"prompt": "a"}).status_code == 200
    with Wire(small.url) as wire:
        answer = wire.send(wire.head("POST", "/api/paint", [JSON, f"Content-Length: {10**12}"]))
        assert answer.status == 413 and answer.headers["connection"] == "close"


def form(parts: list[tuple[bytes, bytes]], boundary: bytes = b"xx") -> bytes:
    """Multipart of these headers and bodies."""
    response = b"".join(
        b"--" + boundary + b"\r\n" + head + b"\r\n\r\n" + body + b"\r\n" for head, body in parts
    )
    return response + b"--" + boundary + b"--\r\n"


FIELD = b'Content-Disposition: form-data; name="recipe"'
FILE = b'Content-Disposition: form-data; name="photos"; filename="a"'


@pytest.mark.parametrize("path", ["/api/concepts/teach", "/api/concepts", "/v1/images/edits", "/api/recipe"])
@pytest.mark.parametrize(
    ("body", "boundary"),
    [
        (form([(FIELD, b"{}")] * 1_000), "xx"), (form([(FILE, b"a")] * 1_000), "xx"),
        (form([(FIELD + b"; x=" + b"a" * 150_000, b"")]), "xx"),
        (form([(FIELD + b"\r\n" + b"X: a\r\n" * 10_000 + b"Y: b", b"")]), "xx"),
        (form([(FIELD, b"a" * 150_000)] * 1), "xx"), (form([(b"X: y", b"")]), "xx"), (b"--xx\r\n", "xx"),
        (b"\r\n" * 50_000, "xx"), (b"--" * 50_000, "xx"), (form([(FIELD, b"{}")], b"x" * 5_000), "x" * 5_000),
        (form([(b'Content-Disposition: form-data; name="\xff\0"', b"")]), "xx"), (b"", ""), (b"a", "é"),
    ],
    ids=["fields", "files", "long header", "many headers", "long field", "no name", "cut", "blank", "dashes",
         "long boundary", "bytes in a name", "nothing", "no boundary"],
)  # fmt: skip
def test_h12_forms_without_measure(small: Served, path: str, body: bytes, boundary: str) -> None:
    """A form of few parts is read; any other is a 4xx after less than a second's work, and without waiting."""
    start_time = cpu()
    kind = f"Content-Type: multipart/form-data; boundary={boundary}"
    with Wire(small.url) as wire:
        response = wire.ask("POST", path, [kind], body)
    assert 400 <= response.status < 500, response
    assert cpu() - start_time < 1


# ---- H14 ---------------------------------------------------------------------------------------


def saved(kind: str, image: Image.Image | None = None, **more: Any) -> bytes:
    file = io.BytesIO()
    (image or Image.new("RGB", (16, 16))).save(file, kind, **more)
    return file.getvalue()


def noise() -> bytes:
    return saved("PNG", Image.effect_noise((64, 64), 50))


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(side: int = 16_000, extra: bytes = b"") -> bytes:
    """A PNG of so many pixels squared in a few KB."""
    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(side // 8 + 1) * side, 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + extra + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def frames(kind: str, n: int) -> bytes:
    images = [Image.new("RGB", (8, 8), (k % 256, k // 256, 0)) for k in range(n)]
    return saved(kind, images[0], save_all=True, append_images=images[1:])


WEBP_BOMB = (
    b"RIFF\x24\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + b"\xff\x3f\0" * 2 + b"VP8L\x06\0\0\0\x2f\xff\xff\xff\x0f\0"
)
MUCH = zlib.compress(bytes(200_000_000), 9)  # 200 KB
JPEG_BOMB = saved("JPEG").replace(b"\x08\x00\x10\x00\x10\x03", b"\x08\xff\xff\xff\xff\x03")
REFUSED = {
    "png bomb": (bomb(), 413, "image_too_large"), "jpeg bomb": (JPEG_BOMB, 413, "image_too_large"),
    "webp bomb": (WEBP_BOMB, 413, "image_too_large"), "file": (bytes(60_000_000), 413, "image_too_large"),
    "text bomb": (bomb(16, chunk(b"zTXt", b"a\0\0" + MUCH)), 415, "unsupported_image"),
    "profile bomb": (bomb(16, chunk(b"iCCP", b"a\0\0" + MUCH)), 415, "unsupported_image"),
    "svg": (b"<svg/>", 415, "unsupported_image"), "nothing": (b"", 415, "unsupported_image"),
    "html": (b"<html><script>alert(1)</script>", 415, "unsupported_image"),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n", 415, "unsupported_image"),
    "psd": (b"8BPS\0\1" + bytes(100), 415, "unsupported_image"),
    "fits": (b"SIMPLE  =                    T" + bytes(100), 415, "unsupported_image"),
    "pdf": (b"%PDF-1.7\n", 415, "unsupported_image"), "zip": (b"PK\3\4" + bytes(100), 415, "unsupported_image"),
    "avi": (b"RIFF\0\0\0\0AVI " + bytes(100), 415, "unsupported_image"),
    "gif": (saved("GIF"), 415, "unsupported_image"), "bmp": (saved("BMP"), 415, "unsupported_image"),
    "tiff": (saved("TIFF"), 415, "unsupported_image"), "ico": (saved("ICO"), 415, "unsupported_image"),
    "gif of many frames": (frames("GIF", 2_000), 415, "unsupported_image"),
    "cut off": (noise()[:2000], 422, "image_corrupt"), "begun": (saved("PNG")[:8], 415, "unsupported_image"),
    "too small": (saved("PNG", Image.new("RGB", (4, 4))), 422, "image_too_small"),
    "no jpeg": (b"\xff\xd8\xff" + bytes(500), 415, "unsupported_image"),
    "no pixels": (bomb(0), 415, "unsupported_image"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_h14_images_that_are_refused(name: str) -> None:
    """With status and code, in little time; a child's memory and time are limited, ours is not touched."""
    data, status, code = REFUSED[name]
    start_time = cpu()  # the child's, too
    with pytest.raises(RequestRejected) as caught:
        decode.decode(data, "image", Limits())
    assert (caught.value.status, caught.value.code) == (status, code), str(caught.value)
    assert cpu() - start_time < 3


def test_h14_odd_images_are_read_to_their_first_frame() -> None:
    """CMYK, 16 bits, palettes with and without holes, animations, bytes after the end: RGB or RGBA, no more."""
    for data, mode in (
        (saved("JPEG", Image.new("CMYK", (16, 16))), "RGB"), (saved("PNG", Image.new("I;16", (16, 16))), "RGB"),
        (saved("PNG", Image.new("1", (16, 16))), "RGB"), (saved("PNG", Image.new("LA", (16, 16))), "RGBA"),
        (saved("PNG", Image.new("P", (16, 16)), transparency=0), "RGBA"), (frames("PNG", 300), "RGB"),
        (frames("WEBP", 30), "RGB"), (saved("PNG") + b"<script>alert(1)</script>PK\3\4", "RGB"),
        (saved("PNG", Image.new("RGBA", (16, 16))), "RGBA"),
    ):  # fmt: skip
        got = decode.decode(data, "image", Limits())
        assert (got.mode, got.info) == (mode, {}) and got.width in (8, 16)


def test_h14_images_lose_everything_but_their_pixels() -> None:
    exif = Image.Exif()
    exif[0x010E] = "SENTINEL"
    data = saved("JPEG", Image.new("RGB", (20, 10)), exif=exif, comment=b"SENTINEL")
    got = decode.decode(data, "image", Limits())
    assert got.size == (20, 10) and got.mode == "RGB" and not got.info


BURNING = decode._SCRIPT.replace("data = sys.stdin", "while True: pass\ndata = sys.stdin")


def test_h14_a_decoder_that_never_ends_is_ended(monkeypatch: Any) -> None:
    """The control of its time: the child is killed, and the caller told. Only one that has used its processor
    time is damaged: on a busy machine a good image takes long, too."""
    for wall, script, words in ((0.1, "import time; time.sleep(60)", "try again"), (60, BURNING, "damaged")):
        monkeypatch.setattr(decode, "WALL", wall)
        monkeypatch.setattr(decode, "_SCRIPT", script)
        with Ticks() as clock, pytest.raises(RequestRejected, match=words):
            decode.decode(saved("PNG"), "image", Limits(decode_s=1.0))
        assert clock.seconds < 30


@pytest.mark.parametrize(("more", "refused"), [(800, True), (8, False)])
def test_h14_memory_of_the_decoder_is_limited(monkeypatch: Any, more: int, refused: bool) -> None:
    greedy = decode._SCRIPT.replace("data = sys.stdin", f"hog = bytearray({more} << 20)\ndata = sys.stdin")
    monkeypatch.setattr(decode, "_SCRIPT", greedy)
    try:
        decode.decode(saved("PNG"), "image", Limits(decode_memory=512 << 20))
        assert not refused
    except RequestRejected:
        assert refused


# ---- H15 ---------------------------------------------------------------------------------------


def test_h15_served_bytes_are_an_image_and_nothing_else(small: Served) -> None:
    """An image with a page after its end comes back without it; no browser takes it for anything else."""
    evil = saved("PNG", Image.new("RGB", (64, 64))) + b"<html><script>alert(1)</script>"
    with small.client() as c:
        body = {"image": base64.b64encode(evil).decode(), "prompt": "a", "steps": 1}
        response = c.post("/api/refine?wait=true", json=body)
        got = c.get(response.json()["results"][0]["url"])
        assert got.headers["content-type"] == "image/png" and b"<script" not in got.content
        assert got.headers.get("x-content-type-options") == "nosniff"
        assert got.headers.get("content-security-policy") == "sandbox; default-src 'none'"
        assert got.headers.get("content-disposition", "").startswith("inline; filename=")
        assert got.headers["x-frame-options"] == "SAMEORIGIN"
        c.post("/api/concepts", files={"file": ("<script>.html", concept("tom", 1), "text/html")})
        got = c.get("/api/concepts/tom")
        assert got.headers["content-type"] == "application/octet-stream"
        assert got.headers["content-disposition"] == 'attachment; filename="tom.safetensors"'
        assert got.headers.get("x-content-type-options") == "nosniff"
        response = c.post("/api/paint", json={"prompt": "<script>"})
        assert response.headers["content-type"] == "application/json"


# ---- H16 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/api/capabilities", "/v1/models", "/sdapi/v1/loras"])
def test_h16_something_unexpected_is_told_by_its_reference(small: Served, monkeypatch: Any, path: str) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("/home/somebody/secret")

    monkeypatch.setattr(small.service.engine, "describe", broken)
    with small.client() as c:
        response = c.get(path)
        assert (
            response.status_code == 500 and "secret" not in response.text and "Traceback" not in response.text
        )
        assert f"Internal error. Reference {response.headers['x-request-id']}." in response.text
        assert "internal_error" in response.text and response.headers.get("x-should-retry") == "false"


def test_h16_every_answer_keeps_the_retry_contract(tmp_path: Path) -> None:
    """No 409; 429 and 503 say when, every other 5xx says no."""
    engine = FakeEngine(errors={"crash": RuntimeError("x"), "base": BaseMismatch("Another base.")})
    with served(engine, tmp_path / "s", limits=Limits(waiting_per_client=0)) as full, full.client() as c:
        response = c.post("/v1/images/generations", json={"prompt": "a"})
        assert response.status_code == 429 and int(response.headers.get("retry-after", 0)) >= 1
    with served(engine, tmp_path / "t") as s, s.client() as c:
        for path in ("/v1/images/generations", "/sdapi/v1/txt2img", "/api/paint?wait=true"):
            for prompt, statuses in (("crash", (500,)), ("base", (400, 422))):
                response = c.post(path, json={"prompt": prompt})
                assert response.status_code in statuses and response.status_code != 409
                assert response.status_code < 500 or response.headers.get("x-should-retry") == "false"
        s.service.drain()
        response = c.post("/v1/images/generations", json={"prompt": "a"})
        assert response.status_code == 503 and int(response.headers.get("retry-after", 0)) >= 1


# ---- H17 ---------------------------------------------------------------------------------------


def test_h17_logs_and_metrics_hold_nothing_of_anybody(small: Served, caplog: Any) -> None:
    """Prompts, names and paths, with line breaks in them, are in no log line and no label; series stay few."""
    caplog.set_level(logging.DEBUG, "minikin")
    with small.client() as c:
        lines = [c.get("/metrics").text.count("\n")]
        for k in range(60):
            c.post("/api/concepts", files={"file": ("x", concept(f"sentinel-{k}", k))})
            c.post("/api/paint", json={"prompt": f"SENTINEL {k}\nERROR forged line", "task": f"SENTINEL{k}"})
            c.get(f"/SENTINEL{k}%0aERROR%20forged", headers={"X-Minikin-Client": f"SENTINEL{k}"})
            c.get("/api/jobs", headers={"User-Agent": f"SENTINEL{k}", "X-Request-Id": f"SENTINEL{k}"})
            if k in (29, 59):
                small.drained()
                text = c.get("/metrics").text
                lines.append(text.count("\n"))
                assert "sentinel" not in text.lower()
        first, second = lines[1] - lines[0], lines[2] - lines[1]
        assert first <= 40 and second <= 10, "series of other names, whatever this process served before"
    assert "sentinel" not in caplog.text.lower() and "forged" not in caplog.text


def test_h17_metrics_equal_the_audit(tmp_path: Path) -> None:
    with served(FakeEngine(), tmp_path / "s") as s, s.client() as c:

        def count() -> float:
            lines = c.get("/metrics").text.splitlines()
            name = 'minikin_jobs_total{kind="paint",outcome="completed"}'
            return next((float(x.split()[-1]) for x in lines if x.startswith(name)), 0.0)

        before = count()
        for k in range(5):
            c.post("/api/paint?wait=true", json={"prompt": f"a {k}"})
        assert count() - before == 5


# ---- H18 and H19 -------------------------------------------------------------------------------


@pytest.mark.usefixtures("quick_disk")
def test_h18_one_client_cannot_fill_the_line(tmp_path: Path) -> None:
    """60 jobs of one: 16 wait, the rest are told to come back; another's single job is next but one."""
    engine = FakeEngine(step_s=0.002)
    with served(engine, tmp_path / "s", limits=Limits(batch=1)) as s, s.client() as c:
        s.service.workers[0].warm.wait(5)
        engine.go.clear()
        response = [c.post("/api/paint", json={"prompt": f"A{k}"}) for k in range(60)]
        taken = [t.json()["id"] for t in response if t.status_code == 202]
        assert 16 <= len(taken) <= 17 and {t.status_code for t in response} == {202, 429}
        assert {t.json()["error"]["code"] for t in response if t.status_code == 429} == {"client_queue_full"}
        other = {"X-Minikin-Client": "B"}
        single = c.post("/api/paint", json={"prompt": "B"}, headers=other).json()["id"]
        engine.go.set()
        s.drained()
        ended = {j["id"]: j["ended"] for j in s.service.store._rows("SELECT id, ended FROM jobs")}
        assert sum(ended[id_] < ended[single] for id_ in taken) <= 2


def test_h19_when_to_come_back_is_computed_and_spread(tmp_path: Path) -> None:
    """By what waits and how quick it was; not the same for all; said while the body is still to come."""
    engine, limits = FakeEngine(), Limits(waiting_per_client=2, receive_s=1)
    with served(engine, tmp_path / "s", limits=limits) as s, s.client() as c:
        s.service.workers[0].warm.wait(5)
        s.service.queue.rate_s = 50.0
        engine.go.clear()
        for k in range(3):
            c.post("/api/paint", json={"prompt": "a", "steps": 40 + k})
            while not s.service.running():  # the first is taken from the line, and two wait
                time.sleep(0.01)
        waits = [int(c.post("/api/paint", json={"prompt": "a"}).headers["retry-after"]) for _ in range(40)]
        assert 10 < min(waits) and max(waits) <= 120 and len(set(waits)) > 3
        with Wire(s.url) as wire:
            response = wire.send(
                wire.head("POST", "/sdapi/v1/txt2img", [JSON, "Content-Length: 9999"])
            )  # no body
            assert response.status == 429, "who reads the body first says 408 after a second"
        engine.go.set()
        s.drained()


def test_h19_every_call_that_waits_is_asked_at_the_door(tmp_path: Path) -> None:
    """Whatever adds to the line says 429 and 503 by its headers alone, by an exact list."""
    from minikin.server.http import StrictRoute
    from tests.robustness.test_open_port import walk_routes

    with served(FakeEngine(), tmp_path / "s") as s:
        matches = {path for path, r in walk_routes(s.app.routes) if isinstance(r, StrictRoute)
                 and getattr(r.endpoint, "enqueues_jobs", False)}  # fmt: skip
    assert matches == {"/api/paint", "/api/refine", "/api/inpaint", "/api/concepts/teach", "/api/masks",
                     "/v1/images/generations", "/v1/images/edits", "/v1/images/variations",
                     "/sdapi/v1/txt2img", "/sdapi/v1/img2img"}  # fmt: skip


# ---- H20 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/api/paint?wait=true", "/v1/images/generations", "/sdapi/v1/txt2img"])
def test_h20_who_goes_away_cancels(tmp_path: Path, path: str) -> None:
    """What waits is gone within 250 ms of its caller, what runs at its next step: counted in steps of 100 ms,
    which a busy machine makes as late as everything else."""
    engine = FakeEngine(steps=50)
    with served(engine, tmp_path / "s", limits=Limits(batch=1)) as s:
        s.service.workers[0].warm.wait(60)
        engine.step_s = 0.1
        body = json.dumps({"prompt": "a", "size": "64x64"} if "/v1/i" in path else {"prompt": "a"}).encode()
        with Wire(s.url) as runs, Wire(s.url) as waits:
            for k, wire in enumerate((runs, waits)):
                wire.socket.sendall(wire.head("POST", path, [JSON, f"Content-Length: {len(body)}"]) + body)
                until = time.monotonic() + 20
                while (
                    len(s.service._unfinished()) <= k or not s.service.running()
                ) and time.monotonic() < until:
                    time.sleep(0.01)
            first, second = sorted(s.service._unfinished(), key=lambda j: j.created)
            assert (first.status, second.status) == ("running", "queued")
            waits.close()
            assert gone(second, engine) <= 4, "steps of the first, from which the second's caller had left"
            at = engine.steps_done
            runs.close()
            assert gone(first, engine) <= 4
            after = s.service.submit(JobRequest("paint", "another"), {"prompt": "a", "steps": 1})
            assert after.finished.wait(20) and engine.steps_done - at <= 5, "the engine was not told to stop"


def gone(job: Any, engine: FakeEngine) -> int:
    """How many steps are painted until a job is cancelled. How long its end takes to write is the disk's."""
    at = engine.steps_done
    while not (job.cancelled.wait(0.005) or job.over) and engine.steps_done - at < 8:
        pass
    assert job.cancelled.is_set(), "its caller has left, and it goes on"
    steps = engine.steps_done - at
    assert job.finished.wait(20) and job.status == "cancelled", "its caller has left, and it goes on"
    return steps


# ---- H21 ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("quick_disk")
def test_h21_two_hundred_concepts_in_turn(tmp_path: Path, monkeypatch: Any) -> None:
    """With room for four in memory: right ones in every image, and the event loop never stands still."""
    monkeypatch.setattr(concept_store, "MAX_PARSED", 4)
    with (
        served(FakeEngine(), tmp_path / "s", limits=Limits(waiting=100, waiting_per_client=100)) as s,
        s.client() as c,
    ):
        shas = {}
        for k in range(200):
            response = c.post("/api/concepts", files={"file": ("x", concept(f"pet{k}", k))})
            shas[f"pet{k}"] = response.json()["sha256"]
        lag = Lag(s)
        wrong = []

        def paint(seed: int) -> None:
            rng = random.Random(seed)
            with s.client() as mine:
                for k in range(10):
                    name = f"pet{rng.randrange(200)}"
                    response = mine.post(
                        "/v1/images/generations", json={"prompt": f"<{name}>", "seed": k, "size": "64x64"}
                    )
                    image = Image.open(io.BytesIO(base64.b64decode(response.json()["data"][0]["b64_json"])))
                    if read(image) != digest(f"<{name}>", "", {name: shas[name]}, k):
                        wrong.append(name)

        threads = [threading.Thread(target=paint, args=(k,)) for k in range(6)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert not wrong and len(s.service.concept_store._parsed) <= 4
        assert lag.p99() < 0.25, lag.p99()


class Lag:
    """How late the server's answer to the simplest question is, asked all the time by a thread; seconds in
    which this process is let run."""

    def __init__(self, s: Served) -> None:
        self._seconds: list[float] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._ask, args=(s,), daemon=True)
        self._thread.start()

    def _ask(self, s: Served) -> None:
        with Wire(s.url, timeout=20) as wire, Ticks() as clock:
            while not self._done.wait(0.01):
                start_time = clock.seconds
                assert wire.ask("GET", "/livez").status == 200
                self._seconds.append(clock.seconds - start_time)

    def p99(self) -> float:
        self._done.set()
        self._thread.join(5)
        return sorted(self._seconds)[int(len(self._seconds) * 0.99)]


def test_every_row_has_a_test_of_its_name() -> None:
    """H1-H21, each with at least one, here or in the files named above."""
    from tests.robustness import test_open_port, test_open_port_values, test_wire

    names = [n for module in (test_open_port, test_open_port_values, test_wire) for n in dir(module)] + [
        *globals()
    ]
    missing = [k for k in range(1, 22) if not any(n.startswith(f"test_h{k:02}_") for n in names)]
    assert not missing
