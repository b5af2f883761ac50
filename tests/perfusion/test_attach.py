"""Concepts on pipelines of diffusers with more on them: ControlNet, IP-Adapter, processors, lists."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from minikin import Concept, attach
from minikin.errors import BadRecipe
from minikin.models.base import Base
from minikin.perfusion import edit
from minikin.perfusion.conditioning import unpacked_delta
from minikin.perfusion.covariance import covariance
from minikin.perfusion.key_lock import category_encoding
from tests import conftest

build_pipeline = partial(conftest.build_pipeline, flat=True)
PROMPT, NEGATIVE = "a cat on the beach", "blurry"
HOW: dict[str, Any] = {"num_inference_steps": 1, "guidance_scale": 5.0, "output_type": "latent"}
HOW |= {"height": 64, "width": 64}


@pytest.fixture(autouse=True)
def _few_captions(monkeypatch: Any) -> None:
    monkeypatch.setattr("minikin.perfusion.covariance.CAPTIONS_PER_DIMENSION", 4)


def concept(base: Base, mode: str = "value") -> Concept:
    """A concept that changes images much."""
    g = torch.Generator().manual_seed(0)
    e = category_encoding(base, "cat").cpu()
    delta = unpacked_delta(base, 5 * torch.randn(base.layout.n_values, generator=g))
    if mode == "value":
        return Concept("tom", "cat", "value", base.origin, (), torch.zeros(1), torch.zeros(1), delta)
    words = tuple(0.02 * torch.randn(w.shape, generator=g) for w in base.word_vectors("cat"))
    return Concept("tom", "cat", "gated", base.origin, words, e, edit.dual(e, covariance(base).inverse), delta)


def call(pipe: Any, **kwargs: Any) -> np.ndarray:
    """The latents of one step."""
    pipe.set_progress_bar_config(disable=True)
    latents: Tensor = pipe(generator=torch.Generator().manual_seed(7), **{**HOW, **kwargs}).images
    return latents.numpy()


def same_without_concept_and_other_with_one(
    stock: Any, ours: Any, minikin: Any, mode: str = "value", **kwargs: Any
) -> None:
    """Without a concept equal to the bit; with one different, and equal to itself."""
    assert np.array_equal(
        call(ours, **minikin(PROMPT, NEGATIVE), **kwargs),
        call(stock, prompt=PROMPT, negative_prompt=NEGATIVE, **kwargs),
    )
    minikin.add(concept(minikin.base, mode))
    tom = call(ours, **minikin("a <tom> on the beach", NEGATIVE), **kwargs)
    assert np.isfinite(tom).all()
    assert np.abs(tom - call(ours, **minikin(PROMPT, NEGATIVE), **kwargs)).max() > 1e-4


# ---- ControlNet and IP-Adapter ----------------------------------------------------------------------


def control_network(unet: Any) -> Any:
    torch.manual_seed(5)
    network = diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8, 8, 8)).eval()
    with torch.no_grad():
        for name, p in network.named_parameters():  # its last layers are zero at first
            if "controlnet_" in name:
                p.copy_(0.1 * torch.randn(p.shape))
    return network


@pytest.mark.parametrize(("family", "order"), [("sd15", "before"), ("sd15", "after"), ("sdxl", "before")])
def test_controlnet(tmp_path: Path, family: str, order: str) -> None:
    """Attached to the text-to-image pipeline whose parts it shares, or to the ControlNet pipeline."""
    xl = "XL" if family == "sdxl" else ""
    cls = getattr(diffusers, f"StableDiffusion{xl}ControlNetPipeline")
    stock, ours = (build_pipeline(family, tmp_path / str(k)) for k in range(2))
    network = control_network(stock.unet)
    minikin = attach(ours) if order != "after" else None
    with_network = [cls(**{**p.components, "controlnet": network}) for p in (stock, ours)]
    if order != "before":
        minikin = attach(with_network[1])
    image = Image.fromarray(np.random.default_rng(1).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    same_without_concept_and_other_with_one(*with_network, minikin, image=image)
    changed = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pair = [call(with_network[1], **minikin("a <tom>"), image=i) for i in (image, changed)]
    assert np.abs(pair[0] - pair[1]).max() > 1e-6  # the image counts


def test_several_controlnets_in_guess_mode(tmp_path: Path) -> None:
    stock, ours = (build_pipeline("sd15", tmp_path / str(k)) for k in range(2))
    minikin, networks = attach(ours), [control_network(stock.unet), control_network(stock.unet)]
    cls = diffusers.StableDiffusionControlNetPipeline
    stock, ours = (cls(**{**p.components, "controlnet": networks}) for p in (stock, ours))
    image = Image.new("RGB", (64, 64), (200, 30, 90))
    same_without_concept_and_other_with_one(stock, ours, minikin, image=[image, image], guess_mode=True)


def ip_adapter(base_unet: Any) -> dict[str, Any]:
    """Weights of an IP-Adapter with random numbers, for this U-Net."""
    g = torch.Generator().manual_seed(9)
    dim, n, width = base_unet.config.cross_attention_dim, 4, 16
    project = {"proj.weight": torch.randn(n * dim, width, generator=g), "proj.bias": torch.zeros(n * dim),
               "norm.weight": torch.ones(dim), "norm.bias": torch.zeros(dim)}  # fmt: skip
    layers, key = {}, 1
    for name, module in base_unet.named_modules():
        if name.endswith("attn2"):
            out = module.to_k.out_features
            layers |= {f"{key}.{k}.weight": torch.randn(out, dim, generator=g) for k in ("to_k_ip", "to_v_ip")}
            key += 2
    return {"image_proj": project, "ip_adapter": layers}


@pytest.mark.parametrize(
    ("family", "order"), [("sd15", "loaded before"), ("sd15", "loaded after"), ("sdxl", "loaded after")]
)
def test_ip_adapter(tmp_path: Path, family: str, order: str) -> None:
    """With an image's embedding beside the prompt; its scale acts; unloading leaves an attached pipeline."""
    stock, ours = (build_pipeline(family, tmp_path / str(k)) for k in range(2))
    weights = ip_adapter(stock.unet)
    minikin = attach(ours) if order == "loaded after" else None
    for pipe in (stock, ours):
        pipe.load_ip_adapter(weights, subfolder=None, weight_name=None, image_encoder_folder=None)
    minikin = minikin or attach(ours)
    embeds = [torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(3))]
    same_without_concept_and_other_with_one(stock, ours, minikin, ip_adapter_image_embeds=embeds)
    images = []
    for scale in (0.0, 1.0):
        ours.set_ip_adapter_scale(scale)
        images.append(call(ours, **minikin("a <tom>"), ip_adapter_image_embeds=embeds))
    assert np.abs(images[0] - images[1]).max() > 1e-5
    for pipe in (stock, ours):
        pipe.unload_ip_adapter()
    same_without_concept_and_other_with_one(stock, ours, minikin)


# ---- processors -------------------------------------------------------------------------------------


def processors(kind: str) -> Callable[[Any], None]:
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

    changes: dict[str, Callable[[Any], None]] = {
        "slices": lambda pipe: pipe.enable_attention_slicing(),
        "slices of 1": lambda pipe: pipe.enable_attention_slicing(1),
        "slices and back": lambda pipe: (pipe.enable_attention_slicing(), pipe.disable_attention_slicing()),
        "set_attn_processor": lambda pipe: pipe.unet.set_attn_processor(AttnProcessor()),
        "set_attn_processor 2": lambda pipe: pipe.unet.set_attn_processor(AttnProcessor2_0()),
        "default": lambda pipe: pipe.unet.set_default_attn_processor(),
        "fused": lambda pipe: pipe.fuse_qkv_projections(),
        "fused and back": lambda pipe: (pipe.fuse_qkv_projections(), pipe.unfuse_qkv_projections()),
        "freeu": lambda pipe: pipe.enable_freeu(0.9, 0.2, 1.2, 1.4),
        "channels last": lambda pipe: pipe.unet.to(memory_format=torch.channels_last),
    }
    return changes[kind]


@pytest.mark.parametrize(
    ("kind", "when"),
    [("slices", "before"), ("slices", "after"), ("slices of 1", "after"), ("slices and back", "after"),
     ("set_attn_processor", "after"), ("set_attn_processor 2", "after"), ("default", "after"),
     ("fused", "before"), ("fused", "after"), ("fused and back", "after"),
     ("freeu", "after"), ("channels last", "after")],
)  # fmt: skip
def test_other_attention_processors(tmp_path: Path, kind: str, when: str) -> None:
    """Whatever the pipeline is set to, before or after: stock's image to the bit, and concepts act."""
    stock, ours = (build_pipeline("sd15", tmp_path / str(k)) for k in range(2))
    minikin = attach(ours) if when == "after" else None
    for pipe in (stock, ours):
        processors(kind)(pipe)
    same_without_concept_and_other_with_one(stock, ours, minikin or attach(ours))


@pytest.mark.parametrize("mode", ["value", "gated"])
def test_loras_of_the_pipeline_count(tmp_path: Path, mode: str) -> None:
    from peft import LoraConfig

    stock, ours = (build_pipeline("sd15", tmp_path / str(k)) for k in range(2))
    minikin = attach(ours)
    for pipe in (stock, ours):
        pipe.unet.add_adapter(
            LoraConfig(r=2, target_modules=["to_k", "to_v"], init_lora_weights=False), "style"
        )
        pipe.unet.eval()
        g = torch.Generator().manual_seed(5)
        for name, p in pipe.unet.named_parameters():
            if "lora_" in name:
                p.data.copy_(0.3 * torch.randn(p.shape, generator=g))
    same_without_concept_and_other_with_one(stock, ours, minikin, mode)


def test_sequential_offloading_is_one_clear_error(tmp_path: Path) -> None:
    ours = build_pipeline("sd15", tmp_path)
    minikin = attach(ours)
    ours.unet.to("meta")
    with pytest.raises(BadRecipe, match="enable_sequential_cpu_offload.*Use enable_model_cpu_offload"):
        minikin(PROMPT)


def test_detach_gives_the_pipeline_back(tmp_path: Path) -> None:
    stock, ours = (build_pipeline("sd15", tmp_path / str(k)) for k in range(2))
    before = {k: type(p) for k, p in ours.unet.attn_processors.items()}
    minikin = attach(ours)
    minikin.detach()
    assert {k: type(p) for k, p in ours.unet.attn_processors.items()} == before
    assert not [m for m in ours.unet.modules() if "forward" in vars(m)]
    assert np.array_equal(call(ours, prompt=PROMPT), call(stock, prompt=PROMPT))
    with pytest.raises(BadRecipe, match="were detached"):
        minikin(PROMPT)
    first, second = attach(ours), attach(ours)  # of one pipeline, or of two with one U-Net
    assert np.array_equal(call(ours, **first(PROMPT)), call(stock, prompt=PROMPT, negative_prompt=""))
    second.detach()
    with pytest.raises(BadRecipe, match="were detached"):
        first(PROMPT)


# ---- arguments --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@pytest.mark.parametrize("n", [1, 2])
def test_lists_of_prompts(tmp_path: Path, family: str, n: int) -> None:
    """In diffusers' order: a prompt's images beside each other; one negative prompt for all, or for each."""
    stock, ours = (build_pipeline(family, tmp_path / str(k)) for k in range(2))
    minikin = attach(ours)
    prompts, generators = (
        ["a cat", "a dog in the snow"],
        [torch.Generator().manual_seed(k) for k in range(2 * n)],
    )
    for negative in (NEGATIVE, [NEGATIVE, "dark"]):
        theirs = stock(
            prompts, negative_prompt=negative if isinstance(negative, list) else [negative] * 2,
            num_images_per_prompt=n, generator=[g.manual_seed(k) for k, g in enumerate(generators)], **HOW,
        ).images  # fmt: skip
        packed = minikin(prompts, negative_prompt=negative, n=n)
        mine = ours(**packed, generator=[g.manual_seed(k) for k, g in enumerate(generators)], **HOW).images
        assert mine.shape == theirs.shape and np.abs(mine - theirs).max() <= 1e-5
    minikin.add(concept(minikin.base))
    first, second = (minikin(p, n=n)["prompt_embeds"] for p in ("a <tom>", "a dog"))
    both = minikin(["a <tom>", "a dog"], n=n)["prompt_embeds"]
    assert torch.allclose(both, torch.cat([first, second]), atol=1e-5)
    with pytest.raises(BadRecipe, match="3 prompts and 2 negative prompts"):
        minikin(["a", "b", "c"], ["d", "e"])
    with pytest.raises(BadRecipe, match="0 prompts"):
        minikin([])


def test_the_second_prompt_of_sdxl(tmp_path: Path) -> None:
    """Equal to the bit without a concept; with one a clear refusal; other families have none."""
    stock, ours = (build_pipeline("sdxl", tmp_path / str(k)) for k in range(2))
    minikin = attach(ours)
    texts = {"prompt_2": "a watercolour", "negative_prompt_2": "a photo"}
    theirs = call(stock, prompt=PROMPT, negative_prompt=NEGATIVE, **texts)
    assert np.array_equal(call(ours, **minikin(PROMPT, negative_prompt=NEGATIVE, **texts)), theirs)
    theirs = call(stock, prompt=PROMPT, prompt_2="a watercolour")
    assert np.array_equal(call(ours, **minikin(PROMPT, prompt_2="a watercolour")), theirs)
    minikin.add(concept(minikin.base))
    minikin("a <tom>", prompt_2="a <tom>")
    with pytest.raises(BadRecipe, match="leave prompt_2 out"):
        minikin("a <tom>", prompt_2="a watercolour")
    with pytest.raises(BadRecipe, match="this pipeline has one"):
        attach(build_pipeline("sd15", tmp_path / "sd15"))("a", prompt_2="b")


@pytest.mark.parametrize(
    ("prompt", "kwargs", "words"),
    [("<tom@left>", {}, "Regions.*in Studio"), ("a <lora:x:1>", {}, "use pipe.load_lora_weights"),
     ("a", {"negative": "b", "negative_prompt": "c"}, "give one of them")],
)  # fmt: skip
def test_what_a_stock_pipeline_cannot_follow_is_refused(
    tmp_path: Path, prompt: str, kwargs: dict[str, Any], words: str
) -> None:
    minikin = attach(build_pipeline("sd15", tmp_path))
    minikin.add(concept(minikin.base))
    with pytest.raises(BadRecipe, match=words):
        minikin(prompt, **kwargs)


def test_a_short_description_and_the_file_name(tmp_path: Path) -> None:
    """A file is known by its name and by the concept's own; the description is one line."""
    minikin = attach(build_pipeline("sd15", tmp_path / "mini"), "mine")
    minikin.add(concept(minikin.base).save(tmp_path / "kitty.safetensors"))
    minikin.add(replace(concept(minikin.base), name="rex").save(tmp_path / "My Dog (2).safetensors"))
    assert {"tom", "kitty", "rex"} == set(minikin.categories)
    assert torch.equal(minikin("a <kitty>")["prompt_embeds"], minikin("a <tom>")["prompt_embeds"])
    text = repr(minikin)
    assert "tom (cat, value)" in text and "StableDiffusionPipeline" in text and len(text) < 250
    assert "\n" not in text and len(repr(minikin.base)) < 100


def test_a_moved_pipeline_takes_its_concepts_along(tmp_path: Path, monkeypatch: Any) -> None:
    minikin = attach(build_pipeline("sd15", tmp_path))
    minikin.add(concept(minikin.base, "gated"))
    minikin.loaded["tom"] = replace(minikin.loaded["tom"], delta=minikin.loaded["tom"].delta.to("meta"))
    assert minikin("a <tom>")["prompt_embeds"].isfinite().all()


# ---- another text encoder ---------------------------------------------------------------------------


def fine_tuned(family: str, folder: Path, amount: float) -> Any:
    """The miniature with text encoders that were changed by this much."""
    pipe = build_pipeline(family, folder)
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name in ("text_encoder", "text_encoder_2"):
            for p in getattr(pipe, name).parameters() if hasattr(pipe, name) else ():
                p.add_(amount * p.std() * torch.randn(p.shape, generator=g) if p.ndim > 1 else 0)
    return pipe


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_value_concepts_act_on_a_fine_tuned_text_encoder(tmp_path: Path, family: str) -> None:
    """One warning that says how far the text encoders are apart; nearer ones are said to be nearer."""
    tom, numbers = concept(Base(build_pipeline(family, tmp_path / "own"), family)), []
    for amount in (0.02, 0.5):
        minikin = attach(fine_tuned(family, tmp_path / str(amount), amount), "anime")
        with pytest.warns(
            UserWarning, match="with another text encoder than that of anime: their weights are"
        ) as w:
            minikin.add(tom)
        assert len(w) == 1
        numbers.append(float(str(w[0].message).split("weights are ")[1].split(" %")[0]))
        plain, with_tom = (minikin(p)["prompt_embeds"] for p in ("a cat", "a <tom>"))
        assert (plain - with_tom).abs().max() > 0.1
    assert 1 < numbers[0] < 4 and 30 < numbers[1] < 80


def test_gated_concepts_need_force_and_get_another_direction(tmp_path: Path) -> None:
    """Refused with the way round; with force the similarity is that of this base: 1 at the concept's word."""
    from minikin.errors import BaseMismatch

    tom = concept(Base(build_pipeline("sd15", tmp_path / "own"), "sd15"), "gated")
    minikin = attach(fine_tuned("sd15", tmp_path / "anime", 0.5), "anime")
    with pytest.raises(BaseMismatch, match=r"another one \(their weights are .* apart\).*--force.*force=True"):
        minikin.add(tom)
    with pytest.warns(UserWarning, match="Its direction was computed anew"):
        minikin.add(tom, force=True)
    direction = minikin.loaded["tom"].direction
    assert direction is not None
    words = minikin.loaded["tom"].words
    e = category_encoding(minikin.base, "cat", words)
    assert abs(float(edit.similarity(e, direction)) - 1) < 1e-4
    expected = edit.dual(e.cpu(), covariance(minikin.base).inverse)
    assert torch.allclose(direction.m_i_star.cpu(), expected, atol=1e-5)
    assert minikin.loaded["tom"].concept is tom or minikin.loaded["tom"].concept == tom  # its record stays
    two = tuple(torch.cat([w, w]) for w in tom.word_deltas)
    with pytest.raises(BaseMismatch, match="has 2 word vectors"):
        minikin.add(replace(tom, word_deltas=two), force=True)


def test_another_architecture_is_refused_with_force_too(bases: dict[str, Base], tmp_path: Path) -> None:
    from minikin.errors import BaseMismatch

    minikin = attach(build_pipeline("sdxl", tmp_path))
    for mode in ("value", "gated"):
        with pytest.raises(BaseMismatch, match="cross-attention layers do not match"):
            minikin.add(concept(bases["sd15"], mode), force=True)


def test_the_same_text_encoder_warns_of_nothing(tmp_path: Path) -> None:
    minikin = attach(build_pipeline("sd15", tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        minikin.add(concept(minikin.base))


@pytest.mark.parametrize("mode", ["value", "gated"])
def test_recipes_say_it_once_and_take_force(tmp_path: Path, monkeypatch: Any, mode: str) -> None:
    """By name from a folder, as on the command line: one note with the distance; gated with `--force` alone."""
    from minikin import Studio
    from minikin.errors import BaseMismatch
    from minikin.recipes import Paint

    monkeypatch.chdir(tmp_path)
    concept(Base(build_pipeline("sd15", tmp_path / "own"), "sd15"), mode).save("tom.safetensors")
    studio = Studio(Base(fine_tuned("sd15", tmp_path / "anime", 0.1), "anime"))
    recipe = {"prompt": "a <tom> and a <tom>", "base": "anime", "steps": 1, "width": 64, "height": 64}
    if mode == "gated":
        with pytest.raises(BaseMismatch, match="--force"):
            studio.resolve(Paint.make(**recipe))
    warnings = studio.resolve(Paint.make(**recipe, force=mode == "gated")).warnings
    (note,) = [text for text in warnings if "another text encoder than that of anime" in text]
    assert "% apart" in note and ("value-only" in note) is (mode == "value")
