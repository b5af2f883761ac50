"""Comparison of methods: all are in the report, numbers are the metrics' own, nothing is generated twice."""

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
from minikin.baselines.result import BaselineResult, using
from minikin.errors import AssetError, BadPhoto, BadRecipe, UnknownName
from minikin.evaluation import metrics
from minikin.evaluation.compare import methods
from minikin.evaluation.compare.compare import CompareTask, compare
from minikin.evaluation.compare.methods import TrainedMethod, concept_bytes, parse_methods, strengths
from minikin.evaluation.compare.samplers import SamplerConfig, sampler_configs
from minikin.evaluation.compare.variants import variant
from minikin.evaluation.encoders import EncoderCard
from minikin.evaluation.experiment import Experiment, Painter
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
from tests.helpers.browsers import Tags, render
from tests.helpers.loras import random_lora, write

pytestmark = pytest.mark.usefixtures("no_curves", "short_teaching", "one_thread", "quick_disk")
SEARCH = Compare(photos="-", category="cat", prompts=3, seeds=2, plain=2, strengths=(0.5,))
SAMPLERS = (SamplerConfig("quality", 50, {"steps": 50}), SamplerConfig("lcm-lora", 4, {"steps": 4}))


class Colours:
    """Encodes the mean colours of an image's quarters; texts are fixed directions."""

    name, has_text_encoder = "colours", True
    card = EncoderCard("colours", "tests", "Apache-2.0", "00ff" * 4)

    def encode_images(self, images: Sequence[Image.Image], masks: Any = None) -> Tensor:
        small = [np.asarray(i.convert("RGB").resize((2, 2), Image.Resampling.BOX), np.float32) for i in images]
        return torch.nn.functional.normalize(torch.tensor(np.stack(small)).flatten(1) + 1, dim=1)

    encode_subjects = encode_images

    def encode_texts(self, captions: Sequence[str]) -> Tensor:
        g = torch.Generator().manual_seed(1)
        return torch.nn.functional.normalize(torch.rand(len(captions), 12, generator=g), dim=1)


class World:
    """Trains and paints without a base: images are noise by method, strength, prompt, steps and seed.

    A baseline's plain images differ from the plain base's, Perfusion's do not. `after` is called with the
    number of generated cells.
    """

    def __init__(self, after: Callable[[int], None] = lambda _: None) -> None:
        self.trained: list[str] = []
        self.sets: list[tuple[Any, ...]] = []
        self.active = 0
        self.after = after

    def train(self, method: str, recipe: Compare = SEARCH) -> Generator[events.Event, None, TrainedMethod]:
        self.trained.append(method)
        yield events.Progress("training", 1, 1)
        n = 10 * (1 + methods.names().index(method))
        return TrainedMethod(
            method, None, f"digest of {method}", {"own": n, "sd15": 2 * n, "sdxl": 3 * n}, n / 2, n, 4
        )

    @contextmanager
    def activate(self, results: Sequence[TrainedMethod], strength: float) -> Iterator[Painter]:
        self.active += 1
        yield lambda recipe: self.paint(results[0] if results else None, strength, recipe)
        self.active -= 1

    def paint(self, trained: TrainedMethod | None, strength: float, recipe: Paint) -> list[Image.Image]:
        method = trained.method if trained else ""
        self.sets.append((method, strength, recipe.prompt, recipe.steps))
        plainly = "<" not in recipe.prompt and (not method or method in methods.PERFUSION)
        images = []
        for seed in range(recipe.seed, recipe.seed + recipe.n):
            effect = ("", 0.0) if plainly else (method, strength)
            rng = np.random.default_rng([*repr((effect, recipe.prompt, recipe.steps, seed)).encode()])
            images.append(Image.fromarray(rng.integers(0, 255, (4, 4, 3), dtype=np.uint8)))
        self.after(len(self.sets))
        return images


@pytest.fixture(scope="module")
def base(tmp_path_factory: Any) -> Base:
    """A miniature of SD 1.5 of this module's own."""
    return Base(build_pipeline("sd15", tmp_path_factory.mktemp("compare-base")), "sd15")


@pytest.fixture(scope="module")
def task(base: Base) -> CompareTask:
    encoder, rng = Colours(), np.random.default_rng(3)
    photos = [Photo(f"{k}", rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)) for k in range(4)]
    images = [Image.fromarray(p.pixels) for p in photos]
    references = References.encode(encoder, images[:3], held_out=images[3:])
    skipped = ("1 step is left out: preset lcm-lora is not on this machine.",)
    return CompareTask(SEARCH, methods.names(), base, photos[:3], SAMPLERS, skipped, encoder, references)


def run(task: CompareTask, out: Path, world: World) -> list[events.Event]:
    return list(compare(task, out, world.train, world.activate))


@pytest.fixture(scope="module")
def compared(
    task: CompareTask, tmp_path_factory: Any
) -> tuple[Path, World, list[events.Event], dict[str, Any]]:
    out, world = tmp_path_factory.mktemp("compare"), World()
    all_events = run(task, out, world)
    return out, world, all_events, json.loads((out / "report.json").read_text())


def test_presets_of_few_steps(base: Base, monkeypatch: Any) -> None:
    """By default the one that is made for the fewest other numbers; otherwise all that are asked for."""
    monkeypatch.setattr("minikin.models.presets.local_file", lambda source: Path(source.name))
    studio = Studio(base)
    listed = studio.presets()

    def facts(recipe: Paint) -> dict[str, Any]:
        record = dict.fromkeys(("base", "preset", "sampler", "guidance", "adapters"))
        return {**record, "recipe": {"steps": recipe.steps}}

    def samplers(**values: Any) -> list[tuple[str, int]]:
        recipe = Compare.make(photos="x", category="cat", steps="50,4,1", **values)
        return [(s.preset, s.steps) for s in sampler_configs(recipe, listed, facts)[0]]

    assert samplers() == [("quality", 50), ("tdm", 4), ("lcm-lora", 1)]
    assert samplers(presets="lcm,lcm-lora") == [
        ("quality", 50),
        ("lcm-lora", 4),
        ("lcm", 4),
        ("lcm-lora", 1),
        ("lcm", 1),
    ]
    with pytest.raises(UnknownName, match="preset 'lcmm'"):
        samplers(presets="lcmm")


# ---- the report ------------------------------------------------------------------------------------


def test_every_method_is_in_the_report(compared: Any) -> None:
    """In every file, with its costs; 50 and 4 steps each; what is left out is said."""
    out, world, all_events, facts = compared
    assert isinstance(all_events[-1], events.Done) and all_events[-1].result == out / "report.html"
    assert [m["method"] for m in facts["methods"]] == list(methods.names()) == world.trained
    for name in ("report.json", "report.csv", "report.md", "report.html"):
        text = (out / name).read_text()
        assert all(method in text for method in methods.names()), name
    for k, m in enumerate(facts["methods"]):
        n = 10 * (1 + k)
        assert m["bytes"] == {"own": n, "sd15": 2 * n, "sdxl": 3 * n}
        assert m["memory"] == n and m["seconds"] == n / 2
        assert [c["sampler"] for c in m["samplers"]] == ["50 steps (quality)", "4 steps (lcm-lora)"]
        expected = [1.0] if m["method"] == "textual-inversion" else [1.0, 0.5]
        assert all([p["strength"] for p in c["strengths"]] == expected for c in m["samplers"])
    for name in ("report.md", "report.html"):
        assert "lcm-lora is not on this machine" in (out / name).read_text()
        assert "give the photos of a second subject with --beside" in (out / name).read_text()


def test_numbers_are_those_of_the_metrics(compared: Any, task: CompareTask) -> None:
    """The same images generated again here and scored by the metrics themselves."""
    facts, encoder, r = compared[3], Colours(), task.recipe
    (m,) = (m for m in facts["methods"] if m["method"] == "dreambooth-lora")
    (c,) = (c for c in m["samplers"] if c["sampler"].startswith("4 "))
    trained = TrainedMethod("dreambooth-lora", None, "", {}, 0, 0, 0)

    def generate(method: TrainedMethod | None, strength: float, prompt: str, n: int) -> list[Image.Image]:
        return World().paint(method, strength, Paint(prompt=prompt, steps=4, n=n, seed=r.seed))

    fidelities = []
    for p in c["strengths"]:
        images = [i for prompt in task.prompts for i in generate(trained, p["strength"], prompt, r.seeds)]
        groups = [prompt for prompt in task.prompts for _ in range(r.seeds)]
        vectors, texts = encoder.encode_images(images), encoder.encode_texts(task.prompts)
        expected = {
            "subject_fidelity": metrics.subject_fidelity(vectors, task.references.photos, groups),
            "held_out": metrics.subject_fidelity(vectors, task.references.held_out, groups),
            "r_precision": metrics.r_precision(vectors, texts, groups),
            "text_alignment": metrics.text_alignment(vectors, texts.repeat_interleave(r.seeds, 0), groups),
            "diversity": metrics.diversity(vectors, groups),
        }
        for name, number in expected.items():
            assert p[name] == pytest.approx(vars(number)), name
        fidelities.append((p["subject_fidelity"]["value"], p["text_alignment"]["value"]))
    assert c["hypervolume"] == pytest.approx(hypervolume(np.array(fidelities)))
    before, after = (
        encoder.encode_images(generate(method, 1.0, task.plain_prompt, r.plain)) for method in (None, trained)
    )
    assert c["drift"] == pytest.approx(vars(metrics.drift(before, after))) and c["drift"]["value"] > 0


def test_drift_of_equal_images_is_exactly_0(compared: Any) -> None:
    """Perfusion's is; the positive control is that every method of this world that changes them has some."""
    for m in compared[3]["methods"]:
        for c in m["samplers"]:
            perfusion = m["method"] in methods.PERFUSION
            assert (c["drift"]["value"] == 0) == (c["drift"]["high"] == 0) == c["drift_free"] == perfusion


def test_csv_and_json_agree(compared: Any) -> None:
    out, _, _, facts = compared
    lines = list(csv.DictReader((out / "report.csv").open()))
    points = [(m, c, p) for m in facts["methods"] for c in m["samplers"] for p in c["strengths"]]
    assert len(lines) == len(points) == 2 * (6 * 2 + 1)
    for line, (m, c, p) in zip(lines, points, strict=True):
        assert (line["method"], line["sampler"]) == (m["method"], c["sampler"])
        assert float(line["strength"]) == p["strength"] and float(line["hypervolume"]) == c["hypervolume"]
        assert line["on_front"] == str(p["strength"] in c["front"])
        assert int(line["bytes_sdxl"]) == m["bytes"]["sdxl"] and float(line["drift"]) == c["drift"]["value"]
        for name in ("subject_fidelity", "held_out", "r_precision", "text_alignment", "diversity"):
            assert float(line[name]) == p[name]["value"] and float(line[f"{name}_low"]) == p[name]["low"]


@pytest.mark.slow
def test_page_in_a_browser(compared: Any, tmp_path: Path) -> None:
    """Headless, offline: all images load, nothing is wider than the window, it is not blank."""
    page = render(compared[0] / "report.html", tmp_path / "report.png")
    assert page["broken"] == 0 and page["images"] >= 8 and page["wide"] <= 0 and page["colours"] > 20


def test_page_needs_no_network(compared: Any) -> None:
    text = (compared[0] / "report.html").read_text()
    tags = Tags()
    tags.feed(text)
    assert not tags.open
    assert all(a.startswith(("data:image/", "#")) for a in tags.addresses)
    photos = sum(a.startswith("data:image/jpeg") for a in tags.addresses)
    assert photos == len(SAMPLERS) * (2 + 7 * (6 + 2))  # plain base; as trained, and plain with it active
    assert text.count("<svg") == 2 and "<script" not in text and "url(http" not in text
    assert "&lt;mine&gt;" in text and "<mine" not in text


# ---- cost, interruption -----------------------------------------------------------------------------


def test_cost_is_announced_before_it_starts(task: CompareTask, compared: Any) -> None:
    """Exactly this number of images is generated; the first note comes before any of them."""
    world = compared[1]
    n = sum(SEARCH.plain if "<" not in prompt else SEARCH.seeds for _, _, prompt, _ in world.sets)
    first, second = (e.text for e in compared[2] if isinstance(e, events.Note))
    assert isinstance(compared[2][0], events.Note) and first == compared[2][0].text
    assert f"7 methods in 50 steps (quality), 4 steps (lcm-lora): {n} images" in first
    assert "perfusion-gated at most 400" in first and "dreambooth-lora 400" in first
    assert "Images take" in second
    assert len(set(world.sets)) == len(world.sets)


def test_killed_run_resumes_and_generates_nothing_twice(
    task: CompareTask, compared: Any, tmp_path: Path
) -> None:
    """Killed three times; only the cell that was not stored is generated again."""

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
        sets += some.sets[:-1]  # the last was generated, but never stored
    rest = World()
    run(task, tmp_path, rest)
    sets += rest.sets
    assert sorted(map(str, sets)) == sorted(map(str, compared[1].sets))
    for name in ("report.json", "report.csv", "report.md", "report.html"):
        assert (tmp_path / name).read_bytes() == (compared[0] / name).read_bytes(), name
    nothing = World()
    run(task, tmp_path, nothing)
    assert not nothing.sets and not nothing.active


def test_another_seed_or_number_of_images_is_generated_again(
    task: CompareTask, compared: Any, tmp_path: Path
) -> None:
    some = replace(task, methods=("perfusion-value",))
    run(some, tmp_path, World())
    for change in ({"seed": 7}, {"plain": 3, "seeds": 1}):
        again = World()
        run(replace(some, recipe=SEARCH.model_copy(update=change)), tmp_path, again)
        assert len(again.sets) == 2 * (2 + 2 * SEARCH.prompts)


def test_two_subjects_in_one_image(task: CompareTask, tmp_path: Path) -> None:
    """TrainedMethod by every method, painted with both on in every course, and told in every file."""
    recipe = SEARCH.model_copy(update={"beside": "-", "beside_category": "dog"})
    beside = replace(task.references, photos=task.references.photos.flip(0))
    two = replace(task, recipe=recipe, methods=("perfusion-value", "dreambooth-lora"), second_references=beside)
    world = World()
    run(two, tmp_path, world)
    assert world.trained == ["perfusion-value"] * 2 + ["dreambooth-lora"] * 2
    prompts = [p for _, _, p, _ in world.sets if "<other>" in p]
    assert len(prompts) == 2 * 2 * SEARCH.prompts
    assert prompts[0] == "a photo of <mine> to the left of <other> in the snow"
    assert any(p == "a photo of a cat to the left of a dog in the snow" for _, _, p, _ in world.sets)
    facts = json.loads((tmp_path / "report.json").read_text())
    for m in facts["methods"]:
        for c in m["samplers"]:
            assert c["two_subjects"]["success"]["n"] == SEARCH.prompts * SEARCH.seeds
    assert "bleed" in (tmp_path / "report.md").read_text() and "bleed" in (tmp_path / "report.html").read_text()
    (row,) = [r for r in two.two_subject_prompts(regions=True) if "snow" in r[0]]
    assert row[0] == "a photo of <mine@left> to the left of <other@right> in the snow"
    with pytest.raises(BadRecipe, match="needs its photos"):
        Compare.make(photos="-", category="cat", beside="x")


# ---- parts ------------------------------------------------------------------------------------------


def test_methods_by_name() -> None:
    assert parse_methods("all") == methods.names() and len(methods.names()) == 7
    assert parse_methods("dreambooth, perfusion-value,dreambooth") == ("dreambooth", "perfusion-value")
    with pytest.raises(UnknownName, match="Unknown method 'dreambooth-lore'. Did you mean 'dreambooth-lora'"):
        parse_methods("perfusion-value,dreambooth-lore")
    assert strengths("textual-inversion", SEARCH) == (1.0,) and strengths("dreambooth", SEARCH) == (1.0, 0.5)


def test_variants_change_one_thing(base: Base, photos: list[Photo], tmp_path: Path) -> None:
    """In training, in generation, or in the photos; a change that cannot be read is an error."""
    for name in parse_methods("ablations"):
        parsed = variant(name)
        plain, changed = (methods.training_recipe(n, SEARCH, tiny=True) for n in (parsed.method, name))
        assert isinstance(plain, Teach) and isinstance(changed, Teach)
        differ = {k for k, v in plain.model_dump().items() if getattr(changed, k) != v}
        assert differ == set(parsed.recipe)
        assert len(parsed.recipe) + len(parsed.generation) + bool(parsed.photos) <= 1
    both = methods.training_recipe("dreambooth-lora:rank=2:lr=1e-2", SEARCH, tiny=True)
    assert isinstance(both, Baseline) and both.rank == 2 and both.lr == 0.01
    for wrong, what in (
        ("perfusion-gated:mask", "write changes as KEY=VALUE"),
        ("perfusion-gated:photos=none", "photos is a whole number"),
        ("perfusion-gated:maks=none", "Unknown setting of perfusion-gated 'maks'. Did you mean 'mask'"),
        ("perfusion:mask=none", "Unknown method 'perfusion'"),
    ):
        with pytest.raises((BadRecipe, UnknownName), match=what):
            parse_methods(wrong)
    with pytest.raises(BadRecipe, match="mask"):
        methods.training_recipe("perfusion-gated:mask=nothing", SEARCH, tiny=True)
    trained_on: list[tuple[int, bool]] = []
    masked = [replace(p, mask=np.ones(p.pixels.shape[:2], np.float32)) for p in photos]

    def trainer(_: Any, __: Path, some: Sequence[Photo]) -> Iterator[events.Event]:
        trained_on.append((len(some), some[0].mask is not None))
        raise KeyboardInterrupt

    for name in ("perfusion-value", "perfusion-value:photos=1", "perfusion-value:mask=none"):
        with pytest.raises(KeyboardInterrupt):
            list(methods.train(base, masked, SEARCH, name, tmp_path, trainer))
    assert trained_on == [(len(photos), True), (1, True), (len(photos), False)]


def test_methods_of_earlier_versions_have_names_now() -> None:
    assert parse_methods("perfusion-row,perfusion-row:keep=0") == ("perfusion-value", "perfusion-value:keep=0")
    assert variant("perfusion-row:keep=0").recipe == {"prior_weight": "0"}


def test_variant_of_generation_has_its_own_images(task: CompareTask, tmp_path: Path) -> None:
    experiment = Experiment(tmp_path, World().activate)
    usual, changed = (
        task.cell(SAMPLERS[0], "<mine>", 2, 1.0, TrainedMethod(name, None, "d", {}, 0, 0, 1))
        for name in ("perfusion-gated", "perfusion-gated:lock=global")
    )
    assert not set(experiment.paths(usual)) & set(experiment.paths(changed))
    assert changed.recipe.lock == "global" and usual.recipe.lock == "local"


def test_methods_have_their_own_defaults() -> None:
    recipe = SEARCH.model_copy(update={"seed": 5})
    value = methods.training_recipe("perfusion-value", recipe, tiny=True)
    assert isinstance(value, Teach) and value.mode == "value" and value.value_lr == 0.1 and value.seed == 5
    lora = methods.training_recipe("dreambooth-lora", recipe, tiny=True)
    assert isinstance(lora, Baseline) and lora.steps == 400 and lora.lr == 3e-3
    few = methods.training_recipe("dreambooth", recipe.model_copy(update={"teach_steps": 3}), tiny=False)
    assert few.steps == 3


def test_sizes_of_concepts_on_real_bases() -> None:
    """As docs/concept-file.md has them: 31.3 KB for SD 1.5, 95.6 KB for SDXL (int8)."""
    origin = Origin("tiny", "f" * 64, "t" * 64, text_sketch="s" * 145)
    gated = Concept("mine", "cat", "gated", origin, (torch.zeros(1, 4),), torch.ones(4), torch.ones(4), {})
    assert concept_bytes(gated, "sd15") == pytest.approx(31_300, rel=0.02)
    assert concept_bytes(gated, "sdxl") == pytest.approx(95_600, rel=0.02)
    value = replace(gated, mode="value", word_deltas=())
    assert 0 < concept_bytes(gated, "sd15") - concept_bytes(value, "sd15") < 6_000


def test_peak_memory_is_of_the_work_alone() -> None:
    with memory.peak(torch.device("cpu")) as large:
        np.ones(300_000_000, np.uint8).sum()
    with memory.peak(torch.device("cpu")) as small:
        pass
    if large.bytes is None or small.bytes is None:
        pytest.skip("this system does not report memory")
    assert large.bytes - small.bytes > 250_000_000


def test_lora_is_merged_over_the_active_weights(tmp_path: Path, base: Base) -> None:
    """A preset's LoRA that was merged before is merged anew when a baseline becomes active, and inactive."""
    name, weight = next((n, p) for n, p in base.denoiser.named_parameters() if n.endswith("attn2.to_v.weight"))
    learned = BaselineResult(
        "dreambooth", "mine", "cat", "sks", "sks cat", base.origin, weights={name: weight + 1}
    )
    adapters = Adapters(base)
    adapter = adapters.get(write(tmp_path / "a.safetensors", random_lora(base)))

    def merged() -> Tensor:
        with adapters.using([(adapter, 1.0)]):
            return base.denoiser.get_submodule(name.removesuffix(".weight")).lora_weight.clone()

    before = merged()
    with using(base, [(learned, 1.0)]):
        inside = merged()
    assert torch.allclose(inside, before + 1, atol=1e-5) and torch.equal(merged(), before)


@pytest.mark.slow
def test_trained_results_are_stored(base: Base, photos: list[Photo], tmp_path: Path) -> None:
    """Keyed by everything they depend on; a result whose costs were never written is trained again."""
    studio = Studio(base)
    calls: list[Path] = []

    def trainer(recipe: Teach | Baseline, folder: Path, photos: Sequence[Photo]) -> Iterator[events.Event]:
        calls.append(folder)
        if isinstance(recipe, Teach):
            return studio.teaching(photos, recipe.model_copy(update={"batch": 2}))
        return studio.teaching_baseline(photos, recipe.model_copy(update={"batch": 1}), folder)

    def train(method: str, **change: Any) -> TrainedMethod:
        recipe = SEARCH.model_copy(update={"teach_steps": 2, **change})
        work, result = methods.train(base, photos, recipe, method, tmp_path, trainer), None
        while result is None:
            try:
                next(work)
            except StopIteration as end:
                result = end.value
        return result

    value = train("perfusion-value")
    again = train("perfusion-value")
    assert len(calls) == 1 and again.digest == value.digest and value.steps == 2 and value.seconds > 0
    assert value.sizes["own"] == len(concept_file.to_bytes(value.result)) > 1000
    assert train("perfusion-value", seed=1).digest != value.digest and len(calls) == 2
    lora = train("dreambooth-lora")
    assert lora.sizes["own"] == lora.result.n_bytes and len(calls) == 3
    (calls[-1] / methods.COSTS).unlink()
    assert train("dreambooth-lora").digest == lora.digest and len(calls) == 4


# ---- errors -----------------------------------------------------------------------------------------


def test_mistakes_are_reported_before_anything_is_trained(
    base: Base, task: CompareTask, photo_folder: Path, tmp_path: Path, monkeypatch: Any
) -> None:  # fmt: skip
    studio = Studio(base)

    def compare(**values: Any) -> None:
        recipe = Compare.make(**{"photos": str(photo_folder), "category": "cat", **values})
        list(studio.comparing(recipe, tmp_path / "out", encoder=Colours()))

    with pytest.raises(UnknownName, match="Unknown method 'perfusion'. Did you mean 'perfusion-"):
        compare(methods="perfusion")
    with pytest.raises(BadPhoto, match="There is no folder or file .*nowhere"):
        compare(photos=str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadPhoto, match="holds no photos"):
        compare(photos=str(tmp_path / "empty"))
    with monkeypatch.context() as m:
        m.setattr("minikin.models.presets.local_file", lambda source: None)  # as where no adapter was pulled
        with pytest.raises(
            BadRecipe, match="There is nothing to generate: 1 step is left out: preset lcm-lora .*lcm-lora-tiny"
        ):
            compare(steps="1")
    with pytest.raises(BadRecipe, match="asks for 99 prompts"):
        compare(steps="9", prompts=99)
    with pytest.raises(UnknownName, match="Unknown encoder"):
        list(
            studio.comparing(
                Compare(photos=str(photo_folder), category="cat", encoder="eagle"), tmp_path / "out"
            )
        )
    images_only = Colours()
    images_only.has_text_encoder = False
    with pytest.raises(BadRecipe, match="colours has no text encoder"):
        run(replace(task, encoder=images_only), tmp_path / "out", World())
    from minikin.tiny.encoders import weights

    monkeypatch.setattr(weights, "embedded", lambda kind: tmp_path / f"no-{kind}.safetensors")
    with pytest.raises(AssetError, match="encoder weights are missing"):
        list(studio.comparing(Compare(photos=str(photo_folder), category="cat"), tmp_path / "out"))
    assert not (tmp_path / "out" / "methods").exists() and not (tmp_path / "out" / "images").exists()


# ---- on tiny ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_command_on_tiny(tmp_path: Path) -> None:
    """Two methods, few steps: Perfusion's plain images are the same, the baseline's are not."""
    from minikin.cli.app import app
    from minikin.cli.demo import examples_folder

    out = tmp_path / "out"
    options = "--methods perfusion-value,dreambooth-lora --prompts 2 --seeds 1 --plain 2 --strengths 0.5"
    args = ["compare", str(examples_folder() / "my_teapot"), "--category", "teapot", "--out", str(out)]
    args += [*options.split(), "--steps", "4,1", "--teach-steps", "2"]
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 0, result.output
    facts = json.loads((out / "report.json").read_text())
    assert [c.split()[0] for c in facts["samplers"]] == ["4", "1"] and not facts["skipped"]
    perfusion, lora = facts["methods"]
    for c in perfusion["samplers"]:
        assert c["drift_free"] and c["drift"]["value"] == 0
    for c in lora["samplers"]:
        assert not c["drift_free"]
    assert perfusion["bytes"]["sd15"] * 100 < lora["bytes"]["sd15"]
    times = {p: p.stat().st_mtime_ns for p in (out / "images").iterdir()}
    again = CliRunner().invoke(app, [*args, "--json"])
    assert json.loads(again.output.strip().splitlines()[-1])["event"] == "done"
    assert times == {p: p.stat().st_mtime_ns for p in (out / "images").iterdir()}
    assert not list(out.glob(".lock"))
