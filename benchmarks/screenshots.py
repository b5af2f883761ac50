"""Screenshots of the page for docs/: studio-paint, studio-phone, studio-inpaint.

    python -m benchmarks.screenshots [FOLDER]

Teaches two examples and uses them in a real browser. Check the images afterwards: tiny generates them anew.
"""

from __future__ import annotations

import io
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import httpx
from PIL import Image
from playwright.sync_api import sync_playwright

from benchmarks.page import opened
from minikin import Studio

ROOT = Path(__file__).resolve().parents[1]
CONCEPTS = {"my_teapot": "teapot", "my_guitar": "guitar"}
SCENE = "a photo of <my_teapot> on the beach"
BEFORE, AFTER = "a photo of a red car in the snow", "a photo of a robot in the snow"
SEED = "7"


def main(folder: Path) -> None:
    path = shutil.which("chromium")
    if not path:
        sys.exit("Chromium is not installed (Debian: apt-get install chromium).")
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        with opened(browser, "eager", width=1280, height=916) as page:
            teach(page.url)
            page.reload()
            page.wait_for_selector("text=<my_teapot>")
            paint(page, SCENE, preset="quality", n=6)
            save(page, folder / "studio-paint.jpg")
            page.set_viewport_size({"width": 390, "height": 844})
            save(page, folder / "studio-phone.jpg")
            page.set_viewport_size({"width": 1280, "height": 684})
            paint(page, BEFORE, preset="quality", n=1)
            inpaint(page)
            save(page, folder / "studio-inpaint.jpg")
        browser.close()


def teach(url: str) -> None:
    """Teach the examples and upload them to the server."""
    studio = Studio.open("tiny")
    for name, category in CONCEPTS.items():
        concept = studio.teach(ROOT / "examples" / name, name=name, category=category)
        with tempfile.TemporaryDirectory() as at:
            concept.save(file := Path(at) / f"{name}.safetensors")
            body = {"file": (file.name, file.read_bytes())}
            httpx.post(httpx.URL(url).join("/api/concepts"), files=body).raise_for_status()


def paint(page: Any, prompt: str, *, preset: str, n: int) -> None:
    """Generate drafts, and wait for the last one and for the live image of the same prompt."""
    form = page.get_by_role("form", name="Paint", exact=True)
    form.get_by_label("Preset").select_option(preset)
    form.get_by_label("Images").fill(str(n))
    form.get_by_label("Seed", exact=True).fill(SEED)
    form.get_by_label("Prompt", exact=True).fill(prompt)
    page.wait_for_timeout(2000)  # the live image first, so that the newest draft is on top
    page.keyboard.press("Control+Enter")
    page.locator(f".card img >> nth={n - 1}").wait_for(timeout=240_000)
    page.get_by_role("link", name="Download").wait_for(timeout=240_000)
    page.wait_for_timeout(1500)


def inpaint(page: Any) -> None:
    """Mask the middle of the current draft and inpaint it."""
    page.get_by_role("button", name="Change", exact=True).click()
    mask, form = page.locator("canvas[width='128']"), page.get_by_role("form", name="Change")
    form.get_by_label("Preset").select_option("quality")
    form.get_by_label("Seed").fill(SEED)
    mask.scroll_into_view_if_needed()
    box = mask.bounding_box()
    for row in (0.28, 0.4, 0.52, 0.64, 0.76):
        page.mouse.move(box["x"] + 0.2 * box["width"], box["y"] + row * box["height"])
        page.mouse.down()
        page.mouse.move(box["x"] + 0.8 * box["width"], box["y"] + row * box["height"], steps=8)
        page.mouse.up()
    form.get_by_label("What to put there").fill(AFTER)
    form.locator("button.main").click()
    page.get_by_role("link", name="Download").wait_for(timeout=240_000)
    page.wait_for_timeout(1000)


def save(page: Any, file: Path) -> None:
    """At most 860 px wide."""
    page.evaluate("() => { scrollTo(0, 0); document.activeElement.blur(); }")
    page.wait_for_timeout(300)
    shot = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    width = min(860, shot.width)
    shot.resize((width, shot.height * width // shot.width), Image.Resampling.LANCZOS).save(file, quality=86)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs")
