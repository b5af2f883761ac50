"""The node pack inside ComfyUI itself, on a miniature with random weights.

MINIKIN_COMFYUI names a checkout of ComfyUI (tried with 0.3.64), whose requirements are installed, too.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from minikin.models.base import Base
from minikin.models.loading import architectures
from minikin.models.prompt import parse
from minikin.models.regions import region_bias_applied, region_bias_of
from minikin.perfusion.concept import Concept
from minikin.perfusion.conditioning import condition, prepare_concept
from tests import conftest
from tests.comfyui.test_nodes import concept_of
from tests.helpers import comfy as standin
from tests.helpers import ldm

CHECKOUT = os.environ.get("MINIKIN_COMFYUI", "")
STEPS, GUIDANCE = 6, 5.0
pytestmark = pytest.mark.skipif(not CHECKOUT, reason="MINIKIN_COMFYUI names no checkout of ComfyUI")


@pytest.fixture(scope="module")
def comfyui(tmp_path_factory: Any) -> Any:
    """ComfyUI's modules, a miniature of SD 1.5 in them and as a base, and the pack as ComfyUI imports it."""
    with pytest.MonkeyPatch.context() as patch:
        yield _set_up(patch, tmp_path_factory)


def _set_up(patch: pytest.MonkeyPatch, tmp_path_factory: Any) -> SimpleNamespace:
    patch.syspath_prepend(CHECKOUT)
    from comfy.cli_args import args

    args.cpu = True
    import comfy.sample
    import comfy.samplers
    import comfy.sd
    import folder_paths
    import nodes
    from comfy import model_detection, model_patcher, supported_models

    shrunk = architectures.shrunk
    groups = {"norm_num_groups": 32, "attention_head_dim": 4}  # ComfyUI has 32 groups in every norm
    patch.setattr(conftest, "shrunk", lambda a: replace(shrunk(a), unet=shrunk(a).unet | groups))
    pipe = conftest.build_pipeline("sd15", tmp_path_factory.mktemp("live"))
    weights = ldm.checkpoint(pipe, "sd15")
    prefix = "model.diffusion_model."
    unet = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    config = supported_models.SD15(model_detection.detect_unet_config(unet, ""))
    config.unet_config["num_heads"] = 4
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model(unet, "", device="cpu")
    model.load_model_weights(unet, "")
    text = pipe.text_encoder.config
    sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "projection_dim")
    options = {"clip_l_model_config": {n: getattr(text, n) for n in sizes}, "dtype": torch.float32}
    clip = comfy.sd.CLIP(config.clip_target(), model_options=options)
    state = {
        f"text_model.{k.removeprefix('text_model.')}": v for k, v in pipe.text_encoder.state_dict().items()
    }
    clip.cond_stage_model.clip_l.transformer.load_state_dict(state, strict=False)
    folder_paths.models_dir = str(tmp_path_factory.mktemp("models"))
    spec = importlib.util.spec_from_file_location(
        "minikin_live", standin.PACK / "__init__.py", submodule_search_locations=[str(standin.PACK)]
    )
    assert spec is not None and spec.loader is not None
    pack = sys.modules["minikin_live"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pack)
    cpu = torch.device("cpu")
    return SimpleNamespace(
        nodes=nodes, sample=comfy.sample, samplers=comfy.samplers, clip=clip, pack=pack,
        base=Base(pipe, "sd15"), model=model_patcher.ModelPatcher(model, cpu, cpu), pipe=pipe,
    )  # fmt: skip


def sigmas(comfyui: Any) -> Any:
    from diffusers import EulerDiscreteScheduler

    config = comfyui.pipe.scheduler.config
    scheduler = EulerDiscreteScheduler.from_config(config, timestep_spacing="leading", steps_offset=1)
    scheduler.set_timesteps(STEPS)
    return scheduler


def by_comfyui(comfyui: Any, x: Tensor, text: str, *uses: Any, patched: bool = True) -> Tensor:
    """Latents by ComfyUI's Euler sampler."""
    encode = comfyui.nodes.CLIPTextEncode().encode
    model, positive = comfyui.model, encode(comfyui.clip, text)[0] if not uses else None
    if uses or patched:
        model, conditioning = comfyui.pack.nodes_v3.nodes.encode_prompt(model, comfyui.clip, text, uses)
        positive = positive or conditioning
    out: Tensor = comfyui.sample.sample_custom(
        model, x, GUIDANCE, comfyui.samplers.sampler_object("euler"), sigmas(comfyui).sigmas, positive,
        encode(comfyui.clip, "blurry")[0], torch.zeros_like(x), disable_pbar=True,
    )  # fmt: skip
    return out


@torch.no_grad()
def by_minikin(comfyui: Any, x: Tensor, text: str, *concepts: Concept) -> Tensor:
    """Latents by the same steps with Minikin's packed keys and values and its regions."""
    base, scheduler = comfyui.base, sigmas(comfyui)
    prepared = {c.name: prepare_concept(base, c) for c in concepts}
    prompts = [parse("blurry", {}), parse(text, {c.name: c.category for c in concepts})]
    negative, positive = condition(base, prompts, prepared)
    regions = region_bias_of(positive.regions, 1, (x.shape[2], x.shape[3]))
    latents = x * scheduler.sigmas[0]
    for step, t in enumerate(scheduler.timesteps):
        model_input = scheduler.scale_model_input(latents, t).repeat(2, 1, 1, 1)
        with region_bias_applied(base.denoiser, regions):
            out = base.predict(model_input, t, torch.cat([negative.kv, positive.kv]))
        unconditional, conditional = out.chunk(2)
        guided = unconditional + GUIDANCE * (conditional - unconditional)
        latents = scheduler.step(guided, t, latents).prev_sample
        if regions:
            regions.after_step((step + 1) / STEPS)
    return latents / comfyui.base.vae.config.scaling_factor


@pytest.mark.parametrize("mode", ["value", "gated"])
def test_an_image_of_the_nodes_is_minikins(comfyui: Any, mode: str) -> None:
    concept, x = concept_of(comfyui.base, mode), torch.randn(1, 4, 8, 8, generator=torch.manual_seed(3))
    use = comfyui.pack.concepts.ConceptInUse(concept, 0.8)
    here = by_comfyui(comfyui, x, "a photo of <tom> on the beach", use)
    there = by_minikin(comfyui, x, "a photo of <tom:0.8> on the beach", concept)
    plain = by_comfyui(comfyui, x, "a photo of a cat on the beach", patched=False)
    assert (here - there).abs().max() < 1e-4 * there.std() < 1e-2 * (here - plain).abs().max()


def test_two_concepts_have_the_same_regions(comfyui: Any) -> None:
    tom, ann = (concept_of(comfyui.base, "value", name, seed) for name, seed in (("tom", 1), ("ann", 2)))
    in_use, boxes = comfyui.pack.concepts.ConceptInUse, comfyui.pack.concepts.NAMED_BOXES
    x = torch.randn(1, 4, 8, 8, generator=torch.manual_seed(3))
    for places, words in (
        ((None, None), ("<tom>", "<ann>")),
        (("left", "right"), ("<tom@left>", "<ann@right>")),
    ):
        uses = [in_use(c, box=boxes.get(place)) for c, place in zip((tom, ann), places, strict=True)]
        here = by_comfyui(comfyui, x, "<tom> and <ann> in a room", *uses)
        there = by_minikin(comfyui, x, f"{words[0]} and {words[1]} in a room", tom, ann)
        assert (here - there).abs().max() < 1e-4 * there.std(), places


def test_without_a_concept_nothing_changes(comfyui: Any) -> None:
    x = torch.randn(1, 4, 8, 8, generator=torch.manual_seed(3))
    plain = by_comfyui(comfyui, x, "a photo of a cat on the beach", patched=False)
    none = comfyui.pack.concepts.ConceptInUse(concept_of(comfyui.base, "gated"), 0.0)
    assert torch.equal(plain, by_comfyui(comfyui, x, "a photo of <tom> on the beach", none))
    model, _ = comfyui.pack.nodes_v3.nodes.encode_prompt(comfyui.model, comfyui.clip, "<tom>", (none,))
    patched = SimpleNamespace(**vars(comfyui) | {"model": model})
    assert torch.equal(plain, by_comfyui(patched, x, "a photo of a cat on the beach", patched=False))


def test_areas_and_zeroed_prompts_stay_as_they_are(comfyui: Any) -> None:
    """ComfyUI's own nodes that copy an entry's options do not carry the concept along."""
    nodes, x = comfyui.nodes, torch.randn(1, 4, 8, 8, generator=torch.manual_seed(3))
    use = comfyui.pack.concepts.ConceptInUse(concept_of(comfyui.base, "value"))
    model, positive = comfyui.pack.nodes_v3.nodes.encode_prompt(
        comfyui.model, comfyui.clip, "<tom> runs", (use,)
    )
    negative = nodes.CLIPTextEncode().encode(comfyui.clip, "blurry")[0]

    def latents(positive: Any, negative: Any) -> Tensor:
        out: Tensor = comfyui.sample.sample_custom(
            model, x, GUIDANCE, comfyui.samplers.sampler_object("euler"), sigmas(comfyui).sigmas, positive,
            negative, torch.zeros_like(x), disable_pbar=True,
        )  # fmt: skip
        return out

    whole = nodes.ConditioningSetArea().append(positive, 64, 64, 0, 0, 1.0)[0]
    assert torch.allclose(latents(whole, negative), latents(positive, negative), atol=1e-2)
    zero = nodes.ConditioningZeroOut().zero_out
    plain = nodes.CLIPTextEncode().encode(comfyui.clip, "a cat runs")[0]
    assert torch.equal(latents(positive, zero(positive)[0]), latents(positive, zero(plain)[0]))


def test_comfyui_takes_the_nodes(comfyui: Any) -> None:
    found = asyncio.run(asyncio.run(comfyui.pack.comfy_entrypoint()).get_node_list())  # word: those of the pack
    assert [node.GET_SCHEMA().node_id for node in found] == ["MinikinLoadConcept", "MinikinEncodePrompt"]
    for node in found:
        assert node.INPUT_TYPES()["required"]
