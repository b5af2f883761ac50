"""Single-file checkpoints: recognise the kind by the content, and open them offline.

Community fine-tunes are published as one .safetensors file in the original (LDM, SGM) layout, without
configurations. Tensor names, shapes, a few values and the metadata identify the kind, never the file's name;
diffusers converts the weights, and the configurations come from `architectures`.
"""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from minikin.errors import BadModelFile
from minikin.models import safetensors_header
from minikin.models.loading.architectures import (
    LCM15,
    SD15,
    SD21,
    SD21_BASE,
    SDXL,
    Architecture,
    as_lcm,
    with_zero_snr,
    write_configs,
)
from minikin.models.loading.unet_layout import with_layout

MAX_HEADER = 100_000_000  # bytes; the limit of the format
_UNET = "model.diffusion_model."
_CONTEXT = "attn2.to_k.weight"
_GUIDANCE = _UNET + "time_embed.cond_proj.weight"
# ComfyUI looks at this tensor: v-prediction models of Stable Diffusion 2 have deviations above 0.09 in it
_V_PREDICTION_BIAS = "1.transformer_blocks.0.norm1.bias"
_V_PREDICTION_STD = 0.09
INPAINTING = 9  # input channels: latents, mask, and the masked image's latents
OTHER_INPUTS = {
    5: "It also reads a depth map (depth-to-image).",
    7: "It also reads a small image (an upscaler).",
    8: "It also reads an image to edit (InstructPix2Pix).",
}

# beside weights that are quantized: fp8 with scales and int8 of ComfyUI, and nf4 and int8 of bitsandbytes
_SCALES = ("scaled_fp8", ".scale_weight", ".weight_scale", ".comfy_quant", ".absmax", ".SCB")
_TRANSFORMER = "the transformer of PixArt or SANA alone: give the whole folder of diffusers"
_OTHER_FILES = {  # names of tensors -> what a file without a U-Net looks like
    "lora": "a LoRA", "double_blocks.": "Flux", "joint_blocks.": "Stable Diffusion 3",
    "control_model.": "a ControlNet", "controlnet_cond_embedding.": "a ControlNet",
    "emb_params": "an embedding", "string_to_param": "an embedding", "clip_g": "an embedding",
    "decoder.conv_in.": "a VAE", "ip_adapter": "an IP-Adapter", "motion_modules.": "AnimateDiff",
    "caption_projection.": _TRANSFORMER, "y_embedder.y_proj.": _TRANSFORMER,
    "model_ema.": "the averaged (EMA) weights alone",
    "down_blocks.": "the U-Net alone, as a diffusers folder has it: give the whole folder",
}  # fmt: skip

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Recognised:
    """Properties of a checkpoint, read from its header and a few of its values.

    prediction  prediction type: epsilon or v_prediction
    zero_snr    zero terminal SNR (Lin et al. 2023, arXiv:2305.08891), of v-prediction only
    """

    architecture: Architecture
    prediction: str
    inpainting: bool
    zero_snr: bool = False


def read_header(path: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Shapes of all tensors by name, and the metadata; reads the header only.

    Raises BadModelFile for other formats; pickles are never opened.
    """
    try:
        if not path.is_file():  # also refuses a pipe, which would block
            raise BadModelFile(f"There is no file {path}.")
        with open(path, "rb") as f:
            (n,) = struct.unpack("<Q", f.read(8))
            if not 2 <= n <= MAX_HEADER:
                raise ValueError(f"header of {n} bytes")
            header, metadata = safetensors_header.parse(f.read(n))
        return {k: tuple(v["shape"]) for k, v in header.items()}, metadata
    except (OSError, ValueError, struct.error) as e:
        raise BadModelFile(
            f"{path} is not a safetensors checkpoint ({e}). Minikin opens .safetensors files and "
            "diffusers folders. A .ckpt or .bin is a pickle, which can run code: turn it into .safetensors "
            f"without running it: minikin models convert {path}"
        ) from None


def recognise(path: Path, prediction: str | None = None) -> Recognised:
    """Recognise a single-file checkpoint; raises BadModelFile for kinds that are not supported."""
    shapes, metadata = read_header(path)
    contexts = {s[1] for k, s in shapes.items() if k.startswith(_UNET) and k.endswith(_CONTEXT) and len(s) == 2}
    if not contexts:
        kind = next((kind for sign, kind in _OTHER_FILES.items() if any(sign in k.lower() for k in shapes)), "")
        hint = f"It looks like {kind}." if kind else ""
        if "minikin.category" in metadata:
            hint = f"It is a concept: `minikin concepts add {path}` puts it into your library."
        raise BadModelFile(
            f"{path.name} holds no U-Net of the Stable Diffusion 1, 2 or XL families (no "
            f"{_UNET}...{_CONTEXT} among its {len(shapes)} tensors). {hint}".strip()
        )
    family = _family(max(contexts), shapes, path)
    channels = [*shapes.get(_UNET + "input_blocks.0.0.weight", (0, 4)), 0, 0][1]
    _refuse_other_kinds(path, family, channels, shapes)
    missing = [p for p in _parts(family) if not any(k.startswith(p) for k in shapes)]
    if missing:
        raise BadModelFile(
            f"{path.name} is incomplete: it has no tensors named {', '.join(p + '...' for p in missing)}. "
            "Minikin needs the full checkpoint with text encoder and VAE."
        )
    if len(guidance := shapes.get(_GUIDANCE, ())) == 2 and not family.unet.get("time_cond_proj_dim"):
        family = as_lcm(family, guidance[1])
    prediction = prediction or _prediction(path, family, channels, shapes, metadata)
    if family is SD21 and prediction == "epsilon":
        family = SD21_BASE
    # trainers mark zero terminal SNR by an empty tensor of this name beside `v_pred`
    zero_snr = "ztsnr" in shapes and prediction == "v_prediction"
    if family.name == "sdxl":
        family = with_layout(family, shapes)
    return Recognised(family, prediction, channels == INPAINTING, zero_snr)


def check(path: Path, recognised: Recognised) -> None:
    """Raise BadModelFile if a tensor that opening needs is missing or of another shape; reads the header."""
    import torch

    from minikin.models.loading.tensors import empty_part, incomplete, missing, to_diffusers

    a = _architecture(recognised)
    shapes, _ = read_header(path)
    try:
        parts = to_diffusers({k: torch.empty(s, device="meta") for k, s in shapes.items()}, a)
        wrong = {
            part: missing(empty_part(part, config), {k: tuple(t.shape) for k, t in state.items()})
            for (part, state), config in zip(parts.items(), (a.unet, a.vae, *a.texts), strict=True)
        }
    except BadModelFile as e:
        raise BadModelFile(f"{path.name} is incomplete: {e}. Get the full checkpoint again.") from None
    except Exception as e:  # of the libraries, for shapes that no model has
        raise BadModelFile(f"{path.name} is damaged: its tensors are no model's ({e}). Get it again.") from e
    if any(wrong.values()):
        raise BadModelFile(incomplete(path.name, wrong))


def open_file(path: Path, dtype: Any, prediction: str | None = None) -> Any:
    """Open a checkpoint as a stock diffusers pipeline, without network access. Raises BadModelFile."""
    import diffusers
    from safetensors.torch import load_file

    from minikin.models.loading.tensors import filled, to_diffusers

    recognised = recognise(path, prediction)
    check(path, recognised)
    a = _architecture(recognised)
    try:
        configs = (a.unet, a.vae, *a.texts)
        parts = to_diffusers(load_file(path), a)
        models = {
            part: filled(part, config, state, dtype)
            for (part, state), config in zip(parts.items(), configs, strict=True)
        }
        with tempfile.TemporaryDirectory() as folder:
            write_configs(a, Path(folder), recognised.prediction)
            return getattr(diffusers, a.pipeline).from_pretrained(
                folder, local_files_only=True, use_safetensors=True, **models
            )
    except Exception as e:
        raise BadModelFile(f"{path.name} looks like {a.name}, but could not be opened: {e}") from e


def _architecture(recognised: Recognised) -> Architecture:
    """The architecture with what one checkpoint has beside it: inpainting inputs, zero terminal SNR."""
    a = recognised.architecture
    if recognised.inpainting:
        a = replace(a, unet=a.unet | {"in_channels": 9})
    return with_zero_snr(a) if recognised.zero_snr else a


def _family(context: int, shapes: Shapes, path: Path, *_: Any) -> Architecture:
    if context == 768:
        return LCM15 if _GUIDANCE in shapes else SD15
    if context == 1024:
        return SD21
    if context == 2048:
        return SDXL
    raise BadModelFile(
        f"{path.name} reads text {context} numbers wide; Stable Diffusion 1 reads 768, 2 reads 1024 and "
        "XL reads 2048. This family is not supported."
    )


def _refuse_other_kinds(path: Path, family: Architecture, channels: int, shapes: Shapes) -> None:
    """Raise BadModelFile for models of these families that are sampled otherwise or need other inputs."""
    why = ""
    if channels not in (4, INPAINTING):
        why = f"its U-Net has {channels} input channels. {OTHER_INPUTS.get(channels, '')}".strip()
    elif any(k.startswith(("edm_mean", "edm_std")) for k in shapes):
        why = "it samples in EDM's noise levels with latents of its own scale, as Playground 2.5 (edm_mean)."
    elif any(k.startswith("edm_vpred") for k in shapes):
        why = "it samples in EDM's noise levels up to sigma 120, as CosXL (edm_vpred)."
    elif family.name != "sdxl" and any(k.startswith(_UNET + "label_emb.") for k in shapes):
        why = "its U-Net also reads an image embedding or a noise level (unCLIP, an upscaler)."
    if any(k.endswith(_SCALES) for k in shapes):
        raise BadModelFile(
            f"{path.name} holds quantized weights (fp8 with scales, int8 or nf4), which are not read. Get the "
            "checkpoint in 16 bits, or in fp8 without scales."
        )
    if why:
        raise BadModelFile(
            f"{path.name} is of another kind: {why} Minikin paints with ordinary and inpainting models of "
            "4 or 9 input channels and the noise schedule of Stable Diffusion."
        )


def _parts(family: Architecture) -> tuple[str, ...]:
    if family.name == "sdxl":
        return ("first_stage_model.", "conditioner.embedders.0.", "conditioner.embedders.1.")
    return ("first_stage_model.", "cond_stage_model.")


def _prediction(
    path: Path, family: Architecture, channels: int, shapes: Shapes, metadata: Mapping[str, str]
) -> str:
    """epsilon or v_prediction: by the trainer's marker, the metadata, or for SD 2 by the weights."""
    stated = metadata.get("modelspec.prediction_type", metadata.get("modelspec.predict_key", "")).lower()
    if stated in ("v", "v_prediction") or "v_pred" in shapes:
        return "v_prediction"
    if stated in ("epsilon", "eps"):
        return "epsilon"
    if family.name != "sd2" or channels == INPAINTING:  # its inpainting model predicts epsilon
        return "epsilon"
    return "v_prediction" if _bias_std(path, shapes) > _V_PREDICTION_STD else "epsilon"


def _bias_std(path: Path, shapes: Shapes) -> float:
    """Deviation of the bias before the last self-attention of the U-Net; 0 where there is none."""
    from minikin.models.loading.tensors import read_tensor

    prefix = _UNET + "output_blocks."
    numbers = [
        int(k[len(prefix) :].split(".")[0])
        for k in shapes
        if k.startswith(prefix) and k.endswith("." + _V_PREDICTION_BIAS)
    ]
    if not numbers:
        return 0.0
    bias = read_tensor(path, f"{prefix}{max(numbers)}.{_V_PREDICTION_BIAS}")
    return 0.0 if bias is None else float(bias.std(unbiased=False))
