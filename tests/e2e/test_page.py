"""The page, in a real browser on a real server with the embedded base, and what of Gradio is closed."""

from __future__ import annotations

import io
import json
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

from minikin.models.base import Base
from minikin.server.jobs import Job
from minikin.server.studio_engine import StudioEngine
from minikin.studio import Studio
from tests.helpers.browsers import browsing
from tests.helpers.fake_engine import FakeEngine
from tests.helpers.servers import Served, served

pytest.importorskip("gradio", reason="the page needs the extra minikin[studio]")
EXAMPLES = Path(__file__).parents[2] / "examples" / "my_teapot"
SECTIONS = ("Paint", "Inpaint", "Concepts", "Teach", "Recipe")
STEPS = 2000  # of teaching that is stopped: a number that no other stage has
DESKTOP, PHONE = {"width": 1200, "height": 860}, {"width": 390, "height": 844}


# ---- without a browser -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def closed(tmp_path_factory: Any) -> Iterator[Served]:
    with served(FakeEngine(), tmp_path_factory.mktemp("closed") / "s", page=True) as s:
        yield s


def test_the_page_is_there(closed: Served) -> None:
    with closed.client() as c:
        assert c.get("/").headers["location"] == "/studio/"
        response = c.get("/studio/")
        assert (
            response.status_code == 200 and "connect-src 'self'" in response.headers["content-security-policy"]
        )
        for name in ("minikin", "paint", "inpaint", "concepts", "teach", "recipe", "live", "head", "now"):
            assert "javascript" in c.get(f"/page/{name}.js").headers["content-type"], name
        assert c.get("/api/capabilities").json()["kinds"]["refine"]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/gradio_api/upload"), ("GET", "/gradio_api/file=/etc/passwd"), ("GET", "/gradio_api/info"),
        ("GET", "/gradio_api/proxy=https://example.org/"), ("POST", "/gradio_api/queue/join"),
        ("POST", "/gradio_api/run/predict"), ("POST", "/gradio_api/call/x"), ("POST", "/login"),
        ("GET", "/monitoring"), ("POST", "/gradio_api/component_server"), ("GET", "/gradio_api/openapi.json"),
    ],
)  # fmt: skip
def test_what_the_page_does_not_need_of_gradio_is_closed(closed: Served, method: str, path: str) -> None:
    with closed.client() as c:
        response = c.request(method, f"/studio{path}", json={} if method == "POST" else None)
        assert response.status_code == 404, response.text[:200]


def test_the_gate_stands_before_the_page(tmp_path: Path) -> None:
    with served(FakeEngine(), tmp_path / "s", keys=["k"], page=True) as s, s.client() as c:
        for path in ("/", "/studio/", "/studio/config", "/studio/theme.css", "/page/paint.js"):
            response = c.get(path)
            assert response.status_code == 401 and "Basic" in response.headers["www-authenticate"], path
            assert c.get(path, auth=("me", "k")).status_code in (200, 307), path
        foreign = {"Origin": "https://example.org", "X-API-Key": "k"}
        assert c.get("/studio/", headers=foreign).status_code == 403


def test_nothing_in_the_page_is_fetched_from_elsewhere(closed: Served) -> None:
    """The sections' own files name no other host; Gradio's own page does in tags that fetch nothing."""
    web = Path(__file__).parents[2] / "src" / "minikin" / "web" / "static"
    for path in web.iterdir():
        matches = set(re.findall(r"https?://[\w.]+", path.read_text()))
        assert matches <= {"http://www.w3.org"}, (path.name, matches)
    with closed.client() as c:
        text = c.get("/studio/").text
    fetched = re.findall(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=\"(https?://[^\"]+)", text)
    assert not [f for f in fetched if urlsplit(f).hostname != "127.0.0.1"]


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_what_is_written_can_be_read(scheme: int) -> None:
    """WCAG's contrast of 4.5 for every colour of words on every ground they stand on."""
    text = (Path(__file__).parents[2] / "src" / "minikin" / "web" / "static" / "page.css").read_text()
    pairs = re.findall(r"--([\w-]+): light-dark\((#\w{6}), (#\w{6})\)", text)
    colours = {name: schemes[scheme] for name, *schemes in pairs}
    grounds = ("paper", "sheet", "wash")
    matches = {
        **{(ink, on): _contrast(colours[ink], colours[on]) for on in grounds
           for ink in ("ink", "soft", "accent", "good", "error", "note", "cancelled")},
        ("on-accent", "accent"): _contrast(colours["on-accent"], colours["accent"]),
    }  # fmt: skip
    assert {pair: round(c, 2) for pair, c in matches.items() if c < 4.5} == {}
    assert _contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01), "just too little"


def _contrast(a: str, b: str) -> float:
    def light(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] + 0.05

    return max(light(a), light(b)) / min(light(a), light(b))


# ---- in a browser ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tiny: Base, tmp_path_factory: Any) -> Iterator[Served]:
    with served(StudioEngine(Studio(tiny)), tmp_path_factory.mktemp("page") / "s", page=True) as s:
        yield s


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with browsing() as tab:
        yield tab


@pytest.fixture
def page(browser: Any, server: Served) -> Iterator[Any]:
    """A page of its own; whatever it asks of another host, or says on the console, is an error."""
    context = browser.new_context(viewport=DESKTOP)
    tab = context.new_page()
    tab.set_default_timeout(120_000)  # of waiting: a busy machine is no fault
    foreign: list[str] = []
    message: list[str] = []

    def count_request(request: Any) -> None:
        parts = urlsplit(request.url)
        if parts.scheme in ("http", "https", "ws", "wss") and parts.hostname != "127.0.0.1":
            foreign.append(request.url)

    tab.on("request", count_request)
    tab.on("websocket", count_request)
    tab.on("pageerror", lambda e: message.append(str(e)))
    opened(tab, server)
    yield tab
    shots = os.environ.get("MINIKIN_SHOTS")
    if shots:
        tab.screenshot(path=f"{shots}/{os.environ['PYTEST_CURRENT_TEST'].split('::')[1].split(' ')[0]}.png")
    context.close()
    assert not foreign and not message


def opened(page: Any, server: Served) -> None:
    page.goto(f"{server.url}/")
    page.wait_for_function("document.querySelector('#paint-preset')?.options.length > 0", timeout=120_000)


def section(page: Any, name: str) -> None:
    page.get_by_role("tab", name=name, exact=True).click()
    page.wait_for_selector(f"html.mk-{name.lower()}-started")  # its script comes when it is first opened


def live_image(page: Any, after: int = 0) -> int:
    """The number of the live image that is shown, once it is a later one."""
    page.wait_for_function(
        f"Number(document.querySelector('#paint-shown')?.dataset.number ?? 0) > {after}", timeout=120_000
    )
    return int(page.locator("#paint-shown").get_attribute("data-number"))


def drafts(page: Any, prompt: str = "a red car in the snow", n: int = 1) -> None:
    page.select_option("#paint-preset", "turbo")
    page.fill("#paint-seed", "7")
    page.fill("#paint-n", str(n))
    page.fill("#paint-prompt", prompt)
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#paint-tools:not([hidden])", timeout=240_000)


def bytes_of(server: Served, page: Any, name: str = "paint") -> bytes:
    """The file behind a section's Download."""
    with server.client() as c:
        return c.get(page.get_attribute(f"#{name}-download", "href")).content


def image_of(server: Served, page: Any, name: str = "paint") -> Image.Image:
    return Image.open(io.BytesIO(bytes_of(server, page, name)))


def photos(page: Any, name: str) -> None:
    """Teach's form, filled but for the steps."""
    section(page, "Teach")
    page.set_input_files("#teach-files", [str(p) for p in sorted(EXAMPLES.glob("*.jpg"))[:3]])
    page.fill("#teach-name", name)
    page.fill("#teach-category", "teapot")


@pytest.mark.slow
def test_typing_paints_and_the_latest_wins(page: Any) -> None:
    sent: dict[str, Any] = {}
    steps = set()

    def wished(frame: str) -> None:
        sent.update(json.loads(frame))
        steps.add(sent["steps"])

    page.on("websocket", lambda socket: socket.on("framesent", wished))
    page.focus("#paint-prompt")
    page.keyboard.press("a")
    while not sent:  # its way to the server is open: who types on is ahead of it
        page.wait_for_timeout(20)
    page.locator("#paint-prompt").press_sequentially(" red car in the snow", delay=5)
    page.wait_for_function(
        "document.querySelector('#paint-shown')?.dataset.prompt === 'a red car in the snow'", timeout=120_000
    )
    assert page.locator("#paint-shown").get_attribute("src").startswith("data:image/jpeg;base64,")
    end = time.monotonic() + 300
    while sent["steps"] != 2 and time.monotonic() < end:
        page.wait_for_timeout(20)
    assert sent["steps"] == 2 and steps == {1, 2}, "hurried while keys came, then in full"
    page.fill("#paint-prompt", "a photo of <nobody")
    page.fill("#paint-prompt", "a photo of <nobody>")
    page.wait_for_function("document.querySelector('#paint-problem').textContent.includes('nobody')")
    assert "Unknown concept 'nobody'" in page.inner_text("#paint-problem")


@pytest.mark.slow
def test_drafts_are_kept_picked_and_refined(page: Any, server: Served) -> None:
    """Two drafts; after a reload they are there, and the form is as it was; one is refined at 1.5x."""
    drafts(page, n=2)
    assert page.get_attribute("#paint-download", "download") == "a-red-car-in-the-snow-7.png"
    assert "parameters" in image_of(server, page).info
    page.reload()
    page.wait_for_selector(".mk-card")
    assert page.input_value("#paint-prompt") == "a red car in the snow"
    cards = page.locator(".mk-card").count()
    assert cards >= 2 and page.is_disabled("#refine-go")
    page.locator(".mk-card input").first.check()
    page.select_option("#refine-size", "1.5x")
    page.click("#refine-go")
    page.wait_for_selector(".mk-card[data-kind=refine]", timeout=240_000)
    assert "192x192" in page.inner_text("#paint-caption")


# counts what is shown on the way
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


PREVIEWS = """() => {
  const shown = document.querySelector('#inpaint-shown');
  window.previews = 0;
  new MutationObserver(() => { previews += shown.src.startsWith('data:image/jpeg'); }).observe(
    shown, {attributeFilter: ['src']});
}"""


@pytest.mark.slow
def test_inpainting_under_a_drawn_mask(page: Any, server: Served, monkeypatch: Any) -> None:
    drafts(page)
    before = np.asarray(image_of(server, page).convert("RGB"))
    page.click("#paint-to-inpaint")
    page.wait_for_selector("#inpaint-mask", state="visible")
    page.wait_for_function("document.querySelector('#inpaint-mask').width === 128")
    page.fill("#inpaint-prompt", "a yellow duck")
    page.select_option("#inpaint-preset", "turbo")
    page.click("#inpaint-go")
    assert "Draw over" in page.inner_text("#inpaint-problem")
    box = page.locator("#inpaint-mask").bounding_box()
    at = [(box["x"] + box["width"] * a, box["y"] + box["height"] * b) for a, b in ((0.3, 0.5), (0.6, 0.6))]
    page.mouse.move(*at[0])
    page.mouse.down()
    page.mouse.move(*at[1], steps=5)
    page.mouse.up()
    page.evaluate(PREVIEWS)
    with held_until(monkeypatch) as observed:
        page.click("#inpaint-go")
        page.wait_for_function("previews > 0", timeout=240_000)
        observed.set()
        page.wait_for_selector("#inpaint-tools:not([hidden])", timeout=240_000)
    after = np.asarray(image_of(server, page, "inpaint").convert("RGB"))
    changed = (before != after).any(-1)
    assert after.shape == before.shape and 100 < changed.sum() < 0.4 * changed.size
    assert not changed[:20].any() and not changed[:, -20:].any(), "far from the brush not a byte moves"
    page.fill("#extend-right", "32")
    page.click("#brush-clear")
    page.click("#inpaint-go")
    page.wait_for_function(
        "document.querySelector('#inpaint-caption').textContent.includes('160x128')", timeout=60_000
    )


@pytest.mark.slow
def test_the_mask_is_drawn_by_keyboard_too(page: Any) -> None:
    drafts(page)
    page.click("#paint-to-inpaint")
    page.wait_for_function("document.querySelector('#inpaint-mask').width === 128")
    page.focus("#inpaint-mask")
    for key in ("ArrowRight", "ArrowDown", "Space"):
        page.keyboard.press(key)
    alpha = """c => c.getContext('2d').getImageData(0, 0, 128, 128).data
        .filter((v, i) => i % 4 === 3 && v > 200).length"""
    assert page.eval_on_selector("#inpaint-mask", alpha) > 50
    page.click("#brush-undo")
    page.focus("#paint-prompt") if page.is_visible("#paint-prompt") else page.focus("#inpaint-prompt")
    assert page.eval_on_selector("#inpaint-mask", alpha) == 0


@pytest.mark.slow
def test_teaching_in_the_page(page: Any, server: Served) -> None:
    """Photos, masks to accept, a strip of samples, the concept in the list, a slider that generates again."""
    section(page, "Teach")
    page.click("#teach-go")
    assert "photos first" in page.inner_text("#teach-problem")
    photos(page, "pot")
    page.click("#teach-look")
    page.wait_for_selector(".mk-mask", timeout=240_000)
    assert page.locator(".mk-mask").count() == 3
    page.locator("#teach-photos input[type=checkbox]").first.uncheck()
    assert page.locator(".mk-mask").count() == 2
    page.fill("#teach-steps", "6")
    page.fill("#teach-every", "3")
    page.click("#teach-go")
    page.wait_for_selector("#teach-done:not([hidden])", timeout=480_000)
    assert "<pot> is taught" in page.inner_text("#teach-problem")
    assert page.locator("#teach-film img").count() >= 1
    page.click("#teach-paint")
    page.wait_for_selector("#strength-pot")
    number = live_image(page)
    page.locator("#strength-pot").fill("0.4")
    assert "<pot:0.4>" in page.input_value("#paint-prompt")
    live_image(page, number)
    section(page, "Concepts")
    page.wait_for_selector(".mk-concept")
    assert page.locator(".mk-concept img").evaluate("i => i.decode().then(() => i.naturalWidth)") == 96
    sweep_chart(page)
    section(page, "Concepts")
    twice = (
        "b => { b.click(); const asked = b.textContent; b.click(); return asked; }"  # it waits for 3 s alone
    )
    assert page.get_by_role("button", name="Delete").evaluate(twice) == "Really?"
    page.wait_for_selector("#concepts-none:not([hidden])")


def sweep_chart(page: Any) -> None:
    """A sweep's points; a click on one sets the strength in the prompt."""

    def row(strength: float, subject: float, prompt: float) -> dict[str, Any]:
        return {"strength": strength, "tau": None, "concept_start": 0.0, "guidance": 4.5,
                "subject_fidelity": {"value": subject}, "text_alignment": {"value": prompt}}  # fmt: skip

    rows = [row(0.5, 0.2, 0.9), row(1.0, 0.5, 0.7), row(1.3, 0.6, 0.4)]
    facts = {"concept": {"name": "pot"}, "preset": "quality", "prompt_fidelity": "text_alignment",
             "measured": rows, "front": rows, "points": {"balanced": rows[1], "faithful": rows[2]}}  # fmt: skip
    data = {"name": "quality.json", "mimeType": "application/json", "buffer": json.dumps(facts).encode()}
    page.set_input_files("#sweep-file", data)
    page.wait_for_selector("#sweep-chart circle")
    assert page.locator("#sweep-chart circle").count() == 3
    page.locator("#sweep-chart circle").nth(2).click()
    page.wait_for_function("document.querySelector('#paint-prompt').value.includes('<pot:1.3>')")


@pytest.mark.slow
def test_stop_and_keep_and_cancel(page: Any, server: Served, monkeypatch: Any) -> None:
    photos(page, "kept")
    page.fill("#teach-steps", str(STEPS))
    with held_until(monkeypatch) as stopping:
        page.click("#teach-go")
        # a step of teaching is done: the bar shows the steps of earlier stages, too, finding masks among them
        page.wait_for_function(
            f"/: [1-9]\\d* of {STEPS}/.test(document.querySelector('#teach-progress').innerText)"
        )
        with page.expect_response(lambda r: r.url.endswith("/stop")):
            page.click("#teach-stop")
        stopping.set()
        page.wait_for_selector("#teach-done:not([hidden])", timeout=480_000)
    assert "<kept> is taught" in page.inner_text("#teach-problem")
    section(page, "Paint")
    page.uncheck("#paint-live")
    page.select_option("#paint-preset", "quality")
    page.fill("#paint-steps", "50")
    page.fill("#paint-n", "10")
    page.fill("#paint-prompt", "a red car in the snow")
    with held_until(monkeypatch):
        page.click("#paint-go")
        page.wait_for_function("document.querySelector('#paint-progress progress').value > 0", timeout=240_000)
        page.click("#paint-cancel")
        page.wait_for_function(
            "document.querySelector('#paint-problem').textContent === 'Cancelled.'", timeout=120_000
        )
    assert page.is_hidden("#paint-progress") and page.is_enabled("#paint-go")
    page.fill("#paint-steps", "")


@pytest.mark.slow
def test_an_image_brings_its_recipe_back(page: Any, server: Served, tmp_path: Path) -> None:
    drafts(page, "a blue boat on the sea")
    image = tmp_path / "boat.png"
    image.write_bytes(bytes_of(server, page))
    page.fill("#paint-prompt", "something else")
    section(page, "Recipe")
    page.set_input_files("#recipe-file", str(image))
    page.wait_for_selector("#recipe-found:not([hidden])")
    assert "Painted with turbo, seed 7" in page.inner_text("#recipe-chain")
    page.click("#recipe-use")
    assert page.input_value("#paint-prompt") == "a blue boat on the sea"
    assert page.input_value("#paint-preset") == "turbo"
    bare = tmp_path / "bare.png"
    Image.new("RGB", (64, 64)).save(bare)
    section(page, "Recipe")
    for path, words in ((bare, "carries no recipe"), (Path(__file__), "is not a JPEG, PNG, WebP")):
        page.set_input_files("#recipe-file", str(path))
        page.wait_for_function(f"document.querySelector('#recipe-problem').textContent.includes('{words}')")


@pytest.mark.slow
def test_by_keyboard(page: Any) -> None:
    """The order of tabbing is that of reading, every stop shows its focus and has a name."""
    page.focus("#paint-prompt")
    order = []
    for _ in range(12):
        page.keyboard.press("Tab")
        order.append(page.evaluate("document.activeElement.id || document.activeElement.tagName.toLowerCase()"))
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid", order[-1]
    expected = [
        "paint-live",
        "paint-preset",
        "paint-steps",
        "paint-seed",
        "paint-dice",
        "paint-lock",
        "paint-n",
        "summary",
        "paint-go",
    ]
    assert [x for x in order if x in expected] == expected
    unnamed = """() => [...document.querySelectorAll('#sections :is(input, textarea, select, button, canvas)')]
        .filter(e => !(e.labels?.length || e.getAttribute('aria-label') || e.textContent.trim()))
        .map(e => e.id || e.outerHTML.slice(0, 80))"""
    for name in SECTIONS:
        section(page, name)
        assert page.evaluate(unnamed) == []


@pytest.mark.slow
def test_on_a_phone(page: Any) -> None:
    """390 px: nothing is wider than the screen, in no section; fields do not zoom (16 px)."""
    page.set_viewport_size(PHONE)
    drafts(page, n=3)
    for name in SECTIONS:
        section(page, name)
        page.wait_for_timeout(150)
        assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0, name
        if os.environ.get("MINIKIN_SHOTS"):
            page.screenshot(path=f"{os.environ['MINIKIN_SHOTS']}/phone-{name}.png", full_page=True)
    assert page.eval_on_selector("#paint-prompt", "e => getComputedStyle(e).fontSize") == "16px"
    paper = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(paper) == "rgb(250, 249, 246)"
    page.emulate_media(color_scheme="dark")
    assert page.evaluate(paper) == "rgb(23, 22, 20)"
