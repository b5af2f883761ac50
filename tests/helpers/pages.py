"""The page in a browser, by its roles and labels."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from tests.helpers.servers import Served

VIEWS = ("Paint", "Gallery", "Change", "Concepts", "Teach", "Recipe")
DESKTOP, PHONE = {"width": 1200, "height": 860}, {"width": 390, "height": 844}
TIMEOUT_MS = 120_000  # of waiting: a busy machine is no fault
SHOTS = os.environ.get("MINIKIN_SHOTS")  # a folder for screenshots


@contextmanager
def tab(browser: Any, server: Served) -> Iterator[Any]:
    """The page in a tab of its own. What it asks of another host, an error of a script, and whatever the
    content security policy stopped, fail the test."""
    context = browser.new_context(viewport=DESKTOP)
    page = context.new_page()
    page.set_default_timeout(TIMEOUT_MS)
    problems: list[str] = []

    def check_host(request: Any) -> None:
        parts = urlsplit(request.url)
        if parts.scheme in ("http", "https", "ws", "wss") and parts.hostname != "127.0.0.1":
            problems.append(request.url)

    page.on("request", check_host)
    page.on("websocket", check_host)
    page.on("pageerror", lambda e: problems.append(str(e)))
    page.on("console", lambda m: problems.append(m.text) if "Content Security Policy" in m.text else None)
    yield opened(page, server)
    shot(page, "end")
    context.close()
    assert problems == []


def opened(page: Any, server: Served) -> Any:
    """Open the page, or load it again, and wait until its form is there."""
    page.goto(f"{server.url}/")
    page.locator("form[aria-label=Paint] option[value=turbo]").wait_for(state="attached")
    return page


def shot(page: Any, name: str) -> None:
    """A screenshot for a person to look at, where a folder for them is named."""
    if SHOTS:
        test = os.environ["PYTEST_CURRENT_TEST"].split("::")[1].split(" ")[0]
        page.screenshot(path=f"{SHOTS}/{test}-{name}.png", full_page=True)


def view(page: Any, name: str) -> None:
    page.get_by_role("navigation").get_by_role("link", name=name, exact=True).click()
    page.get_by_role("heading", level=1, name=name, exact=True).wait_for(state="attached")


def form(page: Any, name: str = "Paint") -> Any:
    return page.get_by_role("form", name=name, exact=True)


def field(page: Any, label: str, name: str = "Paint") -> Any:
    return form(page, name).get_by_label(label, exact=True)


def button(page: Any, name: str) -> Any:
    """The button whose name begins so: those that send a form also say their key."""
    return page.get_by_role("button", name=name)


def press(page: Any, name: str = "Paint") -> None:
    """Send a form by its main button."""
    form(page, name).locator("button.main").click()


def says(page: Any, words: str, kind: str = "") -> None:
    """Wait until the view's message, or the progress of its job, has these words."""
    where = f".message[data-kind={kind}]" if kind else "main [role=status], .queue"
    page.locator(where).filter(has_text=words).first.wait_for()


def until(page: Any, expression: str) -> None:
    """Wait until an expression is true. Playwright's own way needs eval, which the page's policy forbids."""
    for _ in range(round(TIMEOUT_MS / 20)):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(20)
    raise AssertionError(f"never true: {expression}")


def message(page: Any) -> str:
    return str(page.locator(".message").first.inner_text())


def large_image(page: Any) -> Any:
    """The large image of a view."""
    return page.locator("img.shown")


def drag(page: Any, area: Any, start: tuple[float, float], end: tuple[float, float]) -> None:
    """Drag with the mouse from a place of an element to another, in shares of its width and height."""
    area.scroll_into_view_if_needed()
    box = area.bounding_box()
    points = [(box["x"] + box["width"] * x, box["y"] + box["height"] * y) for x, y in (start, end)]
    page.mouse.move(*points[0])
    page.mouse.down()
    page.mouse.move(*points[1], steps=4)
    page.mouse.up()


def live_image(page: Any, after: int = 0) -> int:
    """The number of the live image that is shown, once it is a later one."""
    until(page, f"Number(document.querySelector('img.shown')?.dataset.number ?? 0) > {after}")
    return int(large_image(page).get_attribute("data-number"))


def drafts(page: Any) -> Any:
    return page.locator(".card")


def paint(page: Any, prompt: str = "a red car in the snow", n: int = 1, seed: str = "7") -> None:
    """Paint drafts in few steps, and wait until their job has ended and the first of them is shown."""
    field(page, "Preset").select_option("turbo")
    field(page, "Seed").fill(seed)
    field(page, "Images").fill(str(n))
    field(page, "Prompt").fill(prompt)
    with page.expect_response(lambda r: r.url.endswith("/api/paint")):
        page.keyboard.press("Control+Enter")
    until(page, "!document.querySelector('form[aria-label=Paint] .main').disabled")
    page.get_by_role("link", name="Download").wait_for()
