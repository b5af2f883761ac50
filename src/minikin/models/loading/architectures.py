"""Configurations of the supported model families, so that opening a checkpoint needs no download.

Single-file checkpoints contain weights but no configurations; `write_configs` writes a diffusers folder
without weights for them. `shrunk` returns a miniature of the same structure for tests. The values are those
of the published configuration files.
"""

from __future__ import annotations

import gzip
import json
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

# Only what the published files state: another class takes its own defaults for the rest.
_SCHEDULE = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False,
    "num_train_timesteps": 1000, "set_alpha_to_one": False, "steps_offset": 1, "trained_betas": None,
}  # fmt: skip
_PNDM = _SCHEDULE | {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "prediction_type": "epsilon"}
_DDIM = _SCHEDULE | {"_class_name": "DDIMScheduler", "prediction_type": "epsilon"}
_EULER = _SCHEDULE | {
    "_class_name": "EulerDiscreteScheduler", "prediction_type": "epsilon", "interpolation_type": "linear",
    "use_karras_sigmas": False, "timestep_spacing": "leading",
}  # fmt: skip
_LCM = _SCHEDULE | {
    "_class_name": "LCMScheduler", "prediction_type": "epsilon", "original_inference_steps": 50,
    "set_alpha_to_one": True, "rescale_betas_zero_snr": False, "timestep_spacing": "leading",
}  # fmt: skip
_VAE = {
    "in_channels": 3, "out_channels": 3, "latent_channels": 4, "layers_per_block": 2,
    "block_out_channels": [128, 256, 512, 512], "norm_num_groups": 32, "act_fn": "silu",
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
    "sample_size": 512, "scaling_factor": 0.18215,
}  # fmt: skip
_UNET = {
    "in_channels": 4, "out_channels": 4, "sample_size": 64, "layers_per_block": 2,
    "block_out_channels": [320, 640, 1280, 1280], "norm_num_groups": 32,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "cross_attention_dim": 768, "attention_head_dim": 8,
}  # fmt: skip
_TEXT = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "hidden_act": "quick_gelu", "projection_dim": 768, "vocab_size": 49408,
    "max_position_embeddings": 77, "bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407,
}  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """A model family: the configuration of each component of its diffusers folder."""

    name: str
    pipeline: str
    unet: dict[str, Any]
    vae: dict[str, Any]
    texts: tuple[dict[str, Any], ...]  # one per text encoder; the second is CLIP with projection
    scheduler: dict[str, Any]
    extra: dict[str, Any] = field(default_factory=dict)  # scalars of model_index.json
    pads: tuple[str, ...] = ("<|endoftext|>",)


SD15 = Architecture(
    "sd1", "StableDiffusionPipeline", _UNET, _VAE, (_TEXT,), _PNDM,
)  # fmt: skip
SD21 = Architecture(
    "sd2", "StableDiffusionPipeline",
    _UNET | {"sample_size": 96, "cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20],
             "use_linear_projection": True},
    _VAE | {"sample_size": 768},
    (_TEXT | {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23,
              "num_attention_heads": 16, "hidden_act": "gelu", "projection_dim": 512,
              "pad_token_id": 1},),
    _DDIM | {"prediction_type": "v_prediction"},
    pads=("!",),
)  # fmt: skip
SD21_BASE = replace(SD21, unet=SD21.unet | {"sample_size": 64}, scheduler=_PNDM)  # 512 px, epsilon
SD_TURBO = replace(SD21_BASE, scheduler=_EULER | {"timestep_spacing": "trailing"})
SDXL = Architecture(
    "sdxl", "StableDiffusionXLPipeline",
    _UNET | {
        "sample_size": 128, "block_out_channels": [320, 640, 1280], "cross_attention_dim": 2048,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "attention_head_dim": [5, 10, 20], "transformer_layers_per_block": [1, 2, 10],
        "use_linear_projection": True, "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
    },
    _VAE | {"sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True},
    (_TEXT, _TEXT | {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32,
                     "num_attention_heads": 20, "hidden_act": "gelu", "projection_dim": 1280,
                     "pad_token_id": 1}),
    _EULER,
    extra={"force_zeros_for_empty_prompt": True},
    pads=("<|endoftext|>", "!"),
)  # fmt: skip
LCM15 = Architecture(
    "sd1", "LatentConsistencyModelPipeline", _UNET | {"sample_size": 96, "time_cond_proj_dim": 256},
    _VAE | {"sample_size": 768}, (_TEXT,), _LCM,
)  # fmt: skip

ARCHITECTURES = {"sd15": SD15, "sd21": SD21, "sd-turbo": SD_TURBO, "sdxl": SDXL, "lcm-sd15": LCM15}


def shrunk(a: Architecture) -> Architecture:
    """A miniature of the same structure: the same blocks with few channels and one layer each."""
    levels = len(a.unet["block_out_channels"])
    channels = [32, 64, 64, 64][:levels] if levels == 4 else [32, 64, 64]
    heads = a.unet["attention_head_dim"]
    dims = [32, 64]  # per text encoder; diffusers distinguishes them by width
    texts = tuple(
        t | {"hidden_size": d, "intermediate_size": 64, "num_hidden_layers": 2,
             "num_attention_heads": 2, "projection_dim": d}
        for t, d in zip(a.texts, dims, strict=False)
    )  # fmt: skip
    unet = a.unet | {
        "block_out_channels": channels, "layers_per_block": 1, "sample_size": 8, "norm_num_groups": 8,
        "cross_attention_dim": sum(t["hidden_size"] for t in texts),
        "attention_head_dim": 4 if isinstance(heads, int) else [2, 4, 4, 4][:levels],
    }  # fmt: skip
    if a.name == "sdxl":
        unet |= {
            "addition_time_embed_dim": 8, "transformer_layers_per_block": [1, 2, 2],
            "projection_class_embeddings_input_dim": 6 * 8 + texts[-1]["projection_dim"],
        }  # fmt: skip
    if a.unet.get("time_cond_proj_dim"):
        unet |= {"time_cond_proj_dim": 16}
    vae = a.vae | {"block_out_channels": [8, 8, 16, 16], "layers_per_block": 1,
                   "norm_num_groups": 4, "sample_size": 64}  # fmt: skip
    return replace(a, unet=unet, vae=vae, texts=texts)


def as_lcm(a: Architecture, width: int) -> Architecture:
    """The full latent consistency model of an architecture.

    width  of its guidance embedding, which the U-Net takes as an input
    """
    return replace(a, unet=a.unet | {"time_cond_proj_dim": width}, scheduler=_LCM)


def with_zero_snr(a: Architecture) -> Architecture:
    """The architecture with zero terminal SNR (Lin et al. 2023, arXiv:2305.08891).

    PNDM does not know it; DDIM, with the same noise schedule, does.
    """
    scheduler = _DDIM if a.scheduler["_class_name"] == "PNDMScheduler" else a.scheduler
    zero = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return replace(a, scheduler=scheduler | zero)


def write_configs(a: Architecture, folder: Path, prediction: str | None = None) -> Path:
    """Write a diffusers folder without weights: the configurations and tokenizers of an architecture."""
    scheduler = a.scheduler | ({"prediction_type": prediction} if prediction else {})
    kinds = {"unet": ("diffusers", "UNet2DConditionModel"), "vae": ("diffusers", "AutoencoderKL"),
             "scheduler": ("diffusers", scheduler["_class_name"])}  # fmt: skip
    parts: dict[str, tuple[str, dict[str, Any]]] = {
        "unet": ("config.json", a.unet), "vae": ("config.json", a.vae),
        "scheduler": ("scheduler_config.json", scheduler),
    }  # fmt: skip
    for k, text in enumerate(a.texts):
        tail = f"_{k + 1}" if k else ""
        model = "CLIPTextModelWithProjection" if k else "CLIPTextModel"
        kinds[f"text_encoder{tail}"] = ("transformers", model)
        kinds[f"tokenizer{tail}"] = ("transformers", "CLIPTokenizer")
        parts[f"text_encoder{tail}"] = ("config.json", text | {"architectures": [model],
                                                               "model_type": "clip_text_model"})  # fmt: skip
        _write_tokenizer(folder / f"tokenizer{tail}", a.pads[k])
    for part, (name, config) in parts.items():
        library, kind = kinds[part]
        (folder / part).mkdir(parents=True, exist_ok=True)
        content = deepcopy(config) if library == "transformers" else {"_class_name": kind} | config
        (folder / part / name).write_text(json.dumps(content, indent=1))
    index: dict[str, Any] = {"_class_name": a.pipeline} | a.extra | {k: list(v) for k, v in kinds.items()}
    if a.name != "sdxl":
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None],
                  "requires_safety_checker": False}  # fmt: skip
    (folder / "model_index.json").write_text(json.dumps(index, indent=1))
    return folder


def clip_vocabulary() -> tuple[dict[str, int], list[str]]:
    """OpenAI CLIP's byte-pair vocabulary and merges (MIT; clip/LICENSE)."""
    packed = resources.files("minikin.models").joinpath("clip", "merges.txt.gz").read_bytes()
    merges = gzip.decompress(packed).decode().split("\n")[1:]
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    characters = [chr(b) for b in visible]
    characters += [chr(256 + n) for n in range(256 - len(visible))]
    words = characters + [c + "</w>" for c in characters] + ["".join(m.split()) for m in merges]
    words += ["<|startoftext|>", "<|endoftext|>"]
    return {w: i for i, w in enumerate(words)}, merges


@cache
def _vocabulary_files() -> dict[str, str]:
    vocabulary, merges = clip_vocabulary()
    return {
        "vocab.json": json.dumps(vocabulary, ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *merges]) + "\n",
    }


def _write_tokenizer(folder: Path, pad: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in _vocabulary_files().items():
        (folder / name).write_text(text)
    settings = {
        "tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": pad,
        "bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>",
        "do_lower_case": True, "add_prefix_space": False, "errors": "replace",
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
