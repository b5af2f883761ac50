"""The page: from a key pressed in the browser to the picture that shows it, on tiny, typing live.

Chromium and the server share the machine. `alone` waits for each picture before the next key; `typing`
presses a key every 150 ms, and counts until the picture of that prompt or a newer one is shown.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import tempfile
import time
from typing import Any
from urllib.request import urlopen

TEXT = "a red car in the snow, a photo of a small cat on the beach, painted at night"
PACE_S = 0.15
BARS_MS = (250, 500)
# notes the time of every key, and of every picture once it is decoded and shown
RECORDER = """() => {
  const field = document.querySelector('#paint-prompt'), image = document.querySelector('#paint-shown');
  window.keys = []; window.took = []; let last = '';
  field.addEventListener('input', () => {
    const prompt = field.value.trim();
    if (prompt && prompt !== last) keys.push([performance.now(), prompt]); // a blank at the end changes nothing
    last = prompt;
  }, true);
  image.addEventListener('load', () => requestAnimationFrame(() => {
    const at = keys.findLastIndex(([, prompt]) => prompt === image.dataset.prompt);
    for (const [begun] of keys.splice(0, at + 1)) took.push(performance.now() - begun);
  }));
}"""


def run() -> list[dict[str, Any]]:
    path = shutil.which("chromium")
    if not path:
        return [{"what": "keystroke to picture in the page", "value": "no Chromium"}]
    from playwright.sync_api import sync_playwright

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    starter = "from minikin.cli.app import main; main()"
    with tempfile.TemporaryDirectory() as folder:
        asked = ["studio", "--no-browser", "--port", str(port), "--folder", f"{folder}/s"]
        server = subprocess.Popen([sys.executable, "-c", starter, *asked], stderr=subprocess.DEVNULL)
        try:
            _until_ready(f"http://127.0.0.1:{port}/readyz")
            with sync_playwright() as play:
                args = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
                browser = play.chromium.launch(executable_path=path, args=args)
                page = browser.new_page()
                page.goto(f"http://127.0.0.1:{port}/")
                page.wait_for_function("document.querySelector('#paint-preset')?.options.length > 0")
                page.fill("#paint-prompt", "a dog")
                page.wait_for_function("document.querySelector('#paint-shown').dataset.prompt === 'a dog'")
                page.evaluate(RECORDER)
                found = {
                    "alone": _typed(page, wait=True),
                    "typing, a key every 150 ms": _typed(page, wait=False),
                }
                browser.close()
        finally:
            server.terminate()
            server.wait(30)
    return [row for name, took in found.items() for row in _rows(name, took)]


def _typed(page: Any, *, wait: bool) -> list[float]:
    page.fill("#paint-prompt", "")
    page.evaluate("() => { keys.length = took.length = 0; }")
    page.focus("#paint-prompt")
    for letter in TEXT:
        page.keyboard.press(letter if letter != " " else "Space")
        if wait:
            page.wait_for_function("!keys.length")
        else:
            time.sleep(PACE_S)
    page.wait_for_function("!keys.length")
    took: list[float] = page.evaluate("took")
    return sorted(took)


def _rows(name: str, took: list[float]) -> list[dict[str, Any]]:
    rows = []
    for share, bar in zip((0.5, 0.95), BARS_MS, strict=True):
        value = took[min(len(took) - 1, int(share * len(took)))]
        what = f"keystroke to picture, {name}, p{share * 100:.0f} of {len(took)}"
        rows.append({"what": what, "value": f"{value:.0f} ms", "bar": f"<= {bar} ms", "holds": value <= bar})
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
