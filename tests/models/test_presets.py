"""Presets on all bases: published timesteps, corrections of options, and records in images."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from minikin import Studio, events
from minikin.errors import AssetError, BadModelFile, BadRecipe, NoNetwork, UnknownName
from minikin.generation import schedulers
from minikin.generation.output import Names, save_generated
from minikin.generation.request import resolve
from minikin.images import metadata
from minikin.images.photos import Photo
from minikin.models import presets
from minikin.models.base import Base
from minikin.models.families import BY_TEXT_WIDTH, Family
from minikin.models.loading import hub
from minikin.models.lora import adapters
from minikin.models.presets import CONVENTIONS, PRESETS, recognise
from minikin.recipes import Paint
from tests.conftest import FAMILIES, build_pipeline
from tests.helpers.loras import random_lora, write

# the family of each miniature; by its widths it counts as tiny
STANDS_FOR = {"sd15": "sd1", "sd21": "sd2", "sd-turbo": "sd2", "sdxl": "sdxl", "lcm-sd15": "sd1"}
WORKS = {
    "sd15": {"quality", "lcm-lora", "hyper"}, "sd21": {"quality"}, "sd-turbo": {"quality", "turbo"},
    "sdxl": {"quality", "lcm-lora", "lightning", "hyper"}, "lcm-sd15": {"lcm"},
}  # fmt: skip
PUBLISHED = {  # by hand from the papers' and authors' pages, not from our formulas
    ("lcm", 1): [999], ("lcm", 2): [999, 499], ("lcm", 3): [999, 679, 339], ("lcm", 4): [999, 759, 499, 259],
    ("lcm", 6): [999, 839, 679, 499, 339, 179], ("lcm", 8): [999, 879, 759, 639, 499, 379, 259, 139],
    ("trailing", 1): [999], ("trailing", 2): [999, 499], ("trailing", 4): [999, 749, 499, 249],
    ("trailing", 8): [999, 874, 749, 624, 499, 374, 249, 124],
    ("demo", 1): [999], ("demo", 4): [999, 899, 799, 699],
}  # fmt: skip


@pytest.fixture
def families(monkeypatch: Any) -> None:
    """Miniatures count as their families."""
    by_name = {family.name: family for family in BY_TEXT_WIDTH.values()}

    def get(self: Base) -> Family:
        return by_name.get(STANDS_FOR.get(self.name, "")) or vars(self)["family"]

    def set_(self: Base, value: Family) -> None:
        vars(self)["family"] = value

    monkeypatch.setattr(Base, "family", property(get, set_), raising=False)


def provide(base: Base, preset: str, steps: int = 4, seed: int = 0, **metadata: str) -> Path | None:
    """Write a random adapter where a preset looks for its adapter."""
    source = PRESETS[preset].source(base.architecture, steps)
    if source is None:
        return None
    pairs = random_lora(base, seed, size=0.1)
    return write(adapters.folder() / f"{source.name}.safetensors", pairs, metadata=metadata)


class Calls:
    """Records the timestep and batch size of each call of a U-Net."""

    def __init__(self, base: Base) -> None:
        self.base, self.timesteps, self.batch_sizes = base, [], []  # type: ignore[var-annotated]

    def __enter__(self) -> Calls:
        def note(_unet: Any, inputs: Any, kwargs: Any) -> None:
            self.timesteps.append(float(inputs[1] if len(inputs) > 1 else kwargs["timestep"]))
            self.batch_sizes.append(len(inputs[0]))

        self.handle = self.base.denoiser.register_forward_pre_hook(note, with_kwargs=True)
        return self

    def __exit__(self, *_: Any) -> None:
        self.handle.remove()


def warnings(studio: Studio, **recipe: Any) -> list[str]:
    """The warnings before the first step; no image is generated."""
    texts = []
    run = studio.painting(Paint.make(**{"prompt": "a cat", "size": "64", **recipe}))
    for event in run:
        if not isinstance(event, events.Note):
            break
        texts.append(event.text)
        assert event.warning
    run.close()  # type: ignore[attr-defined]
    return texts


# ---- the contract ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_on_every_base(bases: dict[str, Base], families: None, family: str, name: str) -> None:
    """It runs at the published timesteps, with one U-Net call per step where guidance allows it.

    Otherwise it is refused with a message that says what to use instead.
    """
    base, preset = bases[family], PRESETS[name]
    studio = Studio(base)
    if name not in WORKS[family]:
        with pytest.raises(BadRecipe, match=r"Presets for|paints with preset lcm only|Use --preset lcm-lora"):
            studio.paint("a cat", preset=name)
        return
    provide(base, name)
    # PNDM, of some bases, has one call more
    options: dict[str, Any] = {"steps": 3, "scheduler": "DDIM"} if name == "quality" else {}
    with Calls(base) as calls:
        (image,) = studio.paint("a photo of a cat", preset=name, size="64", **options)
    steps = options.get("steps", preset.steps)
    assert image.size == (64, 64) and np.asarray(image).std() > 0
    assert calls.batch_sizes == [2 if name == "quality" else 1] * steps
    if preset.convention:
        assert calls.timesteps == [float(t) for t in PUBLISHED[preset.convention, steps]]


def test_presets_are_consistent() -> None:
    for p in PRESETS.values():
        assert p.steps in p.allowed and (p.guidance is None or p.low <= p.guidance <= p.high)
        assert p.scheduler is None or schedulers.scheduler_name(p.scheduler) == p.scheduler
        assert p.convention in ("", *CONVENTIONS) and bool(p.convention) == bool(p.scheduler)
        for by_steps in p.adapters.values():
            assert set(by_steps) == {0} or set(by_steps) == set(p.allowed)
    assert len(presets.sources()) == 11


@pytest.mark.parametrize("name", [n for n, p in PRESETS.items() if p.scheduler])
def test_schedulers_use_the_published_timesteps(bases: dict[str, Base], name: str) -> None:
    """The list diffusers' scheduler really uses, from the own configuration of every base with adapters."""
    preset = PRESETS[name]
    for base in (base for base in bases.values() if base.is_unet):
        for steps in preset.allowed:
            s = schedulers.build(preset.scheduler or "", base.pipe.scheduler, preset.config)
            s.set_timesteps(steps)
            assert s.timesteps.tolist() == list(CONVENTIONS[preset.convention](steps))


@pytest.mark.parametrize(("convention", "steps"), PUBLISHED)
def test_timesteps_as_published(convention: str, steps: int) -> None:
    assert list(CONVENTIONS[convention](steps)) == PUBLISHED[convention, steps]


def test_student_with_the_demo_convention(bases: dict[str, Base], families: None) -> None:
    """Its metadata says 999, 899, 799, 699; Euler ancestral then has the noise levels of these."""
    base = bases["sd-turbo"]
    student = Base(base.pipe, "sd-turbo", metadata={"minikin.timesteps": "demo"})
    with Calls(student) as calls:
        Studio(student).paint("a cat", steps=4, size="64")
    assert calls.timesteps == [999, 899, 799, 699]
    s = schedulers.build("Euler a", base.pipe.scheduler, {"timestep_spacing": "trailing"})
    s.set_timesteps(timesteps=[999, 899, 799, 699])
    alphas = s.alphas_cumprod[[999, 899, 799, 699]]
    assert torch.allclose(s.sigmas, torch.cat([((1 - alphas) / alphas) ** 0.5, torch.zeros(1)]))
    s.set_timesteps(4)
    usual = s.sigmas.clone()
    s.set_timesteps(timesteps=[999, 749, 499, 249])
    assert torch.allclose(s.sigmas, usual, rtol=1e-6)
    with pytest.raises(UnknownName, match="Unknown timestep convention 'odd'"):
        resolve(Base(base.pipe, "sd-turbo", metadata={"minikin.timesteps": "odd"}), Paint(prompt=""))


def test_convention_in_the_metadata_of_an_adapter(bases: dict[str, Base]) -> None:
    base = bases["sd15"]  # counts as tiny
    provide(base, "turbo", **{"minikin.timesteps": "demo"})
    with Calls(base) as calls:
        Studio(base).paint("a cat", preset="turbo", steps=2)
    assert calls.timesteps == [999, 899] and calls.batch_sizes == [1, 1]


def test_only_trained_timesteps_are_allowed() -> None:
    """Three trailing steps are 999, 666, 332: a student of 999, 749, 499, 249 paints 1, 2 or 4."""
    header = {"minikin.sampler": "renoise", "minikin.times": "[999, 749, 499, 249]"}
    turbo = presets.PRESETS["turbo"]
    assert presets.for_student(turbo, {**header, "minikin.timesteps": "trailing"}).allowed == (1, 2, 4)
    demo = {**header, "minikin.times": "[999, 899, 799, 699]", "minikin.timesteps": "demo"}
    assert presets.for_student(turbo, demo).allowed == (1, 2, 3, 4)


STUDENTS: dict[str, tuple[dict[str, Any], list[int], str, float]] = {
    # what a header says: the timesteps, the scheduler and the guidance it is painted with
    "turbo": ({"sampler": "renoise", "timesteps": "trailing", "times": [999, 749, 499, 249], "guidance": 1.0},
              [999, 749, 499, 249], "LCMScheduler", 1.0),
    "one step": ({"preset": "tdm", "sampler": "ddim", "timesteps": "trailing", "times": [999],
                  "guidance": 1.0}, [999], "DDIMScheduler", 1.0),
    "a list": ({"preset": "turbo", "sampler": "renoise", "times": [999, 600, 300], "guidance": 1.0},
               [999, 600, 300], "LCMScheduler", 1.0),
    "lcm-lora": ({"sampler": "renoise", "timesteps": "lcm", "times": [999, 759, 499, 259], "guidance": 1.0},
                 [999, 759, 499, 259], "LCMScheduler", 1.0),
    "burnt": ({"preset": "lcm-lora", "sampler": "renoise", "timesteps": "lcm", "times": [999, 759, 499, 259],
               "guidance": 8.5}, [999, 759, 499, 259], "LCMScheduler", 2.0),
}  # fmt: skip


@pytest.mark.parametrize("case", STUDENTS)
@pytest.mark.parametrize("by_preset", [True, False])
def test_a_student_is_sampled_as_its_metadata_says(bases: dict[str, Base], case: str, by_preset: bool) -> None:
    """As the preset's own adapter, and as a LoRA in the prompt without any preset."""
    stated, times, scheduler, guidance = STUDENTS[case]
    base, preset = bases["sd15"], stated.get("preset", case)
    header = {f"minikin.{k}": v if isinstance(v, str) else json.dumps(v) for k, v in stated.items()}
    provide(base, preset, **{"minikin.preset": preset, **header})
    name = presets.PRESETS[preset].source("tiny", 4).name  # type: ignore[union-attr]
    how: dict[str, Any] = {"preset": preset} if by_preset else {}
    studio = Studio(base)
    with Calls(base) as calls:
        done = list(studio.painting(Paint(prompt="a cat" if by_preset else f"a cat <lora:{name}>", **how)))
    assert calls.timesteps == times
    assert not [e for e in done if isinstance(e, events.Note)]
    decided = studio.resolve(Paint(prompt="a cat" if by_preset else f"a cat <lora:{name}>", **how))
    built = schedulers.build(decided.recipe.scheduler, base.pipe.scheduler, decided.preset.config)
    assert type(built).__name__ == scheduler and decided.guidance == guidance
    if scheduler == "DDIMScheduler":
        assert built.config.set_alpha_to_one


@pytest.mark.parametrize(
    "header",
    [{"times": "soon"}, {"times": "[" * 99_000}, {"times": "[1e999]"}, {"times": "[1000]"}, {"times": "[true]"},
     {"sampler": "dice"}, {"guidance": "[]"}, {"guidance": "nan"}],
)  # fmt: skip
def test_invalid_metadata_of_a_student_is_refused(header: dict[str, str]) -> None:
    with pytest.raises(AssetError, match="metadata of the turbo student is invalid"):
        presets.for_student(presets.PRESETS["turbo"], {f"minikin.{k}": v for k, v in header.items()})


def test_guidance_is_an_input_of_a_full_lcm(bases: dict[str, Base]) -> None:
    """w enters through the U-Net's embedding: another image, still one row a step."""
    studio = Studio(bases["lcm-sd15"])
    images = []
    for guidance in (3.0, 8.0, 8.0):
        with Calls(studio.base) as calls:
            images.append(np.asarray(studio.paint("a cat", guidance=guidance)[0], int))
        assert calls.batch_sizes == [1] * 4
    assert np.abs(images[0] - images[1]).max() > 0 and np.array_equal(images[1], images[2])


# ---- recognising ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("facts", "name"),
    [({}, "quality"), ({"name": "stabilityai/sdxl-turbo"}, "turbo"),
     ({"file": "dreamshaperXL_v2TurboDpmpp.safetensors"}, "turbo"),
     ({"modelspec.architecture": "stable-diffusion-xl-turbo-v1"}, "turbo"),
     ({"file": "juggernautXL_v9Rdphoto2Lightning.safetensors"}, "lightning"),
     ({"modelspec.title": "Real Hyper-SDXL 4 steps"}, "hyper"), ({"name": "photon_hyper"}, "hyper"),
     ({"name": "hyperrealism_v3"}, "quality"), ({"name": "HyperRealistic"}, "quality"),
     ({"name": "dreamshaper_8LCM"}, "lcm-lora"), ({"minikin.preset": "tdm", "name": "turbo"}, "tdm")],
)  # fmt: skip
def test_checkpoints_are_recognised(bases: dict[str, Base], facts: dict[str, str], name: str) -> None:
    fields = dict(facts)
    base = Base(bases["sd15"].pipe, fields.pop("name", "base"), metadata=fields)
    assert recognise(base).name == name


@pytest.mark.parametrize(
    ("family", "facts", "guess"),
    [("sd15", {"name": "turbo_charged_cars"}, True), ("sd15", {"name": "cars"}, False),
     ("sd15", {"name": "x", "modelspec.architecture": "stable-diffusion-v1-turbo"}, False),
     ("sd-turbo", {"name": "sd-turbo"}, False)],
)  # fmt: skip
def test_a_preset_by_name_alone_is_said(
    bases: dict[str, Base], families: None, family: str, facts: dict[str, str], guess: bool
) -> None:
    """Nothing in the weights tells a few-step model: who named an ordinary one so reads what to do."""
    metadata = {k: v for k, v in facts.items() if k != "name"}
    request = resolve(Base(bases[family].pipe, facts["name"], metadata=metadata), Paint(prompt="a cat"))
    assert any("has no mark of a few-step model but its name" in text for text in request.warnings) == guess


def test_opened_folders_are_recognised(tmp_path: Path) -> None:
    """A folder on disk: its own name, and what its model_index.json says."""
    from minikin.models.loading.registry import open_base

    folder = tmp_path / "my-lightning"
    build_pipeline("sdxl", tmp_path / "x").save_pretrained(folder)
    assert recognise(open_base(str(folder), device="cpu")).name == "lightning"
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"minikin.preset": "turbo"}))
    opened = open_base(str(folder), device="cpu")
    assert recognise(opened).name == "turbo" and opened.metadata["file"] == "my-lightning"


def test_a_recognised_checkpoint_selects_its_preset(bases: dict[str, Base], families: None) -> None:
    turbo = resolve(bases["sd-turbo"], Paint(prompt="a cat"))
    assert (turbo.preset.name, turbo.steps, turbo.guidance) == ("turbo", 4, 0.0)
    assert turbo.adapter_source is None and turbo.recipe.width == 512
    lcm = resolve(bases["lcm-sd15"], Paint(prompt="a cat"))
    assert (lcm.preset.name, lcm.steps, lcm.guidance, lcm.recipe.scheduler) == ("lcm", 4, 8.0, "LCM")
    usual = resolve(bases["sd15"], Paint(prompt="a cat"))
    assert (usual.preset.name, usual.steps, usual.guidance) == ("quality", 25, 6.0)
    again = resolve(bases["sd-turbo"], turbo.recipe)
    assert again.recipe == turbo.recipe and again.warnings == turbo.warnings


# ---- options that do not fit ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "corrected", "words"),
    [({"guidance": 7}, {"guidance": 2.0},
      "Guidance 7 with preset lcm-lora spoils images (0 to 2 is right); using 2"),
     ({"steps": 25}, {"steps": 8}, "made for 1 to 8 steps, not 25; using 8. --force keeps 25"),
     ({"scheduler": "euler a"}, {"scheduler": "LCM"}, "paints with scheduler LCM, not Euler a; using LCM"),
     ({"negative": "blur"}, {}, "The negative prompt has no effect with preset lcm-lora at guidance 1")],
)  # fmt: skip
def test_unsuitable_options_are_corrected(
    bases: dict[str, Base], options: dict[str, Any], corrected: Any, words: str
) -> None:
    """They are corrected with a warning; with force they stay, without a warning."""
    studio = Studio(bases["sd15"])
    provide(studio.base, "lcm-lora")
    (text,) = warnings(studio, preset="lcm-lora", **options)
    assert words in text
    planned = resolve(studio.base, Paint.make(prompt="a cat", preset="lcm-lora", **options))
    assert {k: getattr(planned.recipe, k) for k in corrected} == corrected
    forced = resolve(studio.base, Paint.make(prompt="a cat", preset="lcm-lora", force=True, **options))
    assert not corrected or not forced.warnings
    expected = {k: "Euler a" if k == "scheduler" else v for k, v in options.items()}
    assert {k: getattr(forced.recipe, k) for k in options} == expected


def test_steps_select_the_adapter(bases: dict[str, Base], families: None) -> None:
    """Lightning: 6 steps become 8, 3 become 4; the adapter is the one of that number."""
    for requested_steps, steps in ((6, 8), (3, 4), (2, 2), (50, 8)):
        request = resolve(bases["sdxl"], Paint(prompt="", preset="lightning", steps=requested_steps))
        assert request.steps == steps and request.adapter_source
        assert request.adapter_source.name == f"sdxl-lightning-{steps}"
        assert request.adapter_source.file == f"sdxl_lightning_{steps}step_lora.safetensors"
    forced = resolve(bases["sdxl"], Paint(prompt="", preset="lightning", steps=6, force=True))
    assert forced.steps == 6 and forced.adapter_source and forced.adapter_source.name == "sdxl-lightning-8"


def test_unknown_preset_is_refused(bases: dict[str, Base]) -> None:
    with pytest.raises(UnknownName, match="Unknown preset 'lcm-lra'. Did you mean 'lcm-lora'"):
        Studio(bases["sd15"]).paint("a cat", preset="lcm-lra")
    assert presets.preset("LCM_LoRA").name == "lcm-lora"


def test_another_preset_on_a_distilled_base(bases: dict[str, Base]) -> None:
    (text,) = warnings(Studio(bases["sd-turbo"]), preset="quality", steps=2)
    assert "looks as if it was made for preset turbo; painting it with quality as asked" in text


def test_missing_adapters_are_refused(bases: dict[str, Base], families: None, tiny: Base) -> None:
    with pytest.raises(NoNetwork) as e:
        Studio(bases["sdxl"]).paint("a cat", preset="lcm-lora")
    for words in ("latent-consistency/lcm-lora-sdxl, 394 MB, licence: CreativeML OpenRAIL++-M",
                  "`minikin models pull lcm-lora-sdxl`",
                  "`minikin models add FILE --name lcm-lora-sdxl`"):  # fmt: skip
        assert words in str(e.value)
    if presets.local_file(PRESETS["tdm"].source("tiny", 4)) is None:  # type: ignore[arg-type]
        with pytest.raises(AssetError, match="adapter tdm-tiny, which is not part of this installation"):
            Studio(tiny).paint("a cat", preset="tdm")


# ---- together, and recorded -----------------------------------------------------------------------


@pytest.fixture
def student(bases: dict[str, Base], tmp_path: Path, monkeypatch: Any) -> Studio:
    """A base with an LCM-LoRA, a style, and a concept taught on the base alone."""
    monkeypatch.chdir(tmp_path)
    base = bases["sd15"]
    provide(base, "lcm-lora")
    write(tmp_path / "loras" / "style.safetensors", random_lora(base, 5, text=True, size=0.1), "kohya")
    studio = Studio(base)
    mask = np.zeros((64, 64), np.float32)
    mask[16:48, 16:48] = 1
    shots = [Photo("a", np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8), mask)]
    studio.teach(shots, name="tom", category="cat", mode="value", steps=3, batch=1)
    return studio


def test_concept_preset_and_style_together(student: Studio) -> None:
    """Each of the three changes the image; without them the base paints what it always did."""
    plain = np.asarray(student.paint("a photo of a cat", steps=2)[0], int)

    def fast(prompt: str) -> np.ndarray:
        return np.asarray(student.paint(prompt, preset="lcm-lora", steps=4, seed=1)[0], int)

    tom, cat = fast("a photo of <tom>"), fast("a photo of a cat")
    styled = fast("a photo of <tom> <lora:style:0.8>")
    assert np.abs(tom - cat).max() > 0 and np.abs(styled - tom).max() > 0
    assert np.array_equal(fast("a photo of <tom> <lora:style:0>"), tom)
    assert np.array_equal(np.asarray(student.paint("a photo of a cat", steps=2)[0], int), plain)


def test_the_image_records_its_preset(student: Studio, tmp_path: Path) -> None:
    """Recipe and A1111's text name the preset, the corrected settings and the adapters; it repeats."""
    recipe = Paint(prompt="<tom> <lora:style:0.8>", preset="lcm-lora", guidance=7, seed=3)
    done = list(student.painting(recipe))[-1]
    path = save_generated(done.result[0], Names(recipe, tmp_path))
    record = metadata.read(path)
    assert record.recipe["preset"] == "lcm-lora" and record.recipe["adapters"].keys() == {
        "lcm-lora-tiny",
        "style",
    }
    assert record.recipe["adapters"]["style"]["weight"] == 0.8
    assert record.settings["Preset"] == "lcm-lora" and record.settings["Sampler"] == "LCM"
    assert record.settings["Steps"] == "4" and record.settings["CFG scale"] == "2"
    assert record.settings["Lora hashes"].startswith("lcm-lora-tiny: ")
    again = Paint.make(**record.recipe["recipe"])
    assert (again.preset, again.steps, again.guidance) == ("lcm-lora", 4, 2.0)
    assert not student.resolve(again).warnings
    (image,) = student.paint(**again.model_dump(exclude={"base"}))
    assert np.array_equal(np.asarray(image), np.asarray(Image.open(path)))


def test_presets_of_a_studio(student: Studio, bases: dict[str, Base], families: None) -> None:
    by_name = {p["name"]: p for p in student.presets()}
    assert by_name["lcm-lora"]["adapter"] == "lcm-lora-sd15" and not by_name["lcm-lora"]["ready"]
    assert by_name["quality"]["ready"] and "lightning" not in by_name
    assert [p["name"] for p in Studio(bases["lcm-sd15"]).presets()] == ["lcm"]
    assert {p["name"] for p in Studio(bases["sd-turbo"]).presets()} == {"turbo", "quality"}


def test_command_line(tiny: Base, tmp_path: Path) -> None:
    """paint --preset, redo, presets, on the embedded base."""
    from minikin.cli.app import app

    provide(tiny, "lcm-lora")
    run = CliRunner().invoke
    out = tmp_path / "a.png"
    result = run(app, ["paint", "a cat", "--preset", "lcm-lora", "--steps", "2", "--guidance", "7", "--out",
                     str(out), "--json"])  # fmt: skip
    assert result.exit_code == 0, result.output
    assert any(json.loads(line).get("warning") for line in result.stdout.splitlines())
    again = run(app, ["redo", str(out), "--out", str(tmp_path), "--json"])
    last = json.loads(again.stdout.splitlines()[-1])
    assert last == {"event": "redo", "largest_difference": 0}
    listed = run(app, ["presets"])
    assert listed.exit_code == 0 and "lcm-lora" in listed.stdout and "tiny*" in listed.stdout
    rows = [json.loads(line) for line in run(app, ["presets", "--json"]).stdout.splitlines()]
    assert [r["name"] for r in rows] == list(PRESETS)


# ---- downloading an adapter -----------------------------------------------------------------------


def test_pulling_an_adapter(bases: dict[str, Base], tmp_path: Path, monkeypatch: Any) -> None:
    """One file of the repository, into the models folder, where the preset finds it."""
    data = write(tmp_path / "x.safetensors", random_lora(bases["sd15"])).read_bytes()
    source = presets.sources()["hyper-sd15-4"]
    files = [{"rfilename": source.file, "size": len(data)}, {"rfilename": "a.bin", "size": 3}]
    facts = {"sha": "abc0" * 10, "cardData": {"license": "other"}, "siblings": files}
    monkeypatch.setattr(hub, "_get", lambda url, repo: json.dumps(facts).encode())
    served = SimpleNamespace(status=200, read=io.BytesIO(data).read)
    monkeypatch.setattr(hub, "_open", lambda url, repo, start=0: contextlib.nullcontext(served))
    plan = hub.plan("hyper-sd15-4")
    assert plan.licence == "other" and [f.name for f in plan.files] == [source.file]
    assert presets.local_file(source) is None
    list(hub.pull(plan))
    path = presets.local_file(source)
    assert path == adapters.folder() / "hyper-sd15-4.safetensors" and path.read_bytes() == data
    facts["siblings"] = []
    with pytest.raises(BadModelFile, match="has no file Hyper-SD15-4steps-lora.safetensors any more"):
        hub.plan("hyper-sd15-4")
