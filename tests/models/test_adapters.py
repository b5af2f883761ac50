"""LoRA adapters: all layouts are read, wrong files refused with a reason, sums exact, the base unchanged."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

from minikin import Studio, attach
from minikin.cli.app import app
from minikin.errors import BadAdapterFile, BadRecipe, BaseMismatch, UnknownName
from minikin.models.base import Base
from minikin.models.loading.architectures import shrunk
from minikin.models.lora import adapters, lora_file
from minikin.models.lora.adapters import Adapters
from minikin.models.lora.lora_file import components
from minikin.models.prompt import Prompt
from tests import conftest
from tests.conftest import build_pipeline
from tests.helpers.loras import ATTENTION, LAYOUTS, Pairs, product, random_lora, write


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: Any) -> None:
    """LoRAs are searched in the current folder."""
    monkeypatch.chdir(tmp_path)


def outputs(base: Base) -> list[Tensor]:
    """Encodings, packed keys and values, and one U-Net call (batch of 2)."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        out = base.encode([Prompt(t, t) for t in ("a cat on the beach", "a dog")])
        kv = base.pack(out.e)
        x = torch.randn(2, 4, 8, 8, generator=g).to(base.dtype)
        sample = base.denoiser(x, torch.tensor(499), kv, **base.added_conditions(2, out.pooled)).sample
    return [out.e, kv, sample]


def merge(base: Base, terms: list[tuple[Pairs, float]]) -> None:
    """Add the weighted sum to the weights of the base."""
    parts = components(base)
    with torch.no_grad():
        for pairs, weight in terms:
            for (component, layer), (down, up) in pairs.items():
                parts[component].get_submodule(layer).weight.add_(weight * product(down, up))


# ---- reading --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_reads_the_same(
    bases: dict[str, Base], tmp_path: Path, family: str, layout: str
) -> None:  # fmt: skip
    """All layers of an LCM-LoRA and of the text encoders, with alpha, give the Delta W that was written."""
    base = bases[family]
    pairs = random_lora(base, text=layout != "peft-own")
    alpha = 1.0 if layout in ("kohya", "peft", "peft-own") else None
    path = write(tmp_path / "x.safetensors", pairs, layout, alpha=alpha, xl=base.is_xl)
    read = lora_file.load(base, path, "x")
    assert set(read.layers) == set(pairs)
    factor = 0.5 if alpha else 1.0
    for key, pair in pairs.items():
        assert torch.allclose(product(*read.layers[key]), factor * product(*pair), atol=1e-6), key


def test_original_block_numbers_of_sdxl(tmp_path: Path, monkeypatch: Any) -> None:
    """kohya's files for SDXL number the blocks as the original code does (two layers a block)."""

    def two_layers(a: Any) -> Any:
        small = shrunk(a)
        return replace(small, unet=small.unet | {"layers_per_block": 2})

    monkeypatch.setattr(conftest, "shrunk", two_layers)
    base = Base(build_pipeline("sdxl", tmp_path / "xl"), "sdxl")
    pairs = random_lora(base, layers=ATTENTION)
    path = write(tmp_path / "x.safetensors", pairs, "kohya", xl=True, sgm=True)
    read = lora_file.load(base, path, "x")
    assert set(read.layers) == set(pairs)
    assert all(torch.allclose(product(*read.layers[k]), product(*p), atol=1e-6) for k, p in pairs.items())


def test_one_by_one_convolutions_and_linear_layers_are_the_same(
    bases: dict[str, Base], tmp_path: Path
) -> None:  # fmt: skip
    base = bases["sd15"]  # proj_in is a convolution here
    pairs = random_lora(base, layers=("proj_in",))
    flat = {k: (down[..., 0, 0], up[..., 0, 0]) for k, (down, up) in pairs.items()}
    read = lora_file.load(base, write(tmp_path / "x.safetensors", flat), "x")
    assert all(torch.equal(read.layers[k].down, down) for k, (down, _) in pairs.items())


# ---- refusing -------------------------------------------------------------------------------------


def test_lora_of_another_family_is_refused_with_the_reason(
    bases: dict[str, Base], tmp_path: Path, monkeypatch: Any
) -> None:  # fmt: skip
    sd15 = write(tmp_path / "a.safetensors", random_lora(bases["sd15"], layers=ATTENTION))
    with pytest.raises(BaseMismatch, match=r"its cross-attention reads text 32 wide.*open base is sdxl"):
        lora_file.load(bases["sdxl"], sd15, "a")
    metadata = {"ss_base_model_version": "sdxl_base_v1-0"}
    path = write(tmp_path / "b.safetensors", random_lora(bases["sd21"], layers=("conv1",)), metadata=metadata)
    monkeypatch.setattr(Base, "architecture", property(lambda self: "sd2"))
    with pytest.raises(BaseMismatch, match="made for sdxl .its metadata says ss_base_model_version = sdxl"):
        lora_file.load(bases["sd21"], path, "b")


def test_layers_that_do_not_fit_are_named(bases: dict[str, Base], tmp_path: Path) -> None:
    base = bases["sd15"]
    pairs = random_lora(base, layers=("conv1",))
    key = next(iter(pairs))
    down, up = pairs[key]
    wide = write(tmp_path / "a.safetensors", pairs | {key: (torch.cat([down, down], 1), up)})
    with pytest.raises(BaseMismatch, match=rf"it changes unet.{key[1]} by .* has \(32, 32, 3, 3\) there"):
        lora_file.load(base, wide, "a")
    nowhere = write(tmp_path / "b.safetensors", pairs | {("unet", "up_blocks.9.conv1"): (1 * down, 1 * up)})
    with pytest.raises(BaseMismatch, match=r"unet.up_blocks.9.conv1 .* has no such layer"):
        lora_file.load(base, nowhere, "b")
    second = write(
        tmp_path / "c.safetensors",
        pairs | {("text_encoder_2", "encoder.layers.0.self_attn.q_proj"): (1 * down, 1 * up)},
    )
    with pytest.raises(BaseMismatch, match="has no such layer"):
        lora_file.load(base, second, "c")


OTHER_FAMILIES = {
    **dict.fromkeys(
        ("lora_unet_double_blocks_0_img_attn_proj", "transformer.single_transformer_blocks.0.attn.to_k",
         "transformer.transformer_blocks.0.attn.add_k_proj", "lora_unet_joint_blocks_0_context_block_attn_qkv",
         "diffusion_model.blocks.0.cross_attn.k", "lora_te3_encoder_block_0_layer_0_SelfAttention_k"),
        "a diffusion transformer, such as Flux",
    ),
    "down_blocks.0.motion_modules.0.attention_blocks.0.to_k": "AnimateDiff",
    "lora_prior_unet_down_blocks_0_1_attention_attn_in_proj": "Stable Cascade",
    "base_model.model.model.layers.0.self_attn.q_proj": "a language model",
    "0.to_q": "IP-Adapter FaceID",
}  # fmt: skip


def pair(stem: str) -> dict[str, torch.Tensor]:
    return {f"{stem}.lora_A.weight": torch.ones(2, 8), f"{stem}.lora_B.weight": torch.ones(8, 2)}


@pytest.mark.parametrize(
    ("tensors", "words"),
    [({"lora_unet_x.oft_blocks": torch.ones(2, 2)}, "of the kind OFT; Minikin reads LoRA, LoHa, LoKr, DoRA"),
     ({"lora_unet_x.a1.weight": torch.ones(2, 2)}, "of the kind GLoRA"),
     ({"lora_unet_x.hada_w1_a": torch.ones(2, 2)}, "belong to no pair of a LoRA and to no other kind"),
     ({"lora_unet_x.lokr_w1": torch.ones(2, 2)}, "belong to no pair"),
     ({"lora_unet_x.dora_scale": torch.ones(2)}, "belong to no pair"),
     ({"i_star": torch.ones(3)}, "is not a LoRA: it holds i_star. It is a concept"),
     ({"clip_l": torch.ones(3)}, "is not a LoRA: it holds clip_l."),
     ({"unet.conv1.lora_A.weight": torch.tensor([[float("nan")]])}, "NaN or Inf"),
     ({"unet.mid_block.conv1.lora_A.weight": torch.ones(2, 2)}, "belong to no pair"),
     ({"unet.mid_block.lora.strange": torch.ones(2, 2)}, "belong to no pair"),
     ({"lora_controlnet": torch.ones(1)}, "of the kind Control-LoRA"),
     *((pair(stem), rf"was made for {family}.*it changes {stem}") for stem, family in OTHER_FAMILIES.items())],
)  # fmt: skip
def test_other_adapters_are_refused(bases: dict[str, Base], tmp_path: Path, tensors: Any, words: str) -> None:
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises((BadAdapterFile, BaseMismatch), match=words):
        lora_file.load(bases["sd15"], tmp_path / "x.safetensors", "x")


def test_pickles_and_damaged_files_are_refused(bases: dict[str, Base], tmp_path: Path) -> None:
    (tmp_path / "old.pt").write_bytes(b"\x80\x04")
    with pytest.raises(BadAdapterFile, match="is a pickle, which can run code, and is never opened"):
        adapters.find("old")
    with pytest.raises(BadAdapterFile, match="is a pickle, which can run code, and is never opened"):
        lora_file.load(bases["sd15"], tmp_path / "old.pt", "old")
    whole = write(tmp_path / "x.safetensors", random_lora(bases["sd15"], layers=("conv1",))).read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadAdapterFile, match="not a safetensors file, or it is damaged"):
        lora_file.load(bases["sd15"], tmp_path / "cut.safetensors", "cut")


# ---- sums -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_the_combination_is_the_weighted_sum(bases: dict[str, Base], tmp_path: Path, family: str) -> None:
    """Three LoRAs, U-Net and text encoders, one negative weight: as merged weights, to 1e-5."""
    base = bases[family]
    makes = [random_lora(base, k, text=k != 2, rank=k + 1, size=0.05) for k in range(3)]
    weights = [1.0, 0.8, -0.3]
    manager = Adapters(base)
    loaded = [manager.get(write(tmp_path / f"{k}.safetensors", m)) for k, m in enumerate(makes)]
    before = outputs(base)
    with manager.using(list(zip(loaded, weights, strict=True))):
        together = outputs(base)
    by_hand = Base(build_pipeline(family, tmp_path / "merged"), family)
    merge(by_hand, list(zip(makes, weights, strict=True)))
    for ours, theirs, plain in zip(together, outputs(by_hand), before, strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * max(1.0, float(theirs.abs().max()))
        assert (ours - plain).abs().max() > 1e-3


def test_combination_matches_diffusers(bases: dict[str, Base], tmp_path: Path) -> None:
    """The same images as load_lora_weights and set_adapters on a stock pipeline, to 1e-4."""
    base, stock = bases["sd15"], build_pipeline("sd15", tmp_path / "stock")
    for k in range(2):
        write(tmp_path / f"s{k}.safetensors", random_lora(base, k, text=True, size=0.1), "kohya", alpha=1)
        stock.load_lora_weights(str(tmp_path), weight_name=f"s{k}.safetensors", adapter_name=f"s{k}")
    stock.set_adapters(["s0", "s1"], [1.0, 0.8])
    generator = [torch.Generator().manual_seed(3)]
    theirs = stock("a cat", num_inference_steps=3, guidance_scale=1.0, height=64, width=64,
                   generator=generator, output_type="np").images  # fmt: skip
    (ours,) = Studio(base).paint("a cat <lora:s0> <lora:s1:0.8>", steps=3, guidance=1.0, seed=3)
    assert np.abs(np.asarray(ours, float) / 255 - theirs[0]).max() <= 1e-4 + 0.5 / 255


@pytest.fixture(params=["merged", "beside"])
def method(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to apply LoRAs: a merged copy of the weights, or the low-rank pair beside them."""
    monkeypatch.setattr(adapters, "MERGED_BYTES", 1 << 40 if request.param == "merged" else 0)
    return str(request.param)


@pytest.mark.usefixtures("method")
def test_base_is_unchanged_afterwards(bases: dict[str, Base], tmp_path: Path) -> None:
    """Bit for bit: outputs, names of weights, hashes; also after an exception inside."""
    base = bases["sd15"]
    before, names = outputs(base), list(base.denoiser.state_dict())
    kinds = {type(m) for m in base.denoiser.modules()}
    identity = Base(base.pipe, "again").origin
    manager = Adapters(base)
    style = manager.get(write(tmp_path / "x.safetensors", random_lora(base, text=True)))
    with suppress(ZeroDivisionError), manager.using([(style, 1.0)]):
        assert list(base.denoiser.state_dict()) == names and base.active_adapters == f"{style.sha256[:16]} 1"
        assert Base(base.pipe, "inside").origin == identity
        _ = 1 / 0
    assert all(torch.equal(a, b) for a, b in zip(before, outputs(base), strict=True))
    assert not any(
        hasattr(m, "lora_up") or hasattr(m, "lora_weight")
        for part in components(base).values()
        for m in part.modules()
    )
    assert base.active_adapters == "" and {type(m) for m in base.denoiser.modules()} == kinds


def test_only_applied_loras_change_layers(bases: dict[str, Base], tmp_path: Path, method: str) -> None:
    """With 20 loaded, only layers of applied LoRAs change, by one pair of the summed rank."""
    name = {"merged": "lora_weight", "beside": "lora_up"}[method]
    base, manager = bases["sd15"], Adapters(bases["sd15"])
    kinds = (("conv1",), ("to_q",))
    many = [manager.get(write(tmp_path / f"{k}.safetensors", random_lora(base, k, layers=kinds[k % 2])))
            for k in range(20)]  # fmt: skip
    assert len(manager.loaded) == 20
    with manager.using([(many[0], 1.0), (many[2], 0.5)]):
        changed = [p for p, m in base.denoiser.named_modules() if hasattr(m, name)]
        assert changed and all(p.endswith("conv1") for p in changed)
    if method == "beside":
        assert {change.tensors["lora_down"].shape[0] for change in manager._sum[1]} == {4}  # two of rank 2


def test_both_methods_agree(bases: dict[str, Base], tmp_path: Path, monkeypatch: Any) -> None:
    base, outs = bases["sd15"], []
    style = write(tmp_path / "x.safetensors", random_lora(base, text=True))
    for limit in (0, 1 << 40):
        monkeypatch.setattr(adapters, "MERGED_BYTES", limit)
        manager = Adapters(base)
        with manager.using([(manager.get(style), 0.7)]):
            outs.append(outputs(base))
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*outs, strict=True))
    assert not all(torch.allclose(a, b, atol=1e-3) for a, b in zip(outs[0], outputs(base), strict=True))


@pytest.mark.usefixtures("method")
def test_compiled_models_apply_loras(bases: dict[str, Base], tmp_path: Path) -> None:
    """A block compiled before takes LoRAs on and off, and another LoRA of the rank without recompiling."""
    base, manager = bases["sd15"], Adapters(bases["sd15"])
    two = [manager.get(write(tmp_path / f"{k}.safetensors", random_lora(base, k))) for k in range(2)]
    attn, conv = (
        base.denoiser.down_blocks[0].attentions[0].proj_in,
        base.denoiser.down_blocks[0].resnets[0].conv1,
    )

    def block(x: Tensor) -> Tensor:
        out: Tensor = attn(conv(x))
        return out

    compiled, x, graphs = torch.compile(block, backend="eager"), torch.randn(1, 32, 8, 8), []
    with torch.no_grad():
        plain = compiled(x)
        for adapter in two:
            with manager.using([(adapter, 1.0)]):
                assert torch.allclose(compiled(x), block(x), atol=1e-5)
                assert not torch.allclose(compiled(x), plain, atol=1e-3)
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        assert graphs[0] == graphs[1]
        assert torch.equal(compiled(x), plain)


@pytest.mark.usefixtures("method")
def test_half_precision(tmp_path: Path) -> None:
    base = Base(build_pipeline("sd15", tmp_path / "half").to(torch.bfloat16), "half")
    manager = Adapters(base)
    style = manager.get(write(tmp_path / "x.safetensors", random_lora(base)))
    with manager.using([(style, 0.7)]):
        assert all(t.dtype is torch.bfloat16 and torch.isfinite(t).all() for t in outputs(base))


def test_files_that_change_are_read_again_and_old_ones_go(
    bases: dict[str, Base], tmp_path: Path, monkeypatch: Any
) -> None:  # fmt: skip
    base, manager = bases["sd15"], Adapters(bases["sd15"])
    path = write(tmp_path / "x.safetensors", random_lora(base, 0))
    first = manager.get(path)
    assert manager.get(path) is first
    write(path, random_lora(base, 1, rank=3))
    assert manager.get(path).sha256 != first.sha256 and len(manager.loaded) == 1
    monkeypatch.setattr(adapters, "KEEP_BYTES", 1)
    last = manager.get(write(tmp_path / "y.safetensors", random_lora(base, 2)))
    assert list(manager.loaded.values()) == [last]


# ---- in prompts -----------------------------------------------------------------------------------


def generate(studio: Studio, prompt: str, **recipe: Any) -> np.ndarray:
    (image,) = studio.paint(prompt, steps=2, seed=1, **recipe)
    return np.asarray(image, np.int16)


def test_tags_in_prompts(bases: dict[str, Base], tmp_path: Path) -> None:
    """Found in ./, ./loras and the models folder; weights add up; 0 is nothing at all."""
    base, studio = bases["sd15"], Studio(bases["sd15"])
    write(tmp_path / "here.safetensors", random_lora(base, 0))
    write(tmp_path / "loras" / "there.safetensors", random_lora(base, 1))
    write(adapters.folder() / "far v1.2.safetensors", random_lora(base, 2))
    plain = generate(studio, "a cat")
    for name in ("here", "there", "far v1.2"):
        assert np.abs(generate(studio, f"a cat <lora:{name}:0.8>") - plain).max() > 0
    assert np.array_equal(generate(studio, "a cat <lora:here:0>"), plain)
    twice = generate(studio, "a cat <lora:here:0.5> <lora:here:0.3>")
    assert np.abs(twice - generate(studio, "a cat <lora:here:0.8>")).max() <= 1
    assert np.array_equal(generate(studio, "a cat"), plain)


@pytest.mark.parametrize(
    ("prompt", "error", "words"),
    [("<lora:styel>", UnknownName, "Unknown LoRA 'styel'. Did you mean 'style'"),
     ("<lora:../style>", BadRecipe, "is not the name of a LoRA"),
     ("<lora:style:9>", BadRecipe, "is outside -8 to 8")],
)  # fmt: skip
def test_invalid_tags_are_refused(
    bases: dict[str, Base], tmp_path: Path, prompt: str, error: type[Exception], words: str
) -> None:  # fmt: skip
    write(tmp_path / "style.safetensors", random_lora(bases["sd15"], layers=("conv1",)))
    with pytest.raises(error, match=words):
        Studio(bases["sd15"]).paint(prompt, steps=1)


def test_lora_tag_in_the_negative_prompt_is_refused(bases: dict[str, Base]) -> None:
    with pytest.raises(BadRecipe, match="move <lora:...> to the prompt"):
        Studio(bases["sd15"]).paint("a cat", negative="<lora:style>", steps=1)


def test_adding_a_lora_file(bases: dict[str, Base], tmp_path: Path) -> None:
    path = write(tmp_path / "elsewhere" / "x.safetensors", random_lora(bases["sd15"]))
    assert adapters.is_lora(path) and not adapters.is_lora(tmp_path)
    link = adapters.add(path, "mine")
    assert adapters.find("mine") == link and link.read_bytes() == path.read_bytes()
    with pytest.raises(BadRecipe, match="cannot be typed in a prompt"):
        adapters.add(path, "a/b")
    result = CliRunner().invoke(app, ["models", "add", str(path), "--name", "yours"])
    assert "<lora:yours:0.8>" in result.stdout and adapters.find("yours").is_file()


def test_adding_never_replaces_another_lora(bases: dict[str, Base], tmp_path: Path, monkeypatch: Any) -> None:
    """The same file stays; another file of that name is not replaced; a link is."""
    there = write(adapters.folder() / "style.safetensors", random_lora(bases["sd15"]))
    before = there.read_bytes()
    assert adapters.add(there) == there and not there.is_symlink() and there.read_bytes() == before
    mine = write(tmp_path / "mine.safetensors", random_lora(bases["sd15"], 1))
    with pytest.raises(BadRecipe, match="is another LoRA. Give yours another name"):
        adapters.add(mine, "style")
    assert there.read_bytes() == before
    link = adapters.add(there, "favourite")
    assert adapters.add(mine, "favourite") == link and link.samefile(mine)
    monkeypatch.setattr(os, "replace", lambda *_: pytest.fail("the disk is full"))
    with pytest.raises(pytest.fail.Exception):
        adapters.add(there, "favourite")
    assert link.samefile(mine)  # the old link is there until the new one takes its place


def test_attached_pipelines_refuse_lora_tags(tmp_path: Path) -> None:
    with pytest.raises(BadRecipe, match=r"use pipe.load_lora_weights"):
        attach(build_pipeline("sd15", tmp_path / "own"))("a cat <lora:style>")
