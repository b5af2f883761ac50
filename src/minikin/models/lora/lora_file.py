"""Reading LoRA files: any of the usual key layouts to one low-rank pair per layer, checked first.

Layouts: kohya (`lora_unet_...lora_down.weight`, `lora_te_`, `lora_te1_`, `lora_te2_`; SDXL's block
numbers too), diffusers old and new, and PEFT (`lora_A`, with or without `base_model.model.`). The
names are converted by diffusers; what each number means (alpha, rank) is folded in here. Only
safetensors: .pt, .ckpt and .bin are pickles, which can run code. They are a stranger's files: read into
memory, never mapped, within the limits below. Knows nothing of layers in use; `adapters` puts them on.
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
MAX_SETTINGS = 1 << 20  # PEFT's adapter_config.json


class LowRank(NamedTuple):
    """A change of one layer's weight: up @ down, alpha folded in.

    down  (r, d_in) or (r, c_in, k, k)
    up    (d_out, r) or (c_out, r, 1, 1)
    """

    down: Tensor
    up: Tensor


@dataclass(frozen=True)
class Adapter:
    """A LoRA that fits one base: what it changes, by (component, path of the layer)."""

    name: str
    sha256: str
    layers: Mapping[tuple[str, str], LowRank]
    metadata: Mapping[str, str]

    @property
    def size(self) -> int:
        """Bytes of its tensors."""
        return sum(t.numel() * t.element_size() for pair in self.layers.values() for t in pair)


def components(base: Base) -> dict[str, nn.Module]:
    """What a LoRA may change, by diffusers' names."""
    names = ("text_encoder", "text_encoder_2")
    return {"unet": base.unet, **dict(zip(names, base.text_encoders, strict=False))}


def load(base: Base, path: Path, name: str) -> Adapter:
    """Read a LoRA for this base, on its device and in its dtype.

    Raises BadAdapterFile when the file is no readable LoRA, BaseMismatch (with the reason) when it
    was made for another family.
    """
    tensors, metadata, sha256 = _read(path)
    check_kind(path, tensors)
    check_family(base, name, tensors, metadata)
    named = _named(base, path, _scaled(path, tensors, metadata))
    return Adapter(name, sha256, _fitted(base, path, name, named), metadata)


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
    """What a file says of itself. Raises ValueError for a header that is too long, or of too many tensors."""
    n = int.from_bytes(data[:8], "little")
    if n > MAX_HEADER:
        raise ValueError(f"a header of {n} bytes, more than {MAX_HEADER}")
    header = json.loads(data[8 : 8 + n])
    metadata = header.pop("__metadata__", None) or {}
    if len(header) > MAX_TENSORS:
        raise ValueError(f"{len(header)} tensors, more than {MAX_TENSORS}")
    return dict(metadata)


def _scaled(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors without alphas: each up factor is multiplied by alpha / rank instead."""
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


def _stem_of_up(key: str) -> str | None:
    """The layer's name in front of an up factor's ending."""
    for tail in (".lora_up.weight", ".lora_B.weight", ".lora_B.default.weight", ".lora.up.weight",
                 "_lora.up.weight", ".lora_linear_layer.up.weight"):  # fmt: skip
        if key.endswith(tail):
            return key.removesuffix(tail)
    return None


def _peft_config(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """PEFT's settings: in diffusers' metadata (with a component in front) or beside the file."""
    try:
        if "lora_adapter_metadata" in metadata:
            return dict(json.loads(metadata["lora_adapter_metadata"]))
        if path.name == "adapter_model.safetensors":
            beside = json.loads(read_small(path.parent / "adapter_config.json", MAX_SETTINGS) or b"")
            return {f"unet.{k}": v for k, v in beside.items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as e:
        raise BadAdapterFile(f"The settings of {path.name} cannot be read ({e}).") from e
    return {}


def _peft_scale(config: Mapping[str, Any], stem: str, rank: int) -> float:
    """alpha / r of one layer (alpha / sqrt(r) for rsLoRA); 1 when nothing is stated."""
    stem = stem.removeprefix("base_model.model.")
    component = next((c for c in ("text_encoder_2", "text_encoder") if stem.startswith(f"{c}.")), "unet")
    layer = stem.removeprefix(f"{component}.")
    alpha = config.get(f"{component}.lora_alpha", rank)
    for pattern, own in (config.get(f"{component}.alpha_pattern") or {}).items():
        if layer == pattern or layer.endswith(f".{pattern}"):
            alpha = own
    return float(alpha) / (math.sqrt(rank) if config.get(f"{component}.use_rslora") else rank)


def _named(base: Base, path: Path, tensors: Mapping[str, Tensor]) -> dict[tuple[str, str], LowRank]:
    """(component, layer) -> pair."""
    how = {"unet_config": base.unet.config} if base.is_xl else {}
    try:
        state, _ = base.pipe.lora_state_dict({_with_component(k): t for k, t in tensors.items()}, **how)
        parts = {c: _peft_names(c, state) for c in ("unet", "text_encoder", "text_encoder_2")}
    except (ValueError, KeyError, IndexError) as e:
        why = " ".join(str(e).split())
        raise BadAdapterFile(f"The layer names of {path.name} cannot be read: {why}") from e
    found: dict[tuple[str, str], LowRank] = {}
    odd = [k for k in state if not k.startswith(tuple(f"{c}." for c in parts))]
    for component, own in parts.items():
        for key, t in own.items():
            layer, _, kind = key.partition(".lora_")
            up = own.get(f"{layer}.lora_B.weight")
            if kind == "A.weight" and up is not None:
                found[component, layer] = LowRank(t, up)
            elif kind != "B.weight" or f"{layer}.lora_A.weight" not in own:
                odd.append(key)
    if odd or not found:
        raise BadAdapterFile(
            f"{path.name} holds {len(odd)} tensors that belong to no pair of a plain LoRA, among them "
            f"{', '.join(odd[:5])}."
        )
    return found


def _peft_names(component: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One component's tensors, named LAYER.lora_A.weight and LAYER.lora_B.weight, by diffusers' converters."""
    from diffusers.utils import state_dict_utils as convert

    own = {k.removeprefix(f"{component}."): t for k, t in state.items() if k.startswith(f"{component}.")}
    if component == "unet":
        named = convert.convert_unet_state_dict_to_peft(
            {k.replace(".processor.", "."): t for k, t in own.items()}
        )
    elif own:
        named = convert.convert_state_dict_to_peft(convert.convert_state_dict_to_diffusers(own))
    else:
        named = {}
    return dict(named)


def _with_component(key: str) -> str:
    """PEFT's own files name the U-Net's layers without saying that it is the U-Net."""
    key = key.replace(".lora_A.default.", ".lora_A.").replace(".lora_B.default.", ".lora_B.")
    key = key.removeprefix("base_model.model.")
    if key.startswith(("down_blocks.", "up_blocks.", "mid_block.", "conv_in.", "conv_out.", "time_emb")):
        return f"unet.{key}"
    return key


def _fitted(
    base: Base, path: Path, name: str, named: Mapping[tuple[str, str], LowRank]
) -> dict[tuple[str, str], LowRank]:  # fmt: skip
    """Every pair in the shape of its layer, on its device, in its dtype; raises BaseMismatch."""
    parts, out = components(base), {}
    for (component, layer), pair in named.items():
        module = _layer(parts.get(component), layer)
        if module is None and (component, layer) == ("unet", guidance.LAYER):
            module = guidance.blank(base.unet, pair.down.shape[1])  # see `Adapters.using`
        weight = getattr(module, "weight", None)
        fitted = None if weight is None else _in_shape(pair, weight)
        if fitted is None:
            have = "has no such layer" if weight is None else f"has {tuple(weight.shape)} there"
            raise BaseMismatch(
                f"LoRA '{name}' does not fit the open base {base.name} ({base.architecture}): it changes "
                f"{component}.{layer} by {tuple(pair.up.shape)} x {tuple(pair.down.shape)}, and the base "
                f"{have}. Use a LoRA of this family, or open the base it was made for."
            )
        out[component, _own_name(parts[component], layer)] = fitted
    return out


def _own_name(model: nn.Module, layer: str) -> str:
    """Some CLIP text models have no `text_model.` level, which files mostly name."""
    bare = layer.removeprefix("text_model.")
    return f"text_model.{bare}" if hasattr(model, "text_model") and "encoder." in bare else bare


def _layer(model: nn.Module | None, layer: str) -> Any:
    if model is None:
        return None
    try:
        module = model.get_submodule(_own_name(model, layer))
    except AttributeError:
        return None
    return getattr(module, "base_layer", module)


def _in_shape(pair: LowRank, weight: Tensor) -> LowRank | None:
    """The pair for a layer with this weight, or None when it does not fit.

    A 1x1 convolution and a linear layer are the same map; tools write either.
    """
    down, up = pair
    if weight.ndim not in (2, 4) or not {down.ndim, up.ndim} <= {2, 4}:
        return None
    down = _as_rank(down, weight.ndim)
    up = _as_rank(up, weight.ndim)
    if down.ndim != weight.ndim or up.ndim != weight.ndim or down.shape[0] != up.shape[1]:
        return None
    if up.shape[0] != weight.shape[0] or down.shape[1:] != weight.shape[1:] or up.shape[2:].numel() != 1:
        return None
    return LowRank(*(t.to(weight.device, weight.dtype).contiguous() for t in (down, up)))


def _as_rank(t: Tensor, ndim: int) -> Tensor:
    if t.ndim == 4 and ndim == 2 and t.shape[2:].numel() == 1:
        return t[..., 0, 0]
    return t[..., None, None] if t.ndim == 2 and ndim == 4 else t
