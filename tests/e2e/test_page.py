"""The page, in a real browser on a real server with the embedded base: what it paints, masks and learns."""

from __future__ import annotations

import io
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from minikin.models.base import Base
from minikin.server.jobs import Job
from minikin.server.studio_engine import StudioEngine
from minikin.studio import Studio
from tests.helpers.browsers import browsing
from tests.helpers.pages import (
    button,
    drafts,
    drag,
    field,
    large_image,
    live_image,
    message,
    paint,
    press,
    says,
    shot,
    tab,
    until,
    view,
)
from tests.helpers.servers import Served, served

pytestmark = pytest.mark.slow
EXAMPLES = Path(__file__).parents[2] / "examples" / "my_teapot"


@pytest.fixture(scope="module")
def server(tiny: Base, tmp_path_factory: Any) -> Iterator[Served]:
    with served(StudioEngine(Studio(tiny)), tmp_path_factory.mktemp("page") / "s", page=True) as s:
        yield s


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with browsing() as browser:
        yield browser


@pytest.fixture
def page(browser: Any, server: Served) -> Iterator[Any]:
    with tab(browser, server) as page:
        yield page


def bytes_of(server: Served, page: Any) -> bytes:
    """The file behind Download."""
    with server.client() as c:
        return c.get(page.get_by_role("link", name="Download").get_attribute("href")).content


def image_of(server: Served, page: Any) -> Image.Image:
    return Image.open(io.BytesIO(bytes_of(server, page)))


def photos(page: Any, name: str) -> None:
    """Teach's form, filled but for the steps."""
    view(page, "Teach")
    files = [str(p) for p in sorted(EXAMPLES.glob("*.jpg"))[:3]]
    page.locator(".drop input").set_input_files(files)
    field(page, "Name", "Teach").fill(name)
    field(page, "What it is", "Teach").fill("teapot")


@contextmanager
def held_until(monkeypatch: Any) -> Iterator[threading.Event]:
    """Jobs stop after each step until the event, or until they are cancelled: however slow the browser is."""
    step, released = Job.step, threading.Event()

    def held(job: Job, *args: Any, **kwargs: Any) -> None:
        step(job, *args, **kwargs)
        while not (job.cancelled.wait(0.1) or released.is_set() or job.stage not in ("teaching", "painting")):
            pass

    with monkeypatch.context() as m:
        m.setattr(Job, "step", held)
        try:
            yield released
        finally:
            released.set()


def test_typing_paints_and_the_latest_wins(page: Any) -> None:
    sent: dict[str, Any] = {}
    steps = set()

    def count_request(frame: str) -> None:
        sent.update(json.loads(frame))
        steps.add(sent["steps"])

    page.on("websocket", lambda socket: socket.on("framesent", count_request))
    prompt = field(page, "Prompt")
    prompt.press("a")
    while not sent:  # its way to the server is open: who types on is ahead of it
        page.wait_for_timeout(20)
    prompt.press_sequentially(" red car in the snow", delay=5)
    until(page, "document.querySelector('img.shown')?.dataset.prompt === 'a red car in the snow'")
    assert large_image(page).get_attribute("src").startswith("data:image/jpeg;base64,")
    while sent["steps"] != 2:
        page.wait_for_timeout(20)
    assert steps == {1, 2}, "hurried while keys came, then in full"
    prompt.fill("a photo of <nobody")
    prompt.fill("a photo of <nobody>")
    says(page, "Unknown concept 'nobody'")


def test_drafts_are_picked_and_refined(page: Any, server: Served) -> None:
    """Two drafts; after a reload they are there, and the form is as it was; one is refined at 1.5x."""
    paint(page, n=2)
    download = page.get_by_role("link", name="Download")
    assert download.get_attribute("download") == "a-red-car-in-the-snow-7.png"
    assert "parameters" in image_of(server, page).info
    page.reload()
    drafts(page).first.wait_for()
    assert field(page, "Prompt").input_value() == "a red car in the snow"
    assert drafts(page).count() >= 2 and button(page, "Refine").is_disabled()
    drafts(page).get_by_role("checkbox").first.check()
    field(page, "Size", "Refine").select_option("1.5x")
    button(page, "Refine").click()
    page.locator(".card[data-kind=refine]").wait_for()
    assert "192x192" in page.locator("figcaption").inner_text()


PREVIEWS = """() => {
  window.previews = 0;
  new MutationObserver(() => {
    window.previews += document.querySelector('.result img')?.src.startsWith('data:image/jpeg') ?? 0;
  }).observe(document.querySelector('.stage'), {subtree: true, childList: true, attributeFilter: ['src']});
}"""


def test_inpainting_under_a_drawn_mask(page: Any, server: Served, monkeypatch: Any) -> None:
    paint(page)
    before = np.asarray(image_of(server, page).convert("RGB"))
    button(page, "Change").click()
    mask = page.locator("canvas[width='128']")
    mask.wait_for()
    drag(page, mask, (0.3, 0.5), (0.6, 0.6))
    field(page, "What to put there", "Change").fill("a yellow duck")
    field(page, "Preset", "Change").select_option("turbo")
    page.evaluate(PREVIEWS)
    with held_until(monkeypatch) as observed:
        press(page, "Change")
        until(page, "window.previews > 0")
        observed.set()
        page.get_by_role("link", name="Download").wait_for()
    after = np.asarray(image_of(server, page).convert("RGB"))
    changed = (before != after).any(-1)
    assert after.shape == before.shape and 100 < changed.sum() < 0.4 * changed.size
    assert not changed[:20].any() and not changed[:, -20:].any(), "far from the brush not a byte moves"
    button(page, "Clear").click()
    field(page, "Right", "Change").fill("32")
    press(page, "Change")
    until(page, "document.querySelector('.result .caption').textContent.includes('160x128')")


def test_teaching_in_the_page(page: Any, server: Served) -> None:
    """Photos, masks to accept, a strip of samples, the concept in the list, a slider that generates again."""
    view(page, "Teach")
    press(page, "Teach")
    says(page, "photos first")
    photos(page, "pot")
    button(page, "Show masks").click()
    page.locator(".mask").first.wait_for()
    assert page.locator(".mask").count() == 3
    page.get_by_label("mask", exact=True).first.uncheck()
    assert page.locator(".mask").count() == 2
    field(page, "Steps", "Teach").fill("6")
    field(page, "A sample every", "Teach").fill("3")
    press(page, "Teach")
    says(page, "<pot> is taught", "good")
    assert page.get_by_role("group", name="Samples").get_by_role("img").count() >= 1
    scores = page.get_by_label("Subject fidelity: ").get_attribute("aria-label")
    assert re.fullmatch(r"Subject fidelity: 0\.\d\d at step 3, 0\.\d\d at step 6", scores)
    page.get_by_role("region", name="pot in six scenes").get_by_role("img").nth(5).wait_for()
    shot(page, "sheet")
    button(page, "Use it").click()
    strength = field(page, "<pot>")
    number = live_image(page)
    strength.fill("0.4")
    assert "<pot:0.4>" in field(page, "Prompt").input_value()
    live_image(page, number)
    view(page, "Concepts")
    preview = page.get_by_alt_text("A preview of pot")
    assert preview.evaluate("i => i.decode().then(() => i.naturalWidth)") == 96
    sweep_chart(page)
    view(page, "Concepts")
    delete = page.get_by_role("button", name="Delete pot")
    twice = "b => { b.click(); const text = b.textContent; b.click(); return text; }"  # it waits for 3 s alone
    assert delete.evaluate(twice) == "Really?"
    page.get_by_text("No concept yet").wait_for()


def sweep_chart(page: Any) -> None:
    """A sweep's points; a click on one sets the strength in the prompt."""

    def row(strength: float, subject: float, prompt: float) -> dict[str, Any]:
        return {"strength": strength, "tau": None, "concept_start": 0.0, "guidance": 4.5,
                "subject_fidelity": {"value": subject}, "text_alignment": {"value": prompt}}  # fmt: skip

    rows = [row(0.5, 0.2, 0.9), row(1.0, 0.5, 0.7), row(1.3, 0.6, 0.4)]
    facts = {"concept": {"name": "pot"}, "preset": "quality", "prompt_fidelity": "text_alignment",
             "measured": rows, "front": rows, "points": {"balanced": rows[1], "faithful": rows[2]}}  # fmt: skip
    data = {"name": "quality.json", "mimeType": "application/json", "buffer": json.dumps(facts).encode()}
    page.get_by_label("Open a sweep").set_input_files(data)
    points = page.get_by_role("group", name="Sweep of pot").get_by_role("button")
    points.nth(2).wait_for()
    assert points.count() == 3
    points.nth(2).click()
    until(page, "document.querySelector('textarea').value.includes('<pot:1.3>')")


def test_stop_and_keep_and_cancel(page: Any, server: Served, monkeypatch: Any) -> None:
    photos(page, "kept")
    field(page, "Steps", "Teach").fill("2000")  # a number that no other stage has
    with held_until(monkeypatch) as stopping:
        press(page, "Teach")
        until(page, "/: [1-9]\\d* of 2000/.test(document.querySelector('.panel .progress')?.innerText)")
        with page.expect_response(lambda r: r.url.endswith("/stop")):
            page.get_by_role("form", name="Teach").get_by_role("button", name="Stop and keep").click()
        stopping.set()
        says(page, "<kept> is taught", "good")
    view(page, "Paint")
    page.get_by_label("Paint as I type").uncheck()
    field(page, "Images").fill("10")
    field(page, "Prompt").fill("a red car in the snow")
    with held_until(monkeypatch):
        press(page)
        until(page, "document.querySelector('.panel progress')?.value > 0")
        page.get_by_role("form", name="Paint").get_by_role("button", name="Cancel").click()
        says(page, "Cancelled.", "cancelled")
    assert message(page) == "Cancelled." and page.locator(".panel .progress").count() == 0


def test_an_image_brings_its_recipe_back(page: Any, server: Served, tmp_path: Path) -> None:
    paint(page, "a blue boat on the sea")
    image = tmp_path / "boat.png"
    image.write_bytes(bytes_of(server, page))
    field(page, "Prompt").fill("something else")
    view(page, "Recipe")
    page.locator(".drop input").set_input_files(str(image))
    page.get_by_text("Painted with turbo, seed 7").wait_for()
    button(page, "Put it into the form").click()
    assert field(page, "Prompt").input_value() == "a blue boat on the sea"
    assert field(page, "Preset").input_value() == "turbo"
    bare = tmp_path / "bare.png"
    Image.new("RGB", (64, 64)).save(bare)
    view(page, "Recipe")
    for path, words in ((bare, "carries no recipe"), (Path(__file__), "is not a JPEG, PNG, WebP")):
        page.locator(".drop input").set_input_files(str(path))
        says(page, words)
