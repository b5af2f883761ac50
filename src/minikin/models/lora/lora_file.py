"""LoRA files: reads the common key layouts, validates them, and returns one low-rank pair per layer.

Layouts: kohya (`lora_unet_...lora_down.weight`, `lora_te_`, `lora_te1_`, `lora_te2_`, also with SDXL's block
numbers), diffusers old and new, and PEFT (`lora_A`, with or without `base_model.model.`). diffusers converts
the names; alpha and rank are multiplied into the factors here. Files are untrusted: only safetensors is read
(.pt, .ckpt and .bin are pickles, which can run code), from memory, never mapped, within the limits below.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minikin.errors import BadAdapterFile, BaseMismatch
from minikin.files import read_small
from minikin.models.base import Base
from minikin.models.lora import guidance
from minikin.models.lora.lora_formats import check_family, check_kind

PICKLES = (".pt", ".ckpt", ".bin", ".pth")
MAX_BYTES = 2 << 30  # SDXL in rank 256: 1.7 GB
MAX_HEADER = 16 << 20  # trainers write the tags of all their images into it
MAX_TENSORS = 20_000  # SDXL with convolutions and text encoders: 3,000
MAX_CONFIG = 1 << 20  # PEFT's adapter_config.json


class LowRank(NamedTuple):
    """A change of one layer's weight: up @ down, with alpha included.

    down  (r, d_in) or (r, c_in, k, k)
    up    (d_out, r) or (c_out, r, 1, 1)
    """

    down: Tensor
    up: Tensor


@dataclass(frozen=True)
class Adapter:
    """A LoRA for one base: low-rank pairs by (component, layer path)."""

    name: str
    sha256: str
    layers: Mapping[tuple[str, str], LowRank]
    metadata: Mapping[str, str]

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(t.numel() * t.element_size() for pair in self.layers.values() for t in pair)


def components(base: Base) -> dict[str, nn.Module]:
    """Components that a LoRA may change, by diffusers' names."""
    names = ("text_encoder", "text_encoder_2")
    return {"unet": base.unet, **dict(zip(names, base.text_encoders, strict=False))}


def load(base: Base, path: Path, name: str) -> Adapter:
    """Read a LoRA for this base, on its device and in its dtype.

    Raises BadAdapterFile for files that are no readable LoRA, BaseMismatch for a LoRA of another family.
    """
    tensors, metadata, sha256 = _read(path)
    check_kind(path, tensors)
    check_family(base, name, tensors, metadata)
    pairs = _pairs(base, path, _scaled(path, tensors, metadata))
    return Adapter(name, sha256, _fitted(base, path, name, pairs), metadata)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str], str]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    if path.suffix.lower() in PICKLES:
        raise BadAdapterFile(
            f"{path.name} is a pickle, which can run code, and is never opened. Turn it into .safetensors "
            f"without running it: minikin models convert {path}"
        )
    try:
        data = read_small(path, MAX_BYTES)
    except OSError as e:
        raise BadAdapterFile(f"The LoRA {path} cannot be read: {e.strerror or e}.") from e
    if data is None:
        raise BadAdapterFile(
            f"{path.name} is no file, or one of more than {MAX_BYTES} bytes, which no LoRA has."
        )
    try:
        metadata = _metadata(data)
        return load(data), metadata, hashlib.sha256(data).hexdigest()
    except (SafetensorError, ValueError, TypeError, AttributeError, RecursionError) as e:
        raise BadAdapterFile(
            f"{path.name} is not a safetensors file, or it is damaged ({e}). Fetch it again, or convert it."
        ) from e


def _metadata(data: bytes) -> dict[str, str]:
    """The metadata of a file; raises ValueError for a header that is too long or lists too many tensors."""
    n = int.from_bytes(data[:8], "little")
    if n > MAX_HEADER:
        raise ValueError(f"a header of {n} bytes, more than {MAX_HEADER}")
    header = json.loads(data[8 : 8 + n])
    metadata = header.pop("__metadata__", None) or {}
    if len(header) > MAX_TENSORS:
        raise ValueError(f"{len(header)} tensors, more than {MAX_TENSORS}")
    return dict(metadata)


def _scaled(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors without alphas; each up factor is multiplied by alpha / rank instead."""
    config = _peft_config(path, metadata)
    out = {k: t for k, t in tensors.items() if not k.endswith(".alpha") and t.ndim}
    for key, t in out.items():
        stem = _stem_of_up(key)
        if stem is None:
            continue
        try:
            rank = t.shape[1]
            alpha = tensors.get(f"{stem}.alpha")
            factor = _peft_scale(config, stem, rank) if alpha is None else float(alpha) / rank
        except (LookupError, ValueError, TypeError, AttributeError, ArithmeticError, RuntimeError) as e:
            raise BadAdapterFile(f"The alpha or rank of {stem} in {path.name} cannot be read ({e}).") from e
        out[key] = t.float() * factor
        if not bool(torch.isfinite(out[key]).all()):
            raise BadAdapterFile(f"{path.name} has a scale of {factor:g} for {stem}, which is not finite.")
    return out


_UP_ENDINGS = (
    ".lora_up.weight",
    ".lora_B.weight",
    ".lora_B.default.weight",
    ".lora.up.weight",
    "_lora.up.weight",
    ".lora_linear_layer.up.weight",
)


def _stem_of_up(key: str) -> str | None:
    """The layer's name if the key is of an up factor, else None."""
    return next((key.removesuffix(end) for end in _UP_ENDINGS if key.endswith(end)), None)


def _peft_config(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """PEFT's configuration, from diffusers' metadata or from adapter_config.json in the same folder."""
    try:
        if "lora_adapter_metadata" in metadata:
            return dict(json.loads(metadata["lora_adapter_metadata"]))
        if path.name == "adapter_model.safetensors":
            config = json.loads(read_small(path.parent / "adapter_config.json", MAX_CONFIG) or b"")
            return {f"unet.{k}": v for k, v in config.items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as e:
        raise BadAdapterFile(f"The settings of {path.name} cannot be read ({e}).") from e
    return {}


def _peft_scale(config: Mapping[str, Any], stem: str, rank: int) -> float:
    """alpha / r of one layer (alpha / sqrt(r) for rsLoRA); 1 without a stated alpha."""
    stem = stem.removeprefix("base_model.model.")
    component = next((c for c in ("text_encoder_2", "text_encoder") if stem.startswith(f"{c}.")), "unet")
    layer = stem.removeprefix(f"{component}.")
    alpha = config.get(f"{component}.lora_alpha", rank)
    for pattern, alpha_of_pattern in (config.get(f"{component}.alpha_pattern") or {}).items():
        if layer == pattern or layer.endswith(f".{pattern}"):
            alpha = alpha_of_pattern
    return float(alpha) / (math.sqrt(rank) if config.get(f"{component}.use_rslora") else rank)


def _pairs(base: Base, path: Path, tensors: Mapping[str, Tensor]) -> dict[tuple[str, str], LowRank]:
    """Low-rank pairs by (component, layer), with diffusers' names."""
    options = {"unet_config": base.unet.config} if base.is_xl else {}
    try:
        state, _ = base.pipe.lora_state_dict({_with_component(k): t for k, t in tensors.items()}, **options)
        parts = {c: _peft_names(c, state) for c in ("unet", "text_encoder", "text_encoder_2")}
    except (ValueError, KeyError, IndexError) as e:
        why = " ".join(str(e).split())
        raise BadAdapterFile(f"The layer names of {path.name} cannot be read: {why}") from e
    pairs: dict[tuple[str, str], LowRank] = {}
    unmatched = [k for k in state if not k.startswith(tuple(f"{c}." for c in parts))]
    for component, of_component in parts.items():
        for key, t in of_component.items():
            layer, _, kind = key.partition(".lora_")
            up = of_component.get(f"{layer}.lora_B.weight")
            if kind == "A.weight" and up is not None:
                pairs[component, layer] = LowRank(t, up)
            elif kind != "B.weight" or f"{layer}.lora_A.weight" not in of_component:
                unmatched.append(key)
    if unmatched or not pairs:
        raise BadAdapterFile(
            f"{path.name} holds {len(unmatched)} tensors that belong to no pair of a plain LoRA, among them "
            f"{', '.join(unmatched[:5])}."
        )
    return pairs


def _peft_names(component: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One component's tensors, renamed by diffusers to LAYER.lora_A.weight and LAYER.lora_B.weight."""
    from diffusers.utils import state_dict_utils as convert

    prefix = f"{component}."
    tensors = {k.removeprefix(prefix): t for k, t in state.items() if k.startswith(prefix)}
    if not tensors:
        return {}
    if component == "unet":
        tensors = {k.replace(".processor.", "."): t for k, t in tensors.items()}
        return dict(convert.convert_unet_state_dict_to_peft(tensors))
    return dict(convert.convert_state_dict_to_peft(convert.convert_state_dict_to_diffusers(tensors)))


def _with_component(key: str) -> str:
    """The key with `unet.` in front, which PEFT's files leave out."""
    key = key.replace(".lora_A.default.", ".lora_A.").replace(".lora_B.default.", ".lora_B.")
    key = key.removeprefix("base_model.model.")
    if key.startswith(("down_blocks.", "up_blocks.", "mid_block.", "conv_in.", "conv_out.", "time_emb")):
        return f"unet.{key}"
    return key


def _fitted(
    base: Base, path: Path, name: str, pairs: Mapping[tuple[str, str], LowRank]
) -> dict[tuple[str, str], LowRank]:
    """Every pair in the shape of its layer, on its device and in its dtype; raises BaseMismatch."""
    parts, out = components(base), {}
    for (component, layer), pair in pairs.items():
        module = _layer(parts.get(component), layer)
        if module is None and (component, layer) == ("unet", guidance.LAYER):
            module = guidance.zero_projection(base.unet, pair.down.shape[1])  # see `Adapters.using`
        weight = getattr(module, "weight", None)
        fitted = None if weight is None else _in_shape(pair, weight)
        if fitted is None:
            have = "has no such layer" if weight is None else f"has {tuple(weight.shape)} there"
            raise BaseMismatch(
                f"LoRA '{name}' does not fit the open base {base.name} ({base.architecture}): it changes "
                f"{component}.{layer} by {tuple(pair.up.shape)} x {tuple(pair.down.shape)}, and the base "
                f"{have}. Use a LoRA of this family, or open the base it was made for."
            )
        out[component, _model_path(parts[component], layer)] = fitted
    return out


def _model_path(model: nn.Module, layer: str) -> str:
    """Path of a layer in the model; some CLIP text models lack the level `text_model.` that most files name."""
    bare = layer.removeprefix("text_model.")
    return f"text_model.{bare}" if hasattr(model, "text_model") and "encoder." in bare else bare


def _layer(model: nn.Module | None, layer: str) -> Any:
    if model is None:
        return None
    try:
        module = model.get_submodule(_model_path(model, layer))
    except AttributeError:
        return None
    return getattr(module, "base_layer", module)


def _in_shape(pair: LowRank, weight: Tensor) -> LowRank | None:
    """The pair in the shape for this weight, or None if it does not fit.

    A 1x1 convolution and a linear layer are the same map, and tools write either shape.
    """
    down, up = pair
    if weight.ndim not in (2, 4) or not {down.ndim, up.ndim} <= {2, 4}:
        return None
    down, up = _with_ndim(down, weight.ndim), _with_ndim(up, weight.ndim)
    if down.ndim != weight.ndim or up.ndim != weight.ndim or down.shape[0] != up.shape[1]:
        return None
    if up.shape[0] != weight.shape[0] or down.shape[1:] != weight.shape[1:] or up.shape[2:].numel() != 1:
        return None
    return LowRank(*(t.to(weight.device, weight.dtype).contiguous() for t in (down, up)))


def _with_ndim(t: Tensor, ndim: int) -> Tensor:
    if t.ndim == 4 and ndim == 2 and t.shape[2:].numel() == 1:
        return t[..., 0, 0]
    return t[..., None, None] if t.ndim == 2 and ndim == 4 else t
