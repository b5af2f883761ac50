"""Comparing methods: every method is in the report, numbers are the metrics' own, nothing is painted twice."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from minikin import Concept, Studio, events
from minikin.baselines.result import Learned, using
from minikin.errors import AssetError, BadPhoto, BadRecipe, UnknownName
from minikin.evaluation import metrics
from minikin.evaluation.compare import methods
from minikin.evaluation.compare.compare import Course, Gallery, Painter, Task, Wish, compare
from minikin.evaluation.compare.methods import Taught, chosen, concept_bytes, strengths
from minikin.evaluation.compare.task import _courses
from minikin.evaluation.compare.variants import variant
from minikin.evaluation.encoders import Card
from minikin.evaluation.pareto import hypervolume
from minikin.evaluation.scores import References
from minikin.images.photos import Photo
from minikin.models import memory
from minikin.models.base import Base
from minikin.models.identity import Origin
from minikin.models.lora.adapters import Adapters
from minikin.perfusion import concept_file
from minikin.recipes import Baseline, Compare, Paint, Teach
from tests.conftest import build_pipeline
from tests.helpers.browsers import Tags, shown
from tests.helpers.loras import random_lora, write

pytestmark = pytest.mark.usefixtures("no_curves", "one_thread", "quick_disk")
SEARCH = Compare(photos="-", category="cat", prompts=3, seeds=2, plain=2, strengths=(0.5,))
COURSES = (Course("quality", 50, {"steps": 50}), Course("lcm-lora", 4, {"steps": 4}))


class Colours:
    """Sees the mean colours of an image's quarters; texts are fixed directions."""

    name, reads = "colours", True
    card = Card("colours", "tests", "Apache-2.0", "00ff" * 4)

    def images(self, pictures: Sequence[Image.Image], masks: Any = None) -> Tensor:
        small = [
            np.asarray(i.convert("RGB").resize((2, 2), Image.Resampling.BOX), np.float32) for i in pictures
        ]
        return torch.nn.functional.normalize(torch.tensor(np.stack(small)).flatten(1) + 1, dim=1)

    likeness = images

    def texts(self, captions: Sequence[str]) -> Tensor:
        g = torch.Generator().manual_seed(1)
        return torch.nn.functional.normalize(torch.rand(len(captions), 12, generator=g), dim=1)


class World:
    """Teaches and paints without a base: images are noise by method, strength, prompt, steps and seed.

    A baseline's plain images differ from the plain base's, Perfusion's do not. `after` is told how many
    sets of images were painted.
    """

    def __init__(self, after: Callable[[int], None] = lambda _: None) -> None:
        self.taught: list[str] = []
        self.sets: list[tuple[Any, ...]] = []
        self.on = 0
        self.after = after

    def teach(self, method: str, recipe: Compare = SEARCH) -> Generator[events.Event, None, Taught]:
        self.taught.append(method)
        yield events.Progress("teaching", 1, 1)
        n = 10 * (1 + methods.names().index(method))
        return Taught(
            method, None, f"digest of {method}", {"own": n, "sd15": 2 * n, "sdxl": 3 * n}, n / 2, n, 4
        )

    @contextmanager
    def wear(self, on: Sequence[Taught], strength: float) -> Iterator[Painter]:
        self.on += 1
        yield lambda recipe: self.paint(on[0] if on else None, strength, recipe)
        self.on -= 1

    def paint(self, taught: Taught | None, strength: float, recipe: Paint) -> list[Image.Image]:
        method = taught.method if taught else ""
        self.sets.append((method, strength, recipe.prompt, recipe.steps))
        plainly = "<" not in recipe.prompt and (not method or method in methods.PERFUSION)
        made = []
        for seed in range(recipe.seed, recipe.seed + recipe.n):
            told = ("", 0.0) if plainly else (method, strength)
            rng = np.random.default_rng([*repr((told, recipe.prompt, recipe.steps, seed)).encode()])
            made.append(Image.fromarray(rng.integers(0, 255, (4, 4, 3), dtype=np.uint8)))
        self.after(len(self.sets))
        return made


@pytest.fixture(scope="module")
def base(tmp_path_factory: Any) -> Base:
    """A miniature of SD 1.5 of this module's own."""
    return Base(build_pipeline("sd15", tmp_path_factory.mktemp("compare-base")), "sd15")


@pytest.fixture(scope="module")
def task(base: Base) -> Task:
    judge, rng = Colours(), np.random.default_rng(3)
    photos = [Photo(f"{k}", rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)) for k in range(4)]
    seen = [Image.fromarray(p.pixels) for p in photos]
    known = References.of(judge, seen[:3], held_out=seen[3:])
    skipped = ("1 step is left out: preset turbo is not on this machine.",)
    return Task(SEARCH, methods.names(), base, photos[:3], COURSES, skipped, judge, known)


def run(task: Task, out: Path, world: World) -> list[events.Event]:
    return list(compare(task, out, world.teach, world.wear))


@pytest.fixture(scope="module")
def compared(task: Task, tmp_path_factory: Any) -> tuple[Path, World, list[events.Event], dict[str, Any]]:
    out, world = tmp_path_factory.mktemp("compare"), World()
    told = run(task, out, world)
    return out, world, told, json.loads((out / "report.json").read_text())


def test_presets_of_the_few_steps(base: Base, monkeypatch: Any) -> None:
    """By default the one that is made for the fewest other numbers; otherwise all that are asked for."""
    monkeypatch.setattr("minikin.models.presets.where", lambda source: Path(source.name))
    studio = Studio(base)
    listed = studio.presets()

    def facts(recipe: Paint) -> dict[str, Any]:
        told = dict.fromkeys(("base", "preset", "sampler", "guidance", "adapters"))
        return {**told, "recipe": {"steps": recipe.steps}}

    def courses(**values: Any) -> list[tuple[str, int]]:
        made = Compare.make(photos="x", category="cat", steps="50,4,1", **values)
        return [(c.preset, c.steps) for c in _courses(made, listed, facts)[0]]

    assert courses() == [("quality", 50), ("tdm", 4), ("turbo", 1)]
    assert courses(presets="lcm,lcm-lora") == [("quality", 50), ("lcm-lora", 4), ("lcm", 4), ("lcm", 1)]
    with pytest.raises(UnknownName, match="preset 'lcmm'"):
        courses(presets="lcmm")


# ---- the report ------------------------------------------------------------------------------------


def test_every_method_is_in_the_report(compared: Any) -> None:
    """In every file, with its costs; 50 and 4 steps each; what is left out is said."""
    out, world, told, facts = compared
    assert isinstance(told[-1], events.Done) and told[-1].result == out / "report.html"
    assert [m["method"] for m in facts["methods"]] == list(methods.names()) == world.taught
    for name in ("report.json", "report.csv", "report.md", "report.html"):
        text = (out / name).read_text()
        assert all(method in text for method in methods.names()), name
    for k, m in enumerate(facts["methods"]):
        n = 10 * (1 + k)
        assert (
            m["bytes"] == {"own": n, "sd15": 2 * n, "sdxl": 3 * n}
            and m["memory"] == n
            and m["seconds"] == n / 2
        )
        assert [c["course"] for c in m["courses"]] == ["50 steps (quality)", "4 steps (lcm-lora)"]
        want = [1.0] if m["method"] == "textual-inversion" else [1.0, 0.5]
        assert all([p["strength"] for p in c["points"]] == want for c in m["courses"])
    for name in ("report.md", "report.html"):
        assert "turbo is not on this machine" in (out / name).read_text()
        assert "give the photos of a second one with --beside" in (out / name).read_text()


def test_numbers_are_those_of_the_metrics(compared: Any, task: Task) -> None:
    """Images painted here once more, by hand, and scored by the metrics themselves."""
    facts, judge, r = compared[3], Colours(), task.recipe
    (m,) = (m for m in facts["methods"] if m["method"] == "dreambooth-lora")
    (c,) = (c for c in m["courses"] if c["course"].startswith("4 "))
    taught = Taught("dreambooth-lora", None, "", {}, 0, 0, 0)

    def painted(on: Taught | None, strength: float, prompt: str, n: int) -> list[Image.Image]:
        return World().paint(on, strength, Paint(prompt=prompt, steps=4, n=n, seed=r.seed))

    places = []
    for p in c["points"]:
        own = [i for prompt in task.prompts for i in painted(taught, p["strength"], prompt, r.seeds)]
        groups = [prompt for prompt in task.prompts for _ in range(r.seeds)]
        seen, texts = judge.images(own), judge.texts(task.prompts)
        want = {
            "likeness": metrics.likeness(seen, task.known.photos, groups),
            "held_out": metrics.likeness(seen, task.known.held_out, groups),
            "recognised": metrics.recognised(seen, texts, groups),
            "alignment": metrics.alignment(seen, texts.repeat_interleave(r.seeds, 0), groups),
            "diversity": metrics.diversity(seen, groups),
        }
        for name, number in want.items():
            assert p[name] == pytest.approx(vars(number)), name
        places.append((p["likeness"]["value"], p["alignment"]["value"]))
    assert c["hypervolume"] == pytest.approx(hypervolume(np.array(places)))
    before, after = (judge.images(painted(on, 1.0, task.plain, r.plain)) for on in (None, taught))
    assert c["drift"] == pytest.approx(vars(metrics.drift(before, after))) and c["drift"]["value"] > 0


def test_drift_is_exactly_0_where_pictures_are_the_same(compared: Any) -> None:
    """Perfusion's is; the positive control is that every method of this world that changes them has some."""
    for m in compared[3]["methods"]:
        for c in m["courses"]:
            own = m["method"] in methods.PERFUSION
            assert (c["drift"]["value"] == 0) == (c["drift"]["high"] == 0) == c["plain_same"] == own


def test_csv_and_json_agree(compared: Any) -> None:
    out, _, _, facts = compared
    lines = list(csv.DictReader((out / "report.csv").open()))
    points = [(m, c, p) for m in facts["methods"] for c in m["courses"] for p in c["points"]]
    assert len(lines) == len(points) == 2 * (6 * 2 + 1)
    for line, (m, c, p) in zip(lines, points, strict=True):
        assert (line["method"], line["course"]) == (m["method"], c["course"])
        assert float(line["strength"]) == p["strength"] and float(line["hypervolume"]) == c["hypervolume"]
        assert line["on_front"] == str(p["strength"] in c["front"])
        assert int(line["bytes_sdxl"]) == m["bytes"]["sdxl"] and float(line["drift"]) == c["drift"]["value"]
        for name in ("likeness", "held_out", "recognised", "alignment", "diversity"):
            assert float(line[name]) == p[name]["value"] and float(line[f"{name}_low"]) == p[name]["low"]


@pytest.mark.slow
def test_a_browser_shows_the_report(compared: Any, tmp_path: Path) -> None:
    """Headless, offline: all images load, nothing is wider than the window, it is not blank."""
    found = shown(compared[0] / "report.html", tmp_path / "report.png")
    assert found["broken"] == 0 and found["images"] >= 8 and found["wide"] <= 0 and found["colours"] > 20


def test_the_page_needs_no_network(compared: Any) -> None:
    text = (compared[0] / "report.html").read_text()
    tags = Tags()
    tags.feed(text)
    assert not tags.open
    assert all(a.startswith(("data:image/", "#")) for a in tags.addresses)
    shown = sum(a.startswith("data:image/jpeg") for a in tags.addresses)
    assert shown == len(COURSES) * (2 + 7 * (6 + 2))  # plain before; as taught, and plain with it on
    assert text.count("<svg") == 2 and "<script" not in text and "url(http" not in text
    assert "&lt;mine&gt;" in text and "<mine" not in text


# ---- cost, interruption -----------------------------------------------------------------------------


def test_the_cost_is_told_before_it_starts(task: Task, compared: Any) -> None:
    """Exactly so many images are painted; the first note comes before any of them."""
    world = compared[1]
    n = sum(SEARCH.plain if "<" not in prompt else SEARCH.seeds for _, _, prompt, _ in world.sets)
    first, second = (e.text for e in compared[2] if isinstance(e, events.Note))
    assert isinstance(compared[2][0], events.Note) and first == compared[2][0].text
    assert f"7 methods in 50 steps (quality), 4 steps (lcm-lora): {n} images" in first
    assert "perfusion-gated at most 400" in first and "dreambooth-lora 400" in first
    assert "Painting takes" in second
    assert len(set(world.sets)) == len(world.sets)


def test_a_killed_run_goes_on_and_paints_nothing_twice(task: Task, compared: Any, tmp_path: Path) -> None:
    """Killed three times while painting; what was not yet kept is the only thing painted again."""

    def die_at(n: int) -> Callable[[int], None]:
        def after(done: int) -> None:
            if done == n:
                raise KeyboardInterrupt

        return after

    sets = []
    for n in (1, 20, 30):
        some = World(die_at(n))
        with pytest.raises(KeyboardInterrupt):
            run(task, tmp_path, some)
        sets += some.sets[:-1]  # the last was painted, but never handed over
    rest = World()
    run(task, tmp_path, rest)
    sets += rest.sets
    assert sorted(map(str, sets)) == sorted(map(str, compared[1].sets))
    for name in ("report.json", "report.csv", "report.md", "report.html"):
        assert (tmp_path / name).read_bytes() == (compared[0] / name).read_bytes(), name
    nothing = World()
    run(task, tmp_path, nothing)
    assert not nothing.sets and not nothing.on


def test_another_result_seed_or_size_of_set_is_painted_again(task: Task, compared: Any, tmp_path: Path) -> None:
    some = replace(task, methods=("perfusion-row",))
    run(some, tmp_path, World())
    for change in ({"seed": 7}, {"plain": 3, "seeds": 1}):
        again = World()
        run(replace(some, recipe=SEARCH.model_copy(update=change)), tmp_path, again)
        assert len(again.sets) == 2 * (2 + 2 * SEARCH.prompts)


def test_two_things_in_one_picture(task: Task, tmp_path: Path) -> None:
    """Taught by every method, painted with both on in every course, and told in every file."""
    recipe = SEARCH.model_copy(update={"beside": "-", "beside_category": "dog"})
    beside = replace(task.known, photos=task.known.photos.flip(0))
    two = replace(task, recipe=recipe, methods=("perfusion-row", "dreambooth-lora"), beside=beside)
    world = World()
    run(two, tmp_path, world)
    assert world.taught == ["perfusion-row"] * 2 + ["dreambooth-lora"] * 2
    prompts = [p for _, _, p, _ in world.sets if "<other>" in p]
    assert len(prompts) == 2 * 2 * SEARCH.prompts
    assert prompts[0] == "a photo of <mine> to the left of <other> in the snow"
    assert any(p == "a photo of a cat to the left of a dog in the snow" for _, _, p, _ in world.sets)
    facts = json.loads((tmp_path / "report.json").read_text())
    for m in facts["methods"]:
        for c in m["courses"]:
            assert c["both"]["success"]["n"] == SEARCH.prompts * SEARCH.seeds
    assert "bleed" in (tmp_path / "report.md").read_text() and "bleed" in (tmp_path / "report.html").read_text()
    (row,) = [r for r in two.duets(regions=True) if "snow" in r[0]]
    assert row[0] == "a photo of <mine@left> to the left of <other@right> in the snow"
    with pytest.raises(BadRecipe, match="needs both its photos"):
        Compare.make(photos="-", category="cat", beside="x")


# ---- parts ------------------------------------------------------------------------------------------


def test_methods_by_name() -> None:
    assert chosen("all") == methods.names() and len(methods.names()) == 7
    assert chosen("dreambooth, perfusion-row,dreambooth") == ("dreambooth", "perfusion-row")
    with pytest.raises(UnknownName, match="Unknown method 'dreambooth-lore'. Did you mean 'dreambooth-lora'"):
        chosen("perfusion-row,dreambooth-lore")
    assert strengths("textual-inversion", SEARCH) == (1.0,) and strengths("dreambooth", SEARCH) == (1.0, 0.5)


def test_variants_change_one_thing(base: Base, photos: list[Photo], tmp_path: Path) -> None:
    """In teaching, in painting, or in what is seen; what is not understood is said."""
    for name in chosen("ablations"):
        told = variant(name)
        plain, wanted = (methods.asked(n, SEARCH, tiny=True) for n in (told.method, name))
        assert isinstance(plain, Teach) and isinstance(wanted, Teach)
        differ = {k for k, v in plain.model_dump().items() if getattr(wanted, k) != v}
        assert differ == set(told.recipe)
        assert len(told.recipe) + len(told.paint) + bool(told.photos) <= 1
    both = methods.asked("dreambooth-lora:rank=2:rate=1e-2", SEARCH, tiny=True)
    assert isinstance(both, Baseline) and both.rank == 2 and both.rate == 0.01
    for wrong, what in (
        ("perfusion-gated:mask", "write changes as KEY=VALUE"),
        ("perfusion-gated:photos=none", "photos is a whole number"),
        ("perfusion-gated:maks=none", "Unknown setting of perfusion-gated 'maks'. Did you mean 'mask'"),
        ("perfusion:mask=none", "Unknown method 'perfusion'"),
    ):
        with pytest.raises((BadRecipe, UnknownName), match=what):
            chosen(wrong)
    with pytest.raises(BadRecipe, match="mask"):
        methods.asked("perfusion-gated:mask=nothing", SEARCH, tiny=True)
    seen: list[tuple[int, bool]] = []
    masked = [replace(p, mask=np.ones(p.pixels.shape[:2], np.float32)) for p in photos]

    def teaching(_: Any, __: Path, some: Sequence[Photo]) -> Iterator[events.Event]:
        seen.append((len(some), some[0].mask is not None))
        raise KeyboardInterrupt

    for name in ("perfusion-row", "perfusion-row:photos=1", "perfusion-row:mask=none"):
        with pytest.raises(KeyboardInterrupt):
            list(methods.teach(base, masked, SEARCH, name, tmp_path, teaching))
    assert seen == [(len(photos), True), (1, True), (len(photos), False)]


def test_a_variant_of_painting_has_pictures_of_its_own(task: Task, tmp_path: Path) -> None:
    gallery = Gallery(task, tmp_path, World().wear)
    usual, changed = (
        Wish(Taught(name, None, "d", {}, 0, 0, 1), 1.0, COURSES[0], "<mine>", 2)
        for name in ("perfusion-gated", "perfusion-gated:lock=global")
    )
    assert not set(gallery.paths(usual)) & set(gallery.paths(changed))
    assert gallery._recipe(changed).lock == "global" and gallery._recipe(usual).lock == "local"


def test_methods_have_their_own_defaults() -> None:
    recipe = SEARCH.model_copy(update={"seed": 5})
    row = methods.asked("perfusion-row", recipe, tiny=True)
    assert isinstance(row, Teach) and row.mode == "row" and row.value_rate == 0.1 and row.seed == 5
    lora = methods.asked("dreambooth-lora", recipe, tiny=True)
    assert isinstance(lora, Baseline) and lora.steps == 400 and lora.rate == 3e-3
    few = methods.asked("dreambooth", recipe.model_copy(update={"teach_steps": 3}), tiny=False)
    assert few.steps == 3


def test_sizes_of_concepts_on_real_bases() -> None:
    """As docs/concept-file.md has them: 31.3 KB for SD 1.5, 95.6 KB for SDXL (int8)."""
    origin = Origin("tiny", "f" * 64, "t" * 64, text_sketch="s" * 145)
    gated = Concept("mine", "cat", "gated", origin, (torch.zeros(1, 4),), torch.ones(4), torch.ones(4), {})
    assert concept_bytes(gated, "sd15") == pytest.approx(31_300, rel=0.02)
    assert concept_bytes(gated, "sdxl") == pytest.approx(95_600, rel=0.02)
    row = replace(gated, mode="row", word_deltas=())
    assert 0 < concept_bytes(gated, "sd15") - concept_bytes(row, "sd15") < 6_000


def test_peak_memory_is_of_the_work_alone() -> None:
    with memory.peak(torch.device("cpu")) as large:
        np.ones(300_000_000, np.uint8).sum()
    with memory.peak(torch.device("cpu")) as small:
        pass
    if large.bytes is None or small.bytes is None:
        pytest.skip("this system does not tell")
    assert large.bytes - small.bytes > 250_000_000


def test_a_lora_is_merged_over_the_weights_at_hand(tmp_path: Path, base: Base) -> None:
    """A preset's LoRA that was merged before is merged anew when a baseline is put on, and when it is off."""
    name, weight = next((n, p) for n, p in base.unet.named_parameters() if n.endswith("attn2.to_v.weight"))
    learned = Learned("dreambooth", "mine", "cat", "sks", "sks cat", base.origin, weights={name: weight + 1})
    adapters = Adapters(base)
    one = adapters.get(write(tmp_path / "a.safetensors", random_lora(base)))

    def merged() -> Tensor:
        with adapters.using([(one, 1.0)]):
            return base.unet.get_submodule(name.removesuffix(".weight")).lora_weight.clone()

    before = merged()
    with using(base, [(learned, 1.0)]):
        inside = merged()
    assert torch.allclose(inside, before + 1, atol=1e-5) and torch.equal(merged(), before)


@pytest.mark.slow
def test_teaching_is_kept(base: Base, photos: list[Photo], tmp_path: Path) -> None:
    """By all it depends on; a result whose costs were never written is taught again."""
    made = Studio(base)
    calls: list[Path] = []

    def teaching(wanted: Teach | Baseline, folder: Path, photos: Sequence[Photo]) -> Iterator[events.Event]:
        calls.append(folder)
        if isinstance(wanted, Teach):
            return made.teaching(photos, wanted.model_copy(update={"batch": 2}))
        return made.teaching_baseline(photos, wanted.model_copy(update={"batch": 1}), folder)

    def taught(method: str, **change: Any) -> Taught:
        recipe = SEARCH.model_copy(update={"teach_steps": 2, **change})
        work, found = methods.teach(base, photos, recipe, method, tmp_path, teaching), None
        while found is None:
            try:
                next(work)
            except StopIteration as end:
                found = end.value
        return found

    row = taught("perfusion-row")
    again = taught("perfusion-row")
    assert len(calls) == 1 and again.digest == row.digest and row.steps == 2 and row.seconds > 0
    assert row.sizes["own"] == len(concept_file.to_bytes(row.result)) > 1000
    assert taught("perfusion-row", seed=1).digest != row.digest and len(calls) == 2
    lora = taught("dreambooth-lora")
    assert lora.sizes["own"] == lora.result.n_bytes and len(calls) == 3
    (calls[-1] / methods.CARD).unlink()
    assert taught("dreambooth-lora").digest == lora.digest and len(calls) == 4


# ---- errors -----------------------------------------------------------------------------------------


def test_what_is_wrong_is_said_before_anything_is_taught(
    base: Base, task: Task, photo_folder: Path, tmp_path: Path, monkeypatch: Any
) -> None:  # fmt: skip
    studio = Studio(base)

    def asked(judge: Any = None, **values: Any) -> None:
        made = Compare.make(**{"photos": str(photo_folder), "category": "cat", **values})
        list(studio.comparing(made, tmp_path / "out", judge=judge or Colours()))

    with pytest.raises(UnknownName, match="Unknown method 'perfusion'. Did you mean 'perfusion-"):
        asked(methods="perfusion")
    with pytest.raises(BadPhoto, match="There is no folder or file .*nowhere"):
        asked(photos=str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadPhoto, match="holds no photos"):
        asked(photos=str(tmp_path / "empty"))
    with monkeypatch.context() as m:
        m.setattr("minikin.models.presets.where", lambda source: None)  # as where no adapter was pulled
        with pytest.raises(
            BadRecipe, match="There is nothing to paint: 1 step is left out: preset turbo .*turbo-tiny"
        ):
            asked(steps="1")
    with pytest.raises(BadRecipe, match="asks for 99 prompts"):
        asked(steps="9", prompts=99)
    with pytest.raises(UnknownName, match="Unknown judge"):
        list(
            studio.comparing(Compare(photos=str(photo_folder), category="cat", judge="eagle"), tmp_path / "out")
        )
    blind = Colours()
    blind.reads = False
    with pytest.raises(BadRecipe, match="colours sees but does not read"):
        run(replace(task, judge=blind), tmp_path / "out", World())
    from minikin.tiny.encoders import weights

    monkeypatch.setattr(weights, "embedded", lambda kind: tmp_path / f"no-{kind}.safetensors")
    with pytest.raises(AssetError, match="weights of the judge are missing"):
        list(studio.comparing(Compare(photos=str(photo_folder), category="cat"), tmp_path / "out"))
    assert not (tmp_path / "out" / "methods").exists() and not (tmp_path / "out" / "pictures").exists()


# ---- on tiny ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_on_tiny_by_the_command(tmp_path: Path) -> None:
    """Two methods, few steps: Perfusion's plain images are the same, the baseline's are not."""
    from minikin.cli.app import app
    from minikin.cli.demo import examples_folder

    out = tmp_path / "out"
    args = ["compare", str(examples_folder() / "my_teapot"), "--category", "teapot", "--out", str(out),
            "--methods", "perfusion-row,dreambooth-lora", "--prompts", "2", "--seeds", "1", "--plain", "2",
            "--strengths", "0.5", "--steps", "9,4,1", "--teach-steps", "4"]  # fmt: skip
    made = CliRunner().invoke(app, args)
    assert made.exit_code == 0, made.output
    facts = json.loads((out / "report.json").read_text())
    assert [c.split()[0] for c in facts["courses"]] == ["9", "4", "1"] and not facts["skipped"]
    own, lora = facts["methods"]
    for c in own["courses"]:
        assert c["plain_same"] and c["drift"]["value"] == 0
    for c in lora["courses"]:
        assert not c["plain_same"]
    assert own["bytes"]["sd15"] * 100 < lora["bytes"]["sd15"]
    kept = {p: p.stat().st_mtime_ns for p in (out / "pictures").iterdir()}
    again = CliRunner().invoke(app, [*args, "--json"])
    assert json.loads(again.output.strip().splitlines()[-1])["event"] == "done"
    assert kept == {p: p.stat().st_mtime_ns for p in (out / "pictures").iterdir()}
    assert not list(out.glob(".lock"))
