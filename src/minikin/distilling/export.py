"""Results as ordinary files that stock diffusers loads: a LoRA, or the folder of a U-Net.

The LoRA is pytorch_lora_weights.safetensors with PEFT keys; alpha is folded in, so that every loader
gives it the same weight. Its metadata say how it was made and how it is to be used.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minikin.distilling.student import Network
from minikin.errors import StorageError
from minikin.files import atomic_write

LORA_NAME = "pytorch_lora_weights.safetensors"


def metadata(facts: Mapping[str, Any]) -> dict[str, str]:
    """Facts as a safetensors header: `minikin.NAME`, text as it is and all else as JSON."""
    rows = {f"minikin.{k}": v if isinstance(v, str) else json.dumps(v) for k, v in facts.items()}
    return {"format": "pt", **rows}


def write(network: Network, folder: Path, facts: Mapping[str, Any], *, half: bool = True) -> Path:
    """Write the student; returns the LoRA's file or the U-Net's folder. Raises StorageError."""
    if hasattr(network.unet, "peft_config"):
        return _write_lora(network, folder / LORA_NAME, facts, half)
    return _write_unet(network, folder / "unet", facts, half)


def lora_tensors(network: Network) -> dict[str, Tensor]:
    """The LoRA's factors by PEFT key, float32, alpha folded into the second one."""
    from peft.utils import get_peft_model_state_dict

    config = network.unet.peft_config["default"]
    scale = config.lora_alpha / config.r
    found = get_peft_model_state_dict(network.unet, adapter_name="default")
    return {
        f"unet.{k}": (v * scale if ".lora_B." in k else v).detach().float().cpu().contiguous()
        for k, v in found.items()
    }


def _write_lora(network: Network, path: Path, facts: Mapping[str, Any], half: bool) -> Path:
    from safetensors.torch import save

    tensors = {k: _stored(v, half) for k, v in lora_tensors(network).items()}
    return atomic_write(path, save(tensors, metadata(facts)))


def _write_unet(network: Network, folder: Path, facts: Mapping[str, Any], half: bool) -> Path:
    """Config and weights as diffusers names them: written beside, then renamed."""
    from safetensors.torch import save

    fresh, old = folder.with_name(f".{folder.name}-new"), folder.with_name(f".{folder.name}-old")
    tensors = {k: _stored(v.cpu().contiguous(), half) for k, v in network.unet.state_dict().items()}
    try:
        shutil.rmtree(fresh, ignore_errors=True)
        network.unet.save_config(str(fresh))
        atomic_write(fresh / "diffusion_pytorch_model.safetensors", save(tensors, metadata(facts)))
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        fresh.rename(folder)
    except OSError as e:
        raise StorageError(
            f"{folder} was not written: {e.strerror or e}. Free some space and run the same command with "
            "--resume; the checkpoint is kept."
        ) from e
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    return folder


def _stored(value: Tensor, half: bool) -> Tensor:
    """In float16, unless that would lose a number altogether."""
    if not half or not value.is_floating_point():
        return value
    small = value.half()
    return small if bool(torch.isfinite(small).all()) else value
