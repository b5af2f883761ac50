"""Rows H1-H8 of docs/robustness.md: who gets at what on an open port.

What it may be asked (H9-H11): test_open_port_values.py; how much, how fast and how long (H12-H21):
test_open_port_limits.py; broken HTTP: test_wire.py.
"""

from __future__ import annotations

import base64
import io
import itertools
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from starlette.routing import BaseRoute, Mount, Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from minikin.server.app import with_middleware
from minikin.server.middleware import PUBLIC_PATHS
from tests.helpers.fake_engine import FakeEngine, digest, read
from tests.helpers.raw import Wire
from tests.helpers.servers import Served, concept, served

KEYS = {"ann": "the-key-of-ann", "bob": "the-key-of-bob"}
SECRET = "the words that nobody may read"


@pytest.fixture(scope="module")
def port(tmp_path_factory: Any) -> Iterator[Served]:
    """A server with two keys; a file beside its folder that is nobody's business."""
    place = tmp_path_factory.mktemp("port")
    (place / "secret.txt").write_text(SECRET)
    (place / "tom.safetensors").write_bytes(SECRET.encode())
    with served(FakeEngine(), place / "s", keys=[*KEYS.values()]) as s:
        yield s


@pytest.fixture(scope="module")
def people(port: Served) -> Iterator[dict[str, httpx.Client]]:
    clients = {who: port.client(headers={"X-API-Key": key}) for who, key in KEYS.items()}
    yield clients
    for c in clients.values():
        c.close()


@pytest.fixture(scope="module")
def open_(tmp_path_factory: Any) -> Iterator[Served]:
    """A server without keys, as for one local user."""
    with served(FakeEngine(), tmp_path_factory.mktemp("local") / "s") as s:
        yield s


# ---- H1 ----------------------------------------------------------------------------------------


def escapes() -> list[str]:
    """200 and more spellings of a way out, as they are sent."""
    ups = ("..", "%2e%2e", "%2E.", ".%2e", "%252e%252e", "..%00", "....", ".%00.", "%c0%ae%c0%ae", "..;")
    slashes = ("/", "%2f", "%5c", "%252f", "//", "/./", "%c0%af")
    files = ("secret.txt", "s/jobs.sqlite", "jobs.sqlite")
    matches = [slash.join([up] * deep + [file]) for up, slash, file in itertools.product(ups, slashes, files)
             for deep in (1,)]  # fmt: skip
    matches += [
        "/etc/passwd",
        "//etc/passwd",
        "%2fetc%2fpasswd",
        "C:%5cwindows%5cwin.ini",
        "C:/windows/win.ini",
        "%5c%5chost%5cshare",
        "file:///etc/passwd",
        "~/.ssh/id_rsa",
        "%7e/.bashrc",
        "/proc/self/environ",
        "tom.safetensors",
        "tom%00.safetensors",
        "tom.safetensors%00",
        "CON",
        "NUL",
        "a" * 3000,
        "%00",
        "%ff%fe",
        "jobs.sqlite-wal",
        "%2e",
        ".",
        "..",
        "*",
        "%2a",
        "?",
        "%3f",
        "%0a",
        "%0d%0aX-Injected: 1",
    ]
    return matches


def test_h01_no_path_leads_out(port: Served) -> None:
    """Every spelling at every place that looks like a file: not there, and not a byte of anything."""
    places = ("/api/results/{}", "/api/concepts/{}", "/api/concepts/{}/preview", "/api/jobs/{}/events",
              "/v1/models/{}", "/{}")  # fmt: skip
    key = f"X-API-Key: {KEYS['ann']}"
    spellings = escapes()
    assert len(spellings) > 200
    with Wire(port.url) as wire:
        for place, spelling in itertools.product(places, spellings):
            response = wire.ask("GET", place.format(spelling), [key])
            assert response.status in (400, 404, 405, 307), (place, spelling, response)
            assert (
                SECRET.encode() not in response.body
                and b"SQLite" not in response.body
                and b"root:" not in response.body
            )
            assert "x-injected" not in response.headers


def test_h01_no_field_leads_out(port: Served, people: dict[str, httpx.Client]) -> None:
    """The same spellings where a body names something; nothing is written beside the server's folder."""
    before = sorted(p.name for p in port.folder.parent.iterdir())
    c = people["ann"]
    for spelling in escapes()[::7]:
        text = spelling.replace("%2f", "/").replace("%2e", ".").replace("%00", "\0")
        requests: list[tuple[str, dict[str, Any]]] = [
            ("/api/refine", {"prompt": "a", "image": f"result:{text}"}),
            ("/api/paint", {"prompt": "<tom>", "concepts": {"tom": text}}),
            ("/api/paint", {"prompt": "a", "base": text or "x"}),
            ("/sdapi/v1/png-info", {"image": text}),
            ("/sdapi/v1/options", {"sd_model_checkpoint": text}),
            ("/v1/images/generations", {"prompt": "a", "model": text or "x"}),
        ]
        for path, body in requests:
            response = c.post(path, json=body)
            assert response.status_code in (400, 404, 422), (path, body, response.text)
            assert SECRET not in response.text
        response = c.post("/api/concepts", files={"file": (text, concept("x", 1))}, data={"name": text or "/"})
        assert response.status_code in (400, 422), response.text
    assert sorted(p.name for p in port.folder.parent.iterdir()) == before


def test_h01_the_secret_is_read_where_somebody_may(port: Served) -> None:
    """The control: with a route that joins paths, the same spellings find it."""
    from fastapi import FastAPI, Response

    app = FastAPI()

    @app.get("/api/results/{id:path}")
    def careless(id: str) -> Response:
        try:
            return Response((port.folder / "results" / id).read_bytes())
        except (OSError, ValueError):
            return Response("", 404)

    client = TestClient(app)
    matches = [e for e in escapes() if SECRET in client.get(f"/api/results/..%2f{e}").text]
    assert matches


# ---- H2 ----------------------------------------------------------------------------------------


def test_h02_what_is_anothers_is_not_there(port: Served, people: dict[str, httpx.Client]) -> None:
    """By id, hash and name: the same answer as for what never was, in the same time; ids have 128 bits."""
    ann, bob = people["ann"], people["bob"]
    job = ann.post("/api/paint?wait=true", json={"prompt": "mine"}).json()
    image = job["results"][0]["id"]
    stored = ann.post("/api/concepts", files={"file": ("x", concept("secret-pet", 3))}).json()
    assert len(job["id"]) == len(image) == 32
    there = {"/api/jobs/{}": job["id"], "/api/jobs/{}/events": job["id"], "/api/results/{}": image,
             "/api/concepts/sha256:{}": stored["sha256"], "/api/concepts/{}": "secret-pet",
             "/api/concepts/{}/preview": "secret-pet"}  # fmt: skip
    for path, id_ in there.items():
        assert "preview" in path or ann.get(path.format(id_)).status_code == 200
        other = f"{id_[::-1]}" if id_ != "secret-pet" else "secret-pot"
        answers = {(t.status_code, t.text.replace(expected, "ID")) for expected in (id_, other)
                   for t in [bob.get(path.format(expected))]}  # fmt: skip
        assert len(answers) == 1 and answers.pop()[0] == 404, path
        assert _apart(bob, path.format(id_), path.format(other)) < 0.003, path
    assert bob.delete(f"/api/jobs/{job['id']}").status_code == 404
    assert bob.delete("/api/concepts/secret-pet").status_code == 404
    assert bob.post(f"/api/jobs/{job['id']}/stop").status_code == 404
    assert bob.post("/api/refine", json={"image": f"result:{image}"}).status_code == 404
    assert bob.post("/api/paint", json={"prompt": f"<secret-pet@sha256:{stored['sha256']}>"}).status_code == 404
    assert bob.get("/api/jobs").json()["jobs"] == []
    assert ann.get("/api/concepts/secret-pet").status_code == 200
    del port.service._jobs[job["id"]]  # as long after its end: told from the store
    assert [c.get(f"/api/jobs/{job['id']}").status_code for c in (ann, bob)] == [200, 404]


def _apart(c: httpx.Client, first: str, other: str) -> float:
    """By how much the work for one path is more than for another, in seconds of the processor: the least of
    eight times each, asked in turns. What others do on this machine is not in it."""
    took: dict[str, list[float]] = {first: [], other: []}
    for path in (first, other) * 8:
        start_time = time.process_time()
        c.get(path)
        took[path].append(time.process_time() - start_time)
    return abs(min(took[first]) - min(took[other]))


# ---- H3 ----------------------------------------------------------------------------------------


def addresses(port_: int) -> list[str]:
    """60 and more spellings of this machine, of networks behind a server, and of what leads there."""
    hosts = ["127.0.0.1", "localhost", "LOCALHOST", "127.1", "127.0.1", "2130706433", "0x7f000001",
             "0x7f.0.0.1", "0177.0.0.1", "017700000001", "127.0.0.1.", "0", "0.0.0.0", "[::1]",
             "[::]", "[::ffff:127.0.0.1]",
             "[::ffff:7f00:1]", "[0:0:0:0:0:0:0:1]", "[64:ff9b::7f00:1]", "[2002:7f00:1::]", "[fe80::1]",
             "169.254.169.254", "[fd00:ec2::254]", "metadata.google.internal", "100.64.0.1", "10.0.0.1",
             "192.168.0.1", "172.16.0.1", "198.18.0.1", "224.0.0.1", "255.255.255.255", "①②⑦.⓪.⓪.①",
             "127.0.0.1@example.org", "example.org@127.0.0.1", "127.0.0.1.nip.io", "localtest.me"]  # fmt: skip
    matches = [f"http://{host}:{port_}/a.png" for host in hosts]
    schemes = (
        "https",
        "ftp",
        "gopher",
        "dict",
        "ldap",
        "sftp",
        "tftp",
        "jar:http",
        "HTTP",
        "hTtP",
        "ws",
        "s3",
        "data:http",
    )
    matches += [f"{scheme}://127.0.0.1:{port_}/a.png" for scheme in schemes]
    matches += [
        "file:///etc/passwd", "file://localhost/etc/passwd", "file:/etc/passwd", f" http://127.0.0.1:{port_}/",
        f"\thttp://127.0.0.1:{port_}/", f"\nhttp://127.0.0.1:{port_}/", f"//127.0.0.1:{port_}/a.png",
        f"\\\\127.0.0.1\\{port_}", f"http:/127.0.0.1:{port_}/", f"http:\\\\127.0.0.1:{port_}\\",
        f"127.0.0.1:{port_}/a.png", f"url(http://127.0.0.1:{port_}/a.png)", f"http://127.0.0.1:{port_}/%0d%0a",
        "data:image/svg+xml;base64,PHN2Zy8+", f"data:text/html,http://127.0.0.1:{port_}/",
    ]  # fmt: skip
    return matches


def test_h03_no_address_is_ever_fetched(open_: Served, monkeypatch: Any) -> None:
    """Every spelling in every field that takes an image: refused; no connection, no name looked up."""
    names: list[Any] = []
    look_up = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: names.append(a[0]) or look_up(*a, **k))
    with socket.create_server(("127.0.0.1", 0)) as trap, open_.client() as c:
        spellings = addresses(trap.getsockname()[1])
        assert len(spellings) > 60
        for url in spellings:
            for path, body in (
                ("/sdapi/v1/png-info", {"image": url}), ("/sdapi/v1/img2img", {"init_images": [url]}),
                ("/api/refine", {"prompt": "a", "image": url}),
                ("/api/inpaint", {"prompt": "a", "image": url, "mask": url}),
            ):  # fmt: skip
                response = c.post(path, json=body)
                assert response.status_code in (400, 415, 422), (url, response.text)
                if url.startswith("http://"):
                    words = "Image URLs are disabled. Send base64 data."
                    assert (
                        response.status_code == 400
                        and "url_inputs_disabled" in response.text
                        and words in response.text
                    )
            response = c.post("/v1/images/edits", data={"image": url, "prompt": "a"}, files={"x": b""})
            assert response.status_code == 400
        trap.settimeout(0.05)
        with pytest.raises(TimeoutError):
            trap.accept()
    assert set(names) <= {"127.0.0.1", b"127.0.0.1"}, names


def test_h03_the_trap_works() -> None:
    """The control: whoever does fetch is seen."""
    with socket.create_server(("127.0.0.1", 0)) as trap:
        trap.settimeout(30)
        url = f"http://127.0.0.1:{trap.getsockname()[1]}/"

        def fetch() -> None:
            with suppress(httpx.HTTPError):
                httpx.get(url, timeout=0.2, verify=False)

        fetching = threading.Thread(target=fetch)
        fetching.start()
        trap.accept()[0].close()
        fetching.join()


# ---- H4 ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 421), ({"Host": "evil.example:80"}, 421), ({"Host": ""}, 421),
        ({"Host": "127.0.0.1.evil.example"}, 421), ({"Host": "[::1].evil.example"}, 421),
        ({"Origin": "http://evil.example"}, 403), ({"Origin": "null"}, 403), ({"Origin": "file://"}, 403),
        ({"Origin": "http://127.0.0.1:1"}, 403), ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Content-Type": "text/plain"}, 415), ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({"Content-Type": "text/plain; application/json"}, 415),
    ],
)  # fmt: skip
def test_h04_web_pages_cannot_reach_in(open_: Served, headers: dict[str, str], status: int) -> None:
    with open_.client() as c:
        headers_ = {"Content-Type": "application/json", **headers}
        response = c.post("/api/paint", content=b'{"prompt": "a"}', headers=headers_)
        assert response.status_code == status, response.text
        assert "access-control-allow-origin" not in response.headers
        own_headers = {"Content-Type": "application/json", "Host": open_.url.removeprefix("http://"),
               "Origin": open_.url, "Sec-Fetch-Site": "same-origin"}  # fmt: skip
        assert (
            c.post("/api/paint?wait=true", content=b'{"prompt": "a"}', headers=own_headers).status_code == 200
        )


def test_h04_nothing_changes_without_a_type(open_: Served) -> None:
    """On every route that changes something, a form's three types are refused, but for uploads' multipart."""
    client = TestClient(with_middleware(open_.app), base_url="http://127.0.0.1", raise_server_exceptions=False)
    changing = [(m, p) for m, p in walk(open_.app.routes) if m not in ("GET", "HEAD", "OPTIONS", "WEBSOCKET")]
    assert len(changing) > 20
    for method, path in changing:
        for kind in ("text/plain", "application/x-www-form-urlencoded"):
            response = client.request(method, path.replace("{", "").replace("}", ""), content=b"a=b",
                                  headers={"Content-Type": kind})  # fmt: skip
            assert response.status_code == 415, (method, path, response.text)


def test_h04_websockets_have_the_same_gate(open_: Served) -> None:
    client = TestClient(with_middleware(open_.app), base_url="http://127.0.0.1")
    for headers in ({"Origin": "http://evil.example"}, {"Host": "evil.example"}):
        with (
            pytest.raises(WebSocketDisconnect),
            client.websocket_connect("ws://127.0.0.1/api/live", headers=headers),
        ):
            pass


# ---- H5 ----------------------------------------------------------------------------------------


def walk_routes(routes: list[BaseRoute], prefix: str = "") -> Iterator[tuple[str, BaseRoute]]:
    """Every path and route of an app, of what is mounted on it, too."""
    for route in routes:
        path = prefix + getattr(route, "path", "")
        inner = getattr(route, "original_router", None) or getattr(route, "app", None)
        if isinstance(route, WebSocketRoute | Route):
            yield path, route
        elif isinstance(route, Mount) or hasattr(inner, "routes"):
            yield from walk_routes(inner.routes, prefix if not isinstance(route, Mount) else path)


def walk(routes: list[BaseRoute]) -> Iterator[tuple[str, str]]:
    """Every method and path."""
    for path, route in walk_routes(routes):
        if isinstance(route, Route):
            yield from ((m, path) for m in route.methods or {"GET"})
        else:
            yield "WEBSOCKET", path


def unguarded(app: Any, guard: Any) -> list[str]:
    """Paths that answer without a key, but for those that may."""
    client, matches = TestClient(guard, base_url="http://127.0.0.1", raise_server_exceptions=False), []
    for method, path in {*walk(app.routes), ("GET", "/nothing"), ("POST", "/v1/files")}:
        where = path.replace("{name:path}", "x").replace("{", "").replace("}", "")
        if method == "WEBSOCKET":
            try:
                with client.websocket_connect(f"ws://127.0.0.1{where}"):
                    matches.append(where)
            except WebSocketDisconnect:
                pass
            except KeyError:  # it got as far as the route, which misses the client's name
                matches.append(where)
        elif where not in PUBLIC_PATHS and client.request(method, where).status_code != 401:
            matches.append(f"{method} {where}")
    return matches


def test_h05_no_route_is_open(port: Served) -> None:
    paths = {p for _, p in walk(port.app.routes)}
    assert {"/livez", "/metrics", "/docs", "/openapi.json", "/api/paint", "/api/live", "/v1/models",
            "/sdapi/v1/txt2img", "/api/results/{id}"} <= paths  # fmt: skip
    assert len(paths) > 50
    assert unguarded(port.app, with_middleware(port.app, keys=[*KEYS.values()])) == []
    assert len(unguarded(port.app, port.app)) > 50, "without the gate the walk finds them"


@pytest.mark.parametrize("method", ["GET", "POST", "HEAD", "OPTIONS", "PUT", "TRACE", "CONNECT", "get", "BREW"])
@pytest.mark.parametrize(
    "path", ["/metrics", "//metrics", "/METRICS", "/livez/../metrics", "/livez/", "/%6civez"]
)
def test_h05_no_spelling_of_a_request_gets_past(port: Served, method: str, path: str) -> None:
    with Wire(port.url) as wire:
        response = wire.ask(method, path)
        body = response.body.decode()
    open_path = path == "/%6civez"  # which is /livez
    assert response.status in ((200, 405) if open_path else (400, 401)), response
    assert "minikin_" not in body


@pytest.mark.parametrize(
    "headers",
    [{"Authorization": "Bearer {}"}, {"X-API-Key": "{}"}, {"Authorization": "Basic {}"}],
)
def test_h05_three_ways_to_give_the_key(port: Served, headers: dict[str, str]) -> None:
    def headers_(key: str) -> dict[str, str]:
        basic = base64.b64encode(f"ann:{key}".encode()).decode()
        return {k: v.format(basic if "Basic" in v else key) for k, v in headers.items()}

    with port.client() as c:
        assert c.get("/api/jobs", headers=headers_(KEYS["ann"])).status_code == 200
        for wrong in ("x", KEYS["ann"][:-1], KEYS["ann"] + "x", KEYS["ann"].upper(), "é"):
            response = c.get("/api/jobs", headers={k: v.encode("latin-1") for k, v in headers_(wrong).items()})  # type: ignore[arg-type]
            assert response.status_code == 401 and KEYS["ann"] not in response.text
            assert response.json()["error"]["code"] == "invalid_api_key"


# ---- H6 ----------------------------------------------------------------------------------------


def test_h06_the_server_tells_nothing_of_itself(port: Served, people: dict[str, httpx.Client]) -> None:
    """No key, path, user or environment in anything that can be read; cmd-flags and memory are empty."""
    c, texts = people["ann"], {}
    for method, path in walk(port.app.routes):
        if method == "GET" and "{" not in path:
            texts[path] = c.get(path).text
    assert texts["/sdapi/v1/cmd-flags"] == texts["/sdapi/v1/memory"] == "{}"
    secrets = [*KEYS.values(), str(port.folder), str(Path.home()), "Traceback", "/src/minikin", "site-packages"]
    response = [(path, s) for path, text in texts.items() for s in secrets if s in text]
    assert not response and len(texts) > 25
    with Wire(port.url) as wire:
        assert "server" not in wire.ask("GET", "/livez").headers


# ---- H7 ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["interrupt", "skip"])
def test_h07_interrupting_is_for_ones_own_jobs(tmp_path: Path, verb: str) -> None:
    """Neither all of another's nor one of them by its name."""
    engine, response = FakeEngine(), dict[str, Any]()
    with served(engine, tmp_path / "s", keys=[*KEYS.values()]) as s:
        people = {who: s.client(headers={"X-API-Key": key}) for who, key in KEYS.items()}
        s.service.workers[0].warm.wait(5)
        engine.go.clear()

        def paint(who: str) -> None:
            body = {"prompt": who, "seed": 1, "width": 64, "height": 64, "force_task_id": "one"}
            response[who] = people[who].post("/sdapi/v1/txt2img", json=body).json()

        threads = [threading.Thread(target=paint, args=(who,)) for who in people]
        try:
            for t in threads:
                t.start()
            while len(jobs := s.service._unfinished()) < 2:
                time.sleep(0.01)
            for task in ("", "one", *(job.id for job in jobs), "*"):
                assert people["ann"].post(f"/sdapi/v1/{verb}", params={"id_task": task}).status_code == 200
            threads[0].join(60)
            assert people["bob"].get("/sdapi/v1/progress").json()["state"]["job_count"] == 1
        finally:
            engine.go.set()
        threads[1].join(60)
        assert json.loads(response["ann"]["info"])["interrupted"]
        assert not json.loads(response["bob"]["info"])["interrupted"]
        assert read(Image.open(io.BytesIO(base64.b64decode(response["bob"]["images"][0])))) == digest(
            "bob", "", {}, 1
        )


# ---- H8 ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "requests",
    [{"script_name": "x"}, {"alwayson_scripts": {"x": {"args": [1]}}}, {"enable_hr": True}, {"styles": ["x"]},
     {"override_settings": {"outdir_samples": "/"}}, {"override_settings": {"sd_model_checkpoint": "other"}},
     {"subseed_strength": 0.5}],
)  # fmt: skip
def test_h08_nothing_is_configured_over_http(people: dict[str, httpx.Client], requests: dict[str, Any]) -> None:
    response = people["ann"].post(
        "/sdapi/v1/txt2img", json={"prompt": "a", "width": 64, "height": 64, **requests}
    )
    assert response.status_code == 422 and response.json()["error"] == "unsupported_field", response.text


def test_h08_options_are_not_written(port: Served, people: dict[str, httpx.Client]) -> None:
    """RequestRejected for what would change something; places to save to are not looked at."""
    c = people["ann"]
    before = c.get("/sdapi/v1/options").json()
    for body in (
        {"outdir_samples": "/etc"},
        {"sd_model_checkpoint": "other"},
        {"CLIP_stop_at_last_layers": 1, "x": 1},
    ):
        response = c.post("/sdapi/v1/options", json=body)
        assert response.status_code == 422 and response.json()["error"] == "unsupported_field", response.text
    place = port.folder.parent / "elsewhere"
    body = {"prompt": "a", "width": 64, "height": 64, "save_images": True, "outpath_samples": str(place)}
    assert c.post("/sdapi/v1/txt2img", json=body).status_code == 200
    assert c.get("/sdapi/v1/options").json() == before and not place.exists()
