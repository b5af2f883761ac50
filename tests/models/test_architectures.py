"""All architectures: without a concept, packed keys and values are bit-identical to the stock pipelines."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from minikin import Concept, Studio, attach
from minikin.images.photos import Photo
from minikin.models.attention import detach, layout, text_projection
from minikin.models.base import Base
from minikin.models.families import denoiser_of
from minikin.models.identity import rounded, sketches_match
from minikin.perfusion import concept_file
from minikin.perfusion.compatibility import compatibility
from minikin.recipes import Teach
from tests.conftest import ALL_FAMILIES, FAMILIES, TRANSFORMERS, build_pipeline, changed

pytestmark = pytest.mark.usefixtures("short_teaching")

PROMPT, NEGATIVE = "a photo of a cat on the beach", "blurry"
STEPS = 3


def call(pipe: Any, n: int = 2, **kwargs: Any) -> np.ndarray:
    """Images of a pipeline call as floats (n, H, W, 3)."""
    generators = [torch.Generator().manual_seed(k) for k in range(n)]
    size: dict[str, Any] = {} if "image" in kwargs else {"height": 64, "width": 64}
    if not hasattr(pipe, "unet"):
        size |= {"use_resolution_binning": False, "clean_caption": False}
    if "Sprint" in type(pipe).__name__:
        size |= {"intermediate_timesteps": None}  # which goes with two steps alone
    if "prompt" in kwargs:
        kwargs["num_images_per_prompt"] = n
    out = pipe(num_inference_steps=STEPS, generator=generators, output_type="np", **size, **kwargs)
    return out.images


def add_lora(pipe: Any) -> None:
    """An active random LoRA on all attention projections, to_k and to_v of attn2 among them."""
    from peft import LoraConfig, inject_adapter_in_model

    denoiser = denoiser_of(pipe)
    config = LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    inject_adapter_in_model(config, denoiser, "style")  # PixArt's has no `add_adapter`
    denoiser.eval()
    g = torch.Generator().manual_seed(5)
    for name, p in denoiser.named_parameters():
        if "lora_" in name:
            p.data.copy_(0.3 * torch.randn(p.shape, generator=g))


@pytest.mark.parametrize("family", ALL_FAMILIES)
@pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
def test_no_concept_means_bit_identical(
    family: str, lora: bool, pipelines: dict[str, Any], tmp_path: Any
) -> None:  # fmt: skip
    """Text-to-image with packed prompts equals the stock pipeline to the bit."""
    stock, ours = pipelines[family], build_pipeline(family, tmp_path / "ours")
    if lora:
        stock = build_pipeline(family, tmp_path / "stock")
        add_lora(stock)
        add_lora(ours)
    guidance = 8.0 if family.startswith("lcm") else 5.0
    reference = call(stock, prompt=PROMPT, guidance_scale=guidance, **negative(family, NEGATIVE))
    packed = attach(ours)(PROMPT, NEGATIVE, n=2)
    assert np.array_equal(call(ours, guidance_scale=guidance, **packed), reference)


def negative(family: str, text: str) -> dict[str, str]:
    return {} if family in ("lcm-sd15", "sana-sprint") else {"negative_prompt": text}


@pytest.mark.parametrize("family", ["sd15", "sd21", "sdxl"])
@pytest.mark.parametrize("task", ["Img2Img", "Inpaint"])
def test_other_stock_pipelines_accept_packed(
    family: str, task: str, pipelines: dict[str, Any], tmp_path: Any
) -> None:  # fmt: skip
    """Image-to-image and inpainting take packed prompts unchanged, and agree to the bit."""
    import diffusers

    kind = "StableDiffusionXL" if family == "sdxl" else "StableDiffusion"
    cls = getattr(diffusers, f"{kind}{task}Pipeline")
    stock, ours = (cls.from_pipe(p) for p in (pipelines[family], build_pipeline(family, tmp_path)))
    rng = np.random.default_rng(1)
    kwargs: dict[str, Any] = {"image": Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8))}
    kwargs["strength"] = 0.7
    if task == "Inpaint":
        kwargs |= {"mask_image": Image.fromarray(np.eye(64, dtype=np.uint8) * 255), "height": 64, "width": 64}
    for pipe in (stock, ours):
        pipe.set_progress_bar_config(disable=True)
    reference = call(stock, n=1, prompt=PROMPT, negative_prompt=NEGATIVE, guidance_scale=5.0, **kwargs)
    packed = attach(ours)(PROMPT, NEGATIVE)
    assert np.array_equal(call(ours, n=1, guidance_scale=5.0, **packed, **kwargs), reference)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_architecture_width_and_hashes(family: str, bases: dict[str, Base]) -> None:
    """Architecture, packed width, hashes; the state dict keeps its names."""
    base = bases[family]
    assert len(base.fingerprint) == len(base.text_hash) == 64
    assert not any("processor" in k for k in base.denoiser.state_dict())
    digest = hashlib.sha256()  # as in the concept files that are there: each encoder, then its vocabulary
    for module in text_projection(base.denoiser):
        digest.update(b"".join(n.encode() + rounded(w) for n, w in sorted(module.named_parameters())))
    for tokenizer, model in zip(base.tokenizers, base.text_encoders, strict=True):
        weights = sorted(model.named_parameters())
        digest.update(b"".join(n.removeprefix("text_model.").encode() + rounded(w) for n, w in weights))
        digest.update("\n".join(sorted(tokenizer.get_vocab())).encode())
    assert base.text_hash == digest.hexdigest()
    if family in TRANSFORMERS:
        assert base.architecture == family.removesuffix("-sprint") and base.layout.text_width == 48
        assert base.has_guidance_embedding == (family == "sana-sprint")
        return
    expected = {"sd15": "sd1", "lcm-sd15": "sd1", "sd21": "sd2", "sd-turbo": "sd2", "sdxl": "sdxl"}
    true_width = {"sd1": 768, "sd2": 1024, "sdxl": 2048}
    assert base.layout.width == 2 * sum(s.width for s in base.layout.layers)
    assert base.is_xl == (family == "sdxl")
    assert base.has_guidance_embedding == family.startswith("lcm")
    from minikin.models.loading.architectures import ARCHITECTURES as full

    assert full[family].name == expected[family]
    assert full[family].unet["cross_attention_dim"] == true_width[expected[family]]


@pytest.mark.parametrize("family", FAMILIES)
def test_cross_attention_layers_at_full_size(family: str) -> None:
    """Full-size U-Nets have 16 layers of total width 12,480; SDXL has 70 of 83,200."""
    from diffusers import UNet2DConditionModel

    from minikin.models.loading.architectures import ARCHITECTURES as full

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(full[family].unet)
    layers = layout(unet).layers
    n, total = (70, 83_200) if family == "sdxl" else (16, 12_480)
    assert len(layers) == n
    assert sum(s.width for s in layers) == total


@pytest.mark.parametrize("family", ALL_FAMILIES)
@pytest.mark.parametrize("mode", ["gated", "value"])
def test_teaching_changes_only_prompts_with_the_concept(
    family: str, mode: str, bases: dict[str, Base], photos: list[Photo], tmp_path: Any
) -> None:  # fmt: skip
    """Other images and the U-Net stay the same; distilled bases use a concept of their original."""
    studio = Studio(bases[family])
    before = {k: v.clone() for k, v in studio.base.denoiser.state_dict().items()}
    size = {"width": 64, "height": 64}
    plain = studio.paint("a photo of a cat", steps=2, seed=3, **size)[0]
    original = studio
    if family == "sd-turbo":
        original = Studio(Base(studio.base.pipe))  # the same, under a name that says nothing
    elif family == "lcm-sd15":
        pipe = build_pipeline("sd15", tmp_path)
        pipe.text_encoder = studio.base.pipe.text_encoder
        original = Studio(Base(pipe))
    elif family == "sana-sprint":
        original = Studio(bases["sana"])
    concept = original.teach(
        photos, name="tom", category="cat", mode=mode, steps=4, batch=2, captions=_few_captions(), size=64
    )
    studio.add(concept)
    after = studio.base.denoiser.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert np.array_equal(plain, studio.paint("a photo of a cat", steps=2, seed=3, **size)[0])
    with_tom = studio.paint("a photo of <tom>", steps=2, seed=3, **size)[0]
    assert not np.array_equal(plain, with_tom)
    both = studio.paint("<tom:0.5> and a dog", steps=2, lock="global", **size)[0]
    assert both.size == (64, 64)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_only_words_and_values_have_gradients(family: str, bases: dict[str, Base], photos: list[Photo]) -> None:
    """Gradient reaches o*_V and v*, and nothing of the base (lucidrains trained the frozen keys instead)."""
    from minikin.perfusion.covariance import Covariance
    from minikin.perfusion.key_lock import category_encoding
    from minikin.perfusion.objective import TrainableConcept
    from minikin.perfusion.train import Batches, prepare

    base = bases[family]
    recipe = Teach.make(name="tom", category="teddy bear", mode="gated", batch=2, size=64)
    prepared = prepare(base, photos, recipe)
    c = Covariance(torch.eye(base.layout.text_width, dtype=torch.float64), 1, 1)
    student = TrainableConcept(base, recipe, category_encoding(base, "teddy bear"), c.inverse)
    for module in base.modules:
        module.zero_grad(set_to_none=True)  # the base is shared with tests that do not freeze it
    with base.frozen():
        loss, _ = student.loss(Batches(base, prepared, recipe).at(0))
        loss.backward()
    assert student.delta.grad is not None and student.delta.grad.abs().max() > 0
    assert all(w.grad is not None and w.grad.abs().max() > 0 for w in student.words)
    assert len(student.words) == len(base.text_encoders)
    for module in (base.denoiser, base.vae, *base.text_encoders):
        assert all(p.grad is None for p in module.parameters())
    trainable = [p for g in student.param_groups() for p in g.parameters]
    assert {p.numel() for p in trainable} == {base.layout.n_values, *(w.numel() for w in student.words)}


def test_detach_restores_the_stock_pipeline(pipelines: dict[str, Any], tmp_path: Any) -> None:
    stock, ours = pipelines["sd15"], build_pipeline("sd15", tmp_path)
    attach(ours)
    detach(ours.unet)
    kwargs = {"prompt": PROMPT, "guidance_scale": 5.0}
    assert np.array_equal(call(ours, **kwargs), call(stock, **kwargs))
    assert all(p.requires_grad for p in ours.unet.parameters())
    assert type(next(iter(ours.unet.attn_processors.values()))).__name__ == "AttnProcessor2_0"


def test_plain_prompts_still_work_while_attached(pipelines: dict[str, Any], tmp_path: Any) -> None:
    stock, ours = pipelines["sd15"], build_pipeline("sd15", tmp_path)
    attach(ours)
    kwargs = {"prompt": PROMPT, "guidance_scale": 5.0}
    assert np.array_equal(call(ours, **kwargs), call(stock, **kwargs))


def _few_captions() -> str:
    """A captions file small enough for miniatures."""
    import tempfile

    from minikin.perfusion.corpus import captions

    with tempfile.NamedTemporaryFile("w", suffix=".txt", delete=False) as f:
        f.write("\n".join(captions(200)))
    return f.name


@pytest.mark.parametrize("name", ["Euler", "Euler a", "DPM++ 2M", "PNDM"])
def test_training_does_not_depend_on_the_sampling_scheduler(
    name: str, photos: list[Photo], tmp_path: Any
) -> None:
    """Published folders ship Euler or PNDM, whose add_noise and velocity are not those of training."""
    from minikin.generation import schedulers
    from minikin.perfusion.train import Batches, prepare

    pipe = build_pipeline("sd21", tmp_path)
    recipe = Teach(name="tom", category="cat", batch=2)
    base = Base(pipe)
    expected = Batches(base, prepare(base, photos, recipe), recipe).at(0)
    pipe.scheduler = schedulers.build(name, pipe.scheduler)
    other = Base(pipe)
    batch = Batches(other, prepare(other, photos, recipe), recipe).at(0)
    assert torch.allclose(batch.x_t, expected.x_t, atol=1e-5)
    assert torch.allclose(batch.target, expected.target, atol=1e-5)


def test_identity_does_not_depend_on_precision(tmp_path: Any) -> None:
    """Opened in float32, float16 or bfloat16, a base has the same fingerprint and text hash."""
    from minikin.models.loading.registry import open_base

    build_pipeline("sd15", tmp_path / "a").to(torch.float16).save_pretrained(tmp_path / "b")
    identities = {
        (b.fingerprint, b.text_hash, str(b.dtype) != "")
        for dtype in ("float32", "float16", "bfloat16")
        for b in [open_base(str(tmp_path / "b"), device="cpu", dtype=dtype)]
    }
    assert len(identities) == 1


@pytest.mark.parametrize("family", ["sd15", "sdxl", "pixart-sigma", "sana"])
def test_a_concept_fits_copies_of_its_base_in_any_precision(family: str, tmp_path: Any) -> None:
    """Taught on a copy in one precision, used through attach() on another: float32, float16, bfloat16.

    Also a bfloat16 copy made from the float16 one. Rounding twice differs, in the hash of the exact values, in
    6 % of the weights; a text encoder that differs by 2 % is another one all the same.
    """
    pipes = [build_pipeline(family, tmp_path / name, flat=True) for name in "abcd"]
    copies = [Base(pipe.to(d)) for pipe, d in zip(pipes, (torch.float32, torch.float16), strict=False)]
    copies += [Base(pipes[2].to(torch.bfloat16)), Base(pipes[3].to(torch.float16).to(torch.bfloat16))]
    assert copies[0].text_hash == copies[1].text_hash and copies[0].fingerprint == copies[1].fingerprint
    assert copies[0].text_hash != copies[2].text_hash  # what the sketch is for
    theirs = [attach(b.pipe) for b in copies]
    for a in copies:
        tom = Concept(
            "tom", "cat", "value", a.origin, (), torch.zeros(1), torch.zeros(1),
            {s.path: torch.zeros(s.width) for s in a.layout.layers},
        )  # fmt: skip
        for concepts in theirs:
            concepts.add(concept_file.from_bytes(concept_file.to_bytes(tom)))
    with torch.no_grad():
        for p in copies[0].text_encoders[0].parameters():
            p.mul_(1.02)
    for precision in (torch.float32, torch.float16, torch.bfloat16):
        assert compatibility(Base(copies[0].pipe.to(precision)), tom) == "other text encoder"


def test_damaged_sketches_match_nothing(bases: dict[str, Base]) -> None:
    whole = bases["sd15"].origin.text_sketch
    assert sketches_match(whole, whole)
    odd = ("", "x", "x y", "é é", whole[:-8], whole.replace(" ", ""), "0" + whole[1:], whole[:17] + "====")
    for text in odd:
        assert not sketches_match(text, whole) and not sketches_match(whole, text)


@pytest.mark.parametrize(
    ("mode", "family"),
    [(mode, family) for mode in ("gated", "value") for family in ("sd15", "sdxl", "pixart-sigma")]
    + [("value", "sana")],
)
def test_teach_and_paint_in_bfloat16(family: str, mode: str, photos: list[Photo], tmp_path: Any) -> None:
    """Half-precision weights, as on a GPU: no dtype meets another, results stay finite."""
    studio = Studio(Base(build_pipeline(family, tmp_path).to(torch.bfloat16), family))
    how: dict[str, Any] = {"mode": mode, "steps": 2, "batch": 2, "captions": _few_captions()}
    concept = studio.teach(photos, name="tom", category="cat", **how)
    assert concept.is_finite()
    (image,) = studio.paint("<tom> and (a dog:1.2)", negative="blurry", steps=2)
    assert image.size == (64, 64)


def test_changes_of_shared_fixtures_are_detected(bases: dict[str, Base], request: Any) -> None:
    """Control of the check in conftest after every file: it reports a changed weight, not a restored one."""
    weight = next(bases["sdxl"].denoiser.parameters()).data.view(-1)[:1]
    before = weight.clone()
    weight += 0.01
    assert changed(request.config, ["bases", "tiny"]) == ["bases"]
    weight.copy_(before)
    assert changed(request.config, ["bases", "tiny"]) == []
