"""Single-file checkpoints: recognise the architecture from the header, and open them offline.

Community fine-tunes are published as one .safetensors file in the original (LDM, SGM) layout, without
configurations. Tensor names and shapes in the header identify the family, diffusers converts the weights, and
the configurations come from `architectures`.
"""

from __future__ import annotations

import struct
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from minikin.errors import BadModelFile
from minikin.models import safetensors_header
from minikin.models.loading.architectures import LCM15, SD15, SD21, SD_TURBO, SDXL, Architecture, write_configs

MAX_HEADER = 100_000_000  # bytes; the limit of the format
_UNET = "model.diffusion_model."
_CONTEXT = "attn2.to_k.weight"
_ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


@dataclass(frozen=True)
class Recognised:
    """Properties of a checkpoint, read from its header.

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
    """Recognise a single-file checkpoint; raises BadModelFile for unsupported families."""
    shapes, metadata = read_header(path)
    contexts = {s[1] for k, s in shapes.items() if k.startswith(_UNET) and k.endswith(_CONTEXT)}
    if not contexts:
        hint = "It looks like a LoRA." if any("lora" in k.lower() for k in shapes) else ""
        if "minikin.category" in metadata:
            hint = f"It is a concept: `minikin concepts add {path}` puts it into your library."
        raise BadModelFile(
            f"{path.name} holds no U-Net of the Stable Diffusion 1, 2 or XL families (no "
            f"{_UNET}...{_CONTEXT} among its {len(shapes)} tensors). {hint}".strip()
        )
    name = (metadata.get("modelspec.title") or path.stem).lower()
    family = _family(max(contexts), shapes, path, name)
    first = shapes.get(_UNET + "input_blocks.0.0.weight", (0, 4))
    missing = [p for p in _parts(family) if not any(k.startswith(p) for k in shapes)]
    if missing:
        raise BadModelFile(
            f"{path.name} is incomplete: it has no tensors named {', '.join(p + '...' for p in missing)}. "
            "Minikin needs the full checkpoint with text encoder and VAE."
        )
    guess = prediction or _prediction(family, shapes, metadata, name)
    # trainers mark zero terminal SNR by an empty tensor of this name beside `v_pred`
    return Recognised(family, guess, first[1] == 9, "ztsnr" in shapes and guess == "v_prediction")


def open_file(path: Path, dtype: Any, prediction: str | None = None) -> Any:
    """Open a checkpoint as a stock diffusers pipeline, without network access."""
    import diffusers

    recognised = recognise(path, prediction)
    family = recognised.architecture
    # diffusers' converter does not support a guidance embedding, so it is added afterwards
    plain = family.unet | {"time_cond_proj_dim": None} | ({"in_channels": 9} if recognised.inpainting else {})
    try:
        with tempfile.TemporaryDirectory() as folder:
            schedule = family.scheduler | (_ZERO_SNR if recognised.zero_snr else {})
            configs = write_configs(
                replace(family, unet=plain, scheduler=schedule), Path(folder), recognised.prediction
            )
            pipe = getattr(diffusers, family.pipeline).from_single_file(
                str(path), config=str(configs), local_files_only=True, dtype=dtype
            )
        if family.unet.get("time_cond_proj_dim"):
            _add_guidance_embedding(pipe, path, family.unet["time_cond_proj_dim"])
    except Exception as e:
        raise BadModelFile(f"{path.name} looks like {family.name}, but could not be opened: {e}") from e
    return pipe


def _add_guidance_embedding(pipe: Any, path: Path, width: int) -> None:
    """Replace the U-Net of a full LCM by one with its guidance embedding."""
    from diffusers import UNet2DConditionModel
    from safetensors import safe_open

    with safe_open(path, "pt") as f:
        weight = f.get_tensor(_UNET + "time_embed.cond_proj.weight")
    config = dict(pipe.unet.config) | {"time_cond_proj_dim": width}
    unet = UNet2DConditionModel.from_config(config)
    state = pipe.unet.state_dict() | {"time_embedding.cond_proj.weight": weight}
    unet.load_state_dict(state)
    pipe.register_modules(unet=unet.to(pipe.unet.dtype).eval())


def _family(context: int, shapes: dict[str, Any], path: Path, name: str) -> Architecture:
    if context == 768:
        return LCM15 if _UNET + "time_embed.cond_proj.weight" in shapes else SD15
    if context == 1024:
        return SD_TURBO if "turbo" in name else SD21
    if context == 2048:
        return SDXL
    raise BadModelFile(
        f"{path.name} reads text {context} numbers wide; Stable Diffusion 1 reads 768, 2 reads 1024 and "
        "XL reads 2048. This family is not supported."
    )


def _parts(family: Architecture) -> tuple[str, ...]:
    if family.name == "sdxl":
        return ("first_stage_model.", "conditioner.embedders.0.", "conditioner.embedders.1.")
    return ("first_stage_model.", "cond_stage_model.")


def _prediction(family: Architecture, shapes: dict[str, Any], metadata: dict[str, str], name: str) -> str:
    stated = metadata.get("modelspec.prediction_type", "").lower()
    if stated in ("v", "v_prediction") or "v_pred" in shapes:
        return "v_prediction"
    if stated in ("epsilon", "eps"):
        return "epsilon"
    if family is SD21 and ("512" in name or "base" in name):
        return "epsilon"
    return str(family.scheduler["prediction_type"])
