"""Checks of an adapter's kind and model family before it is read, and its scales.

The checks give a reason ("made for sdxl, its cross-attention reads text 2048 wide") where shapes alone would
differ.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minikin import strict_json
from minikin.errors import BadAdapterFile, BaseMismatch
from minikin.models import families
from minikin.models.base import Base
from minikin.models.lora import lora_keys

MAX_CONFIG = 1 << 20  # PEFT's adapter_config.json
READ_KINDS = "LoRA, LoHa, LoKr, DoRA, IA3 and whole differences"
_OTHER_KINDS = {
    "oft_": "OFT", "boft_": "BOFT", ".a1.weight": "GLoRA", ".b1.weight": "GLoRA", "vera_": "VeRA",
    "hra_u": "HRA", "ia3_l": "IA3 of PEFT", "randlora_": "RandLoRA", "fourierft_": "FourierFT",
    "bone_block": "Bone", "lora_controlnet": "Control-LoRA",
    "dyn_up": "LyCORIS with dynamic weights", "p_layer": "T-LoRA",
}  # fmt: skip
_CHANGES: tuple[tuple[set[str], str], ...] = (
    ({"up", "down"}, "mid"), ({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}, "hada_t1 hada_t2"),
    ({"lokr_w1", "lokr_w2"}, ""), ({"lokr_w1", "lokr_w2_a", "lokr_w2_b"}, "lokr_t2"),
    ({"lokr_w1_a", "lokr_w1_b", "lokr_w2"}, "lokr_t1"),
    ({"lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b"}, "lokr_t1 lokr_t2"),
    ({"diff"}, ""), ({"w_norm"}, ""), ({"weight", "on_input"}, ""), (set(), ""),
)  # fmt: skip
_BESIDE = {"alpha", "scalar", "diff_b", "b_norm", "up_bias", "dora_scale", "magnitude"}
_VERSIONS = (("sdxl", "sdxl"), ("xl", "sdxl"), ("sd_v1", "sd1"), ("diffusion-v1", "sd1"), ("sd_v2", "sd2"),
             ("diffusion-v2", "sd2"), ("flux", "flux"), ("sd3", "sd3"))  # fmt: skip
_FOREIGN = (  # how layers are named that no Stable Diffusion has
    (r"^(?:base_model\.model\.)?(?:transformer\.|transformer_blocks\.)|(?:double|single|joint)_blocks|"
     r"single_transformer_blocks|^diffusion_model\.(?:blocks|layers)\.|^lora_(?:unet|transformer)_(?:blocks|layers)_|"
     r"^lora_(?:transformer|te3)_", "a diffusion transformer, such as Flux, SD 3, Qwen-Image or Wan"),
    (r"motion_modules", "AnimateDiff"), (r"prior_unet", "Stable Cascade"),
    (r"^\d+\.to_", "IP-Adapter FaceID"), (r"model\.layers\.\d", "a language model"),
)  # fmt: skip

Fields = Mapping[str, Tensor]


def check_kind(path: Path, tensors: Fields, adapter_tensors: Fields) -> dict[str, dict[str, Tensor]]:
    """The adapter's tensors by layer name and field.

    adapter_tensors  those that belong to an adapter or to a layer of the base
    Raises BadAdapterFile for other kinds than READ_KINDS, for tensors of no layer's change, and for NaN or Inf.
    """
    for sign, kind in _OTHER_KINDS.items():
        if any(sign in k for k in adapter_tensors):
            raise BadAdapterFile(
                f"{path.name} is an adapter of the kind {kind}; Minikin reads {READ_KINDS}. Merge it into a "
                "base, or extract a LoRA from it, with the tool it came from."
            )
    groups = lora_keys.grouped(adapter_tensors)
    if not any(lora_keys.is_adapter(k) for k in adapter_tensors):
        hint = " It is a concept: write its name in angle brackets." if "i_star" in tensors else ""
        raise BadAdapterFile(
            f"{path.name} is not a LoRA: it holds {', '.join(list(tensors)[:5]) or 'nothing'}.{hint}"
        )
    broken = [
        k for k, t in adapter_tensors.items() if t.is_floating_point() and not torch.isfinite(t.float()).all()
    ]
    if broken:
        raise BadAdapterFile(f"{path.name} holds NaN or Inf in {', '.join(broken[:5])}.")
    places = {k: lora_keys.parse(k) for k in adapter_tensors}
    unread = [
        k for k, place in places.items()
        if place is None or place.field not in groups.get(place.stem, {}) or not _is_whole(groups[place.stem])
    ]  # fmt: skip
    if unread:
        raise BadAdapterFile(
            f"{path.name} holds {len(unread)} tensors that belong to no pair of a LoRA and to no other kind "
            f"that Minikin reads ({READ_KINDS}), among them {', '.join(unread[:5])}."
        )
    return groups


def _is_whole(fields: Fields) -> bool:
    """True if a layer's tensors are all that one kind needs, and no more."""
    names = fields.keys() - _BESIDE
    if not names and {"dora_scale", "magnitude", "up_bias"} & fields.keys():
        return False
    return any(needed <= names <= needed | set(extra.split()) for needed, extra in _CHANGES)


def check_family(base: Base, name: str, groups: Mapping[str, Fields], metadata: Mapping[str, str]) -> None:
    """Raise BaseMismatch for an adapter of another model family, by its layers, text width or metadata."""
    width, (stated, stated_in) = _text_width(groups), _stated_family(metadata)
    foreign = ((stem, family) for stem in groups for sign, family in _FOREIGN if re.search(sign, stem))
    stem, family = next(foreign, ("", ""))
    if family:
        why, wrong = f"it changes {stem}", True
    elif width is not None:
        family, why = families.family("", width).name, f"its cross-attention reads text {width} wide"
        wrong = width != base.layout.text_width
    else:
        family, why = stated, f"its metadata says {stated_in} = {metadata.get(stated_in)}"
        wrong = stated not in ("", base.architecture)
    if wrong:
        raise BaseMismatch(
            f"LoRA '{name}' was made for {family} ({why}); the open base is {base.name}, {base.architecture} "
            f"({base.layout.text_width} wide). Use a LoRA of this family, or open the base it was made for."
        )


def _text_width(groups: Mapping[str, Fields]) -> int | None:
    """Width of the text encodings that an adapter's cross-attention reads; None if it changes none."""
    for stem, fields in groups.items():
        if "attn2" in stem and re.search(r"to_[kv]", stem) and (width := _input_width(fields)):
            return width
    return None


def _input_width(fields: Fields) -> int | None:
    for name in ("down", "hada_w1_b", "diff"):
        if name in fields and fields[name].ndim > 1:
            return int(fields[name].shape[1])
    halves = [fields.get(f"lokr_w{k}", fields.get(f"lokr_w{k}_b")) for k in "12"]
    widths = [int(t.shape[1]) for t in halves if t is not None and t.ndim > 1]
    return widths[0] * widths[1] if len(widths) == 2 else None


@dataclass
class Scales:
    """alpha / rank of an adapter's layers, from the file or from PEFT's configuration.

    config  PEFT's settings by `COMPONENT.name`
    notes   sentences on what the file does not say
    """

    path: Path
    config: Mapping[str, Any]
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, path: Path, metadata: Mapping[str, str]) -> Scales:
        """Raises BadAdapterFile for a configuration that cannot be read."""
        return cls(path, _peft_config(path, metadata))

    def scale(self, stem: str, fields: Fields) -> float:
        """The scale of one layer's change. Raises BadAdapterFile for an alpha that is no number."""
        try:
            rank = _rank(fields)
            alpha = fields.get("alpha")
            if alpha is None:
                self._note_missing_config(stem)
                scale = self._peft_scale(stem, rank)
            else:
                scale = float(alpha) / rank if rank else 1.0
            scale *= float(fields.get("scalar", 1.0))
        except (LookupError, ValueError, TypeError, AttributeError, ArithmeticError, RuntimeError) as e:
            file = self.path.name
            raise BadAdapterFile(f"The alpha or rank of {stem} in {file} cannot be read ({e}).") from e
        if not math.isfinite(scale):
            raise BadAdapterFile(f"{self.path.name} has a scale of {scale:g} for {stem}, which is not finite.")
        return scale

    def _peft_scale(self, stem: str, rank: int | None) -> float:
        """alpha / r of one layer (alpha / sqrt(r) for rsLoRA); 1 without a stated alpha."""
        stem = stem.removeprefix("base_model.model.")
        component = next((c for c in ("text_encoder_2", "text_encoder") if stem.startswith(f"{c}.")), "unet")
        layer, config = stem.removeprefix(f"{component}."), self.config
        rank = rank or _of_layer(config, component, "rank_pattern", layer, config.get(f"{component}.r"))
        # LoHa and LoKr call it alpha
        alpha = config.get(f"{component}.lora_alpha", config.get(f"{component}.alpha", rank))
        alpha = _of_layer(config, component, "alpha_pattern", layer, alpha)
        if rank is None:
            return 1.0
        return float(alpha) / (math.sqrt(rank) if config.get(f"{component}.use_rslora") else rank)

    def _note_missing_config(self, stem: str) -> None:
        if stem.startswith("base_model.model.") and not self.config and not self.notes:
            self.notes.append(
                f"{self.path.name} is of PEFT, which keeps alpha in adapter_config.json; there is none beside "
                "it, so alpha = rank is used. If that is wrong, give the folder's adapter_model.safetensors to "
                "`minikin models add`."
            )


def _rank(fields: Fields) -> int | None:
    """The rank of a change; None where no factor has one. Raises IndexError and ValueError for damaged ones."""
    for name, axis in (("up", 1), ("hada_w1_b", 0), ("lokr_w2_b", 0), ("lokr_w1_b", 0)):
        if name in fields:
            if not (rank := int(fields[name].shape[axis])):
                raise ValueError("the rank is 0")
            return rank
    return None


def _of_layer(config: Mapping[str, Any], component: str, name: str, layer: str, default: Any) -> Any:
    """PEFT's value for one layer, where a pattern of the configuration names it."""
    for pattern, value in (config.get(f"{component}.{name}") or {}).items():
        if layer == pattern or layer.endswith(f".{pattern}"):
            default = value
    return default


def _peft_config(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """PEFT's configuration, from diffusers' metadata or from adapter_config.json in the same folder."""
    try:
        if "lora_adapter_metadata" in metadata:
            return strict_json.loads(metadata["lora_adapter_metadata"], kind=dict)
        file = path.resolve()  # `models add` makes a link
        if file.name == "adapter_model.safetensors":
            config = strict_json.read(file.parent / "adapter_config.json", kind=dict, max_bytes=MAX_CONFIG)
            return {f"{c}.{k}": v for c in ("unet", "text_encoder") for k, v in config.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as e:
        raise BadAdapterFile(f"The settings of {path.name} cannot be read ({e}).") from e
    return {}


def _stated_family(metadata: Mapping[str, str]) -> tuple[str, str]:
    """The family that the metadata names, and its field; ("", "") for none."""
    for name in ("ss_base_model_version", "modelspec.architecture"):
        stated = metadata.get(name, "").lower()
        for sign, family in _VERSIONS:
            if sign in stated:
                return family, name
    return "", ""
