"""The kind of a checkpoint is told by its content, not by its name: prediction type, size, inputs, layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor

from minikin import Studio
from minikin.errors import BadModelFile
from minikin.models.loading import registry, single_file
from minikin.models.loading.architectures import (
    ARCHITECTURES,
    SD21_BASE,
    SDXL,
    shrunk,
    write_configs,
)
from minikin.models.loading.registry import open_base
from minikin.models.loading.tensors import empty_part, missing
from minikin.models.loading.unet_layout import with_layout
from tests.conftest import FAMILIES, build_pipeline
from tests.helpers import ldm
from tests.helpers.headers import BIAS, KEY, header_only, shapes
from tests.helpers.published_schedulers import published

State = dict[str, Tensor]
GUIDANCE = KEY + "time_embed.cond_proj.weight"
FIRST = KEY + "input_blocks.0.0.weight"
V_BIAS = torch.linspace(-0.5, 0.5, 320)  # deviation 0.29
EPS_BIAS = 0.1 * V_BIAS  # 0.03
DTYPES = (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
PROJECTION = "conditioner.embedders.1.model.text_projection"


def same(recognised: Any, *, name: str, prediction: str, size: int, inpainting: bool = False) -> None:
    assert (recognised.architecture.name, recognised.prediction, recognised.inpainting) == (
        name,
        prediction,
        inpainting,
    )
    assert recognised.architecture.unet["sample_size"] == size


@pytest.mark.parametrize(
    ("width", "more", "values", "metadata", "name", "prediction", "size"),
    [
        (768, {}, {}, {}, "sd1", "epsilon", 64),
        (768, {GUIDANCE: [320, 256]}, {}, {}, "sd1", "epsilon", 96),
        (1024, {}, {BIAS: V_BIAS}, {}, "sd2", "v_prediction", 96),
        (1024, {}, {BIAS: EPS_BIAS}, {}, "sd2", "epsilon", 64),
        (1024, {}, {BIAS: EPS_BIAS}, {"modelspec.prediction_type": "v"}, "sd2", "v_prediction", 96),
        (1024, {}, {BIAS: V_BIAS}, {"modelspec.prediction_type": "epsilon"}, "sd2", "epsilon", 64),
        *((1024, {}, {BIAS: V_BIAS.to(dtype)}, {}, "sd2", "v_prediction", 96) for dtype in DTYPES),
        *((1024, {}, {BIAS: EPS_BIAS.to(dtype)}, {}, "sd2", "epsilon", 64) for dtype in DTYPES),
        (2048, {}, {}, {"modelspec.predict_key": "v"}, "sdxl", "v_prediction", 128),
        (2048, {}, {}, {}, "sdxl", "epsilon", 128),
        (2048, {"v_pred": [0]}, {}, {}, "sdxl", "v_prediction", 128),
    ],
)  # fmt: skip
def test_kinds(
    width: int, more: dict[str, list[int]], values: State, metadata: dict[str, str], name: str,
    prediction: str, size: int, tmp_path: Path,
) -> None:  # fmt: skip
    """Stable Diffusion 2 by the deviation of one bias, as ComfyUI; what predicts epsilon paints 512 px."""
    for stem in ("x", "v2-1_512-base", "my_database_style", "sd_turbo", "v2_1512041", "768-v"):
        path = header_only(tmp_path / f"{stem}.safetensors", shapes(width, **more), metadata, values)
        same(single_file.recognise(path), name=name, prediction=prediction, size=size)
        assert single_file.recognise(path, "epsilon").prediction == "epsilon"


@pytest.mark.parametrize("width", [768, 1024, 2048])
def test_inpainting_models_predict_epsilon(width: int, tmp_path: Path) -> None:
    """Nine channels; also of Stable Diffusion 2, whatever the bias."""
    path = header_only(tmp_path / "a.safetensors", shapes(width, **{FIRST: [320, 9, 3, 3]}), {}, {BIAS: V_BIAS})
    size = {768: 64, 1024: 64, 2048: 128}[width]
    name = {768: "sd1", 1024: "sd2", 2048: "sdxl"}[width]
    same(single_file.recognise(path), name=name, prediction="epsilon", size=size, inpainting=True)


@pytest.mark.parametrize(
    ("width", "more", "words"),
    [
        (768, {FIRST: [320, 8, 3, 3]}, "8 input channels. It also reads an image to edit"),
        (1024, {FIRST: [320, 5, 3, 3]}, "It also reads a depth map"),
        (1024, {FIRST: [256, 7, 3, 3]}, "an upscaler"),
        (2048, {FIRST: [320, 8, 3, 3], "edm_vpred.sigma_max": [1]}, "8 input channels"),
        (2048, {"edm_vpred.sigma_max": [1]}, "as CosXL"),
        (2048, {"edm_mean": [1, 4, 1, 1], "edm_std": [1, 4, 1, 1]}, "as Playground 2.5"),
        (1024, {KEY + "label_emb.0.0.weight": [1280, 1536]}, "unCLIP"),
        (2048, {"scaled_fp8": [0]}, "Get the checkpoint in 16 bits"),
        (2048, {KEY + "out.2.weight.absmax": [4]}, "quantized"),
        (768, {KEY + "out.2.scale_weight": [1]}, "fp8"),
    ],
)  # fmt: skip
def test_kinds_that_are_sampled_otherwise_are_refused_when_added(
    width: int, more: dict[str, list[int]], words: str, tmp_path: Path
) -> None:
    path = header_only(tmp_path / "x.safetensors", shapes(width, **more))
    with pytest.raises(BadModelFile, match="is of another kind|holds quantized weights") as e:
        registry.add(path)
    assert words in str(e.value) and not registry.entries()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (KEY + "double_blocks.0.img_attn.qkv.weight", "Flux"), (KEY + "joint_blocks.0.x", "Stable Diffusion 3"),
        ("decoder.conv_in.weight", "a VAE"), ("control_model.input_blocks.0.0.weight", "a ControlNet"),
        ("emb_params", "an embedding"), ("clip_g", "an embedding"), ("lora_unet_x.lora_up.weight", "a LoRA"),
        ("model_ema.diffusion_modeltime_embed0weight", r"the averaged \(EMA\) weights alone"),
        ("down_blocks.0.resnets.0.conv1.weight", "the U-Net alone"),
        ("caption_projection.linear_1.weight", "the transformer of PixArt or SANA alone: give"),
    ],
)  # fmt: skip
def test_files_of_other_kinds_are_named_when_added(name: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(BadModelFile, match=f"holds no U-Net of the Stable Diffusion.* It looks like {words}"):
        registry.add(header_only(tmp_path / "x.safetensors", {name: [4, 4]}))


# ---- the same sampler from a file and from a folder -----------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_single_file_has_the_default_sampler_of_the_published_folder(family: str, tmp_path: Path) -> None:
    ours = _scheduler(ARCHITECTURES[family], tmp_path)
    assert type(ours) is type(published(family))
    _same_steps(ours, published(family))


def test_a_base_of_512_px_samples_as_published(tmp_path: Path) -> None:
    _same_steps(_scheduler(SD21_BASE, tmp_path), published("sd21-base"))


def _scheduler(architecture: Any, folder: Path) -> Any:
    import diffusers

    write_configs(architecture, folder, architecture.scheduler["prediction_type"])
    config = diffusers.DDIMScheduler.load_config(folder / "scheduler")
    return getattr(diffusers, config["_class_name"]).from_pretrained(folder / "scheduler")


def _same_steps(ours: Any, stock: Any) -> None:
    """Also for every other class that is made of it."""
    import diffusers

    for kind in (type(stock), diffusers.EulerDiscreteScheduler, diffusers.DPMSolverMultistepScheduler):
        a, b = kind.from_config(ours.config), kind.from_config(stock.config)
        a.set_timesteps(20)
        b.set_timesteps(20)
        assert torch.equal(torch.as_tensor(a.timesteps), torch.as_tensor(b.timesteps))
        assert float(a.init_noise_sigma) == float(b.init_noise_sigma)
        assert a.config.prediction_type == b.config.prediction_type
        assert a.config.get("set_alpha_to_one") == b.config.get("set_alpha_to_one")


def test_zero_terminal_snr_of_stable_diffusion_1(pipelines: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """PNDM does not know it; such a checkpoint samples with DDIM."""
    marks = {k: torch.ones(1) for k in ("v_pred", "ztsnr")}
    base = opened("sd15", pipelines, tmp_path, monkeypatch, lambda s: s | marks)
    assert type(base.pipe.scheduler).__name__ == "DDIMScheduler"
    assert float(base.pipe.scheduler.alphas_cumprod[-1]) < 1e-6


# ---- names of other tools, and tensors that are missing --------------------------------------------


def opened(
    family: str, pipelines: dict[str, Any], tmp_path: Path, monkeypatch: Any, change: Callable[[State], State]
) -> Any:
    """A miniature of the family as a single file with its tensors changed, opened."""
    state = change(ldm.checkpoint(pipelines[family], family))
    path = tmp_path / "x.safetensors"
    save_file({k: v.clone().contiguous() for k, v in state.items()}, path)
    monkeypatch.setattr(single_file, "_family", lambda *_: shrunk(ARCHITECTURES[family]))
    registry.add(path)
    return open_base(str(path), device="cpu", dtype="float32")


def old_clip(s: State) -> State:
    """Stable Diffusion 1's names of 2022."""
    return {k.replace(".transformer.text_model.", ".transformer."): v for k, v in s.items()}


def linear_projection(s: State) -> State:
    """As diffusers' own script writes SDXL."""
    return {(f"{k}.weight" if k == PROJECTION else k): (v.T if k == PROJECTION else v) for k, v in s.items()}


def linear_attention(s: State) -> State:
    """The VAE's attention under the names of diffusers."""
    for ours, theirs in (("q", "to_q"), ("k", "to_k"), ("v", "value"), ("proj_out", "to_out.0")):
        s = {k.replace(f".attn_1.{ours}.", f".attn_1.{theirs}."): v for k, v in s.items()}
    return s


@pytest.mark.parametrize(
    ("family", "change"),
    [("sd15", old_clip), ("sdxl", old_clip), ("sdxl", linear_projection), ("sd15", linear_attention)],
)
def test_names_of_other_tools_are_read(
    family: str, change: Any, pipelines: dict[str, Any], tmp_path: Path, monkeypatch: Any
) -> None:
    base = opened(family, pipelines, tmp_path, monkeypatch, change)
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        if expected := getattr(pipelines[family], part, None):
            weights = getattr(base.pipe, part).state_dict()
            assert all(torch.equal(weights[k], v) for k, v in expected.state_dict().items())


@pytest.mark.parametrize(
    ("family", "left_out", "message"),
    [
        ("sdxl", PROJECTION, "text_encoder_2: text_projection.weight"),
        ("sd15", "final_layer_norm", "text_encoder: final_layer_norm.weight, final_layer_norm.bias"),
        ("sd15", "diffusion_model.out.2.bias", "1 tensor is missing or of another shape (unet: conv_out.bias)"),
        ("sdxl", "label_emb.0.0.weight", "no tensor named model.diffusion_model.label_emb.0.0.weight"),
        ("sd21", "decoder.conv_in.bias", "vae: decoder.conv_in.bias"),
        ("sd21", "positional_embedding", "text_encoder: embeddings.position_embedding.weight"),
    ],
)  # fmt: skip
def test_missing_tensors_are_named_when_a_file_is_added(
    family: str, left_out: str, message: str, pipelines: dict[str, Any], tmp_path: Path, monkeypatch: Any
) -> None:
    with pytest.raises(BadModelFile, match="x.safetensors is incomplete") as e:
        opened(family, pipelines, tmp_path, monkeypatch,
               lambda s: {k: v for k, v in s.items() if left_out not in k})  # fmt: skip
    assert message in str(e.value) and not registry.entries()
    with pytest.raises(BadModelFile, match="is incomplete"):
        open_base(str(tmp_path / "x.safetensors"), device="cpu")


def test_a_tensor_of_another_shape_and_a_damaged_header(
    pipelines: dict[str, Any], tmp_path: Path, monkeypatch: Any
) -> None:
    bias = KEY + "out.2.bias"
    with pytest.raises(BadModelFile, match=r"unet: conv_out.bias \(2 in place of 4\)"):
        opened("sd15", pipelines, tmp_path, monkeypatch, lambda s: s | {bias: s[bias][:2]})
    for shape in ([-1, 768], [2**62, 2**62], [3]):
        more = {
            "first_stage_model.encoder.conv_in.weight": shape,
            KEY + "input_blocks.1.1.proj_in.weight": shape,
        }
        with pytest.raises(BadModelFile):
            registry.add(header_only(tmp_path / "h.safetensors", shapes(768, **more)))


@pytest.mark.parametrize("part", ["unet", "text_encoder", "tokenizer", "scheduler"])
def test_folders_that_cannot_be_opened_are_refused_when_added(
    part: str, pipelines: dict[str, Any], tmp_path: Path
) -> None:
    """transformers would use random values for a tensor that is missing."""
    from safetensors.torch import load_file

    folder = tmp_path / "folder"
    pipelines["sd15"].save_pretrained(folder)
    weights = next((folder / part).glob("*.safetensors"), None)
    if weights:
        state = load_file(weights)
        gone = next(k for k in state if k.endswith("norm.bias") or k.endswith("norm_out.bias"))
        save_file({k: v for k, v in state.items() if k != gone}, weights)
    else:
        for file in (folder / part).iterdir():
            file.unlink()
    for use in (registry.add, lambda p: open_base(str(p), device="cpu")):
        with pytest.raises(BadModelFile, match=rf"{part}"):
            use(folder)


def test_a_folder_of_half_precision_files_opens(pipelines: dict[str, Any], tmp_path: Path) -> None:
    """As a download of the fp16 files of a repository; and shards are read through their index."""
    pipelines["sd15"].save_pretrained(tmp_path / "half", variant="fp16")
    pipelines["sd15"].save_pretrained(tmp_path / "shards", max_shard_size="200KB")
    reference = registry.Base(pipelines["sd15"])
    for name in ("half", "shards"):
        registry.add(tmp_path / name)
        base = open_base(str(tmp_path / name), device="cpu", dtype="float32")
        assert (base.fingerprint, base.text_hash) == (reference.fingerprint, reference.text_hash)


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        ("unet/config.json", {"in_channels": 8}, "It also reads an image to edit"),
        ("vae/config.json", {"latents_mean": [0.0] * 4}, "as Playground 2.5"),
        (
            "model_index.json",
            {"scheduler": ["diffusers", "EDMEulerScheduler"]},
            "samples with EDMEulerScheduler",
        ),
        ("model_index.json", {"text_encoder": [None, None]}, "has no text_encoder"),
    ],
)
def test_folders_of_other_kinds_are_refused_when_added(
    part: str, change: dict[str, Any], words: str, pipelines: dict[str, Any], tmp_path: Path
) -> None:
    import json

    pipelines["sd15"].save_pretrained(tmp_path / "folder")
    file = tmp_path / "folder" / part
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(BadModelFile, match=words):
        registry.add(tmp_path / "folder")


# ---- layouts --------------------------------------------------------------------------------------

# transformer layers of SDXL's distilled U-Nets, as published (down, up, layers_per_block, middle)
LAYOUTS: dict[str, dict[str, Any]] = {
    # segmind/SSD-1B, unet/config.json
    "ssd-1b": {"transformer_layers_per_block": [1, [2, 2], [4, 4]], "mid_block_type": "UNetMidBlock2D",
               "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1]},
    # segmind/Segmind-Vega, unet/config.json
    "vega": {"transformer_layers_per_block": [1, [1, 1], [2, 2]], "mid_block_type": "UNetMidBlock2D",
             "reverse_transformer_layers_per_block": [[2, 2, 2], [1, 1, 1], 1]},
    "sdxl": {},
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_published_layouts_are_read_from_the_names(name: str) -> None:
    """SSD-1B and Segmind Vega at full size, by their tensors' names and shapes alone."""
    theirs = empty_part("unet", SDXL.unet | LAYOUTS[name])
    original = {
        KEY + ldm.unet_name(k, 2, [True, True, False]): tuple(v.shape) for k, v in theirs.state_dict().items()
    }
    ours = with_layout(SDXL, original)
    assert (ours is SDXL) is (name == "sdxl")
    model = empty_part("unet", ours.unet)
    shapes_of_theirs = {k: tuple(v.shape) for k, v in theirs.state_dict().items()}
    assert set(model.state_dict()) == set(shapes_of_theirs) and not missing(model, shapes_of_theirs)


def test_a_distilled_sdxl_paints_from_its_file_as_from_its_folder(tmp_path: Path, monkeypatch: Any) -> None:
    """A miniature of SSD-1B's layout."""
    pipe = build_pipeline("sdxl", tmp_path / "mini")
    layout = {
        "layers_per_block": 2, "mid_block_type": "UNetMidBlock2D",
        "transformer_layers_per_block": [1, [2, 2], [1, 1]],
        "reverse_transformer_layers_per_block": [[1, 1, 2], [2, 1, 1], 1],
    }  # fmt: skip
    torch.manual_seed(0)
    pipe.register_modules(unet=UNet2DConditionModel.from_config(pipe.unet.config, **layout).eval())
    pipe.save_pretrained(tmp_path / "folder")
    base = opened("sdxl", {"sdxl": pipe}, tmp_path, monkeypatch, lambda s: s)
    assert base.denoiser.config.mid_block_type == "UNetMidBlock2D"
    registry.add(tmp_path / "folder", "small")
    images = [
        np.asarray(Studio(b).paint("a cat", steps=2, preset="quality")[0])
        for b in (base, open_base("small", device="cpu", dtype="float32"))
    ]
    assert np.array_equal(*images)


def test_a_full_lcm_of_sdxl_keeps_its_guidance_input(tmp_path: Path, monkeypatch: Any) -> None:
    pipe = build_pipeline("sdxl", tmp_path / "mini")
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config(pipe.unet.config, time_cond_proj_dim=16).eval()
    pipe.register_modules(unet=unet)
    base = opened("sdxl", {"sdxl": pipe}, tmp_path, monkeypatch, lambda s: s)
    assert base.has_guidance_embedding and type(base.pipe.scheduler).__name__ == "LCMScheduler"
    weight = base.denoiser.time_embedding.cond_proj.weight
    assert torch.equal(weight, unet.time_embedding.cond_proj.weight)
    weak, strong = (np.asarray(Studio(base).paint("a cat", guidance=g)[0]) for g in (1.5, 8.0))
    assert not np.array_equal(weak, strong)


def test_a_miniature_of_stable_diffusion_2_by_its_bias(
    pipelines: dict[str, Any], tmp_path: Path, monkeypatch: Any
) -> None:
    """The bias before the last self-attention, wherever a smaller U-Net has it."""
    state = ldm.checkpoint(pipelines["sd21"], "sd21")
    name = [k for k in state if k.endswith("1.transformer_blocks.0.norm1.bias") and "output_blocks" in k][-1]
    monkeypatch.setattr(single_file, "_family", lambda *_: replace(shrunk(ARCHITECTURES["sd21"])))
    for scale, prediction in ((0.5, "v_prediction"), (0.01, "epsilon")):
        state[name] = scale * torch.linspace(-1, 1, len(state[name]))
        save_file(state, tmp_path / "x.safetensors")
        assert open_base(str(tmp_path / "x.safetensors"), device="cpu").prediction_type == prediction
