"""A request is resolved once: one choice of preset and one parse of each prompt, for all its images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from minikin import Studio, events
from minikin.errors import BadRecipe
from minikin.generation import defaults, request
from minikin.generation.source import SourceImage, inherited
from minikin.images import metadata
from minikin.models import prompt
from minikin.models.base import Base
from minikin.recipes import Paint, Refine
from minikin.server.engine import Row
from minikin.server.studio_engine import StudioEngine
from tests.helpers.loras import random_lora, write
from tests.helpers.servers import served
from tests.perfusion.test_concept_file import concept

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


# ---- what the prompt asks for ---------------------------------------------------------------------


def warnings(studio: Studio, prompt: str, **recipe: Any) -> list[str]:
    run = studio.painting(Paint(prompt=prompt, steps=1, **recipe))
    return [e.text for e in run if isinstance(e, events.Note)]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("", "The prompt is empty"),
        ("  ", "The prompt is empty"),
        ("a photo of a samovar", "'tiny' probably does not know 'samovar'"),
        ("a photo of <tom", "'<tom' is not closed"),
        ("a photo of tom", "'tom' is a word here and not your concept: write <tom>"),
        ("a cat AND a dog", "'AND' is A1111's way"),
        ("a cat, embedding:easynegative", "ComfyUI's syntax"),
        ("a cat " * 200, "14 chunks of 30 tokens; the first 10 are read"),
        ("a BREAK " * 12, "12 chunks"),
    ],
)
def test_one_note_for_what_is_painted_otherwise(
    tiny: Base, tmp_path: Path, monkeypatch: Any, source: str, words: str
) -> None:
    """Beside tom.safetensors, which the prompt does not name."""
    monkeypatch.chdir(tmp_path)
    concept("sd15", mode="value").save("tom.safetensors")
    (note,) = warnings(Studio(tiny), source)
    assert words in note


def test_ordinary_prompts_have_no_note(tiny: Base, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    studio = Studio(tiny)
    for source in (PROMPT, "a [cat:dog:0.5] BREAK (on the beach: 1.2)", "a 3d render of a teddy bear, " * 6):
        assert warnings(studio, source) == []


def test_words_of_other_scripts_on_clip(bases: dict[str, Base]) -> None:
    """Stable Diffusion's text encoder reads them as bytes."""
    studio = Studio(bases["sd15"])
    (note,) = warnings(studio, "浜辺の猫, xqzvkw")
    assert "'浜辺の猫', 'xqzvkw'" in note
    assert warnings(studio, "a photo of a labradoodle, masterpiece, highly detailed, 8k") == []


def test_loras_with_another_weight_on_the_text_encoder(
    bases: dict[str, Base], tmp_path: Path, monkeypatch: Any
) -> None:
    """<lora:x:0:1> leaves the text encoder alone, <lora:x:1:0> the U-Net."""
    monkeypatch.chdir(tmp_path)
    base = bases["sd15"]
    studio, pairs = Studio(base), random_lora(base, text=True)
    write(Path("x.safetensors"), pairs, "kohya")
    for name, part in (("unet", True), ("text", False)):
        of_part = {k: v for k, v in pairs.items() if (k[0] == "unet") == part}
        write(Path(f"{name}.safetensors"), of_part, "kohya")
    how: dict[str, Any] = {"steps": 2, "seed": 1}

    def image(tag: str) -> bytes:
        return studio.paint(f"a cat <lora:{tag}>", **how)[0].tobytes()

    assert image("x:0:0.7") == image("unet:0.7") and image("x:0.7:0") == image("text:0.7")
    assert len({image(t) for t in ("x:0:0.7", "x:0.7:0", "x:0.7", "x:te=0.2:unet=0.7")}) == 4
    record = studio.record(Paint(prompt="a <lora:x:0.2:0.7>"))
    assert record["adapters"]["x"]["weight"] == 0.7 and record["adapters"]["x"]["text_weight"] == 0.2


# ---- clip skip ------------------------------------------------------------------------------------


def test_clip_skip_is_recorded_and_read_back(cli: Any, tmp_path: Path) -> None:
    args = ("paint", PROMPT, "--steps", "1", "--seed", "3")
    assert cli(*args, "--clip-skip", "2", "--out", "two.png")[0] == 0
    assert cli(*args, "--out", "one.png")[0] == 0
    plain, skipped = (metadata.read(f"{name}.png") for name in ("one", "two"))
    assert skipped.settings["Clip skip"] == "2" and "Clip skip" not in plain.settings
    assert skipped.recipe["recipe"]["clip_skip"] == 2 and plain.recipe["recipe"]["clip_skip"] == 1
    assert Image.open("one.png").tobytes() != Image.open("two.png").tobytes()
    code, out, _ = cli("redo", "two.png", "--out", "again.png")
    assert code == 0 and "identical" in out
    foreign = Image.new("RGB", (64, 64))
    foreign.info["parameters"] = "a cat\nSteps: 20, Sampler: Euler a, Seed: 5, Size: 64x64, Clip skip: 2"
    assert inherited(Refine, SourceImage.of(foreign), {}).clip_skip == 2


@pytest.mark.parametrize("value", ["0", "-1", "33", "2.5", "two", "9" * 5000, ""])
def test_settings_of_strangers_that_are_none_are_left_out(value: str) -> None:
    foreign = Image.new("RGB", (64, 64))
    foreign.info["parameters"] = f"a cat\nSteps: 20, Seed: {value}.5, Size: 64x64, Clip skip: {value}"
    assert SourceImage.of(foreign).settings == {"prompt": "a cat"}


def test_clip_skip_is_said_where_it_does_nothing_or_harm(bases: dict[str, Base]) -> None:
    (note,) = warnings(Studio(bases["sdxl"]), "a cat", clip_skip=2)
    assert "Clip skip 2 has no effect" in note
    studio = Studio(bases["sd15"])
    assert warnings(studio, "a cat", clip_skip=2) == []
    with pytest.raises(BadRecipe, match="a layer that the text encoder of 'sd15' does not have"):
        warnings(studio, "a cat", clip_skip=30)
