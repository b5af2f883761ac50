"""The training of the embedded model, in miniature: every stage, adoption, refusals, the command line."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as FastTokenizer
from tools.tiny_training import art, stages
from tools.tiny_training.autoencoder import Crops
from tools.tiny_training.images import store, store_of_things, stream, world_of
from tools.tiny_training.job import Job
from tools.tiny_training.latents import stores as latent_stores
from tools.tiny_training.recipes import (
    Adapters,
    Autoencoder,
    Build,
    Images,
    Latents,
    Text,
    Tokenizer,
    Unet,
    recipe,
)

from minikin.errors import AssetError, BadModelFile, BadRecipe, Busy, StorageError, UnknownName
from minikin.events import Done, Note
from minikin.tiny.captions import caption
from minikin.training.config import StepContext, TrainingConfig
from tests.conftest import filling

pytestmark = pytest.mark.usefixtures("one_thread")
PLAN = TrainingConfig(steps=3, batch=4, bf16=False, log_steps=1, warmup=2, save_minutes=0)

STAGES = ("images", "autoencoder", "tokenizer", "text", "latents", "unet", "export")


def miniature(**unet: Any) -> Build:
    """Everything of the small recipe but its size: latents of 16x16x4 from four levels."""
    return Build(
        images=Images(count=48, pairs=16, things=16, shard=16, backdrops=1),
        autoencoder=Autoencoder(
            channels=(4, 8, 8, 8),
            latents=4,
            crop=32,
            held_out=4,
            plan=PLAN,
        ),
        tokenizer=Tokenizer(size=700, captions=60),
        text=Text(layers=1, width=32, heads=2, plan=PLAN),
        latents=Latents(captions=2, batch=16),
        unet=Unet(
            channels=(16, 32),
            convolutional=0,
            head=8,
            groups=8,
            held_out=8,
            samples=2,
            sample_steps=2,
            plan=PLAN,
            **unet,
        ),
    )


def events_of(job: Job, *names: str) -> list[Any]:
    return list(stages.run(job, names))


@pytest.fixture(scope="module")
def built(tmp_path_factory: Any) -> Job:
    """A finished miniature, exported in files of at most 0.15 MB."""
    job = Job(miniature(), tmp_path_factory.mktemp("build"), split=0.15)
    done = events_of(job, *STAGES)[-1]
    assert isinstance(done, Done) and done.result == job.model
    return job


def test_stages_write_logs_curves_and_samples(built: Job) -> None:
    for name in ("autoencoder", "text", "unet"):
        folder = built.out / name
        rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        assert [r["step"] for r in rows if "loss" in r] == [1, 2, 3]
        assert rows[-1]["evaluation"]
        if find_spec("matplotlib"):
            assert (folder / "curve.png").stat().st_size > 1000
    assert len(list((built.out / "unet" / "samples").glob("*.png"))) == 1
    assert (built.out / "images" / "sample.png").exists()


def test_stock_pipeline_opens_the_model(built: Job) -> None:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(built.model, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    assert isinstance(pipe.scheduler, DDIMScheduler)
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    assert pipe.scheduler.alphas_cumprod[-1] == 0
    image = pipe("a photo of a cat", num_inference_steps=2).images[0]
    assert image.size == (128, 128)


def test_minikin_opens_the_model(built: Job) -> None:
    from minikin.models.loading.registry import open_base

    base = open_base(str(built.model), device="cpu")
    assert base.architecture == "tiny"
    assert base.prediction_type == "v_prediction"


def test_weights_are_float16_in_small_files(built: Job) -> None:
    from safetensors import safe_open

    files = list(built.model.rglob("*.safetensors"))
    assert len(files) > 3  # the U-Net needs more than one
    for path in files:
        assert path.stat().st_size <= 0.15e6
        with safe_open(path, "pt") as f:
            assert all(f.get_tensor(k).dtype is torch.float16 for k in f.keys())  # noqa: SIM118


def test_card_has_data_licences_and_cost(built: Job) -> None:
    text = (built.model / "README.md").read_text()
    assert "48 scenes" in text and "| U-Net | 3 | 12 |" in text and "v-loss" in text
    for style in ("MIT", "Apache-2.0", "CC-BY-4.0"):
        assert style in text


def test_finished_stages_change_nothing(built: Job) -> None:
    before = {p: p.read_bytes() for p in built.model.rglob("*.safetensors")}
    notes = [e.text for e in events_of(built, "images", "text", "latents", "unet") if isinstance(e, Note)]
    assert any("unet: already trained (3 steps)" in t for t in notes)
    events_of(built, "export")
    assert all(p.read_bytes() == data for p, data in before.items())


def test_latents_are_normalised(built: Job) -> None:
    z = torch.from_numpy(
        np.concatenate([np.load(p) for p in sorted((built.out / "latents").glob("*.npy"))])
    ).float()
    assert z.shape == (48, 4, 16, 16)
    assert abs(float(z.mean())) < 0.5
    assert 0.6 < float(z.std()) < 1.6


def test_training_from_an_exported_folder(built: Job, tmp_path: Path) -> None:
    """The parts without a budget are copied, and the U-Net begins where the folder's was."""
    job = Job(miniature(), tmp_path, source=built.model, steps={"unet": 3})
    notes = " ".join(e.text for e in events_of(job, *STAGES[:-1]) if isinstance(e, Note))
    assert "vae taken from" in notes and "text_encoder taken from" in notes
    assert (job.text_encoder / "config.json").read_bytes() == (
        built.model / "text_encoder" / "config.json"
    ).read_bytes()
    first = json.loads((tmp_path / "unet" / "log.jsonl").read_text().splitlines()[1])
    last = json.loads((built.out / "unet" / "log.jsonl").read_text().splitlines()[-2])
    assert first["loss"] < 3 * last["loss"]


# ---- refusals ------------------------------------------------------------------------------------


def test_missing_stage_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadRecipe, match="vae is missing: it is made by stage autoencoder. Run --stage"):
        events_of(Job(miniature(), tmp_path), "latents")
    with pytest.raises(BadRecipe, match="images-things lacks 1 of its 1 files. Run --stage images first"):
        events_of(Job(miniature(), tmp_path), "autoencoder")


def test_names_of_version_0_1_are_understood(tmp_path: Path) -> None:
    """Stages have another name, and folders of a build are renamed at its next run."""
    former, name = "judge", "dual-encoder"  # word: stage of version 0.1
    assert stages.chosen([former]) == [name]
    (tmp_path / former).mkdir(parents=True)
    with pytest.raises(BadRecipe, match="Run --stage tokenizer first"):
        events_of(Job(miniature(), tmp_path), former)
    assert (tmp_path / name).exists() and not (tmp_path / former).exists()


def test_names_are_checked(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="Unknown stage 'unett'. Did you mean 'unet'"):
        events_of(Job(miniature(), tmp_path), "unett")
    with pytest.raises(UnknownName, match="Unknown world 'smal'"):
        recipe("smal", "cpu")
    with pytest.raises(UnknownName, match="Unknown trained stage 'export'"):
        Job(miniature(), tmp_path, minutes={"export": 3})
    with pytest.raises(BadRecipe, match="in minutes and one in steps; give one of them"):
        Job(miniature(), tmp_path, minutes={"unet": 3}, steps={"unet": 3})
    with pytest.raises(BadRecipe, match="The budget of stage unet must be positive"):
        Job(miniature(), tmp_path, minutes={"unet": 0})


def test_latents_of_another_autoencoder_are_refused(built: Job, tmp_path: Path) -> None:
    import shutil

    out = tmp_path / "copy"
    shutil.copytree(built.out, out)
    (out / "autoencoder" / "vae" / "config.json").write_text("{}")
    with pytest.raises(BadRecipe, match="made from something else: autoencoder is"):
        events_of(Job(miniature(), out), "latents")


def test_a_foreign_folder_is_refused(tmp_path: Path) -> None:
    job = Job(miniature(), tmp_path / "out", source=tmp_path)
    with pytest.raises(BadModelFile, match="has no folder 'tokenizer'. --from wants a diffusers folder"):
        events_of(job, "tokenizer")


def test_missing_and_damaged_art_packs(tmp_path: Path) -> None:
    with pytest.raises(AssetError, match="The art pack .* cannot be read"):
        events_of(Job(miniature(), tmp_path / "a", art=tmp_path / "none.npz"), "images")
    broken = tmp_path / "broken.npz"
    broken.write_bytes(art.shipped().read_bytes()[:5000])
    with pytest.raises(AssetError, match="The art pack .* cannot be read"):
        events_of(Job(miniature(), tmp_path / "b", art=broken), "images")


def test_another_art_pack_is_refused_without_the_option(tmp_path: Path, monkeypatch: Any) -> None:
    assert art.fingerprint() == art.SHIPPED
    monkeypatch.setattr(art, "SHIPPED", "0" * 64)
    with pytest.raises(AssetError, match=r"its fingerprint is 7461\w+, expected 0000\w+.*--art"):
        events_of(Job(miniature(), tmp_path), "images")
    art.check(art.shipped())


def test_a_full_disk_while_rendering(tmp_path: Path, monkeypatch: Any) -> None:
    """The message says what to do, finished files stay, and the same call goes on."""
    job = Job(miniature(), tmp_path)
    with monkeypatch.context() as m:
        m.setattr(os, "fsync", filling(7))
        with pytest.raises(StorageError, match="full. Free some space and try again; nothing was lost"):
            events_of(job, "images")
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "images").glob("*.npy")}
    assert times
    events_of(job, "images")
    assert all(p.stat().st_mtime_ns == t for p, t in times.items())
    assert not list(tmp_path.rglob(".minikin-*"))


def test_a_full_disk_while_exporting(built: Job, monkeypatch: Any) -> None:
    """The model that was there before stays."""
    from diffusers import StableDiffusionPipeline

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(StableDiffusionPipeline, "save_pretrained", full)
    before = sorted(p.name for p in built.model.rglob("*"))
    with pytest.raises(StorageError, match="model was not written: No space left on device. Free some space"):
        events_of(built, "export")
    assert sorted(p.name for p in built.model.rglob("*")) == before


def test_budgets() -> None:
    """By stage; a stage without a budget keeps the recipe's."""
    job = Job(miniature(), Path("out"), minutes={"autoencoder": 10}, steps={"unet": 7})
    assert job.plan("autoencoder", PLAN).minutes == 10
    assert job.plan("autoencoder", PLAN).steps is None
    assert job.plan("unet", PLAN).steps == 7
    assert job.plan("text", PLAN) == PLAN


def test_second_build_in_one_folder_is_refused(tmp_path: Path) -> None:
    work = stages.run(Job(miniature(), tmp_path), ["images"])
    next(work)
    with pytest.raises(Busy, match="already working on the build in"):
        next(stages.run(Job(miniature(), tmp_path), ["images"]))
    work.close()


# ---- the pieces ----------------------------------------------------------------------------------


def test_last_scenes_are_pairs(built: Job) -> None:
    """Their images and captions are of the same stream."""
    worlds = [stream(built, i) for i in range(48)]
    assert worlds == ["small"] * 32 + ["small:pair"] * 16
    world = world_of("small:pair", 1, None)
    scene = world.scene(built.recipe.images.seed, 40)
    assert scene.layout == "pair"
    image_files = store(built)
    assert np.array_equal(image_files[np.array([40])][0], np.asarray(world.draw(scene)[0]))
    tokens = latent_stores(built)[1][np.array([40])][0]
    text = caption(scene, np.random.default_rng((built.recipe.images.seed, 40, 0))).text
    ids = FastTokenizer.from_file(str(built.tokenizer / "tokenizer.json")).encode(text).ids
    assert tokens[0].tolist()[:10] == ids[:10]


def test_crops_lie_around_things(built: Job) -> None:
    """A crop has more pixels of things than the images have; masks are mirrored with their images."""
    files = store_of_things(built)
    crops = Crops(files, 64).batch(StepContext(0, 64, (0, 0))).numpy()
    assert crops.shape == (64, 64, 64, 4) and set(np.unique(crops[..., 3])) <= {0, 255}
    assert (crops[..., 3] > 0).mean() > 1.2 * (files.all()[..., 3] > 0).mean()


def test_tokenizer_has_clips_conventions(built: Job) -> None:
    """Every byte has a token, so nothing is unknown; case and spaces do not matter; equal in every build."""
    from tools.tiny_training.tokenizer import learn, texts
    from transformers import AutoTokenizer

    t = AutoTokenizer.from_pretrained(built.tokenizer)
    assert t.model_max_length == 32
    assert (t.bos_token_id, t.eos_token_id) == (len(t) - 2, len(t) - 1)
    for text in ("a photo of a cat", "teddy bear's café 42 ümlaut 猫", ""):
        ids = t(text)["input_ids"]
        assert (ids[0], ids[-1]) == (t.bos_token_id, t.eos_token_id)
        assert t.eos_token_id not in ids[1:-1]
        assert t.decode(ids, skip_special_tokens=True).strip().replace(" ", "") == text.replace(" ", "")
    assert t("A  Photo")["input_ids"] == t("a photo")["input_ids"]
    assert learn(texts(built, 60), 700) == learn(texts(built, 60), 700)


def test_minimal_pairs_differ_in_nouns_only(built: Job) -> None:
    from tools.tiny_training.images import world_of
    from tools.tiny_training.labels import CATEGORIES, Captions
    from transformers import AutoTokenizer

    t = AutoTokenizer.from_pretrained("src/minikin/tiny/weights/tokenizer")
    b = Captions([world_of("small", 1, None)], t, 32).batch(StepContext(0, 32, (0,)))
    rows = torch.arange(32)
    assert (b.ids[rows, b.end] == t.eos_token_id).all()
    assert (b.ids[b.is_same] == b.minimal_pairs[b.is_same]).all()
    assert not b.is_same[rows, b.end].any()
    words = [t.decode(b.ids[r, p]).strip() for r, p in b.nouns.tolist()]
    categories = [CATEGORIES[k] for k in b.kinds.tolist()]
    assert sum(w.rstrip("s") in n or n in w for w, n in zip(words, categories, strict=True)) > 0.7 * len(words)
    assert 0 < int((b.ids != b.minimal_pairs).sum()) <= len(words)


@pytest.mark.parametrize("name", ["small", "rich"])
def test_slots_have_labels_where_a_causal_encoder_can_know_them(name: str) -> None:
    """From the second noun on and at the end; a causal encoder cannot know them at the first."""
    from tools.tiny_training.labels import CATEGORIES, SLOTS, UNKNOWN, Captions
    from transformers import AutoTokenizer

    t = AutoTokenizer.from_pretrained("src/minikin/tiny/weights/tokenizer")
    b = Captions([world_of(name, 1, None)], t, 32).batch(StepContext(0, 96, (0,)))
    standing = b.choices[:, -len(SLOTS) :]
    several = standing[:, 1] != len(CATEGORIES)
    assert ((standing[:, 0] != len(CATEGORIES)) == several).all() and 8 < int(several.sum()) < 80
    has_slot, slots = b.slots != UNKNOWN, set()
    for (row, place), kind, slot in zip(
        *(x[has_slot].tolist() for x in (b.nouns, b.kinds, b.slots)), strict=True
    ):
        assert kind == standing[row, slot]
        assert place > int(b.nouns[b.nouns[:, 0] == row, 1].min())
        slots.add(slot)
    assert slots == set(range(3 if name == "rich" else 2))


# ---- the command line ----------------------------------------------------------------------------


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tools.tiny_training", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def test_command_line_reports_mistakes(tmp_path: Path) -> None:
    out = command("--world", "smal", "--out", str(tmp_path))
    assert out.returncode == 2 and "minikin: Unknown world 'smal'. Did you mean 'small'?" in out.stderr
    assert "Traceback" not in out.stderr


def test_adapters_are_those_of_the_presets(built: Job, monkeypatch: Any) -> None:
    """Distilled from the exported model, small, and each painted as its header says."""
    from tools.tiny_training import in_domain_concepts

    from minikin import Studio
    from minikin.models import presets
    from minikin.models.lora import adapters

    methods = ("lcm-lora", "lcm", "turbo", "tdm")
    assert tuple(Adapters().batch) == methods and {*Adapters().steps, *Adapters().with_concepts} == {*methods}
    small = Adapters(
        rank=2,
        steps=dict.fromkeys(("lcm-lora", "turbo", "tdm"), 1),
        batch=dict.fromkeys(methods, 4),
        scenes=8,
        with_concepts={"lcm-lora": 1, "lcm": 1},
        things=2,
        things_steps=1,
        captions=4,
        teacher_steps=1,
    )
    job = replace(built, recipe=built.recipe.model_copy(update={"adapters": small}))
    notes = [e.text for e in events_of(job, "adapters") if isinstance(e, Note)]
    assert sum("adapters/" in n and "MB" in n for n in notes) == 4
    for method in methods:
        adapter = job.out / "adapters" / f"{method}.safetensors"
        assert adapter.stat().st_size < 200_000
        adapters.add(adapter, f"{method}-tiny")
    studio = Studio.open(str(job.model), device="cpu")
    for method in methods:
        assert presets.local_file(presets.PRESETS[method].adapters["tiny"][0]) is not None
        assert studio.paint("a cat", preset=method)[0].size == (128, 128)
    things = job.out / "adapters" / "things"
    lines = (things / "captions.txt").read_text().splitlines()
    assert len(lines) == 8 and sum("<thing0" in line for line in lines) == 4
    assert len(list((things / "photos" / "thing00").glob("*.jpg"))) == 5
    assert any("already trained" in e.text for e in events_of(job, "adapters") if isinstance(e, Note))
    file = things / "concepts" / "thing00.safetensors"
    before = file.stat().st_mtime_ns

    def again(steps: int) -> bool:
        how = {"things": 1, "steps": steps, "captions": 1}
        list(in_domain_concepts.make(studio.base, things, job.recipe.world, **how))
        return file.stat().st_mtime_ns != before

    assert not again(1) and again(2), "what was taught otherwise is taught again"
