"""A request is resolved once: one choice of preset and one parse of each prompt, for all its images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from minikin import Studio
from minikin.generation import defaults, request
from minikin.images import metadata
from minikin.models import prompt
from minikin.models.base import Base
from minikin.recipes import Paint
from minikin.server.engine import Row
from minikin.server.studio_engine import StudioEngine
from tests.helpers.servers import served

PROMPT, NEGATIVE = "a photo of a cat on the beach", "a dog"
ONCE = {"preset": 1, "values": 1, PROMPT: 1, NEGATIVE: 1}


@pytest.fixture
def count(monkeypatch: Any) -> dict[str, int]:
    """How often a preset was chosen, values were filled in, and each prompt was parsed."""
    calls: dict[str, int] = {}

    def counted(name: Callable[..., str], function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name(*args)] = calls.get(name(*args), 0) + 1
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(defaults, "choose_preset", counted(lambda *_: "preset", defaults.choose_preset))
    monkeypatch.setattr(defaults, "fill_in", counted(lambda *_: "values", defaults.fill_in))
    parse = counted(lambda text, *_: text, prompt.parse)
    for module in (prompt, request):
        monkeypatch.setattr(module, "parse", parse)
    return calls


def test_paint_resolves_once(cli: Any, count: dict[str, int]) -> None:
    code, *_ = cli(
        "paint", PROMPT, "--negative", NEGATIVE, "-n", "4", "--batch", "2", "--steps", "1", "--out", "."
    )
    assert code == 0 and len(list(Path().glob("*-?.png"))) == 4
    assert count == ONCE


def test_redo_resolves_once(cli: Any, count: dict[str, int]) -> None:
    code, *_ = cli("paint", PROMPT, "--negative", NEGATIVE, "-n", "4", "--steps", "1", "--out", ".")
    assert code == 0
    count.clear()
    image = sorted(Path().glob("*-2.png"))[0]
    code, out, _ = cli("redo", image, "--out", "again.png")
    assert code == 0 and "identical" in out
    assert count == ONCE


def test_refine_resolves_once(cli: Any, count: dict[str, int]) -> None:
    Image.new("RGB", (64, 64), (90, 120, 30)).save("draft.png")
    code, *_ = cli(
        "refine", "draft.png", "--prompt", PROMPT, "--negative", NEGATIVE, "--steps", "2", "--out", "x.png"
    )
    assert code == 0 and count == ONCE


def test_server_resolves_once(tiny: Base, tmp_path: Path, count: dict[str, int]) -> None:
    with served(StudioEngine(Studio(tiny)), tmp_path / "s") as server, server.client() as client:
        count.clear()  # of the warm-up
        body = {"prompt": PROMPT, "negative": NEGATIVE, "n": 4, "steps": 1}
        answer = client.post("/api/paint?wait=true", json=body).json()
        assert answer["status"] == "completed" and len(answer["results"]) == 4
    assert count == ONCE


def test_counting_can_fail(tiny: Base, count: dict[str, int]) -> None:
    """The control: resolving twice is counted twice."""
    studio = Studio(tiny)
    for _ in range(2):
        studio.resolve(Paint(prompt=PROMPT, negative=NEGATIVE))
    assert count == dict.fromkeys(ONCE, 2)


def test_every_image_event_carries_its_record(tiny: Base, tmp_path: Path) -> None:
    """The record of an event is what is written into the file."""
    from minikin import events
    from minikin.generation.image import GeneratedImage
    from minikin.generation.output import Names, save_generated

    recipe = Paint(prompt=PROMPT, n=3, batch=2, seed=5, steps=1)
    ready = [e for e in Studio(tiny).painting(recipe) if isinstance(e, events.ImageReady)]
    assert [e.record["seed"] for e in ready if e.record] == [5, 6, 7]
    assert [e.record["batch"] for e in ready if e.record] == [
        {"seed": 5, "n": 2}, {"seed": 5, "n": 2}, {"seed": 7, "n": 1},
    ]  # fmt: skip
    names = Names(recipe, tmp_path)
    for event in ready:
        assert event.record and event.seed is not None
        path = save_generated(GeneratedImage(event.image, event.seed, record=event.record), names)
        written = metadata.read(path).recipe
        assert {k: v for k, v in written.items() if k != "version"} == event.record


def test_rows_of_a_server_batch_record_themselves_alone(tiny: Base) -> None:
    """Another batch would round differently: a row's record says that it repeats alone."""
    engine = StudioEngine(Studio(tiny))
    prepared = engine.prepare("paint", Paint(prompt=PROMPT, steps=1, n=2), {})
    images = engine.paint([Row(prepared, 3), Row(prepared, 4)], lambda done, preview: None)
    assert len(images) == 2 and engine.facts(prepared) == prepared.plan.record
