"""The page: from a key pressed in the browser to the image that shows it, on tiny, typing live.

Chromium and the server share the machine. `alone` waits for each image before the next key; `typing`
presses a key every 150 ms, and counts until the image of that prompt or a newer one is shown. `in the
server` is the part from the wish's arrival to the image's departure. The same with PyTorch and with
OpenVINO, alternately key by key, so that a busy minute meets both.
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
ENGINES = ("eager", "openvino")
PACE_S = 0.15
BARS_MS = (250, 500)
# notes the time of every key, and of every image once it is decoded and shown
RECORDER = """() => {
  const field = document.querySelector('#paint-prompt'), image = document.querySelector('#paint-shown');
  window.keys = []; window.took = []; window.inside = []; let last = '';
  field.addEventListener('input', () => {
    const prompt = field.value.trim();
    if (prompt && prompt !== last) keys.push([performance.now(), prompt]); // a blank at the end changes nothing
    last = prompt;
  }, true);
  image.addEventListener('load', () => requestAnimationFrame(() => {
    const at = keys.findLastIndex(([, prompt]) => prompt === image.dataset.prompt);
    for (const [begun] of keys.splice(0, at + 1)) took.push(performance.now() - begun);
    if (at >= 0) inside.push(image.dataset.seconds * 1000);
  }));
}"""


def run() -> list[dict[str, Any]]:
    path = shutil.which("chromium")
    if not path:
        return [{"what": "keystroke to image in the page", "value": "no Chromium"}]
    from playwright.sync_api import sync_playwright

    found: dict[str, list[Found]] = {}
    with ExitStack() as stack:
        play = stack.enter_context(sync_playwright())
        args = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = play.chromium.launch(executable_path=path, args=args)
        stack.callback(browser.close)
        pages = {name: stack.enter_context(opened(browser, name)) for name in ENGINES}
        for wait, how in ((True, "alone"), (False, "typing, a key every 150 ms")):
            for words in re.findall(r"\S+\s*", TEXT):  # a few keys on one, the same on the other
                for name, page in pages.items():
                    found.setdefault(f"{name}, {how}", []).append(_typed(page, words.rstrip(), wait=wait))
    return [row for name, parts in found.items() for row in _rows(name, parts)]


class Found(NamedTuple):
    """Milliseconds from keys to images, and of the images in the server."""

    took: list[float]
    inside: list[float]


@contextmanager
def opened(browser: Any, engine: str, width: int = 1280, height: int = 720) -> Iterator[Any]:
    """A page on a server of its own, once live painting is warm."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    starter = "from minikin.cli.app import main; main()"
    with tempfile.TemporaryDirectory() as folder:
        asked = [
            "studio",
            "--no-browser",
            "--port",
            str(port),
            "--folder",
            f"{folder}/s",
            "--live-engine",
            engine,
        ]
        server = subprocess.Popen([sys.executable, "-c", starter, *asked], stderr=subprocess.DEVNULL)
        try:
            _until_ready(f"http://127.0.0.1:{port}/readyz")
            page = browser.new_page(viewport={"width": width, "height": height})
            page.goto(f"http://127.0.0.1:{port}/")
            page.wait_for_function("document.querySelector('#paint-preset')?.options.length > 0")
            page.fill("#paint-prompt", "a dog")
            page.wait_for_function("document.querySelector('#paint-shown').dataset.prompt === 'a dog'")
            page.evaluate(RECORDER)
            yield page
        finally:
            server.terminate()
            server.wait(120)  # a busy machine drains slowly


def _typed(page: Any, words: str, *, wait: bool) -> Found:
    page.bring_to_front()
    page.evaluate("() => { keys.length = took.length = inside.length = 0; }")
    page.focus("#paint-prompt")
    page.keyboard.press("Space")
    for letter in words:
        page.keyboard.press(letter)
        if wait:
            page.wait_for_function("!keys.length")
        else:
            time.sleep(PACE_S)
    page.wait_for_function("!keys.length")
    return Found(page.evaluate("took"), page.evaluate("inside"))


def _rows(name: str, parts: Sequence[Found]) -> list[dict[str, Any]]:
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
