"""Generating images: seeds, batches, schedulers, and the record inside a file."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from minikin import Concept, Studio
from minikin.errors import BadPhoto, BadRecipe, UnknownName
from minikin.generation import sampler, schedulers
from minikin.generation.conditioning_schedule import conditionings
from minikin.generation.output import Names, save_generated
from minikin.generation.request import resolve
from minikin.images import metadata
from minikin.images.encode import Marking
from minikin.images.photos import Photo
from minikin.images.sheet import contact_sheet
from minikin.models.base import Base
from minikin.recipes import Paint
from tests.conftest import equal

pytestmark = pytest.mark.usefixtures("short_teaching")


@pytest.fixture(scope="module")
def studio(bases: dict[str, Base]) -> Studio:
    return Studio(bases["sd15"])


@pytest.fixture(scope="module")
def tom(studio: Studio) -> Concept:
    rng = np.random.default_rng(0)
    mask = np.zeros((64, 64), np.float32)
    mask[16:48, 16:48] = 1
    shots = [Photo("a", rng.integers(0, 255, (64, 64, 3), dtype=np.uint8), mask)]
    return studio.teach(shots, name="tom", category="cat", mode="value", steps=3, batch=2)


def pixels(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(i, np.int16) for i in images])


def test_same_seed_same_image_in_any_batch(studio: Studio, tom: Concept) -> None:
    """seed + i, whatever the batch: within one grey level of rounding."""
    prompt = "a photo of <tom> on the beach"
    five = pixels(studio.paint(prompt, n=5, seed=40, steps=3, batch=5))
    singly = pixels(studio.paint(prompt, n=5, seed=40, steps=3, batch=1))
    two = pixels(studio.paint(prompt, n=2, seed=42, steps=3, batch=2))
    assert np.abs(five - singly).max() <= 1
    assert np.abs(five[2:4] - two).max() <= 1
    assert np.abs(five[0] - five[1]).max() > 8


def test_same_seed_latents_agree_to_1e_4(studio: Studio, tom: Concept) -> None:
    """The float images of diffusers' own bar: 1e-4 in float32."""
    request = resolve(studio.base, Paint(prompt="<tom>", steps=3), studio.concepts.loaded)
    (single,), _ = conditionings(studio.base, request, [request.prompt], 1)
    (four,), _ = conditionings(studio.base, request, [request.prompt], 4)
    assert (single.kv - four.kv).abs().max() < 1e-4


@pytest.mark.parametrize("name", schedulers.SCHEDULERS)
def test_every_scheduler_paints(studio: Studio, name: str) -> None:
    (image,) = studio.paint("a cat", steps=4, scheduler=name)
    assert np.isfinite(pixels([image])).all()


@pytest.mark.parametrize("name", schedulers.SCHEDULERS)
def test_every_scheduler_takes_any_number_of_steps(studio: Studio, name: str) -> None:
    """On tiny's own noise schedule, Karras spacing rounds to equal timesteps from 25 steps on."""
    for steps in (1, 2, 10, 20, 25, 30, 50):
        scheduler = schedulers.build(name, studio.base.pipe.scheduler)
        scheduler.set_timesteps(steps)
        x = torch.randn((1, 4, 4, 4), generator=torch.Generator().manual_seed(0)) * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            out = torch.zeros_like(scheduler.scale_model_input(x, t))
            x = scheduler.step(out, t, x).prev_sample
        assert torch.isfinite(x).all(), steps


@pytest.mark.parametrize("family", ["sd21", "sdxl"])
@pytest.mark.parametrize("name", ["Euler a", "DPM++ 2M Karras", "UniPC"])
def test_schedulers_on_other_families(bases: dict[str, Base], family: str, name: str) -> None:
    (image,) = Studio(bases[family]).paint("a cat", steps=3, scheduler=name)
    assert image.size == (64, 64)


@pytest.mark.parametrize(
    ("spelling", "name"),
    [("dpm++ 2m karras", "DPM++ 2M Karras"), ("euler_ancestral", "Euler a"),
     ("EulerDiscreteScheduler", "Euler"),
     ("ddim", "DDIM"), ("dpmpp_2m", "DPM++ 2M"), ("k_euler_a", "Euler a"), ("LCM", "LCM"), ("uni_pc", "UniPC")],
)  # fmt: skip
def test_scheduler_spellings(spelling: str, name: str) -> None:
    assert schedulers.scheduler_name(spelling) == name


def test_unknown_scheduler_names_the_nearest() -> None:
    with pytest.raises(UnknownName, match="Did you mean 'Euler'"):
        schedulers.scheduler_name("Eulr")


def test_strength_zero_is_the_category_itself(studio: Studio, tom: Concept) -> None:
    """In mode "value", <tom:0> gives the images of the plain category."""
    zero = pixels(studio.paint("a photo of <tom:0>", steps=3, seed=1))
    plain = pixels(studio.paint("a photo of a cat", steps=3, seed=1))
    assert np.abs(zero - plain).max() <= 1


def test_concept_in_the_negative_prompt(studio: Studio, tom: Concept) -> None:
    a = pixels(studio.paint("a dog", negative="<tom>", steps=3))
    b = pixels(studio.paint("a dog", negative="a cat", steps=3))
    assert np.abs(a - b).max() > 0


@pytest.mark.parametrize(
    ("values", "words"),
    [({"width": 100}, "Width must be divisible by 8, but it is 100; use 96"),
     ({"height": 72}, "height must be a multiple of 64 for this base, but it is 72; use 64"),
     ({"steps": 0}, "steps: must be at least 1 (it is 0)"),
     ({"n": 10**6}, "must be at most 1000"), ({"lock": "odd"}, "'local' or 'global'"),
     ({"guidance": 99}, "must be at most 50"), ({"size": "big"}, "Write the size as 512 or 512x768")],
)  # fmt: skip
def test_bad_recipes_say_one_sentence(studio: Studio, values: dict[str, Any], words: str) -> None:
    with pytest.raises(BadRecipe) as e:
        studio.paint("a cat", **values)
    assert words in str(e.value) and "\n" not in str(e.value)


def test_size_in_one_word(studio: Studio) -> None:
    (image,) = studio.paint("a cat", steps=1, size="64x128")
    assert image.size == (64, 128)


def test_unknown_concept(studio: Studio, tom: Concept) -> None:
    with pytest.raises(UnknownName, match="Did you mean 'tom'"):
        studio.paint("<tim>")


def test_prompt_longer_than_the_text_encoder_reads(studio: Studio, tom: Concept) -> None:
    """Chunks of 75 tokens are joined, at most ten; the concept in the second one acts."""
    studio.add(tom)
    concept, plain = (
        studio.paint(f"{'very ' * 90}old <tom:{strength}>", steps=1, seed=1)[0] for strength in (1, 0)
    )
    assert not equal(concept, plain)
    with pytest.raises(BadRecipe, match="<tom> lies beyond"):
        studio.paint("very " * 900 + "old <tom>", steps=1)


def test_closing_the_generator_stops_the_work(studio: Studio) -> None:
    """A consumer that goes away ends painting within a step, and the studio is free again."""
    run = studio.painting(Paint(prompt="a cat", steps=50))
    next(run)
    run.close()  # type: ignore[attr-defined]
    assert len(studio.paint("a cat", steps=1)) == 1


def test_a_concept_replaced_while_a_thread_waits(
    bases: dict[str, Base], tom: Concept, monkeypatch: Any
) -> None:  # fmt: skip
    """The prompt is read when it is the thread's turn: never the old category with the new concept."""
    studio, read, waiting = Studio(bases["sd15"]), [], threading.Event()
    studio.add(tom)
    generate = sampler.generate

    def listen(base: Base, request: Any, *more: Any, **how: Any) -> Any:
        read.append((request.prompt.text, request.concepts["tom"].concept.category))
        return generate(base, request, *more, **how)

    monkeypatch.setattr(sampler, "generate", listen)
    real = studio._lock

    class Gate:
        """The studio's lock, which tells when somebody else wants it."""

        def __enter__(self) -> None:
            waiting.set()
            real.acquire()

        def __exit__(self, *_: Any) -> None:
            real.release()

    with real:
        monkeypatch.setattr(studio, "_lock", Gate())
        other = threading.Thread(target=studio.paint, args=("a photo of <tom>",), kwargs={"steps": 1})
        other.start()
        assert waiting.wait(30)
        studio.concepts.add(replace(tom, category="dog"))
    other.join(60)
    assert read == [("a photo of a dog", "dog")]


# ---- recipes inside images ------------------------------------------------------------------------


def save_first(studio: Studio, recipe: Paint, out: Path) -> Path:
    done = list(studio.painting(recipe))[-1]
    names = Names(recipe, out)
    paths = [save_generated(image, names) for image in done.result]
    return paths[0]


def test_image_carries_its_recipe(studio: Studio, tom: Concept, tmp_path: Path) -> None:
    recipe = Paint(prompt="<tom>, at night", negative="blur: bad", steps=3, seed=5, scheduler="euler a")
    texts = metadata.read(save_first(studio, recipe, tmp_path))
    assert texts.prompt == recipe.prompt and texts.negative == recipe.negative
    assert texts.settings["Steps"] == "3" and texts.settings["Sampler"] == "Euler a"
    assert texts.settings["Seed"] == "5" and texts.settings["Size"] == "64x64"
    again = Paint.make(**texts.recipe["recipe"])
    assert again == recipe
    assert "tom" in texts.recipe["concepts"]


def test_redo_repeats_the_image(studio: Studio, tom: Concept, tmp_path: Path) -> None:
    recipe = Paint(prompt="<tom>", steps=3, seed=5)
    path = save_first(studio, recipe, tmp_path)
    again = Paint.make(**metadata.read(path).recipe["recipe"])
    (image,) = studio.paint(**again.model_dump(exclude={"base"}))
    assert np.array_equal(np.asarray(image), np.asarray(Image.open(path)))


def test_files_do_not_overwrite_each_other(studio: Studio, tmp_path: Path) -> None:
    recipe = Paint(prompt="A cat, (small)!", steps=1, n=2)
    first, second = (save_first(studio, recipe, tmp_path) for _ in range(2))
    assert first.name == "a-cat-small-0.png" and second.name == "a-cat-small-0.2.png"
    assert len(list(tmp_path.iterdir())) == 4


def test_without_metadata(studio: Studio, tmp_path: Path) -> None:
    done = list(studio.painting(recipe := Paint(prompt="a cat", steps=1)))[-1]
    names = Names(recipe, tmp_path / "x.png")
    bare = Marking(on=False)
    path = save_generated(done.result[0], names, metadata=False, marking=bare)
    assert Image.open(path).info == {}
    with pytest.raises(BadPhoto, match="carries no recipe"):
        metadata.read(path)


text = st.text(st.characters(blacklist_categories=["Cs", "Cc"]), max_size=60)


@given(text, text, st.dictionaries(st.sampled_from(["Model", "Sampler", "Note"]), text, min_size=3))
@settings(max_examples=200, deadline=None)
def test_parameters_round_trip(prompt: str, negative: str, values: dict[str, str]) -> None:
    """parse(write(x)) == x in A1111's grammar, for any text without line breaks."""
    clean = {k: v.strip() for k, v in values.items()}
    settings_ = {"Steps": "4", "Seed": "1", "CFG scale": "2"} | {k: v for k, v in clean.items() if v}
    prompt, negative = prompt.strip() or "x", negative.strip()
    if prompt.startswith("Negative prompt:") or "\n" in prompt + negative:
        return
    parsed = metadata.parse_parameters(metadata.parameters_text(prompt, negative, settings_))
    assert parsed[0] == prompt and parsed[1] == negative
    assert {k: v.strip('"') for k, v in parsed[2].items()} == {k: v.strip('"') for k, v in settings_.items()}


def test_reads_images_of_other_tools(tmp_path: Path) -> None:
    info = PngInfo()
    info.add_text("parameters", "a fox, (snow:1.2)\nNegative prompt: blurry\nSteps: 20, Sampler: DPM++ 2M, "
                  "CFG scale: 7, Seed: 42, Size: 512x512, Model: dream, Version: v1.9")  # fmt: skip
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=info)
    texts = metadata.read(tmp_path / "a.png")
    assert texts.prompt == "a fox, (snow:1.2)" and texts.settings["Seed"] == "42" and texts.recipe == {}


def inside(path: Path, **texts: str) -> Path:
    """An image with these text chunks."""
    info = PngInfo()
    for key, value in texts.items():
        info.add_text(key, value)
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    return path


@pytest.mark.parametrize(
    "text", ["a" * 50_000, " " * 50_000, "a:" * 25_000, "," * 50_000, ',a: "' * 8_000, 'ab: "' + "\\," * 20_000]
)
def test_any_text_is_read_in_linear_time(text: str) -> None:
    """50,000 characters in well under a second (a quadratic pattern takes a minute for some of these)."""
    started = time.thread_time()
    metadata.parse_parameters(text)
    assert time.thread_time() - started < 1


@pytest.mark.parametrize("recipe", ["[1]", "1", '"x"', "null", "[" * 50_000, "{"])
def test_a_recipe_that_is_no_object_is_none(recipe: str, tmp_path: Path) -> None:
    with pytest.raises(BadPhoto, match="carries no recipe"):
        metadata.read(inside(tmp_path / "a.png", minikin=recipe))
    both = inside(tmp_path / "b.png", minikin=recipe, parameters="a cat")
    assert metadata.read(both).recipe == {} and metadata.read(both).prompt == "a cat"


def test_a_recipe_of_absurd_length_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadPhoto, match="a recipe of 200,001 characters; at most 100,000"):
        metadata.read(inside(tmp_path / "a.png", parameters="a" * 200_001))


def test_contact_sheet_holds_every_image() -> None:
    images = [Image.new("RGB", (32, 32), (k * 40, 0, 0)) for k in range(5)]
    sheet = contact_sheet(images, [f"number {k}" for k in range(5)], columns=3, title="five")
    colours = {c for _, c in sheet.getcolors(maxcolors=10**6) or []}
    assert {(k * 40, 0, 0) for k in range(5)} <= colours


def test_lcm_accepts_its_own_scheduler_only(bases: dict[str, Base]) -> None:
    with pytest.raises(BadRecipe, match="paints with the LCM scheduler only"):
        Studio(bases["lcm-sd15"]).paint("a cat", scheduler="DDIM")
    assert len(Studio(bases["lcm-sd15"]).paint("a cat", steps=2, scheduler="lcm")) == 1
