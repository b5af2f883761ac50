"""Initial LoRA: a student that starts from a published or trained adapter instead of from the teacher.

The teacher cannot paint in one step, and an adversarial loss alone takes long to teach it. A student
that starts as a consistency model needs sharpening only, as in Hyper-SD (Ren et al. 2024,
arXiv:2404.13686, section 3.2: consistency distillation first, then adversarial).
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from minikin.distillation.student import Network
from minikin.errors import BadRecipe
from minikin.models import presets
from minikin.models.base import Base
from minikin.models.lora import lora_file


def find(base: Base, ref: str) -> Path:
    """The file of a preset's adapter for this base, or the LoRA file itself.

    Raises BadRecipe, AssetError, NoNetwork with what to do.
    """
    if ref in presets.PRESETS:
        preset = presets.PRESETS[ref]
        source = preset.source(base.architecture, preset.steps)
        if source is None:
            raise BadRecipe(f"Preset '{ref}' has no adapter for {base.architecture}. Give --start a LoRA file.")
        return presets.locate(preset, source)
    path = Path(ref)
    if not path.is_file():
        names = ", ".join(n for n in presets.for_architecture(base.architecture) if n != "quality")
        raise BadRecipe(f"--start {ref} is neither a file nor a preset with an adapter ({names or 'none'}).")
    return path


def digest(path: Path) -> str:
    """SHA-256 of the LoRA's tensors. Not of the file: safetensors orders its header differently every time."""
    from safetensors.torch import load_file

    sha = hashlib.sha256()
    for name, value in sorted(load_file(path).items()):
        sha.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        sha.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


@torch.no_grad()
def apply(student: Network, base: Base, path: Path) -> None:
    """Initialise an untrained student with the LoRA; its outputs are then exactly those of base and LoRA.

    A LoRA student copies the factors, a full student adds their product to its weights. Raises BadRecipe
    when the student's rank is smaller or a layer is not trained, BadAdapterFile, BaseMismatch.
    """
    adapter = lora_file.load(base, path, path.stem)
    if not adapter.is_plain:
        raise BadRecipe(f"{path.name} is not a plain LoRA, and a student can start from no other kind.")
    for (component, layer), pair in adapter.pairs.items():
        module = _layer(student, layer) if component == "unet" else None
        if module is None:
            raise BadRecipe(f"{path.name} changes {component}.{layer}, which this student does not train.")
        down, up = pair.down.float(), pair.up.float()
        if not hasattr(module, "lora_A"):
            module.weight += (up.flatten(1) @ down.flatten(1)).view_as(module.weight)
            continue
        a, b, r = module.lora_A["default"].weight, module.lora_B["default"].weight, len(down)
        if r > len(a):
            raise BadRecipe(f"{path.name} has rank {r}, the student {len(a)}. Use --rank {r} or more.")
        a[:r] = down
        b[:, :r] = up / module.scaling["default"]


def _layer(student: Network, name: str) -> Any:
    try:
        module: Any = student.unet.get_submodule(name)
    except AttributeError:
        return None
    trainable = hasattr(module, "lora_A") or (hasattr(module, "weight") and module.weight.requires_grad)
    return module if trainable else None
