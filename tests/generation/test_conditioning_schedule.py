"""Concept start, prompt editing, long prompts, guidance interval, and operating points."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from minikin import Concept, Studio, events
from minikin.errors import BadConceptFile, BadRecipe
from minikin.generation.batching import BatchRow, batch_key, generate_together
from minikin.generation.conditioning_schedule import nearest
from minikin.generation.request import resolve
from minikin.images.photos import Photo
from minikin.models.base import Base
from minikin.models.prompt import parse
from minikin.perfusion import concept_file, operating_points
from minikin.perfusion.operating_points import Point
from minikin.recipes import ConceptSettings, Paint
from tests.perfusion.test_concept_file import concept as random_concept

STEPS = 5
PROMPT = "a photo of <tom> on the beach"
FAITHFUL = Point(1.6, 0.25, 3.0, 0.4, (0.2, 0.8), 0.9, 0.5, "tiny 0123456789abcdef")
BALANCED = replace(FAITHFUL, strength=1.3, tau=0.1, concept_start=0.2, interval=(0.0, 1.0))
POINTS = {"quality": {"faithful": FAITHFUL, "balanced": BALANCED}}


@pytest.fixture(scope="module")
def studios(bases: dict[str, Base]) -> dict[str, Studio]:
    """SD 1.5 and SDXL with tom, a cat, and rex, a dog, whose values are far from their categories'."""
    studios = {}
    for family in ("sd15", "sdxl"):
        studio = studios[family] = Studio(bases[family])
        rng = np.random.default_rng(0)
        shots = [Photo("a", rng.integers(0, 255, (64, 64, 3), dtype=np.uint8), np.ones((64, 64), np.float32))]
        for k, (name, category) in enumerate([("tom", "cat"), ("rex", "dog")]):
            how: dict[str, Any] = {"mode": "gated", "steps": 1, "batch": 1, "preview": False}
            concept = studio.teach(shots, name=name, category=category, **how)
            g = torch.Generator().manual_seed(k)
            delta = {p: 5 * torch.randn(d.shape, generator=g) for p, d in concept.delta.items()}
            studio.add(replace(concept, delta=delta))
    return studios


@pytest.fixture(params=["sd15", "sdxl"])
def studio(request: Any, studios: dict[str, Studio]) -> Studio:
    return studios[request.param]


def pixels(studio: Studio, prompt: str = PROMPT, **recipe: Any) -> np.ndarray:
    images = studio.paint(prompt, **{"steps": STEPS, "seed": 3, **recipe})
    return np.stack([np.asarray(i, np.int16) for i in images])


@contextmanager
def calls(studio: Studio) -> Iterator[list[tuple[int, int]]]:
    """Rows of latents and of keys and values in every call of the U-Net."""
    rows: list[tuple[int, int]] = []

    def note(_module: Any, args: Any, kwargs: Any) -> None:
        kv = kwargs["encoder_hidden_states"]
        more = kwargs.get("added_cond_kwargs") or {}
        assert all(len(v) == len(kv) for v in more.values())
        rows.append((len(args[0]), len(kv)))

    handle = studio.base.denoiser.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield rows
    finally:
        handle.remove()


@contextmanager
def using(studio: Studio, measured: operating_points.Points, name: str = "tom") -> Iterator[None]:
    """The concept with these operating points."""
    before = studio.concepts.loaded[name].concept
    studio.add(replace(before, points=measured))
    try:
        yield
    finally:
        studio.add(before)


# ---- concept start --------------------------------------------------------------------------------


def test_start_zero_and_whole_interval_change_nothing(studio: Studio) -> None:
    usual = pixels(studio)
    assert np.array_equal(pixels(studio, concept_start=0), usual)
    assert np.array_equal(pixels(studio, interval=(0, 1)), usual)
    assert np.array_equal(pixels(studio, concept_start=0.05), usual)  # a quarter of a step is none


def test_start_one_is_the_image_of_the_category(studio: Studio) -> None:
    """Bit for bit: then nothing of the concept is packed at all."""
    plain = pixels(studio, "a photo of a cat on the beach")
    assert np.array_equal(pixels(studio, concept_start=1), plain)
    assert np.abs(pixels(studio) - plain).max() > 8  # the concept itself is another image


def test_category_first_concept_later(studio: Studio) -> None:
    """Each later start comes nearer to the category; packed prompts follow the steps."""
    plain = pixels(studio, "a photo of a cat on the beach")
    far = [np.abs(pixels(studio, concept_start=s) - plain).mean() for s in (0.0, 0.4, 0.8, 1.0)]
    assert far == sorted(far, reverse=True) and far[0] > 1.5 * far[2] > far[3] == 0


def test_concept_start_swaps_the_packed_prompt(studio: Studio) -> None:
    conditionings = []
    note = studio.base.denoiser.register_forward_pre_hook(
        lambda _m, _a, k: conditionings.append(k["encoder_hidden_states"].clone()), with_kwargs=True
    )
    try:
        pixels(studio, concept_start=0.4, scheduler="DDIM")  # one call in each step
        pixels(studio, scheduler="DDIM")
        pixels(studio, "a photo of a cat on the beach", scheduler="DDIM")
    finally:
        note.remove()
    switched, concept, category = (conditionings[i : i + STEPS] for i in (0, STEPS, 2 * STEPS))
    for step in range(STEPS):
        want = (category if step < 2 else concept)[step]
        assert torch.allclose(switched[step], want, atol=1e-4), step
    assert not torch.allclose(concept[0], category[0], atol=1e-2)


def test_each_concept_has_its_own_start(studio: Studio) -> None:
    both, after = (
        "<tom> and <rex>",
        {"tom": ConceptSettings(concept_start=0.4), "rex": ConceptSettings(concept_start=1.0)},
    )
    no_rex = pixels(studio, "<tom> and a dog", points={"tom": ConceptSettings(concept_start=0.4)})
    assert np.abs(pixels(studio, both, points=after) - no_rex).max() <= 1  # packed in other shapes
    assert np.abs(pixels(studio, both) - no_rex).max() > 8


# ---- prompt editing -------------------------------------------------------------------------------


@contextmanager
def conditionings(studio: Studio) -> Iterator[list[torch.Tensor]]:
    """Keys and values of every call of the U-Net."""
    kv: list[torch.Tensor] = []
    handle = studio.base.denoiser.register_forward_pre_hook(
        lambda _m, _a, k: kv.append(k["encoder_hidden_states"].clone()), with_kwargs=True
    )
    try:
        yield kv
    finally:
        handle.remove()


def in_steps(studio: Studio, prompt: str, **recipe: Any) -> list[torch.Tensor]:
    """With one call in each step, unless the recipe names another scheduler."""
    with conditionings(studio) as kv:
        pixels(studio, prompt, **{"scheduler": "DDIM", **recipe})
    return kv


@pytest.mark.parametrize(
    ("source", "prompts"),
    [
        ("a [cat:dog:0.4] at night", "ccddd"),
        ("a [cat:dog:4] at night", "ccccd"),
        ("a [cat|dog] at night", "cdcdc"),
        ("a [[cat|dog]:cat:0.6] at night", "cdccc"),
        ("a [cat:dog:0] at night", "ddddd"),
    ],
)
def test_prompt_editing_changes_the_prompt_in_its_step(studio: Studio, source: str, prompts: str) -> None:
    plain = {p[2]: in_steps(studio, p)[0] for p in ("a cat at night", "a dog at night")}
    for step, (kv, of) in enumerate(zip(in_steps(studio, source), prompts, strict=True)):
        assert torch.allclose(kv, plain[of], atol=1e-4), step
    assert not torch.allclose(plain["c"], plain["d"], atol=1e-2)


def test_negative_prompts_are_edited_too(studio: Studio) -> None:
    plain = {n: in_steps(studio, "a cat", negative=n, guidance=3)[0] for n in ("dog", "bus")}
    edited = in_steps(studio, "a cat", negative="[dog:bus:0.4]", guidance=3)
    for step, kv in enumerate(edited):
        assert torch.allclose(kv, plain["dog" if step < 2 else "bus"], atol=1e-4), step


def test_concepts_in_edited_prompts(studio: Studio) -> None:
    """A concept that is there for a while has its start, its strength and its point then."""
    edited = in_steps(studio, "a photo of [<tom:0.5>:<rex>:0.4]", concept_start=0.2)
    first = in_steps(studio, "a photo of a cat")[0]
    second, last = (in_steps(studio, f"a photo of {p}")[0] for p in ("<tom:0.5>", "<rex>"))
    for step, want in enumerate([first, second, last, last, last]):
        assert torch.allclose(edited[step], want, atol=1e-4), step
    with pytest.raises(BadRecipe, match="concept in a region stays the same in all steps"):
        pixels(studio, "[<tom@left>:a dog:0.5]")


def test_schedulers_with_more_calls_count_calls(studios: dict[str, Studio]) -> None:
    """As in A1111: Heun calls the U-Net twice a step."""
    studio = studios["sd15"]
    cat, dog = (in_steps(studio, f"a {p}")[0] for p in ("cat", "dog"))
    edited = in_steps(studio, "a [cat:dog:0.5]", scheduler="Heun")
    assert len(edited) == 9 and all(
        torch.allclose(kv, cat if k < 4 else dog, atol=1e-4) for k, kv in enumerate(edited)
    )


def test_over_an_image_shares_are_of_a_whole_one(studios: dict[str, Studio]) -> None:
    """At strength 0.4 the last two of five steps run: the prompt has changed before them."""
    studio = studios["sd15"]
    image = studio.paint("a cat", steps=1)[0]
    dog = in_steps(studio, "a dog")[0]
    with conditionings(studio) as kv:
        studio.refine(image, prompt="a [cat:dog:0.5]", strength=0.4, steps=STEPS, scheduler="DDIM")
    assert len(kv) == 2 and all(torch.allclose(k, dog, atol=1e-4) for k in kv)


def test_edited_prompts_share_batches(studios: dict[str, Studio]) -> None:
    """Each image of a batch has its own steps."""
    base = studios["sd15"].base
    requests = [
        resolve(base, Paint(prompt=p, steps=STEPS)) for p in ("a [cat:dog:0.4]", "a [bus|car]", "a cat")
    ]
    assert len({batch_key(r, ()) for r in requests}) == 1
    together = generate_together(base, [BatchRow(r, 3) for r in requests])
    for request, image in zip(requests, together, strict=True):
        (alone,) = generate_together(base, [BatchRow(request, 3)])
        assert np.abs(np.asarray(image.image, np.int16) - np.asarray(alone.image, np.int16)).max() <= 1


# ---- long prompts ---------------------------------------------------------------------------------


def test_long_prompts_and_break_make_more_keys_and_values(studio: Studio) -> None:
    """Both prompts have as many chunks as the longer one; other requests do not share their batch."""
    for prompt, n in (("a cat", 77), ("a cat BREAK a dog", 154), ("a cat, " * 60, 231)):
        assert {kv.shape[1] for kv in in_steps(studio, prompt, guidance=3)} == {n}
    assert {kv.shape[1] for kv in in_steps(studio, "a cat", negative="dog " * 80, guidance=3)} == {154}
    keys = {batch_key(resolve(studio.base, Paint(prompt=p)), ()) for p in ("a cat", "a dog", "a BREAK b")}
    assert len(keys) == 2


def test_concepts_and_regions_in_later_chunks(studio: Studio) -> None:
    far = "night, " * 40 + "<tom>"
    plain = pixels(studio, "night, " * 40 + "a cat")
    assert np.abs(pixels(studio, far) - plain).max() > 2
    left, right = (pixels(studio, f"night BREAK <tom@{side}> BREAK <rex>") for side in ("left", "right"))
    assert np.abs(left - right).max() > 0


# ---- guidance interval ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("interval", "guided"),
    [((0, 1), [0, 1, 2, 3, 4]), ((0.2, 0.8), [1, 2, 3]), ((0, 0.4), [0, 1]), ((0.6, 1), [3, 4])],
)
def test_rows_outside_the_interval(studio: Studio, interval: Any, guided: list[int]) -> None:
    """A guided step has two rows an image, any other one; keys and values are always as many."""
    with calls(studio) as rows:
        pixels(studio, interval=interval, n=2, concept_start=0.4, scheduler="DDIM")  # one call in each step
    assert rows == [(4, 4) if i in guided else (2, 2) for i in range(STEPS)]


def test_an_interval_is_guidance_in_between(studio: Studio) -> None:
    """Other than with guidance everywhere, and other than without any."""
    part, usual, none = pixels(studio, interval=(0.2, 0.8)), pixels(studio), pixels(studio, guidance=1)
    assert np.abs(part - usual).max() > 0 and np.abs(part - none).max() > 0
    later = pixels(studio)
    assert np.array_equal(later, usual)  # nothing of it stays behind


def test_interval_without_guidance_is_a_warning(studios: dict[str, Studio]) -> None:
    studio = studios["sd15"]

    def notes(**more: Any) -> list[str]:
        run = studio.painting(Paint(prompt=PROMPT, steps=1, **more))
        return [e.text for e in run if isinstance(e, events.Note)]

    assert any("interval has no effect" in t for t in notes(guidance=1, interval=(0.2, 0.8)))
    assert not notes(guidance=3, interval=(0.2, 0.8)) and not notes(guidance=1, interval=(0, 1))


@pytest.mark.parametrize("name", ["Heun", "DPM++ 2M Karras"])
def test_schedulers_with_more_calls_than_steps(studios: dict[str, Studio], name: str) -> None:
    with calls(studios["sd15"]) as rows:
        pixels(studios["sd15"], scheduler=name, interval=(0, 0.5), concept_start=0.5)
    n = len(rows)
    assert n == (2 * STEPS - 1 if name == "Heun" else STEPS)
    assert [rows for rows, _ in rows] == [2 if i < nearest(0.5, n) else 1 for i in range(n)]


# ---- operating points ----------------------------------------------------------------------------


def test_a_name_alone_means_balanced(studios: dict[str, Studio]) -> None:
    studio = studios["sd15"]
    as_taught = pixels(studio)
    options = {"tau": 0.1, "guidance": 3.0, "concept_start": 0.2}
    explicit = pixels(studio, PROMPT.replace("<tom>", "<tom:1.3>"), **options)
    faithful = pixels(
        studio,
        PROMPT.replace("<tom>", "<tom:1.6>"),
        tau=0.25,
        guidance=3.0,
        concept_start=0.4,
        interval=(0.2, 0.8),
    )
    with using(studio, POINTS):
        assert np.array_equal(pixels(studio), explicit)
        assert np.array_equal(pixels(studio, PROMPT.replace("<tom>", "<tom:faithful>")), faithful)
        assert np.array_equal(pixels(studio, PROMPT.replace("<tom>", "<tom:balanced>")), explicit)
        assert np.array_equal(pixels(studio, points={}), as_taught)
    assert np.abs(as_taught - explicit).max() > 4 and np.abs(faithful - explicit).max() > 4
    assert np.array_equal(pixels(studio), as_taught)


def test_options_win_over_points(studios: dict[str, Studio]) -> None:
    studio = studios["sd15"]
    values = {"tau": 0.2, "guidance": 2.0, "concept_start": 0.6, "interval": (0.0, 0.6)}
    want = pixels(studio, PROMPT.replace("<tom>", "<tom:0.7>"), **values)
    with using(studio, POINTS):
        assert np.array_equal(pixels(studio, PROMPT.replace("<tom>", "<tom:0.7>"), **values), want)


def test_points_are_a_preset_s_own(studios: dict[str, Studio]) -> None:
    studio = studios["sd15"]
    usual = pixels(studio)
    with using(studio, {"lcm-lora": POINTS["quality"], "quality-9": POINTS["quality"]}):
        assert np.array_equal(pixels(studio), usual)
        assert np.abs(pixels(studio, steps=9) - pixels(studio, steps=9, points={})).max() > 4
        with pytest.raises(BadRecipe, match="no operating point 'creative' for preset quality.*sweep tom"):
            pixels(studio, "<tom:creative>")
    with pytest.raises(BadRecipe, match="is not a number.*faithful, balanced, creative"):
        pixels(studio, "<tom:faithfull>")


def test_an_image_repeats_whatever_is_measured_later(studios: dict[str, Studio]) -> None:
    """The record of an image has the point's numbers in it, or says that there were none."""
    studio = studios["sd15"]
    with using(studio, POINTS):
        before = pixels(studio)
        (*_, done) = studio.painting(Paint(prompt=PROMPT, steps=STEPS, seed=3))
        recorded = done.facts["recipe"]
        assert recorded["points"]["tom"] == {"strength": 1.3, "tau": 0.1, "concept_start": 0.2}
        sha = done.facts["concepts"]["tom"]["sha256"]
    other = {"quality": {"balanced": replace(BALANCED, strength=0.3)}}
    with using(studio, other):
        again = studio.paint(**Paint.make(**recorded).model_dump(exclude={"base"}))
        assert np.array_equal(np.asarray(again[0], np.int16), before[0])
        (*_, done) = studio.painting(Paint(prompt=PROMPT, steps=STEPS, seed=3))
        assert done.facts["concepts"]["tom"]["sha256"] == sha  # points are no other concept


def test_prompts_distinguish_points_from_strengths() -> None:
    uses = parse("<tom> <tom:0.8> <tom:creative> <concept:tom:faithful>", {"tom": "cat"}).uses
    assert [(u.strength, u.point, u.has_strength) for u in uses] == [
        (1.0, "", False), (0.8, "", True), (1.0, "creative", False), (1.0, "faithful", False),
    ]  # fmt: skip


# ---- points in the file ---------------------------------------------------------------------------------

THREE = {
    n: replace(FAITHFUL, subject_fidelity=0.71234567, prompt_fidelity=0.33333333)
    for n in operating_points.NAMES
}


@pytest.mark.parametrize(("family", "int8", "cap"), [("sd15", False, 32_000), ("sd15", True, 20_000),
                                                     ("sdxl", None, 100_000)])  # fmt: skip
def test_points_fit_into_the_file(family: str, int8: bool | None, cap: int, tmp_path: Path) -> None:
    """Three presets with three points each, put in without touching anything else."""
    concept = random_concept(family)
    path = concept.save(tmp_path / "tom.safetensors", int8=int8)
    before = concept_file.load(path)
    measured = dict.fromkeys(("quality", "lcm-lora", "turbo-1"), THREE)
    assert concept_file.store_points(path, measured)
    after = concept_file.load(path)
    assert path.stat().st_size <= cap
    assert after.points["turbo-1"]["creative"] == replace(
        FAITHFUL, subject_fidelity=0.7123, prompt_fidelity=0.3333
    )
    assert all(torch.equal(after.delta[k], before.delta[k]) for k in before.delta)
    assert concept_file.to_bytes(replace(after, points={}), int8=int8) == concept_file.to_bytes(
        before, int8=int8
    )


def test_points_never_push_a_file_over_its_cap(tmp_path: Path, monkeypatch: Any) -> None:
    """A preview gives way; where points do not fit at all, the file stays as it is."""
    concept = replace(random_concept("sd15"), preview=b"\xff" * 2000)
    path = concept.save(tmp_path / "tom.safetensors")
    monkeypatch.setattr(concept_file, "MAX_BYTES", path.stat().st_size)
    assert concept_file.store_points(path, {"quality": THREE})
    assert concept_file.load(path).points and not concept_file.load(path).preview
    before = path.read_bytes()
    monkeypatch.setattr(concept_file, "MAX_BYTES", len(before))
    assert not concept_file.store_points(path, dict.fromkeys(("quality", "turbo"), THREE))
    assert path.read_bytes() == before


ENCODER = "judge"  # word: the key in concept files


@pytest.mark.parametrize("points", [
    [], {"quality": []}, {"quality": {}}, {"quality": {ENCODER: 3}}, {"quality": {ENCODER: "x", "best": []}},
    {"quality": {ENCODER: "x", "faithful": [1, 0.1, 4, 0, 0, 1, 0.5]}},
    {"quality": {ENCODER: "x", "faithful": [9, 0.1, 4, 0, 0, 1, 0.5, 0.5]}},
    {"quality": {ENCODER: "x", "faithful": [1, 0.0, 4, 0, 0, 1, 0.5, 0.5]}},
    {"quality": {ENCODER: "x", "faithful": [1, 0.1, 4, 0, 1, 0, 0.5, 0.5]}},
    {"quality": {ENCODER: "x", "faithful": [1, 0.1, 4, 0, 0, 1, float("nan"), 0.5]}},
    {"quality": {ENCODER: "x" * 99, "faithful": [1, 0.1, 4, 0, 0, 1, 0.5, 0.5]}},
    {str(k): {ENCODER: "x"} for k in range(17)},
])  # fmt: skip
def test_absurd_points_are_refused(points: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """Whatever is in there, the message is the concept file's; sound points are read (positive control)."""
    monkeypatch.setattr(operating_points, "as_json", lambda _: points)
    concept: Concept = random_concept("sd15", mode="value")
    with pytest.raises(BadConceptFile, match="not a sound concept file"):
        concept_file.from_bytes(concept_file.to_bytes(concept))
    points = {"quality": {ENCODER: "x", "faithful": [1, None, 4, 0, 0, 1, 0.5, 0.5]}}
    (read,) = concept_file.from_bytes(concept_file.to_bytes(concept)).points["quality"].values()
    assert read == Point(1, None, 4, 0, (0, 1), 0.5, 0.5, "x")


def test_the_recipe_of_an_image_is_plain_data() -> None:
    recipe = Paint.make(prompt="<tom>", interval="0.2-0.8", points={"tom": {"strength": 1.3}})
    assert Paint.make(**recipe.model_dump(mode="json")) == recipe
    for wrong in (
        {"interval": "0.8-0.2"},
        {"interval": "some"},
        {"concept_start": 1.5},
        {"interval": (0.2, 0.2)},
    ):
        with pytest.raises(BadRecipe):
            Paint.make(prompt="<tom>", **wrong)
