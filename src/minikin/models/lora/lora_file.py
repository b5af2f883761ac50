"""Adapter files: reads LoRA and the kinds of LyCORIS and PEFT, validates them, and returns a change per layer.

Names: see `lora_keys`; kinds and their formulas: see `changes`. Alpha and rank of a plain LoRA are multiplied
into its factors. Tensors that belong to no adapter, such as embeddings that OneTrainer puts into the file, are
set aside with a note. Files are untrusted: only safetensors is read (.pt, .ckpt and .bin are pickles, which can
run code), from memory, never mapped, within the limits below.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minikin.errors import BadAdapterFile, BaseMismatch
from minikin.files import read_small
from minikin.models import safetensors_header
from minikin.models.base import Base
from minikin.models.lora import guidance, lora_keys
from minikin.models.lora.changes import Change, LowRank, with_middle
from minikin.models.lora.lora_formats import Scales, check_family, check_kind
from minikin.models.lora.lora_keys import Layer, components

__all__ = ["Adapter", "Change", "LowRank", "components", "load"]

PICKLES = (".pt", ".ckpt", ".bin", ".pth")
MAX_BYTES = 2 << 30  # SDXL in rank 256: 1.7 GB
MAX_HEADER = 16 << 20  # trainers write the tags of all their images into it
MAX_RANK = 4096  # of a middle factor
MAX_TENSORS = 20_000  # SDXL with convolutions and text encoders: 3,000


@dataclass(frozen=True)
class Adapter:
    """An adapter for one base: changes of weights and biases by (component, layer path).

    notes  sentences for the person who uses it: what of the file is not used
    """

    name: str
    sha256: str
    layers: Mapping[Layer, LowRank | Change]
    metadata: Mapping[str, str]
    biases: Mapping[Layer, Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        tensors = list(self.biases.values())
        for change in self.layers.values():
            tensors += change.tensors.values() if isinstance(change, Change) else change
        return sum(t.numel() * t.element_size() for t in tensors)

    @property
    def pairs(self) -> dict[Layer, LowRank]:
        """The changes of a plain LoRA."""
        return {layer: change for layer, change in self.layers.items() if isinstance(change, LowRank)}

    @property
    def is_plain(self) -> bool:
        """True for a plain LoRA, which is low-rank pairs alone."""
        return len(self.pairs) == len(self.layers) and not self.biases


def load(base: Base, path: Path, name: str) -> Adapter:
    """Read an adapter for this base, on its device and in its dtype.

    Raises BadAdapterFile for files that are no readable adapter, BaseMismatch for one of another family, and
    BadRecipe for a base without a U-Net.
    """
    base.require_unet(f"LoRA '{name}'")
    tensors, metadata, sha256 = _read(path)
    names = lora_keys.layer_names(base)
    adapter_tensors = {k: t for k, t in tensors.items() if lora_keys.is_adapter(k) or _names_a_layer(names, k)}
    groups = check_kind(path, tensors, adapter_tensors)
    check_family(base, name, groups, metadata)
    scales = Scales.of(path, metadata)
    layers: dict[Layer, LowRank | Change] = {}
    biases: dict[Layer, Tensor] = {}
    for stem, fields in groups.items():
        layer = lora_keys.find_layer(names, stem)
        change, bias = _change(path, stem, fields, scales)
        if change is None and bias is None:
            continue
        weight, own_bias = _parameters(base, layer, change)
        fitted = None if change is None or weight is None else _in_shape(change, weight)
        if layer is None or weight is None or (change is not None and fitted is None):
            raise BaseMismatch(_misfit(base, name, stem, layer, fields, weight))
        if fitted is not None:
            layers[layer] = fitted
        if bias is not None:
            if own_bias is None or own_bias.numel() != bias.numel():
                raise BaseMismatch(_misfit(base, name, stem, layer, fields, own_bias))
            biases[layer] = bias.to(own_bias.device, own_bias.dtype).view_as(own_bias)
    foreign = [k for k in tensors if k not in adapter_tensors]
    return Adapter(name, sha256, layers, metadata, biases, (*_notes(path, foreign), *scales.notes))


def _names_a_layer(names: Mapping[str, Layer], key: str) -> bool:
    """True for a tensor whose layer the base has, such as `unet.conv_in.weight`."""
    return lora_keys.find_layer(names, key.rpartition(".")[0]) is not None


def _notes(path: Path, foreign: list[str]) -> list[str]:
    """A sentence on embeddings in the file, and one on other tensors that no adapter has."""
    embeddings = lora_keys.embedding_names(foreign)
    others = [k for k in foreign if not k.startswith(lora_keys.EMBEDDING)]
    notes = []
    if embeddings:
        words = " and ".join(f"'{name}'" for name in embeddings)
        notes.append(
            f"{path.name} also holds the embedding {words}, which is not used with it. To use it, make it a "
            "concept, and name that in the prompt: minikin concepts import FILE --name NAME --category WORD "
            "--base BASE"
        )
    if others:
        notes.append(
            f"{path.name} also holds {len(others)} tensors that are not used, because no adapter has them: "
            f"{', '.join(others[:5])}."
        )
    return notes


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
    return safetensors_header.parse(data[8 : 8 + n], MAX_TENSORS)[1]


def _change(
    path: Path, stem: str, fields: Mapping[str, Tensor], scales: Scales
) -> tuple[LowRank | Change | None, Tensor | None]:
    """The change of a layer's weight and the difference of its bias, as the file's fields say."""
    scale = scales.scale(stem, fields)
    t = {k: v for k, v in fields.items() if k not in ("alpha", "scalar", "diff_b", "b_norm", "up_bias")}
    bias = fields.get("diff_b", fields.get("b_norm"))
    if "up_bias" in fields:
        bias = fields["up_bias"].float() * scale
    if "w_norm" in t:
        t["diff"] = t.pop("w_norm")
    if {"up", "down"} <= t.keys() and not {"dora_scale", "magnitude"} & t.keys():
        up = t["up"].float() * scale
        if "mid" in t and (t["mid"].shape[:1] != up.shape[1:2] or len(t["mid"]) > MAX_RANK):
            raise BadAdapterFile(f"The factors of {stem} in {path.name} have ranks that do not fit together.")
        if not bool(torch.isfinite(up).all()):
            raise BadAdapterFile(f"{path.name} has a scale of {scale:g} for {stem}, which is not finite.")
        try:
            return LowRank(with_middle(t["down"], t.get("mid")), up), bias
        except RuntimeError as e:
            raise BadAdapterFile(f"The factors of {stem} in {path.name} do not fit together ({e}).") from e
    return (Change(t, scale) if t else None), bias


def _parameters(
    base: Base, layer: Layer | None, change: LowRank | Change | None
) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias of a layer; None for one that the base lacks."""
    if layer is None:
        return None, None
    component, path = layer
    try:
        module: Any = components(base)[component].get_submodule(path)
    except (KeyError, AttributeError):
        if layer != ("unet", guidance.LAYER) or not isinstance(change, LowRank):
            return None, None
        module = guidance.zero_projection(base.denoiser, change.down.shape[1])  # see `Adapters.using`
    module = getattr(module, "base_layer", module)
    supported = isinstance(module, nn.Linear | nn.Conv2d | nn.GroupNorm | nn.LayerNorm)
    return (module.weight, getattr(module, "bias", None)) if supported else (None, None)


def _misfit(
    base: Base, name: str, stem: str, layer: Layer | None, fields: Mapping[str, Tensor], weight: Tensor | None
) -> str:
    have = "has no such layer" if weight is None else f"has {tuple(weight.shape)} there"
    shapes = " x ".join(str(tuple(t.shape)) for field, t in sorted(fields.items(), reverse=True) if t.ndim)
    return (
        f"LoRA '{name}' does not fit the open base {base.name} ({base.architecture}): it changes "
        f"{'.'.join(layer) if layer else stem} by {shapes}, and the base {have}. Use a LoRA of this family, or "
        "open the base it was made for."
    )


def _in_shape(change: LowRank | Change, weight: Tensor) -> LowRank | Change | None:
    """The change in the shape for this weight, on its device, or None if it does not fit."""
    if isinstance(change, Change):
        return change.to(weight) if change.fits(weight) else None
    down, up = change
    if weight.ndim not in (2, 4) or not {down.ndim, up.ndim} <= {2, 4}:
        return None
    # a 1x1 convolution and a linear layer are the same map, and tools write either shape
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
