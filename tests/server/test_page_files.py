"""The page's files, without a browser: what is served, to whom, under which policy, and what is vendored."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from minikin.web.app import STATIC
from tests.helpers.fake_engine import FakeEngine
from tests.helpers.servers import Served, served

MAX_BYTES = 300_000  # of all that a browser loads
MODULES = sorted(p.relative_to(STATIC).as_posix() for p in STATIC.rglob("*.*js"))
COLOURS = ("ink", "soft", "accent", "good", "error", "note", "cancelled")


@pytest.fixture(scope="module")
def server(tmp_path_factory: Any) -> Iterator[Served]:
    with served(FakeEngine(), tmp_path_factory.mktemp("files") / "s", page=True) as s:
        yield s


def test_the_page_and_its_policy(server: Served) -> None:
    with server.client() as c:
        assert c.get("/").headers["location"] == "/studio/"
        page = c.get("/studio/")
        policy = page.headers["content-security-policy"]
        assert page.status_code == 200 and "<html" in page.text
        assert "default-src 'none'; script-src 'self'; style-src 'self';" in policy
        assert "unsafe" not in policy and "http" not in policy
        for name in MODULES:
            response = c.get(f"/studio/{name}")
            assert "javascript" in response.headers["content-type"], name
            assert response.headers["cache-control"] == "no-cache"
        for path in ("/favicon.ico", "/studio/icon.svg"):
            assert c.get(path).content == (STATIC / "icon.svg").read_bytes()
        for path in ("/studio/../app.py", "/studio/%2e%2e/app.py", "/studio/nothing.js", "/page/paint.js"):
            assert c.get(path).status_code == 404, path
        assert c.post("/studio/").status_code in (405, 415)


def test_middleware_protects_the_page(tmp_path: Path) -> None:
    with served(FakeEngine(), tmp_path / "s", keys=["k"], page=True) as s, s.client() as c:
        for path in ("/", "/studio/", "/studio/page.css", "/studio/js/main.js"):
            response = c.get(path)
            assert response.status_code == 401 and "Basic" in response.headers["www-authenticate"], path
            assert c.get(path, auth=("me", "k")).status_code in (200, 307), path
        foreign = {"Origin": "https://example.org", "X-API-Key": "k"}
        assert c.get("/studio/", headers=foreign).status_code == 403


def test_the_page_is_small_and_refers_to_no_other_host() -> None:
    """Nothing inline, which the policy would stop; all modules are fetched at once, not one after the other."""
    index = (STATIC / "index.html").read_text()
    assert sorted(re.findall(r'<link rel="modulepreload" href="([^"]+)">', index)) == MODULES
    assert re.findall(r"<script[^>]*>", index) == ['<script type="module" src="js/main.js">']
    assert not re.search(r"<style|\sstyle=|\son\w+=", index)
    loaded = [*(STATIC / name for name in ("index.html", "page.css", "icon.svg", *MODULES))]
    assert sum(path.stat().st_size for path in loaded) <= MAX_BYTES
    for path in loaded:
        assert set(re.findall(r"https?://[\w.]+", path.read_text())) <= {"http://www.w3.org"}, path


def test_vendored_files_are_those_of_npm() -> None:
    """With its imports as npm has them, each file has the hash of the file in its package. Who updates one
    writes the package's version and hash into the manifest."""
    vendor = STATIC / "vendor"
    manifest = json.loads((vendor / "manifest.json").read_text())
    assert set(manifest["files"]) == {p.name for p in vendor.glob("*.mjs")}
    for name, facts in manifest["files"].items():
        text = (vendor / name).read_text()
        for package, file in manifest["imports"].items():
            text = text.replace(f'from"{file}"', f'from"{package}"')
        assert hashlib.sha256(text.encode()).hexdigest() == facts["sha256"], name
        assert facts["licence"].partition("-")[0] in (vendor / facts["text"]).read_text(), name


def test_modules_are_short() -> None:
    for path in (*STATIC.rglob("*.js"), STATIC / "page.css"):
        lines = path.read_text().splitlines()
        assert len(lines) <= 400 and max(map(len, lines)) <= 112, path
        assert path.suffix == ".css" or lines[0] == "// @ts-check", path


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_has_contrast(scheme: int) -> None:
    """WCAG's contrast of 4.5 for every colour of text on every background it stands on."""
    text = (STATIC / "page.css").read_text()
    pairs = re.findall(r"--([\w-]+): light-dark\((#\w{6}), (#\w{6})\)", text)
    colours = {name: schemes[scheme] for name, *schemes in pairs}
    ratios = {
        **{(ink, on): _contrast(colours[ink], colours[on])
           for on in ("paper", "sheet", "wash") for ink in COLOURS},
        ("on-accent", "accent"): _contrast(colours["on-accent"], colours["accent"]),
    }  # fmt: skip
    assert {pair: round(c, 2) for pair, c in ratios.items() if c < 4.5} == {}
    assert _contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01), "just too little"


def _contrast(a: str, b: str) -> float:
    def light(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] + 0.05

    return max(light(a), light(b)) / min(light(a), light(b))
