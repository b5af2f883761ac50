"""Export of a student as files that stock diffusers loads: a LoRA, or the folder of a whole model.

The LoRA is pytorch_lora_weights.safetensors with PEFT keys; alpha is folded in, so that every loader
applies the same weight. A full student becomes model/, a pipeline folder with the other parts of its
base, which `--base` and `models add` accept. The metadata (in a folder: in model_index.json) record
recipe and sampler spec.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minikin.distillation.student import Network
from minikin.files import atomic_folder, atomic_write
from minikin.models.base import Base
from minikin.models.precision import name_float32

LORA_NAME = "pytorch_lora_weights.safetensors"
MODEL_NAME = "model"


def metadata(facts: Mapping[str, Any]) -> dict[str, str]:
    """Facts as a safetensors header: keys are `minikin.NAME`, values text or JSON."""
    rows = {f"minikin.{k}": v if isinstance(v, str) else json.dumps(v) for k, v in facts.items()}
    return {"format": "pt", **rows}


def write(network: Network, base: Base, folder: Path, facts: Mapping[str, Any], *, half: bool = True) -> Path:
    """Write the student of a base; returns the LoRA's file or the model's folder. Raises StorageError."""
    if hasattr(network.unet, "peft_config"):
        return _write_lora(network, folder / LORA_NAME, facts, half)
    return _write_model(network, base, folder / MODEL_NAME, facts, half)


def lora_tensors(network: Network) -> dict[str, Tensor]:
    """The LoRA's factors by PEFT key, float32, with alpha folded into the second one."""
    from peft.utils import get_peft_model_state_dict

    config = network.unet.peft_config["default"]
    scale = config.lora_alpha / config.r
    factors = get_peft_model_state_dict(network.unet, adapter_name="default")
    return {
        f"unet.{k}": (v * scale if ".lora_B." in k else v).detach().float().cpu().contiguous()
        for k, v in factors.items()
    }


def _write_lora(network: Network, path: Path, facts: Mapping[str, Any], half: bool) -> Path:
    from safetensors.torch import save

    tensors = {k: _stored(v, half) for k, v in lora_tensors(network).items()}
    return atomic_write(path, save(tensors, metadata(facts)))


def _write_model(network: Network, base: Base, folder: Path, facts: Mapping[str, Any], half: bool) -> Path:
    """The base's pipeline folder with the student's U-Net."""
    from safetensors.torch import save

    tensors = {k: _stored(v.cpu().contiguous(), half) for k, v in network.unet.state_dict().items()}
    with atomic_folder(folder) as fresh:
        base.pipe.save_config(str(fresh))
        index = json.loads((fresh / "model_index.json").read_text())
        index.pop("_name_or_path", None)  # a path of this machine
        (fresh / "model_index.json").write_text(json.dumps({**index, **metadata(facts)}, indent=2) + "\n")
        for name, part in base.pipe.components.items():
            if part is not None and name != "unet":
                part.save_pretrained(str(fresh / name))
        name_float32(fresh)
        network.unet.save_config(str(fresh / "unet"))
        (fresh / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(save(tensors, metadata(facts)))
    return folder


def _stored(value: Tensor, half: bool) -> Tensor:
    """The tensor in float16, or as it is where float16 would overflow."""
    if not half or not value.is_floating_point():
        return value
    small = value.half()
    return small if bool(torch.isfinite(small).all()) else value
