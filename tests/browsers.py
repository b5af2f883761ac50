"""Chromium for tests: Debian's, driven by Playwright; where there is none the tests say so, in CI they fail."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

ARGS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync")  # fmt: skip


def chromium() -> str:
    """Its path; skips the test, or fails it in CI, where there is none."""
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if not found:
        why = "Chromium is not installed (Debian: apt-get install chromium): the page was tried in no browser"
        if os.environ.get("CI", "").lower() == "true":
            pytest.fail(why)
        pytest.skip(why)
    return found


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
