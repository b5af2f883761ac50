"""Chromium for tests: Debian's, driven by Playwright; where there is none the tests say so, in CI they fail.

And what a page refers to, read without a browser.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

ARGS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync")  # fmt: skip


def chromium() -> str:
    """Its path; skips the test, or fails it in CI, where there is none."""
    matches = shutil.which("chromium") or shutil.which("chromium-browser")
    if not matches:
        why = "Chromium is not installed (Debian: apt-get install chromium): the page was tried in no browser"
        if os.environ.get("CI", "").lower() == "true":
            pytest.fail(why)
        pytest.skip(why)
    return matches


@contextmanager
def browsing() -> Iterator[Any]:
    """A headless browser of Playwright's."""
    path = chromium()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=path, args=list(ARGS))
        try:
            yield browser
        finally:
            browser.close()


def render(file: Path, shot: Path, width: int = 1000) -> dict[str, float]:
    """Render a page of ours in a browser without a network; counts broken and loaded images, pixels too wide.

    shot  file for the screenshot
    """
    with browsing() as browser:
        page = browser.new_page(viewport={"width": width, "height": 1400}, offline=True)
        page.goto(file.as_uri())
        page.screenshot(path=shot, full_page=True)
        matches: dict[str, float] = page.evaluate("""() => ({
          broken: [...document.images].filter(i => !i.naturalWidth).length, images: document.images.length,
          drawn: document.querySelector("svg")?.getBoundingClientRect().height ?? 0,
          wide: document.documentElement.scrollWidth - innerWidth})""")
    with Image.open(shot) as image:
        matches["colours"] = len(image.convert("RGB").getcolors(maxcolors=10**6) or [])
    return matches


class Tags(HTMLParser):
    """Every address a page refers to, and whether its tags are closed in order."""

    EMPTY = frozenset({"meta", "img", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.open: list[str] = []
        self.cells = 0

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.addresses += [v for k, v in attrs if k in ("src", "href", "xlink:href", "data") and v]
        self.cells += tag == "td"
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
