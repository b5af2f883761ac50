"""Checks of an adapter's kind and model family before its tensors are converted.

They give a reason ("made for sdxl, its cross-attention reads text 2048 wide") where shapes alone would differ.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from minikin.errors import BadAdapterFile, BaseMismatch
from minikin.models.base import ARCHITECTURES, Base

_OTHER_KINDS = {
    "hada_": "LoHa", "lokr_": "LoKr", "lora_mid": "LoCon with a middle factor", "oft_": "OFT",
    "dora_scale": "DoRA", "lora_magnitude_vector": "DoRA", "diff_b": "full difference",
}  # fmt: skip
_VERSIONS = (("sdxl", "sdxl"), ("xl", "sdxl"), ("sd_v1", "sd1"), ("diffusion-v1", "sd1"), ("sd_v2", "sd2"),
             ("diffusion-v2", "sd2"), ("flux", "flux"), ("sd3", "sd3"))  # fmt: skip


def check_kind(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise BadAdapterFile for tensors of other kinds than plain LoRA, and for NaN or Inf."""
    for sign, kind in _OTHER_KINDS.items():
        if any(sign in k for k in tensors):
            raise BadAdapterFile(
                f"{path.name} is a {kind} adapter; Minikin reads plain LoRA. Merge it into a base, or extract "
                "a LoRA from it, with the tool it came from."
            )
    if not any("lora" in k.lower() for k in tensors):
        hint = " It is a concept: write its name in angle brackets." if "i_star" in tensors else ""
        raise BadAdapterFile(
            f"{path.name} is not a LoRA: it holds {', '.join(list(tensors)[:5]) or 'nothing'}.{hint}"
        )
    broken = [k for k, t in tensors.items() if t.is_floating_point() and not torch.isfinite(t.float()).all()]
    if broken:
        raise BadAdapterFile(f"{path.name} holds NaN or Inf in {', '.join(broken[:5])}.")


def check_family(base: Base, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Raise BaseMismatch for a LoRA of another model family, by its text width or its metadata."""
    width, (stated, field) = _text_width(tensors), _stated_family(metadata)
    if width is not None:
        family, why = ARCHITECTURES.get(width, "tiny"), f"its cross-attention reads text {width} wide"
        wrong = width != base.layout.text_width
    else:
        family, why = stated, f"its metadata says {field} = {metadata.get(field)}"
        wrong = stated not in ("", base.architecture)
    if wrong:
        raise BaseMismatch(
            f"LoRA '{name}' was made for {family} ({why}); the open base is {base.name}, {base.architecture} "
            f"({base.layout.text_width} wide). Use a LoRA of this family, or open the base it was made for."
        )


def _text_width(tensors: Mapping[str, Tensor]) -> int | None:
    """Width of the text encodings that a LoRA's cross-attention reads; None if it changes none."""
    for key, t in tensors.items():
        if "attn2" in key and re.search(r"to_[kv]", key) and re.search(r"lora[._]down|lora_A", key):
            return int(t.shape[1])
    return None


def _stated_family(metadata: Mapping[str, str]) -> tuple[str, str]:
    """The family that the metadata names, and its field; ("", "") for none."""
    for field in ("ss_base_model_version", "modelspec.architecture"):
        stated = metadata.get(field, "").lower()
        for sign, family in _VERSIONS:
            if sign in stated:
                return family, field
    return "", ""
