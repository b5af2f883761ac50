"""Latency of the page: from a key press in the browser to the image of it, on tiny, typing live.

Chromium and the server share the machine. `alone` waits for each image before the next key; `typing` presses a
key every 150 ms, and measures until the image of that prompt or a newer one is displayed. `in the server` is
the part from the arrival of the request to the departure of the image. PyTorch and OpenVINO take turns key by
key, so that other load on the machine affects both.
"""

from __future__ import annotations

import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from urllib.request import urlopen

TEXT = "a red car in the snow, a photo of a small cat on the beach, painted at night"
BACKENDS = ("eager", "openvino")
PACE_S = 0.15
BARS_MS = (250, 500)
# notes the time of every key, and of every image once it is decoded and shown
RECORDER = """() => {
  const field = document.querySelector('#prompt'), image = document.querySelector('img.shown');
  window.keys = []; window.took = []; window.inside = []; let last = '';
  field.addEventListener('input', () => {
    const prompt = field.value.trim();
    if (prompt && prompt !== last) keys.push([performance.now(), prompt]); // a trailing blank changes nothing
    last = prompt;
  }, true);
  image.addEventListener('load', () => requestAnimationFrame(() => {
    const at = keys.findLastIndex(([, prompt]) => prompt === image.dataset.prompt);
    for (const [pressed] of keys.splice(0, at + 1)) took.push(performance.now() - pressed);
    if (at >= 0) inside.push(image.dataset.seconds * 1000);
  }));
}"""


def run() -> list[dict[str, Any]]:
    path = shutil.which("chromium")
    if not path:
        return [{"what": "keystroke to image in the page", "value": "no Chromium"}]
    from playwright.sync_api import sync_playwright

    latencies: dict[str, list[Latencies]] = {}
    with ExitStack() as stack:
        play = stack.enter_context(sync_playwright())
        args = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = play.chromium.launch(executable_path=path, args=args)
        stack.callback(browser.close)
        pages = {name: stack.enter_context(opened(browser, name)) for name in BACKENDS}
        for wait, label in ((True, "alone"), (False, "typing, a key every 150 ms")):
            for words in re.findall(r"\S+\s*", TEXT):  # the same keys on each in turn
                for name, page in pages.items():
                    latencies.setdefault(f"{name}, {label}", []).append(_typed(page, words.rstrip(), wait=wait))
    return [row for name, parts in latencies.items() for row in _rows(name, parts)]


class Latencies(NamedTuple):
    """Milliseconds from keys to images, and of these in the server."""

    took: list[float]
    inside: list[float]


@contextmanager
def opened(browser: Any, backend: str, width: int = 1280, height: int = 720) -> Iterator[Any]:
    """A page on a server of its own, once live painting is warm."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    starter = "from minikin.cli.app import main; main()"
    with tempfile.TemporaryDirectory() as folder:
        args = ["studio", "--no-browser", "--port", str(port), "--folder", f"{folder}/s"]
        args += ["--live-backend", backend]
        server = subprocess.Popen([sys.executable, "-c", starter, *args], stderr=subprocess.DEVNULL)
        try:
            _until_ready(f"http://127.0.0.1:{port}/readyz")
            page = browser.new_page(viewport={"width": width, "height": height})
            page.goto(f"http://127.0.0.1:{port}/")
            page.locator("option[value=turbo]").first.wait_for(state="attached")
            page.fill("#prompt", "a dog")
            page.locator("img.shown[data-prompt='a dog']").wait_for()
            page.evaluate(RECORDER)
            yield page
        finally:
            server.terminate()
            server.wait(120)  # a busy machine drains slowly


def _typed(page: Any, words: str, *, wait: bool) -> Latencies:
    page.bring_to_front()
    page.evaluate("() => { keys.length = took.length = inside.length = 0; }")
    page.focus("#prompt")
    page.keyboard.press("Space")
    for letter in words:
        page.keyboard.press(letter)
        if wait:
            _until_painted(page)
        else:
            time.sleep(PACE_S)
    _until_painted(page)
    return Latencies(page.evaluate("took"), page.evaluate("inside"))


def _until_painted(page: Any) -> None:
    """Wait for the image of the last key; without eval, which the page's policy forbids."""
    while page.evaluate("keys.length"):
        time.sleep(0.005)


def _rows(name: str, parts: Sequence[Latencies]) -> list[dict[str, Any]]:
    took, inside = (sorted(t for part in parts for t in part[k]) for k in range(2))
    rows = []
    for share, bar in zip((0.5, 0.95), BARS_MS, strict=True):
        value = took[min(len(took) - 1, int(share * len(took)))]
        what = f"{name}, p{share * 100:.0f} of {len(took)}"
        rows.append({"what": what, "value": f"{value:.0f} ms", "bar": f"<= {bar} ms", "holds": value <= bar})
    rows.append({"what": f"{name}, in the server (median)", "value": f"{statistics.median(inside):.0f} ms"})
    return rows


def _until_ready(url: str, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            with urlopen(url) as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(f"{url} did not answer in {seconds:.0f} s")
