"""Baselines: only what they name is trained, files are other tools' own, and the base stays as it was."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from typer.testing import CliRunner

from minikin import Studio, events
from minikin.baselines import class_images, methods, sizes
from minikin.baselines import train as teaching
from minikin.baselines.methods import METHODS
from minikin.baselines.result import BaselineResult, using
from minikin.errors import BadConceptFile, BadPhoto, BadRecipe, BaseMismatch, UnknownName
from minikin.images.photos import Photo
from minikin.models.base import Base
from minikin.models.loading.architectures import ARCHITECTURES
from minikin.recipes import PUBLISHED_BASELINES, TINY_BASELINES, Baseline
from tests.conftest import build_pipeline

pytestmark = pytest.mark.usefixtures("no_curves", "one_thread")
FAST = {"steps": 4, "batch": 2, "lr": 1e-2, "prior": 0.0}
TRAINS = {  # what each method may change, as regular expressions over the trained tensors' names
    "textual-inversion": r"words\.0",
    "dreambooth": r"unet\..*",
    "dreambooth-prior": r"unet\..*",
    "dreambooth-lora": r"unet\..*\.attn[12]\.to_(q|k|v|out\.0)\.lora_[AB]\.default\.weight",
    "custom-diffusion": r"words\.0|unet\..*\.attn2\.to_[kv]\.weight",
}  # fmt: skip

Results = dict[str, tuple[BaselineResult, Path]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: Any) -> Base:
    """A miniature of SD 1.5 of this module's own."""
    return Base(build_pipeline("sd15", tmp_path_factory.mktemp("baselines"), flat=True), "sd15")


@pytest.fixture
def noise_class_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Class images of grey noise, instead of generated ones."""
    rng = np.random.default_rng(5)
    images = [Photo(f"{i}", rng.integers(90, 160, (64, 64, 3), dtype=np.uint8)) for i in range(4)]
    monkeypatch.setattr(teaching, "class_images", lambda *_: iter([events.Done(images, {})]))


def run(base: Base, photos: list[Photo], out: Path, **kwargs: Any) -> events.Done:
    how = {k: kwargs.pop(k) for k in ("resume", "snapshot", "snapshot_steps") if k in kwargs}
    recipe = Baseline.make(**{"name": "tom", "category": "cat", **FAST, **kwargs})
    done = list(teaching.teach(base, photos, recipe, out, **how))[-1]
    assert isinstance(done, events.Done)
    return done


@pytest.fixture(scope="module")
def results(base: Base, tmp_path_factory: Any) -> Results:
    """One short run of every method (but the prior, which needs class images)."""
    rng = np.random.default_rng(0)
    photos = [Photo(f"{k}", rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)) for k in range(2)]
    out = {}
    for name in METHODS:
        if name != "dreambooth-prior":
            folder = tmp_path_factory.mktemp(name)
            out[name] = (run(base, photos, folder, method=name).result, folder)
    return out


def state_of(base: Base) -> dict[str, torch.Tensor]:
    return {f"{i}.{n}": t.clone() for i, m in enumerate(base.modules) for n, t in m.state_dict().items()}


def files_of(folder: Path) -> dict[str, bytes]:
    """The files of a result: not the log, which has times."""
    paths = (p for p in folder.rglob("*") if p.suffix in (".safetensors",) or p.name == "config.json")
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths}


# ---- training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_trains_what_it_names_and_the_loss_falls(
    name: str, base: Base, photos: list[Photo], tmp_path: Path, noise_class_images: None
) -> None:
    """On one photo the error of a fixed batch falls; the trained tensors, and no others, have moved."""
    import re

    before = state_of(base)
    lr = {"textual-inversion": 0.2, "dreambooth-lora": 5e-2}.get(name, 4e-3)
    recipe = Baseline.make(method=name, name="tom", category="cat", batch=4, lr=lr, steps=12,
                           prior=1.0 if name == "dreambooth-prior" else 0.0, flip=False)  # fmt: skip
    before_and_after: list[tuple[dict[str, torch.Tensor], float]] = []
    training: dict[str, Any] = {}
    make_loss = teaching._loss

    def spying(base: Base, method: Any, student: Any, *rest: Any) -> Any:
        loss = make_loss(base, method, student, *rest)
        training.update(student=student, loss=loss)
        before_and_after.append(look())
        return loss

    def look() -> tuple[dict[str, torch.Tensor], float]:
        from minikin.training.config import StepContext

        now = {n: p.detach().clone() for n, p in training["student"].named_parameters()}
        with torch.no_grad():
            return now, float(training["loss"](StepContext(999, 8, (0,)), None)["loss"])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teaching, "_loss", spying)
        list(teaching.teach(base, photos[:1], recipe, tmp_path / "out"))
    (first, start), (last, end) = before_and_after[0], look()
    moved = {n for n in first if not torch.equal(first[n], last[n])}
    assert moved and all(re.fullmatch(TRAINS[name], n) for n in moved)
    allowed = {n for n in first if re.fullmatch(TRAINS[name], n)}
    assert len(moved) >= 0.9 * len(allowed)  # a bias or two may have no gradient
    assert end < start * 0.999
    after = state_of(base)
    assert all(torch.equal(before[n], after[n]) for n in before) and before.keys() == after.keys()


@pytest.mark.parametrize("name", ["textual-inversion", "dreambooth-lora", "custom-diffusion"])
def test_equal_seeds_give_equal_files(
    name: str, base: Base, photos: list[Photo], tmp_path: Path, noise_class_images: None
) -> None:
    prior = 0.0 if name == "textual-inversion" else 1.0
    for k, seed in enumerate((1, 1, 2)):
        run(base, photos, tmp_path / str(k), method=name, seed=seed, prior=prior)
    a, b, other = (files_of(tmp_path / str(k)) for k in range(3))
    assert a and a == b
    assert a != other


def test_resumed_equals_uninterrupted(
    base: Base, photos: list[Photo], tmp_path: Path, noise_class_images: None
) -> None:
    """Ctrl-C at step 5 of 8 saves, --resume goes on, and the files are those of a run in one piece."""
    how = {"method": "custom-diffusion", "steps": 8, "prior": 1.0}  # trains weights and a word
    run(base, photos, tmp_path / "whole", **how)

    def interrupt(step: int, learned: BaselineResult) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(base, photos, tmp_path / "two", **how, snapshot=interrupt, snapshot_steps=[5])
    assert (tmp_path / "two" / "checkpoint.safetensors").exists()
    assert not files_of(tmp_path / "two").keys() - {"checkpoint.safetensors"}
    with pytest.raises(BadRecipe, match="--resume"):
        run(base, photos, tmp_path / "two", **how)
    with pytest.raises(BadRecipe, match="another run: seed is 0 there and 9 here"):
        run(base, photos, tmp_path / "two", **how, seed=9, resume=True)
    done = run(base, photos, tmp_path / "two", **how, resume=True)
    assert done.facts["steps"] == 8
    assert files_of(tmp_path / "two") == files_of(tmp_path / "whole")


def test_snapshots_change_nothing(base: Base, photos: list[Photo], tmp_path: Path) -> None:
    snapshots = []
    how = {"method": "textual-inversion", "steps": 6}
    run(
        base,
        photos,
        tmp_path / "a",
        **how,
        snapshot=lambda *args: snapshots.append(args),
        snapshot_steps=[2, 6],
    )
    run(base, photos, tmp_path / "b", **how)
    assert [step for step, _ in snapshots] == [2, 6]
    assert not torch.equal(snapshots[0][1].words[0], snapshots[1][1].words[0])
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def test_first_token_has_no_gradient_in_custom_diffusion(base: Base) -> None:
    """Its keys and values pass no gradient; the positive control is a student without that."""
    from minikin.baselines.method import TO_KV
    from minikin.baselines.student import Student, partial_copy
    from minikin.models.prompt import parse

    for hold in (True, False):
        with base.frozen():
            unet = partial_copy(base.denoiser, lambda n: bool(TO_KV.fullmatch(n)))
            student = Student(base, unet, detach_first_token=hold)
            kv, _ = student.condition([parse("a photo of a cat", {})])
            kv[:, 0].sum().backward() if not hold else None
            assert kv[:, 1:].requires_grad
            weight = next(p for n, p in student.unet.named_parameters() if TO_KV.fullmatch(n))
            if hold:
                (kv * torch.nn.functional.one_hot(torch.tensor(0), kv.shape[1])[None, :, None]).sum().backward()
                assert weight.grad is None or not weight.grad.any()
            else:
                assert weight.grad is not None and weight.grad.any()


# ---- prompts --------------------------------------------------------------------------------------


def test_prompts_in_the_published_form(results: Results, base: Base) -> None:
    for name, prompt in (
        ("textual-inversion", "a photo of a sks on the beach"),
        ("dreambooth", "a photo of a sks cat on the beach"),
        ("dreambooth-lora", "a photo of a sks cat on the beach"),
        ("custom-diffusion", "a photo of an ucd cat on the beach"),
    ):
        assert results[name][0].prompt("a photo of <tom> on the beach") == prompt
    result = results["dreambooth"][0]
    assert result.prompt("the <tom:0.8> and (<concept:tom>:1.2)") == "the sks cat and (a sks cat:1.2)"
    assert replace(result, name="kim").prompt("<tom> and <kim>") == "<tom> and a sks cat"
    with pytest.raises(BadRecipe, match="does not name the concept"):
        result.prompt("a photo of a cat")


def test_captions_of_photos_and_templates(base: Base, photos: list[Photo]) -> None:
    r = Baseline.make(method="dreambooth", name="tom", category="cat").resolved(False)
    some = [replace(photos[0], caption="a photo of {} in a meadow"), photos[1]]

    def texts(recipe: Baseline) -> list[list[str]]:
        prepared = teaching._prepare_photos(base, some, recipe, METHODS["dreambooth"], "sks cat", "sks")
        (use,) = prepared.prompts[0][0].uses
        text = prepared.prompts[0][0].text
        assert text[use.start : use.end] == "sks"
        assert float(prepared.masks.min()) == 1  # photos bring masks, the published method has none
        return [[p.text for p in ps] for ps in prepared.prompts]

    assert texts(r) == [["a photo of a sks cat in a meadow"], ["a photo of a sks cat"]]
    assert texts(r.model_copy(update={"captions": False})) == [["a photo of a sks cat"]] * 2
    with_masks = r.model_copy(update={"mask": "attention"})
    masked = teaching._prepare_photos(base, some, with_masks, METHODS["dreambooth"], "sks cat", "sks")
    assert float(masked.masks.min()) == 0


def test_rare_words(base: Base, tiny: Base, photos: list[Photo]) -> None:
    """One token each, on CLIP's vocabulary and on tiny's own."""
    for opened, words in ((base, {"sks", "ucd"}), (tiny, {"bacus", "embic"})):
        recipes = [Baseline.make(method=m, name="tom", category="cat", prior=0.0) for m in METHODS]
        assert {teaching.check(opened, photos, r) for r in recipes} == words


# ---- on the base ----------------------------------------------------------------------------------


def image_of(base: Base, text: str) -> np.ndarray:
    g = torch.Generator().manual_seed(3)
    out = base.pipe(text, num_inference_steps=2, guidance_scale=3.0, generator=g, output_type="np").images
    return np.asarray(out)


@pytest.mark.parametrize("name", ["textual-inversion", "dreambooth", "dreambooth-lora", "custom-diffusion"])
def test_the_base_is_untouched_bit_for_bit(name: str, results: Results, base: Base) -> None:
    """Inside, images of the word change; afterwards tensors, their memory and images are the old ones."""
    tom = results[name][0]
    before, plain = state_of(base), image_of(base, tom.prompt("<tom>"))
    places = [p.data_ptr() for p in base.denoiser.parameters()]
    kinds = [type(m) for m in base.denoiser.modules()]
    with using(base, [(tom, 1.0)]):
        inside = image_of(base, tom.prompt("<tom>"))
    assert np.abs(inside - plain).max() > 1e-3
    after = state_of(base)
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert places == [p.data_ptr() for p in base.denoiser.parameters()]
    assert kinds == [type(m) for m in base.denoiser.modules()]
    assert np.array_equal(image_of(base, tom.prompt("<tom>")), plain)
    assert not any(m.get_input_embeddings()._forward_hooks for m in base.text_encoders)


def test_an_error_inside_leaves_the_base_too(results: Results, base: Base) -> None:
    before = state_of(base)
    with pytest.raises(ZeroDivisionError), using(base, [(results["dreambooth"][0], 1.0)]):
        _ = 1 / 0
    assert all(torch.equal(t, before[n]) for n, t in state_of(base).items())


def test_weighted_sums(results: Results, base: Base) -> None:
    """W + sum w (W' - W), of whole weights and of LoRAs; two concepts need two words."""
    full, lora = results["custom-diffusion"][0], results["dreambooth-lora"][0]
    name = next(iter(full.weights))
    original = base.denoiser.get_parameter(name).detach().clone()
    down, up = lora.pairs[name.removesuffix(".weight")]
    expected = original + 0.5 * (full.weights[name] - original) + 2.0 * (up @ down)
    with using(base, [(full, 0.5), (lora, 2.0)]):
        assert torch.allclose(base.denoiser.get_parameter(name), expected, atol=1e-6)
    with pytest.raises(BadRecipe, match="both taught with the word 'sks'"), using(
        base, [(lora, 1.0), (replace(results["textual-inversion"][0], name="kim"), 1.0)]
    ):  # fmt: skip
        pass


def test_another_base_is_refused(results: Results, base: Base, bases: dict[str, Base]) -> None:
    """Whole weights belong to one base; LoRAs and words also to its fine-tunes, as everywhere."""
    for name, (result, _) in results.items():
        with pytest.raises(BaseMismatch, match="Open the base it was made for"), using(
            bases["sdxl"], [(result, 1.0)]
        ):  # fmt: skip
            pass
        sibling = replace(result, origin=replace(result.origin, fingerprint="0" * 64))
        if name in ("textual-inversion", "dreambooth-lora"):
            with using(base, [(sibling, 1.0)]):
                pass
        else:
            with pytest.raises(BaseMismatch), using(base, [(sibling, 1.0)]):
                pass


# ---- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["textual-inversion", "dreambooth", "dreambooth-lora", "custom-diffusion"])
def test_stock_diffusers_paints_the_same(name: str, results: Results, base: Base, tmp_path: Path) -> None:
    """The files in a plain pipeline give our image within 1e-4 (float32).

    diffusers 0.42.1 reads Custom Diffusion's processors only when it is also given `_pipeline`;
    without it load_attn_procs returns and nothing has changed.
    """
    tom, folder = results[name]
    with using(base, [(tom, 1.0)]):
        mine = image_of(base, tom.prompt("<tom> at night"))
    stock = build_pipeline("sd15", tmp_path, flat=True)
    text = tom.prompt("<tom> at night")
    if name == "textual-inversion":
        stock.load_textual_inversion(str(folder / "learned_embeds.safetensors"), token="<tom>")
    elif name == "dreambooth":
        stock.unet = UNet2DConditionModel.from_pretrained(folder / "unet").eval()
    elif name == "dreambooth-lora":
        stock.load_lora_weights(str(folder), weight_name="pytorch_lora_weights.safetensors")
    else:
        file = "pytorch_custom_diffusion_weights.safetensors"
        stock.unet.load_attn_procs(str(folder), weight_name=file, _pipeline=stock)
        stock.load_textual_inversion(str(folder / "tom.safetensors"), token="<tom>")
    if tom.words:
        text = text.replace(tom.word, "<tom>")
    theirs = image_of(Base_like(stock), text)
    assert np.abs(mine - theirs).max() < 1e-4
    assert np.abs(mine - image_of(base, tom.prompt("<tom> at night"))).max() > 1e-3  # and it is not the base's


class Base_like:
    """What `image_of` needs, around a pipeline that Minikin has never touched."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe


def test_a_lora_is_one_of_minikins_own(
    results: Results, base: Base
) -> None:  # fmt: skip
    """The same file through <lora:...>'s loader gives the same image."""
    from minikin.models.lora.adapters import Adapters

    tom, folder = results["dreambooth-lora"]
    adapters = Adapters(base)
    with adapters.using([(adapters.get(folder / "pytorch_lora_weights.safetensors"), 1.0)]):
        theirs = image_of(base, tom.prompt("<tom>"))
    with using(base, [(tom, 1.0)]):
        mine = image_of(base, tom.prompt("<tom>"))
    assert np.abs(mine - theirs).max() < 1e-4


def test_folders_are_read_back(results: Results, base: Base, tmp_path: Path) -> None:
    for tom, folder in results.values():
        again = methods.load(base, folder)
        assert again.prompt("<tom>") == tom.prompt("<tom>") and again.origin == tom.origin
        assert all(torch.equal(a, b) for a, b in zip(again.words, tom.words, strict=True))
        assert again.weights.keys() == tom.weights.keys()
        assert all(torch.equal(again.weights[n], t) for n, t in tom.weights.items())
        assert again.pairs.keys() == tom.pairs.keys()
        assert all(
            torch.equal(x, y) for n in tom.pairs for x, y in zip(again.pairs[n], tom.pairs[n], strict=True)
        )
    with pytest.raises(BadConceptFile, match="no result of `minikin baseline`"):
        methods.load(base, tmp_path)
    folder = results["dreambooth"][1]
    (tmp_path / "unet").mkdir()
    (tmp_path / methods.CARD).write_text((folder / methods.CARD).read_text())
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"torn")
    with pytest.raises(BadConceptFile, match="cannot be read as a safetensors"):
        methods.load(base, tmp_path)


def test_sdxl_embedding_has_both_encoders(bases: dict[str, Base], photos: list[Photo], tmp_path: Path) -> None:
    done = run(bases["sdxl"], photos[:1], tmp_path / "x", method="textual-inversion", steps=1)
    tensors = load_file(tmp_path / "x" / "learned_embeds.safetensors")
    assert {k: tuple(t.shape) for k, t in tensors.items()} == {"clip_l": (1, 32), "clip_g": (1, 64)}
    assert methods.load(bases["sdxl"], tmp_path / "x").words[1].shape == (1, 64)
    assert done.facts["sizes"]["own"] == 4 * 96


# ---- sizes ----------------------------------------------------------------------------------------


def test_sizes_at_the_real_widths() -> None:
    """Against the numbers counted from the published layouts (DreamBooth 3.4 GB, TI 3 KB, LoRA 3.2 MB)."""
    sd15, sdxl = sizes.of_family("sd15"), sizes.of_family("sdxl")
    assert methods.n_bytes("textual-inversion", sd15) == 3_072
    assert methods.n_bytes("textual-inversion", sdxl) == 8_192
    assert methods.n_bytes("dreambooth", sd15) == 4 * 859_520_964
    assert methods.n_bytes("dreambooth-prior", sdxl) == 4 * 2_567_463_684
    assert methods.n_bytes("dreambooth-lora", sd15, 4) == 4 * 797_184
    assert methods.n_bytes("dreambooth-lora", sd15, 1) == 797_184
    assert methods.n_bytes("dreambooth-lora", sdxl, 4) == pytest.approx(23.2e6, rel=0.01)
    assert methods.n_bytes("custom-diffusion", sd15) == 4 * (19_169_280 + 768)
    assert methods.n_bytes("custom-diffusion", sdxl) == pytest.approx(1.363e9, rel=0.01)


def test_sizes_of_files_and_results_agree(results: Results, base: Base) -> None:
    for name, (tom, folder) in results.items():
        size = methods.size_table(name, base)["own"]
        assert tom.n_bytes == size
        on_disk = sum(p.stat().st_size for p in folder.rglob("*.safetensors"))
        n_tensors = len(tom.words) + len(tom.weights) + 2 * len(tom.pairs)
        assert size < on_disk < size + 200 * n_tensors + 2000  # headers


# ---- class images, recipes, refusals ---------------------------------------------------------------


def test_class_images_are_generated_once(base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing one is generated again, with its whole batch, and is the same image."""
    monkeypatch.setenv("MINIKIN_CACHE", str(tmp_path))
    batches = []
    generate = class_images.generate

    def counted(base: Base, request: Any, seeds: list[int]) -> Any:
        batches.append(seeds)
        quick = class_images.Paint(prompt=class_images.prompt("owl"), base=base.name, steps=1, guidance=1.0)
        return generate(base, class_images.resolve(base, quick), seeds)

    monkeypatch.setattr(class_images, "generate", counted)
    first = list(class_images.class_images(base, "owl", 6))
    assert [e.done for e in first if isinstance(e, events.Progress)] == [4, 6]
    photos = first[-1].result  # type: ignore[union-attr]
    assert len(photos) == 6 and len(batches) == 2
    again = list(class_images.class_images(base, "owl", 5))
    assert len(again) == 1 and len(batches) == 2
    (Path(again[-1].facts["folder"]) / "00001.png").unlink()  # type: ignore[union-attr]
    third = list(class_images.class_images(base, "owl", 5))[-1].result  # type: ignore[union-attr]
    assert len(batches) == 3
    assert all(np.array_equal(a.pixels, b.pixels) for a, b in zip(photos, third, strict=False))
    assert class_images.prompt("owl") == "a photo of an owl"


def test_recipes_hold_what_was_published_and_what_suits_tiny() -> None:
    assert PUBLISHED_BASELINES.keys() == TINY_BASELINES.keys() == METHODS.keys()
    prior = Baseline.make(method="dreambooth-prior", name="tom", category="cat")
    assert prior.resolved(False).model_dump(include={"lr", "steps", "batch", "prior", "class_images"}) == {
        "lr": 5e-6, "steps": 800, "batch": 1, "prior": 1.0, "class_images": 200,
    }  # fmt: skip
    assert prior.resolved(True).class_images == 32 and prior.resolved(True).prior == 1.0
    explicit = Baseline.make(method="dreambooth", name="tom", category="cat", lr=1e-3, prior=0.5)
    assert (explicit.resolved(True).lr, explicit.resolved(True).prior) == (1e-3, 0.5)


def test_refusals(base: Base, bases: dict[str, Base], photos: list[Photo], tmp_path: Path) -> None:
    def refused(words: str, kind: type[Exception] = BadRecipe, some: Any = photos, **how: Any) -> None:
        with pytest.raises(kind, match=words):
            run(base, some, tmp_path / "no", **{"method": "dreambooth-lora", **how})
        assert not (tmp_path / "no" / "log.jsonl").exists()

    refused("There are no photos", BadPhoto, [])
    refused("rank 500 is larger than layer .* rank is 32. Use --rank 32 or less", rank=500)
    refused("'sks cat' takes 2 tokens", word="sks cat")
    refused("cannot be a concept's name", name="Tom Cat")
    refused("characters that no word has", category="c_t")
    refused("has no prior loss", method="textual-inversion", prior=1.0)
    refused("equal pieces", accumulation=3)
    with pytest.raises(BadRecipe, match="method: must be 'textual-inversion', 'dreambooth'"):
        Baseline.make(method="lora", name="tom", category="cat")
    with pytest.raises(UnknownName, match="Unknown method 'dreambooht'. Did you mean 'dreambooth'"):
        methods.method("dreambooht")
    with pytest.raises(BadPhoto, match="no folder or file"):
        list(Studio(base).teaching_baseline(
            tmp_path / "nothing", Baseline.make(method="dreambooth", name="tom", category="cat"), tmp_path / "o"
        ))  # fmt: skip


def test_half_precision_bases_are_taught_in_float32(photos: list[Photo], tmp_path: Path) -> None:
    """On a bfloat16 base the trained tensors are float32, and the result goes back on in bfloat16."""
    pipe = build_pipeline("sd15", tmp_path / "p", flat=True)
    for part in (pipe.unet, pipe.text_encoder):
        part.to(torch.bfloat16)
    half = Base(pipe, "half")
    for name in ("custom-diffusion", "dreambooth-lora"):
        tom = run(half, photos[:1], tmp_path / name, method=name, steps=2).result
        assert all(t.dtype is torch.float32 for t in (*tom.weights.values(), *tom.words))
        with using(half, [(tom, 1.0)]):
            assert {p.dtype for p in half.denoiser.parameters()} == {torch.bfloat16}


# ---- on tiny, by the command line ---------------------------------------------------------------------


@pytest.mark.slow
def test_command_line(photo_folder: Path, tmp_path: Path) -> None:
    from minikin.cli.app import app

    out = tmp_path / "tom"
    args = ["baseline", "textual-inversion", str(photo_folder), "--name", "tom", "--category", "cat",
            "--out", str(out), "--steps", "2"]  # fmt: skip
    first = CliRunner().invoke(app, args)
    assert first.exit_code == 0, first.output
    assert "SD 1.5: 3.07 KB" in first.output and 'a photo of a <tom> on the beach"' in first.output
    assert load_file(out / "learned_embeds.safetensors")["<tom>"].shape == (1, 256)
    again = CliRunner().invoke(app, [*args, "--json"])
    assert again.exit_code == 1 and "holds an earlier run" in str(again.exception)
    other = CliRunner().invoke(app, [*args[:-4], "--out", str(tmp_path / "b"), "--steps", "1", "--json"])
    done = json.loads(other.output.strip().splitlines()[-1])
    assert done["event"] == "done" and done["phrase"] == "bacus" and done["sizes"]["own"] == 1024


@pytest.mark.slow
def test_studio_paints_with_presets_inside(tiny: Base, photos: list[Photo], tmp_path: Path) -> None:
    """A result is on for the Studio's own painting verb, and off after it."""
    studio = Studio(tiny)
    recipe = Baseline.make(method="dreambooth-lora", name="tom", category="cat", steps=3, batch=2, lr=0.05)
    done = list(studio.teaching_baseline(photos, recipe, tmp_path / "t"))[-1]
    tom: BaselineResult = done.result  # type: ignore[union-attr]
    text = tom.prompt("a photo of <tom>")
    before, inside, after = None, None, None
    (before,) = studio.paint(text, steps=2)
    with studio.using_baselines(tom):
        (inside,) = studio.paint(text, steps=2)
    (after,) = studio.paint(text, steps=2)
    assert np.array_equal(before, after) and not np.array_equal(before, inside)


def test_every_family_has_its_published_methods() -> None:
    """Every method can say its size on every architecture."""
    for family in ARCHITECTURES:
        shapes = sizes.of_family(family)
        assert all(methods.n_bytes(name, shapes) > 0 for name in METHODS)


def test_the_search_finds_a_planted_best() -> None:
    """Highest mean score over the concepts; a setting measured on fewer of them does not count."""
    from benchmarks.baselines import best, best_rates

    def row(
        lr: float, steps: int, concept: str, subject_fidelity: float, scene_accuracy: float
    ) -> dict[str, Any]:
        return {"method": "dreambooth", "lr": lr, "steps": steps, "concept": concept,
                "subject_fidelity": subject_fidelity, "scene_accuracy": scene_accuracy}  # fmt: skip

    rows = [row(1e-4, 50, c, v, 1.0) for c, v in (("a", 0.36), ("b", 0.16))]
    rows += [row(1e-4, 100, c, v, 1.0) for c, v in (("a", 0.25), ("b", 0.49))]
    rows += [row(3e-4, 100, c, 0.9, 0.1) for c in ("a", "b")]
    rows += [row(1e-3, 50, "a", 1.0, 1.0)]
    assert best(rows) == {"dreambooth": {"lr": 1e-4, "steps": 100, "score": 0.6, "concepts": 2}}
    assert best_rates(rows, "dreambooth") == [1e-3, 1e-4]  # by the first concept alone, each at its best steps
