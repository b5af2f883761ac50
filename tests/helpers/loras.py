"""Random LoRAs on miniatures, written in every key layout tools use."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from minikin.models.base import Base
from minikin.models.lora.lora_file import components
from minikin.perfusion.export import _kohya_name

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
ALL = (
    *ATTENTION,
    "proj_in",
    "proj_out",
    "ff.net.0.proj",
    "ff.net.2",
    "conv1",
    "conv2",
    "conv_shortcut",
    "downsamplers.0.conv",
    "upsamplers.0.conv",
    "time_emb_proj",
)  # LCM-LoRA's list
TEXT = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
LAYOUTS = ("peft", "peft-own", "peft-state", "diffusers", "diffusers-old", "kohya")

Pairs = dict[tuple[str, str], tuple[Tensor, Tensor]]


def random_lora(
    base: Base,
    seed: int = 0,
    *,
    layers: tuple[str, ...] = ALL,
    text: bool = False,
    rank: int = 2,
    size: float = 0.2,
) -> Pairs:
    """(component, layer) -> (down, up), of the shapes tools write."""
    g = torch.Generator().manual_seed(seed)
    pairs: Pairs = {}
    for component, model in components(base).items():
        endings = layers if component == "unet" else TEXT if text else ()
        for path, module in model.named_modules():
            if path.endswith(tuple(f".{e}" for e in endings)) and hasattr(module, "weight"):
                out, *rest = module.weight.shape
                down = size * torch.randn(rank, *rest, generator=g)
                up = size * torch.randn(out, rank, *[1] * (len(rest) - 1), generator=g)
                pairs[component, path] = (down, up)
    return pairs


def product(down: Tensor, up: Tensor) -> Tensor:
    """Delta W of a pair, in the layer's shape."""
    return (up.flatten(1) @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:])


def write(
    path: Path,
    pairs: Pairs,
    layout: str = "peft",
    *,
    alpha: float | None = None,
    xl: bool = False,
    sgm: bool = False,
    metadata: dict[str, str] | None = None,
) -> Path:
    """A LoRA file in one of LAYOUTS; alpha None means alpha = rank."""
    tensors: dict[str, Tensor] = {}
    metadata = dict(metadata or {})
    for (component, layer), (down, up) in pairs.items():
        inner = layer if component == "unet" else f"text_model.{layer.removeprefix('text_model.')}"
        if layout == "kohya":
            te = ("lora_te1" if component == "text_encoder" else "lora_te2") if xl else "lora_te"
            name_in_file = _kohya_name(layer, True) if sgm else inner.replace(".", "_")
            key = f"{'lora_unet' if component == 'unet' else te}_{name_in_file}"
            tensors[f"{key}.lora_down.weight"], tensors[f"{key}.lora_up.weight"] = down, up
            tensors[f"{key}.alpha"] = torch.tensor(float(alpha or down.shape[0]))
            continue
        key = f"{component}.{inner}"
        if layout == "peft-own":
            key = f"base_model.model.{layer}"
        if layout.startswith("peft"):
            name = "style." * (layout == "peft-state")  # in a model's state dict each adapter has a name
            names = (f"{key}.lora_A.{name}weight", f"{key}.lora_B.{name}weight")
        elif layout == "diffusers-old" and layer.endswith(ATTENTION):
            head, tail = key.removesuffix(".0").rsplit(".", 1)
            names = (f"{head}.processor.{tail}_lora.down.weight", f"{head}.processor.{tail}_lora.up.weight")
        elif component == "unet":
            names = (f"{key}.lora.down.weight", f"{key}.lora.up.weight")
        else:
            names = (f"{key}.lora_linear_layer.down.weight", f"{key}.lora_linear_layer.up.weight")
        tensors[names[0]], tensors[names[1]] = down, up
    if layout == "peft-own":
        path = path.parent / "adapter_model.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        rank = next(iter(pairs.values()))[0].shape[0]
        (path.parent / "adapter_config.json").write_text(json.dumps({"r": rank, "lora_alpha": alpha or rank}))
    elif layout == "peft" and alpha:
        metadata["lora_adapter_metadata"] = json.dumps({f"{c}.lora_alpha": alpha for c, _ in pairs})
    elif alpha and layout != "kohya":
        raise ValueError("this layout has no alpha")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: t.contiguous() for k, t in tensors.items()}, path, metadata)
    return path
