"""The page and its jobs, in a real browser on an engine that paints nothing: quick, and halted on purpose."""

from __future__ import annotations

import base64
import io
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from minikin import events
from minikin.events import Event
from minikin.perfusion.concept_file import from_bytes
from minikin.server.engine import JobInputs, PreparedRequest
from tests.helpers.browsers import browsing
from tests.helpers.fake_engine import FakeEngine
from tests.helpers.servers import Served, concept, served

pytest.importorskip("gradio", reason="the page needs the extra minikin[studio]")
SECTIONS = ("Paint", "Inpaint", "Concepts", "Teach", "Recipe")
OTHER = """x
Steps: 20, Sampler: Euler a, Schedule type: Karras, CFG scale: 7.5, Seed: 5, Size: 96x64, Clip skip: 2"""
SHOTS = os.environ.get("MINIKIN_SHOTS")


class Engine(FakeEngine):
    """Teaches until it is told to go on, or to stop and keep."""

    def describe(self) -> dict[str, Any]:
        presets = [{"name": n, "steps": 4, "guidance": 1.0, "ready": True, "allowed": [1, 2, 4]}
                   for n in ("quality", "turbo")]  # fmt: skip
        return {**super().describe(), "presets": presets, "schedules": ["Karras", "Simple"]}

    def run(self, kind: str, prepared: PreparedRequest, inputs: JobInputs) -> Iterator[Event]:
        if kind != "teach":
            yield from super().run(kind, prepared, inputs)
            return
        name = prepared.recipe.name  # type: ignore[attr-defined]
        step = 1
        while not self.go.wait(0.05) and not (inputs.stop and inputs.stop.is_set()):
            yield events.Progress("teaching", step, 300, preview=lambda: Image.new("RGB", (96, 32), "teal"))
            step = min(step + 1, 120)
        yield events.Done(from_bytes(concept(name, 1), name), {})


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with browsing() as browser:
        yield browser


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Served]:
    engine = Engine()
    with served(engine, tmp_path / "s", page=True, image_folder=tmp_path / "images", one_library=True) as s:
        yield s
        engine.go.set()
        s.drained()


@pytest.fixture
def page(browser: Any, server: Served) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": 1200, "height": 860})
    tab = context.new_page()
    problems: list[str] = []
    tab.on("pageerror", lambda e: problems.append(str(e)))
    tab.set_default_timeout(60_000)
    yield opened(tab, server)
    shot(tab, "end")
    context.close()
    assert not problems


def opened(page: Any, server: Served) -> Any:
    page.goto(f"{server.url}/")
    page.wait_for_function("document.querySelector('#paint-kept')?.textContent")
    return page


def shot(page: Any, name: str) -> None:
    if SHOTS:
        test = os.environ["PYTEST_CURRENT_TEST"].split("::")[1].split(" ")[0]
        page.screenshot(path=f"{SHOTS}/{test}-{name}.png", full_page=True)


def section(page: Any, name: str) -> None:
    page.get_by_role("tab", name=name, exact=True).click()
    page.wait_for_selector(f"html.mk-{name.lower()}-started")  # its script comes when it is first opened


def says(page: Any, name: str, words: str) -> None:
    page.wait_for_function(f"document.querySelector('#{name}').innerText.includes({json.dumps(words)})")


def photo(size: tuple[int, int] = (64, 64), name: str = "photo.png") -> dict[str, Any]:
    out = io.BytesIO()
    Image.new("RGB", size, "orange").save(out, "PNG")
    return {"name": name, "mimeType": "image/png", "buffer": out.getvalue()}


def halted(server: Served) -> Callable[[], None]:
    """Hold every job at its present step; returns what lets them go on."""
    engine: Any = server.service.engine
    engine.go.clear()
    go_on: Callable[[], None] = engine.go.set
    return go_on


def teach(page: Any) -> None:
    section(page, "Teach")
    page.set_input_files("#teach-files", [photo((256, 64)), photo()])
    page.fill("#teach-name", "tom")
    page.fill("#teach-category", "cat")
    page.click("#teach-go")


@pytest.mark.slow
def test_what_runs_is_shown_on_every_tab_and_after_a_reload(page: Any, server: Served) -> None:
    halted(server)
    teach(page)
    says(page, "mk-now", "of 300")
    assert "Teaching <tom>" in page.inner_text("#mk-now")
    for name in SECTIONS:
        section(page, name)
        assert page.is_visible("#mk-now") and "of 300" in page.inner_text("#mk-now"), name
    opened(page, server)
    section(page, "Teach")
    says(page, "teach-progress", "of 300")
    assert page.is_visible("#teach-stop") and page.is_visible("#teach-cancel") and page.is_disabled("#teach-go")
    page.wait_for_selector("#teach-film img")
    section(page, "Paint")
    page.fill("#paint-prompt", "a cat")
    says(page, "paint-problem", "Live painting waits: Teaching <tom> is running")
    assert page.get_attribute("#paint-problem", "data-kind") == "note"
    shot(page, "waits")
    page.get_by_role("button", name="Stop Teaching <tom> and keep it").click()
    page.wait_for_selector("#mk-now", state="hidden")
    page.wait_for_function("document.querySelector('#paint-names').innerText.includes('<tom>')")
    section(page, "Teach")
    says(page, "teach-problem", "<tom> is taught")
    assert page.get_attribute("#teach-problem", "data-kind") == "good"


@pytest.mark.slow
def test_cancelled_from_the_strip(page: Any, server: Served) -> None:
    halted(server)
    teach(page)
    says(page, "mk-now", "Teaching <tom>")
    section(page, "Concepts")
    page.get_by_role("button", name="Cancel Teaching <tom>").click()
    page.wait_for_selector("#mk-now", state="hidden")
    section(page, "Teach")
    says(page, "teach-problem", "Cancelled.")
    assert page.get_attribute("#teach-problem", "data-kind") == "cancelled"


@pytest.mark.slow
def test_drafts_have_other_seeds_unless_one_is_kept(page: Any, server: Served) -> None:
    page.fill("#paint-n", "2")
    page.fill("#paint-prompt", "a cat")

    def seeds() -> list[int]:
        before = page.locator(".mk-card").count()
        page.keyboard.press("Control+Enter")
        page.wait_for_function(f"document.querySelectorAll('.mk-card').length === {before + 2}")
        labels = page.locator(".mk-card .mk-pick").all_inner_texts()[:2]
        return [int(label) for label in labels]

    first, second = seeds(), seeds()
    assert not set(first) & set(second)
    page.fill("#paint-seed", "7")
    assert page.is_checked("#paint-lock") and (seeds(), seeds()) == ([7, 8], [7, 8])
    page.uncheck("#paint-lock")
    assert seeds() == [7, 8] and not set(seeds()) & {7, 8}, "what is shown is painted, and then another"
    assert page.get_attribute("#paint-download", "download").startswith("a-cat-")
    folder = server.service.writer.image_folder
    assert folder and f"saved in {folder.path}" in page.inner_text("#paint-kept")
    assert len(list(folder.path.glob("a-cat-*.png"))) == 12


@pytest.mark.slow
def test_a_reload_forgets_nothing(page: Any, server: Served) -> None:
    page.uncheck("#paint-live")
    page.fill("#paint-prompt", "a cat")
    page.click("#paint-go")
    page.wait_for_selector(".mk-card >> nth=3")
    page.locator(".mk-card .mk-face").nth(2).click()
    source = page.get_attribute("#paint-shown", "src")
    page.click("#paint-more summary")
    page.fill("#paint-guidance", "9")
    page.click("#paint-more summary")
    assert "guidance 9" in page.inner_text("#paint-more summary"), "what acts is said while it is hidden"
    opened(page, server)
    page.wait_for_selector("#paint-tools:not([hidden])")
    assert page.get_attribute("#paint-shown", "src") == source
    assert not page.is_checked("#paint-live") and page.is_visible("#paint-guidance")


@pytest.mark.slow
def test_messages_are_for_a_page(page: Any, server: Served) -> None:
    page.click("#paint-go")
    says(page, "paint-problem", "Type a prompt first")
    page.fill("#paint-prompt", "a photo of <nobody>")
    page.click("#paint-go")
    says(page, "paint-problem", "Unknown concept 'nobody'")
    text = page.inner_text("#paint-problem")
    assert "under Concepts" in text and not re.search(r"minikin|`|--", text), text
    assert page.get_attribute("#paint-problem", "data-kind") == "error"
    colour = """kind => { const e = document.querySelector('#paint-problem'); e.dataset.kind = kind;
        return getComputedStyle(e).color; }"""
    colours = {page.evaluate(colour, kind) for kind in ("error", "note", "cancelled", "good")}
    assert len(colours) == 4
    plain = "m => import('/page/minikin.js').then(p => p.plain(m))"
    command = "minikin models add FILE --name lcm"
    assert page.evaluate(plain, f"Add it: `{command}`.") == f"Add it: {command} (in a terminal)."
    for message in ("Use --preset quality.", "It is not here: `minikin models pull lcm`.", "--no-half failed"):
        assert not re.search(r"`|--", page.evaluate(plain, message))


@pytest.mark.slow
def test_a_sign_of_work_comes_before_the_answer(page: Any, server: Served) -> None:
    held: list[Any] = []
    page.route("**/api/paint", lambda route: held.append(route))
    page.fill("#paint-prompt", "a cat")
    page.click("#paint-go")
    says(page, "paint-progress", "Sending")
    while not held:
        page.wait_for_timeout(20)
    held[0].continue_()
    page.wait_for_selector(".mk-card")


@pytest.mark.slow
def test_the_header_says_when_the_server_is_warm(page: Any, server: Served) -> None:
    cold = [True]
    page.route("**/readyz", lambda r: r.fulfill(status=503, body="{}") if cold else r.continue_())
    opened(page, server)
    says(page, "mk-base", "warming up")
    cold.clear()
    page.wait_for_function("!document.querySelector('#mk-base').innerText.includes('warming')")


@pytest.mark.slow
def test_files_dropped_beside_their_place_and_pasted(page: Any, server: Served) -> None:
    section(page, "Teach")
    data = base64.b64encode(photo()["buffer"]).decode()
    for kind, attribute, count in (("drop", "dataTransfer", 1), ("paste", "clipboardData", 2)):
        prevented = page.evaluate(
            """([kind, attribute, data]) => {
              const files = new DataTransfer();
              const bytes = Uint8Array.from(atob(data), c => c.charCodeAt(0));
              files.items.add(new File([bytes], "p.png", {type: "image/png"}));
              const type = kind === "drop" ? DragEvent : ClipboardEvent;
              const event = new type(kind, {[attribute]: files, bubbles: true, cancelable: true});
              document.body.dispatchEvent(event);
              return event.defaultPrevented;
            }""",
            [kind, attribute, data],
        )  # fmt: skip
        assert prevented, "else the browser opens the file"
        assert page.locator("#teach-photos figure").count() == count
    section(page, "Inpaint")
    assert page.locator("#teach-photos figure").count() == 2


@pytest.mark.slow
def test_photos_keep_their_shape_and_heic_is_taken(page: Any, server: Served) -> None:
    section(page, "Teach")
    heic = {"name": "IMG_1.HEIC", "mimeType": "", "buffer": b"not shown by this browser"}
    page.set_input_files(
        "#teach-files",
        [photo((400, 100)), photo((100, 300)), heic, photo(name="a.pdf") | {"mimeType": "application/pdf"}],
    )
    page.wait_for_selector(".mk-unshown")
    assert "IMG_1.HEIC" in page.inner_text("#teach-photos") and "a.pdf" in page.inner_text("#teach-problem")
    boxes = [page.locator(".mk-photo").nth(k).bounding_box() for k in range(2)]
    assert [round(b["width"] / b["height"], 1) for b in boxes] == [4.0, 0.3]
    shot(page, "photos")


@pytest.mark.slow
def test_the_name_is_checked_in_the_browser(page: Any, server: Served) -> None:
    """Chromium reads patterns with the `v` flag, under which a bare hyphen at a class's end is an error."""
    section(page, "Teach")
    valid = "e => (new RegExp(e.pattern, 'v'), e.checkValidity())"
    for name, right in (("tom", True), ("tom_2-b", True), ("Tom", False), ("2tom", False)):
        page.fill("#teach-name", name)
        assert page.eval_on_selector("#teach-name", valid) is right, name


@pytest.mark.slow
def test_a_concept_of_the_command_line_appears(page: Any, server: Served, tmp_path: Path) -> None:
    from minikin.perfusion import library

    path = tmp_path / "rex.safetensors"
    path.write_bytes(concept("rex", 3))
    library.follow(path, "rex", None)
    section(page, "Concepts")
    page.wait_for_selector(".mk-concept")
    assert "<rex>" in page.inner_text("#concepts-list")
    section(page, "Paint")
    assert "<rex>" in page.inner_text("#paint-names")


@pytest.mark.slow
def test_an_images_whole_recipe_comes_back(page: Any, server: Served) -> None:
    """Size, guidance, sampler and seed, of our own and of A1111's; before, they were lost."""
    page.uncheck("#paint-live")
    page.click("#paint-more summary")
    page.fill("#paint-guidance", "9")
    page.fill("#paint-size", "128x64")
    page.select_option("#paint-scheduler", "Euler a")
    page.fill("#paint-prompt", "a cat")
    page.fill("#paint-seed", "11")
    page.click("#paint-go")
    page.wait_for_selector("#paint-tools:not([hidden])")
    for name in ("guidance", "size", "seed"):
        page.fill(f"#paint-{name}", "1" if name != "size" else "")
    page.select_option("#paint-scheduler", "")
    page.click("#paint-again")
    page.wait_for_function("document.querySelector('#paint-size').value === '128x64'")
    assert form(page) == ["9", "128x64", "Euler a", "11"]
    image, info, out = Image.new("RGB", (96, 96)), PngInfo(), io.BytesIO()
    info.add_text("parameters", OTHER)
    image.save(out, "PNG", pnginfo=info)
    with server.client() as c:
        read = c.post("/api/recipe", files={"file": out.getvalue()}).json()
    got = page.evaluate("f => import('/page/paint.js').then(p => p.formOf(f))", read)
    names = ("guidance", "size", "scheduler", "schedule", "seed", "steps", "clip_skip")
    assert [got[name] for name in names] == [7.5, "96x64", "Euler a", "Karras", 5, 20, 2]
    page.evaluate("f => import('/page/minikin.js').then(p => p.tell('recipe', f))", got)
    assert form(page) == ["7.5", "96x64", "Euler a", "5"] and page.input_value("#paint-schedule") == "Karras"


def form(page: Any) -> list[str]:
    return [page.input_value(f"#paint-{name}") for name in ("guidance", "size", "scheduler", "seed")]


def test_the_icon_is_ours(server: Served) -> None:
    with server.client() as c:
        for path in ("/favicon.ico", "/studio/favicon.ico"):
            response = c.get(path)
            assert response.status_code == 200 and response.content == c.get("/page/icon.svg").content, path
