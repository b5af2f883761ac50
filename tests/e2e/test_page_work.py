"""The page and its jobs, in a real browser on an engine that paints nothing: quick, and halted on purpose."""

from __future__ import annotations

import base64
import io
import json
import re
import zipfile
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
from tests.helpers import axe
from tests.helpers.browsers import browsing
from tests.helpers.fake_engine import FakeEngine
from tests.helpers.pages import (
    DESKTOP,
    PHONE,
    VIEWS,
    button,
    drafts,
    drag,
    field,
    form,
    large_image,
    message,
    opened,
    paint,
    press,
    says,
    shot,
    tab,
    until,
    view,
)
from tests.helpers.servers import Served, concept, served

pytestmark = pytest.mark.slow
OTHER = """x
Steps: 20, Sampler: Euler a, Schedule type: Karras, CFG scale: 7.5, Seed: 5, Size: 96x64, Clip skip: 2"""


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
        self.photos = inputs.photos
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
    with tab(browser, server) as page:
        yield page


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
    view(page, "Teach")
    page.locator(".drop input").set_input_files([photo((256, 64)), photo()])
    field(page, "Name", "Teach").fill("tom")
    field(page, "What it is", "Teach").fill("cat")
    press(page, "Teach")


def queue(page: Any) -> Any:
    """The strip of jobs above every view."""
    return page.get_by_role("region", name="Running now")


def test_what_runs_is_shown_in_every_view_and_after_a_reload(page: Any, server: Served) -> None:
    halted(server)
    teach(page)
    says(page, "Teaching <tom>")
    for name in VIEWS:
        view(page, name)
        queue(page).filter(has_text="of 300").wait_for()
    opened(page, server)
    view(page, "Teach")
    stop = form(page, "Teach").get_by_role("button", name="Stop and keep")
    stop.wait_for()
    assert form(page, "Teach").locator("button.main").is_disabled()
    page.get_by_role("group", name="Samples").get_by_role("img").first.wait_for()
    view(page, "Paint")
    field(page, "Prompt").fill("a cat")
    says(page, "Live painting waits: Teaching <tom> is running", "note")
    shot(page, "waits")
    button(page, "Stop Teaching <tom> and keep it").click()
    queue(page).wait_for(state="hidden")
    button(page, "<tom>").wait_for()
    view(page, "Teach")
    says(page, "<tom> is taught", "good")


def test_cancelled_from_the_strip(page: Any, server: Served) -> None:
    halted(server)
    teach(page)
    says(page, "Teaching <tom>")
    view(page, "Concepts")
    button(page, "Cancel Teaching <tom>").click()
    queue(page).wait_for(state="hidden")
    view(page, "Teach")
    says(page, "Cancelled.", "cancelled")


def test_drafts_have_other_seeds_unless_one_is_kept(page: Any, server: Served) -> None:
    field(page, "Images").fill("2")
    field(page, "Prompt").fill("a cat")

    def seeds() -> list[int]:
        before = drafts(page).count()
        page.keyboard.press("Control+Enter")
        until(page, f"document.querySelectorAll('.card').length === {before + 2}")
        return [int(label) for label in drafts(page).locator(".check").all_inner_texts()[:2]]

    first, second = seeds(), seeds()
    assert not set(first) & set(second)
    keep = button(page, "Keep the seed")
    field(page, "Seed").fill("7")
    assert keep.get_attribute("aria-pressed") == "true" and (seeds(), seeds()) == ([7, 8], [7, 8])
    keep.click()
    assert seeds() == [7, 8] and not set(seeds()) & {7, 8}, "what is shown is painted, and then another"
    assert page.get_by_role("link", name="Download").get_attribute("download").startswith("a-cat-")
    folder = server.service.writer.image_folder
    assert folder and page.get_by_text(f"saved in {folder.path}").is_visible()
    assert len(list(folder.path.glob("a-cat-*.png"))) == 12


def test_styles_and_earlier_prompts(page: Any, server: Served) -> None:
    """A style is added to the prompt, or put around it, when it is painted; both survive a reload."""
    page.locator("summary", has_text="Styles").click()
    for name, text in (("ink", "drawn in ink"), ("photo", "a photo of {prompt}")):
        field(page, "Name of a new style").fill(name)
        field(page, "What it adds to the prompt").fill(text)
        button(page, "Add the style").click()
    shot(page, "styles")
    paint(page, "a cat")
    opened(page, server)
    page.locator("summary", has_text="Styles: ink, photo").click()
    page.get_by_role("button", name="ink", exact=True).click()
    paint(page, "a dog")
    with server.client() as c:
        jobs = c.get("/api/jobs").json()["jobs"]
    assert [job["about"] for job in jobs] == ["a photo of a dog", "a photo of a cat, drawn in ink"]
    page.get_by_label("Earlier prompts").select_option("a cat")
    assert field(page, "Prompt").input_value() == "a cat"
    drafts(page).first.get_by_role("button").click()
    button(page, "Use its recipe").click()
    until(page, "document.querySelector('textarea').value === 'a photo of a dog'")
    assert page.locator("summary", has_text="Styles").inner_text() == "Styles", "the recipe's prompt has it"
    button(page, "Delete the style photo").click()
    button(page, "Delete the style photo").click()  # really
    styles = page.get_by_role("group", name="Styles").get_by_role("button")
    assert styles.count() == 2
    tab = opened(page.context.new_page(), server)
    tab.locator("summary", has_text="Styles").click()
    field(tab, "Name of a new style").fill("oil")
    field(tab, "What it adds to the prompt").fill("in oil")
    button(tab, "Add the style").click()
    styles.nth(3).wait_for()
    tab.close()


def test_a_reload_forgets_nothing(page: Any, server: Served) -> None:
    live = page.get_by_label("Paint as I type")
    live.uncheck()
    field(page, "Prompt").fill("a cat")
    press(page)
    drafts(page).nth(3).wait_for()
    drafts(page).nth(2).get_by_role("button").click()
    source = large_image(page).get_attribute("src")
    more = page.locator("summary", has_text="More")
    more.click()
    for text in ("2", "", "2"):
        field(page, "Clip skip").fill(text)
        assert field(page, "Clip skip").is_visible(), "emptied, it stays open under the hand that types"
    more.click()
    assert "clip skip 2" in more.inner_text(), "what acts is said while it is hidden"
    opened(page, server)
    page.get_by_role("link", name="Download").wait_for()
    assert large_image(page).get_attribute("src") == source
    assert not live.is_checked() and field(page, "Clip skip").is_visible()


def test_names_are_completed_and_weighed(page: Any, server: Served) -> None:
    """Behind "<" the concepts and LoRAs are proposed; a named concept has its strength and can be left out."""
    for name in ("tom", "rex"):
        server.service.concept_store.put("local", concept(name, 1), None)
    page.reload()
    prompt = field(page, "Prompt")
    button(page, "<rex>").wait_for()
    prompt.press_sequentially("a photo of <r")
    names = page.get_by_role("listbox", name="Names").get_by_role("option")
    names.first.wait_for()
    assert names.all_inner_texts() == ["<rex>\ncat"]
    prompt.press("Enter")
    assert prompt.input_value() == "a photo of <rex>"
    prompt.press_sequentially(" and <")
    names.nth(2).wait_for()
    for key in ("ArrowDown", "ArrowDown", "Tab"):
        prompt.press(key)
    assert prompt.input_value() == "a photo of <rex> and <lora:style:1>"
    field(page, "<rex>").fill("0.5")
    assert "<rex:0.5>" in prompt.input_value()
    button(page, "Leave rex out of the prompt").click()
    until(page, "document.querySelector('textarea').value.startsWith('a photo of cat and')")


def test_regions_are_proposed_drawn_moved_and_removed(page: Any, server: Served) -> None:
    """What a box over the image says is in the prompt, by mouse, keyboard and a list of names."""
    for name in ("tom", "rex"):
        server.service.concept_store.put("local", concept(name, 1), None)
    page.reload()
    prompt = field(page, "Prompt")
    button(page, "<rex>").wait_for()
    prompt.fill("<tom:0.5> and <rex> in the snow")

    def reads(text: str) -> None:
        until(page, f"document.querySelector('textarea').value === {text!r}")

    page.get_by_text("<tom> left, <rex> right?").wait_for()
    button(page, "Place them so").click()
    reads("<tom@left:0.5> and <rex@right> in the snow")
    assert button(page, "Place tom in the image").get_attribute("aria-pressed") == "true"
    area = page.locator(".regions")
    regions = area.get_by_role("application")
    assert regions.count() == 2
    shot(page, "regions")
    drag(page, regions.first, (0.5, 0.5), (1.0, 0.5))  # by a quarter of the image
    reads("<tom@25,0,75,100:0.5> and <rex@right> in the snow")
    tom = page.get_by_role("application", name="Region of tom")
    drag(page, tom, (1.0, 1.0), (1.0, 0.5))  # its corner
    reads("<tom@25,0,75,50:0.5> and <rex@right> in the snow")
    tom.focus()
    for key in ("ArrowRight", "Shift+ArrowDown"):
        page.keyboard.press(key)
    reads("<tom@27,0,77,52:0.5> and <rex@right> in the snow")
    assert page.locator(".region-bar [role=status]").inner_text() == "27 to 77 % across, 0 to 52 % down"
    page.keyboard.press("Delete")
    reads("<tom:0.5> and <rex@right> in the snow")
    drag(page, area, (0.05, 0.1), (0.4, 0.9))  # on bare ground: a box of the concept that is being placed
    reads("<tom@5,10,40,90:0.5> and <rex@right> in the snow")
    page.get_by_label("Place of <tom>").select_option("top-left")
    reads("<tom@top-left:0.5> and <rex@right> in the snow")
    page.get_by_label("Place of <tom>").select_option("anywhere")
    button(page, "Done").click()
    reads("<tom:0.5> and <rex@right> in the snow")
    assert area.count() == 0
    written = "import('/studio/js/prompt.js').then(p => [p.boxOf('<tom@constructor>', 'tom'), "
    written += "p.boxOf('<tom@-3,0,5,100>', 'tom'), p.withRegion('<tom@left>, <tom@right>', 'tom', 'top')])"
    assert page.evaluate(written) == [None, None, "<tom@top>, <tom@right>"]


def test_messages_are_for_a_page(page: Any, server: Served) -> None:
    press(page)
    says(page, "Type a prompt first", "error")
    field(page, "Prompt").fill("a photo of <nobody>")
    press(page)
    says(page, "Unknown concept 'nobody'", "error")
    assert "under Concepts" in message(page) and not re.search(r"minikin|`|--", message(page))
    colour = """kind => { const e = document.querySelector('.message'); e.dataset.kind = kind;
        return getComputedStyle(e).color; }"""
    colours = {page.evaluate(colour, kind) for kind in ("error", "note", "cancelled", "good")}
    assert len(colours) == 4
    plain = "m => import('/studio/js/api.js').then(p => p.plain(m))"
    command = "minikin models add FILE --name lcm"
    assert page.evaluate(plain, f"Add it: `{command}`.") == f"Add it: {command} (in a terminal)."
    for text in ("Use --preset quality.", "It is not here: `minikin models pull lcm`.", "--no-half failed"):
        assert not re.search(r"`|--", page.evaluate(plain, text))


def test_the_server_is_slow_cold_or_away(page: Any, server: Served) -> None:
    """A sign of work comes before the answer; the header says when a server is warm; a lost one comes back."""
    held: list[Any] = []
    page.route("**/api/paint", lambda route: held.append(route))
    field(page, "Prompt").fill("a cat")
    press(page)
    says(page, "Sending")
    while not held:
        page.wait_for_timeout(20)
    held[0].continue_()
    drafts(page).first.wait_for()
    cold, away = [True], [True]
    page.route("**/readyz", lambda r: r.fulfill(status=503, body="{}") if cold else r.continue_())
    page.route("**/api/capabilities", lambda r: r.abort() if away else r.continue_())
    page.reload()
    says(page, "The server does not answer")
    away.clear()
    page.get_by_text("warming up").wait_for()
    cold.clear()
    page.get_by_text("warming up").wait_for(state="hidden")
    page.get_by_text("The server does not answer").wait_for(state="hidden")
    damaged = {"error": {"message": "The index is damaged."}}
    page.route("**/api/concepts", lambda r: r.fulfill(status=500, json=damaged))
    view(page, "Concepts")
    page.get_by_text("The index is damaged.").wait_for()
    page.unroute("**/api/concepts")
    page.get_by_text("The index is damaged.").wait_for(state="hidden")


def test_files_dropped_beside_their_place_and_pasted(page: Any, server: Served) -> None:
    view(page, "Teach")
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
        page.get_by_alt_text(f"Photo {count}").wait_for()
    view(page, "Change")
    view(page, "Teach")
    assert page.locator(".photos figure").count() == 2, "what is in a view stays there"


def test_photos_keep_their_shape_and_heic_is_taken(page: Any, server: Served) -> None:
    view(page, "Teach")
    heic = {"name": "IMG_1.HEIC", "mimeType": "", "buffer": b"not shown by this browser"}
    page.locator(".drop input").set_input_files(
        [photo((400, 100)), photo((100, 300)), heic, photo(name="a.pdf") | {"mimeType": "application/pdf"}]
    )
    page.get_by_text("IMG_1.HEIC").wait_for()
    assert "a.pdf" in message(page)
    boxes = [page.locator(".photo").nth(k).bounding_box() for k in range(2)]
    assert [round(b["width"] / b["height"], 1) for b in boxes] == [4.0, 0.3]
    shot(page, "photos")
    name = field(page, "Name", "Teach")  # Chromium reads its pattern with the `v` flag
    for text, right in (("tom", True), ("tom_2-b", True), ("Tom", False), ("2tom", False)):
        name.fill(text)
        valid = "e => (new RegExp(e.pattern, 'v'), e.checkValidity())"
        assert name.evaluate(valid) is right, text


def test_masks_are_corrected_and_captions_and_warnings_shown(page: Any, server: Served) -> None:
    """A mask is drawn or corrected in a dialog; a photo that is small or like another has a warning; afterwards
    the concept is in six scenes, at the strength of a slider."""
    view(page, "Teach")
    page.locator(".drop input").set_input_files([photo(), photo(), photo((32, 64), "small.png")])
    page.get_by_text("Nearly the same as photo 1").first.wait_for()
    page.get_by_text("Small: 32x64, the base paints 64 px").wait_for()
    page.get_by_label("Caption of photo 2").fill("a cat on a chair")
    button(page, "Draw the mask of photo 1").click()
    dialog = page.get_by_role("dialog")
    mask = dialog.locator("canvas")
    drag(page, mask, (0.3, 0.3), (0.6, 0.6))
    shot(page, "correct")
    button(page, "Take this mask").click()
    page.locator(".photos .mask").wait_for()
    button(page, "Draw the mask of photo 1").click()
    pixels = """document.querySelector('dialog canvas').getContext('2d').getImageData(0, 0, 64, 64).data
        .filter((v, i) => i % 4 === 3 && v > 200).length"""
    until(page, f"{pixels} > 100")
    dialog.get_by_role("button", name="Close").click()
    field(page, "Name", "Teach").fill("tom")
    field(page, "What it is", "Teach").fill("cat")
    page.get_by_label("Caption of photo 3").fill("a dog on a chair")
    page.get_by_text('The caption is used only with the word "cat" in it').wait_for()
    page.get_by_label("Caption of photo 3").fill("")
    overlays = "[...document.querySelectorAll('.photos .mask')].map(e => e.style.maskImage)"
    by_hand = page.evaluate(overlays)
    button(page, "Show masks").click()
    until(page, f"{overlays}.length === 2")  # one is proposed
    assert page.evaluate(overlays)[:1] == by_hand, "what was drawn by hand stays"
    shot(page, "masks")
    page.get_by_label("mask", exact=True).nth(1).uncheck()
    press(page, "Teach")
    sheet = page.get_by_role("region", name="tom in six scenes")
    sheet.get_by_role("img").nth(5).wait_for()
    engine: Any = server.service.engine
    assert [p.caption for p in engine.photos] == ["", "a cat on a chair", ""]
    assert [round(float(p.mask.mean()), 1) for p in engine.photos[1:]] == [1, 1]
    assert 0.02 < engine.photos[0].mask.mean() < 0.5
    sources = "[...document.querySelectorAll('.scenes img')].map(i => i.src)"
    before = page.evaluate(sources)
    sheet.get_by_label("Strength").fill("0.5")
    shot(page, "sheet")
    page.get_by_role("button", name="Use it").click()
    until(page, "document.querySelector('textarea').value === 'a photo of <tom:0.5>'")
    assert len(set(before)) == 6


def test_a_concept_of_the_command_line_appears(page: Any, server: Served, tmp_path: Path) -> None:
    from minikin.perfusion import library

    path = tmp_path / "rex.safetensors"
    path.write_bytes(concept("rex", 3))
    library.follow(path, "rex", None)
    view(page, "Concepts")
    page.get_by_role("article", name="rex").wait_for()
    row: dict[str, Any] = {"strength": 1.0, "subject_fidelity": {"value": 0.5}, "text_alignment": {"value": 1}}
    sound = {"concept": {"name": "rex"}, "measured": [row], "front": [row], "points": {}}
    text = {**row, "text_alignment": {"value": "high"}}
    wrong = ({"concept": {}}, {"measured": [{}]}, {"measured": [text]}, {"front": 1}, {"points": [None]})
    for facts in (None, *({**sound, **parts} for parts in wrong)):
        for content, answer in ((sound, "A point sets the strength"), (facts, "This file is no sweep")):
            data = {"name": "x.json", "mimeType": "application/json", "buffer": json.dumps(content).encode()}
            page.get_by_label("Open a sweep").set_input_files(data)
            page.get_by_text(answer).wait_for()
            if content is sound:
                page.get_by_role("group", name="Sweep of rex").wait_for()
    view(page, "Paint")
    assert button(page, "<rex>").is_visible()


def test_an_images_whole_recipe_comes_back(page: Any, server: Served) -> None:
    """Size, guidance, sampler and seed, of our own and of A1111's."""
    page.get_by_label("Paint as I type").uncheck()
    page.locator("summary", has_text="More").click()
    field(page, "Guidance").fill("9")
    field(page, "Size").fill("128x64")
    field(page, "Sampler").select_option("Euler a")
    paint(page, "a cat", seed="11")
    for name in ("Guidance", "Seed"):
        field(page, name).fill("1")
    field(page, "Size").fill("")
    field(page, "Sampler").select_option("")
    button(page, "Use its recipe").click()
    names = ("Guidance", "Size", "Sampler", "Seed", "Schedule", "Steps", "Clip skip")
    inputs = "document.querySelector('form input[placeholder=\"the base\\'s own\"]').value === '{}'"
    until(page, inputs.format("128x64"))
    assert [field(page, name).input_value() for name in names[:4]] == ["9", "128x64", "Euler a", "11"]
    image, info, out = Image.new("RGB", (96, 96)), PngInfo(), io.BytesIO()
    info.add_text("parameters", OTHER)
    image.save(out, "PNG", pnginfo=info)
    view(page, "Recipe")
    file = {"name": "other.png", "mimeType": "image/png", "buffer": out.getvalue()}
    page.locator(".drop input").set_input_files(file)
    button(page, "Put it into the form").click()
    expected = ["7.5", "96x64", "Euler a", "5", "Karras", "20", "2"]
    assert [field(page, name).input_value() for name in names] == expected


def test_the_mask_is_drawn_by_keyboard_too(page: Any, server: Served) -> None:
    paint(page)
    button(page, "Change").click()
    mask = page.locator("canvas[width='64']")
    mask.focus()
    for key in ("ArrowRight", "ArrowDown", "Space"):
        mask.press(key)
    alpha = """c => c.getContext('2d').getImageData(0, 0, 64, 64).data
        .filter((v, i) => i % 4 === 3 && v > 200).length"""
    pixels = f"""({alpha})(document.querySelector("canvas[width='64']"))"""
    until(page, f"{pixels} > 20")
    button(page, "Undo").click()
    field(page, "Preset", "Change").focus()
    until(page, f"{pixels} === 0")
    mask.focus()
    for key in ("l", "Space", "ArrowLeft", "ArrowLeft", "Space", "ArrowUp", "ArrowUp", "Space", "Enter"):
        mask.press(key)
    field(page, "Preset", "Change").focus()
    until(page, f"{pixels} > 20")
    mask.press("Control+z")
    until(page, f"{pixels} < 20")  # the brush
    mask.press("Control+y")
    until(page, f"{pixels} > 20")
    mask.press("]")
    assert page.get_by_label("Size", exact=True).first.input_value() == "18"


def test_one_canvas_refines_inpaints_and_extends(page: Any, server: Served) -> None:
    """Nothing drawn is refining; a lasso, a word's mask or an edge that is dragged is inpainting. Zoomed, it is
    moved by a drag."""
    main = "document.querySelector('form[aria-label=Change] .main')"
    page.evaluate("location.hash = 'inpaint'")  # the view's name before, in a bookmark
    press(page, "Change")
    says(page, "Choose an image first")
    page.locator(".drop input").set_input_files(photo())
    mask = page.locator("canvas[width='64']")
    mask.wait_for()

    def change() -> dict[str, Any]:
        with page.expect_request(lambda r: r.method == "POST") as sending:
            press(page, "Change")
        until(page, f"!{main}.disabled")
        page.get_by_role("link", name="Download").wait_for()
        return {"job": sending.value.url.rsplit("/")[-1], **sending.value.post_data_json}

    field(page, "What it shows", "Change").fill("a cat")
    field(page, "Strength", "Change").fill("0.6")
    field(page, "Size", "Change").select_option("2x")
    body = change()
    assert (body["job"], body["strength"], body["size"]) == ("refine", 0.6, "2x") and "mask" not in body
    page.get_by_label("Share of before").fill("20")
    shot(page, "refined")
    drag(page, mask, (0.2, 0.2), (0.8, 0.8))
    button(page, "Lasso").click()
    drag(page, mask, (0.2, 0.8), (0.6, 0.8))
    body = change()
    assert (body["job"], body["strength"]) == ("inpaint", 1) and "size" not in body
    mask_image = Image.open(io.BytesIO(base64.b64decode(body["mask"]))).convert("RGB")
    counts = sorted(mask_image.getcolors(), reverse=True)
    assert mask_image.size == (64, 64) and {colour for _, colour in counts[:2]} == {(0, 0, 0), (255, 255, 255)}
    for _ in range(2):
        button(page, "Undo").click()
    assert form(page, "Change").locator("button.main").inner_text().startswith("Refine")
    button(page, "Redo").click()
    button(page, "Clear").click()
    page.get_by_label("Mask what is a").fill("cat")
    with page.expect_request("**/api/masks"):
        page.keyboard.press("Enter")
    until(page, f"{main}.innerText.startsWith('Inpaint')")
    button(page, "Clear").click()
    edge = page.locator(".edge.right")
    box, frame = edge.bounding_box(), page.locator(".frame").bounding_box()
    page.mouse.move(box["x"] + 6, box["y"] + 20)
    page.mouse.down()
    page.mouse.move(box["x"] + 6 + frame["width"] / 2, box["y"] + 20, steps=3)
    page.mouse.up()
    assert field(page, "Right", "Change").input_value() == "32"
    shot(page, "extended")
    body = change()
    assert body["job"] == "inpaint" and body["extend"] == "right=32" and "mask" not in body
    zoom = button(page, "Zoom")
    zoom.click()
    zoom.click()
    button(page, "Move").click()
    drag(page, page.locator(".easel-view"), (0.6, 0.6), (0.4, 0.4))
    until(page, "(e => e.scrollLeft > 50 && e.scrollTop > 50)(document.querySelector('.easel-view'))")
    shot(page, "zoomed")
    go_on = halted(server)
    press(page, "Change")
    page.locator(".result .shown[src^=data]").wait_for()  # its preview
    button(page, "Another image").click()
    page.locator(".drop input").set_input_files(photo())
    mask.wait_for()
    go_on()
    until(page, f"!{main}.disabled")
    assert page.locator(".result").count() == 0, "what was made of one image is not shown beside another"
    whole, part = "[[0, 0], [64, 0], [64, 64], [0, 64]]", "[[9, 9], [40, 9], [40, 40]]"
    erased = f"[{{kind: 'lasso', points: {part}}}, {{kind: 'lasso', points: {whole}, erase: true}}]"
    of = f"import('/studio/js/strokes.js').then(s => s.maskOf({{strokes: {erased}, undone: []}}, [64, 64]))"
    assert page.evaluate(of) is None


def tile_count(page: Any, count: int) -> None:
    until(page, f"document.querySelectorAll('.tile img').length === {count}")


def four_images(page: Any) -> Any:
    """Paint them, and open the gallery; the buttons of their tiles."""
    for k, prompt in enumerate(("a red car", "a cat"), 1):
        paint(page, prompt, n=2)
        until(page, f"document.querySelectorAll('.card').length === {2 * k}")
    view(page, "Gallery")
    tile_count(page, 4)
    return page.get_by_role("list").get_by_role("button", name="Open")


def test_the_gallery(page: Any, server: Served) -> None:
    """Images are searched, marked, compared, opened, sent to other views, and deleted unless that is undone."""
    tiles = four_images(page)
    page.get_by_role("searchbox").fill("red")
    tile_count(page, 2)
    page.get_by_role("button", name="Favourite a red car, seed 8").click()
    button(page, "Favourites").click()
    tile_count(page, 1)
    button(page, "Favourites").click()
    page.get_by_role("searchbox").fill("")
    tile_count(page, 4)
    for name in ("a cat, seed 7", "a red car, seed 7"):
        page.get_by_role("checkbox", name=f"Choose {name}").check()
    with page.expect_download() as download:
        button(page, "Download 2").click()
    with zipfile.ZipFile(download.value.path()) as file:
        assert sorted(file.namelist()) == ["a-cat-7.png", "a-red-car-7.png", "recipes.json"]
    button(page, "Compare").click()
    page.get_by_label("Share of the first image").fill("20")
    assert page.locator(".pair img").nth(1).evaluate("e => e.style.clipPath").startswith("inset(0px 80%")
    shot(page, "compare")
    button(page, "Back to the gallery").click()
    tiles.first.click()
    dialog = page.get_by_role("dialog")
    caption = dialog.locator(".hint")
    first = caption.inner_text()
    page.keyboard.press("ArrowRight")
    until(page, f"document.querySelector('dialog .hint').innerText !== {first!r}")
    shot(page, "viewer")
    folder = server.service.writer.image_folder
    assert folder and len(list(folder.path.iterdir())) == 4
    for undone in (True, False):
        dialog.get_by_role("button", name="Delete").click()
        dialog.wait_for(state="hidden")
        if undone:
            button(page, "Undo").click()
            tiles.first.click()
    view(page, "Paint")  # the time to undo is not waited for: leaving the page ends it
    page.reload()
    while len(list(folder.path.iterdir())) == 4:
        page.wait_for_timeout(20)
    view(page, "Gallery")
    tile_count(page, 3)
    tiles.first.click()
    dialog.get_by_role("button", name="Refine").click()
    assert drafts(page).first.get_by_role("checkbox").is_checked() and button(page, "Refine").is_enabled()
    view(page, "Gallery")
    tiles.first.click()
    dialog.get_by_role("button", name="Change").click()
    page.locator("canvas[width='64']").wait_for()


LISTS, IMAGES = "import('/studio/js/gallery.js')", "import('/studio/js/images.js')"
FINISH = f"{LISTS}.then(g => g.finishDeleting())"  # its 8 s are not waited for


def test_the_viewer_stays_with_its_image(page: Any, server: Served) -> None:
    """Whatever happens to the list. Arrows leave out an image that is being deleted, and deleting it once more
    leaves it to be brought back."""
    tiles = four_images(page)
    deletions: list[str] = []
    page.on("request", lambda r: deletions.append(r.url) if r.method == "DELETE" else None)
    dialog = page.get_by_role("dialog")

    def shows(words: str) -> None:
        dialog.locator(".hint").filter(has_text=words).wait_for()

    page.evaluate(f"{IMAGES}.then(i => i.togglePick(i.drafts.value[1]))")
    for undone in (True, False):
        tiles.nth(1).click()
        shows("a cat · seed 8")
        page.keyboard.press("Delete")
        dialog.wait_for(state="hidden")
        page.evaluate(f"{LISTS}.then(g => g.remove(g.deleted.value))")
        if undone:
            button(page, "Undo").click()
    assert deletions == []
    tiles.nth(2).click()
    shows("a red car · seed 7")
    page.keyboard.press("ArrowLeft")
    shows("a cat · seed 7")
    page.keyboard.press("ArrowRight")
    shows("a red car · seed 7")
    page.evaluate(FINISH)
    tile_count(page, 3)
    assert len(deletions) == 1 and page.evaluate(f"{IMAGES}.then(i => i.picked.value.size)") == 0
    shows("a red car · seed 7")
    zoom = dialog.get_by_role("button", name="Zoom")
    zoom.click()
    page.keyboard.press("ArrowRight")
    drag(page, dialog.locator(".zoom"), (0.7, 0.7), (0.5, 0.5))  # moves it, and is no click
    assert page.evaluate("(e => e.scrollLeft > 50 && e.scrollTop > 50)(document.querySelector('.zoom'))")
    for _ in range(2):
        zoom.click()
    page.keyboard.press("ArrowLeft")
    shows("a cat · seed 7")
    dialog.get_by_role("button", name="Close").click()
    until(page, "document.activeElement.matches('.tile .face')")


def test_the_family_of_an_image_and_teaching_from_it(page: Any, server: Served) -> None:
    """A draft, the image refined from it and the one inpainted from that; each opens from the others."""
    with server.client() as c:
        image = c.post("/api/paint?wait=true", json={"prompt": "a cat", "seed": 7}).json()["results"][0]
        for kind in ("refine", "inpaint"):
            body = {
                "image": f"result:{image['id']}",
                "seed": 7,
                "extend": "right=8" if kind == "inpaint" else None,
            }
            body = {k: v for k, v in body.items() if v}
            image = c.post(f"/api/{kind}?wait=true", json=body).json()["results"][0]
    view(page, "Gallery")
    tile_count(page, 3)
    page.get_by_role("button", name="Favourite a cat, seed 7").first.click()
    button(page, "Favourites").click()
    tile_count(page, 1)
    page.get_by_role("list").get_by_role("button", name="Open").first.click()
    family = page.get_by_role("region", name="Family")
    family.get_by_role("button").nth(2).wait_for()
    names = "[...document.querySelectorAll('.family button')].map(b => b.getAttribute('aria-label'))"
    assert page.evaluate(names) == [f"{kind}, seed 7" for kind in ("painted", "refined", "inpainted")]
    assert page.locator(".family li li li").count() == 1, "each is made from the one before"
    shot(page, "family")
    family.get_by_role("button", name="painted, seed 7", exact=True).click()
    dialog = page.get_by_role("dialog")
    dialog.locator(".hint").filter(has_text="a cat · seed 7 · 64x64").wait_for()
    until(page, "document.querySelector('.family [aria-current]').innerText === 'painted'")
    heart = dialog.get_by_role("button", name="Favourite")  # of an image that the list does not have
    for pressed in ("true", "false"):
        heart.click()
        dialog.locator(f"[aria-pressed={pressed}]").wait_for()
    dialog.get_by_role("button", name="Teach from it").click()
    page.get_by_alt_text("Photo 1").wait_for()


def test_the_gallery_says_what_failed_and_follows_other_tabs(page: Any, server: Served) -> None:
    """A deletion that failed, an image from another tab, and more like one of them."""
    tiles = four_images(page)
    dialog = page.get_by_role("dialog")

    def shows(words: str) -> None:
        dialog.locator(".hint").filter(has_text=words).wait_for()

    message = {"error": {"message": "Its folder is not there."}}
    page.route("**/api/images/*", lambda route: route.fulfill(status=507, json=message))
    tiles.first.click()
    shows("a cat · seed 7")
    page.keyboard.press("Delete")
    page.evaluate(FINISH)
    says(page, "Its folder is not there.")
    page.unroute("**/api/images/*")
    go_on = halted(server)
    with server.client() as c:  # in another tab
        c.post("/api/paint", json={"prompt": "a boat", "seed": 7}).raise_for_status()
    queue(page).wait_for()
    go_on()
    tile_count(page, 5)
    tiles.nth(1).click()
    shows("a cat · seed 7")
    page.go_back()
    view(page, "Gallery")
    tile_count(page, 5)
    assert dialog.count() == 0
    tiles.nth(1).click()
    dialog.get_by_role("button", name="More like this").click()
    until(page, "document.querySelectorAll('.card').length === 8")
    assert "7" not in drafts(page).locator(".check").all_inner_texts()[:4]


def test_a_gallery_of_10000_images(page: Any, server: Served) -> None:
    """Only the tiles near the window are in the document, and only their pages are asked for."""
    total, offsets, held = 10_000, set(), list[Any]()

    def answer(route: Any) -> None:
        offset = int(re.findall(r"offset=(\d+)", route.request.url)[0])
        if offset == 0 and 0 in offsets and not held:  # of the second time
            held.append(route)
            return
        offsets.add(offset)
        rows = [{"id": f"{k:032}", "seed": k, "width": 64, "height": 64, "name": f"{k}.png", "url": "/x.png",
                 "kind": "paint", "about": f"image {k}", "favourite": False, "created": 0}
                for k in range(offset, offset + 100)]  # fmt: skip
        route.fulfill(json={"images": rows, "total": total})

    page.route("**/api/images?*", answer)
    page.route("**/thumbnail", lambda route: route.fulfill(body=photo()["buffer"], content_type="image/png"))
    view(page, "Gallery")
    page.get_by_text("image 0", exact=True).wait_for()
    page.evaluate("scrollTo(0, document.documentElement.scrollHeight)")
    page.get_by_text("image 9999", exact=True).wait_for()
    assert page.locator(".tile").count() < 150
    assert min(offsets) == 0 and max(offsets) == 9900 and len(offsets) <= 5
    with page.expect_response(lambda response: "offset=9900" in response.url):
        page.evaluate(f"{LISTS}.then(g => {{ g.reload(); g.need(9900, 9999); }})")
    while not held:
        page.wait_for_timeout(20)
    answer(held[0])  # the first page comes last
    until(page, f"{LISTS}.then(g => Boolean(g.items.value[0]))")
    until(page, "[...document.querySelectorAll('.tile')].every(tile => tile.querySelector('img'))")
    button(page, "Open image 9999").click()
    page.evaluate(f"{LISTS}.then(g => g.reload())")
    caption = page.get_by_role("dialog").locator(".hint")
    caption.filter(has_text="image 9999").wait_for()
    page.keyboard.press("ArrowLeft")
    caption.filter(has_text="image 9998").wait_for()


UNNAMED = """() => [...document.querySelectorAll('main :is(input, textarea, select, button, canvas, a)')]
    .filter(e => !(e.labels?.length || e.getAttribute('aria-label') || e.textContent.trim()))
    .map(e => e.outerHTML.slice(0, 80))"""


def test_by_keyboard(page: Any, server: Served) -> None:
    """The order of tabbing is that of reading, every stop shows its focus and has a name."""
    field(page, "Prompt").focus()
    order = []
    for _ in range(11):
        page.keyboard.press("Tab")
        label = "e => e.getAttribute('aria-label') ?? e.labels?.[0]?.innerText ?? e.innerText"
        order.append(page.locator(":focus").evaluate(label).split("\n")[0])
        outline = "getComputedStyle(document.activeElement).outlineStyle"
        assert page.evaluate(outline) == "solid", order[-1]
    assert order == [
        "Negative prompt", "Styles", "Preset", "Guidance", "Seed", "Another seed", "Keep the seed", "Images",
        "More", "Paint", "Paint as I type",
    ]  # fmt: skip
    for name in VIEWS:
        view(page, name)
        assert page.evaluate(UNNAMED) == [], name


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_axe_finds_nothing_grave(page: Any, server: Served, scheme: Any, size: dict[str, int]) -> None:
    """On no view, with what one does there: regions, a canvas, a photo's mask, an image large, a recipe."""
    planted = "document.body.insertAdjacentHTML('beforeend', '<img src=icon.svg>')"
    page.evaluate(planted)
    assert [problem.split(":")[0] for problem in axe.grave(page)] == ["image-alt"], "it finds what is planted"
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size(size)
    for name in ("tom", "rex"):
        server.service.concept_store.put("local", concept(name, 1), None)
    page.reload()
    button(page, "<rex>").wait_for()
    page.locator("summary", has_text="Styles").click()
    paint(page, "<tom> and <rex>")
    button(page, "Place them so").click()
    problems = {"Paint": axe.grave(page)}
    drafts(page).first.get_by_role("button").click()
    button(page, "Change").click()
    page.locator("canvas[width='64']").wait_for()
    problems["Change"] = axe.grave(page)
    shot(page, "change")
    view(page, "Gallery")
    page.get_by_role("checkbox", name="Choose").check()
    problems["Gallery"] = axe.grave(page)
    shot(page, "gallery")
    page.get_by_role("list").get_by_role("button", name="Open").click()
    problems["viewer"] = axe.grave(page)
    page.get_by_role("dialog").get_by_role("button", name="Teach from it").click()
    button(page, "Draw the mask of photo 1").click()
    problems["mask"] = axe.grave(page)
    page.keyboard.press("Escape")
    problems["Teach"] = axe.grave(page)
    shot(page, "teach")
    view(page, "Concepts")
    problems["Concepts"] = axe.grave(page)
    shot(page, "concepts")
    view(page, "Recipe")
    shot(page, "recipe")
    image = next(server.service.writer.image_folder.path.iterdir())  # type: ignore[union-attr]
    page.locator(".drop input").set_input_files(str(image))
    button(page, "Put it into the form").wait_for()
    problems["Recipe"] = axe.grave(page)
    shot(page, "recipe-read")
    assert {name: rules for name, rules in problems.items() if rules} == {}


def test_on_a_phone_and_in_the_dark(page: Any, server: Served) -> None:
    """390 px: no view is wider than the screen; fields do not zoom (16 px); the chosen theme stays."""
    page.set_viewport_size(PHONE)
    paint(page, n=3)
    for name in VIEWS:
        view(page, name)
        if name == "Gallery":
            tile_count(page, 3)
        until(page, "document.documentElement.scrollWidth <= innerWidth")
        shot(page, name)
    view(page, "Paint")
    assert field(page, "Prompt").evaluate("e => getComputedStyle(e).fontSize") == "16px"
    paper = "getComputedStyle(document.body).backgroundColor"
    light, dark = "rgb(250, 249, 246)", "rgb(23, 22, 20)"
    assert page.evaluate(paper) == light
    page.emulate_media(color_scheme="dark")
    assert page.evaluate(paper) == dark
    button(page, "Theme").click()
    page.reload()
    assert page.evaluate(paper) == light, "light was chosen, whatever the system has"
