"""Names of tensors in adapter files: which layer a tensor belongs to, and what it is there.

Read are the names of kohya's scripts, LyCORIS and OneTrainer (`lora_unet_down_blocks_0_...`, `lora_te_`,
`lora_te1_`, `lora_te2_`), all with diffusers' or with the original (sgm) numbers of blocks; ComfyUI
(`diffusion_model.input_blocks.1.1...`); diffusers, old and new; and PEFT (with or without
`base_model.model.`). kohya writes `_` for `.`, so layers are looked up with `_` throughout.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from minikin.models import unet_names
from minikin.models.base import Base
from minikin.models.lora import guidance

_LORA = {  # the ends of a name, and the field that they stand for
    "lora_down.weight": "down", "lora_A.weight": "down", "lora.down.weight": "down",
    "lora_linear_layer.down.weight": "down", "lora_up.weight": "up", "lora_B.weight": "up",
    "lora.up.weight": "up", "lora_linear_layer.up.weight": "up", "lora_mid.weight": "mid",
    "lora_B.bias": "up_bias", "lora_magnitude_vector": "magnitude", "lora_magnitude_vector.weight": "magnitude",
}  # fmt: skip
_OTHERS = (
    "alpha", "scalar", "dora_scale", "diff", "diff_b", "w_norm", "b_norm", "on_input", "weight",
    *(f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
    *(f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t1", "t2")),
)  # fmt: skip
FIELDS = {f".{end}": field for end, field in {**_LORA, **{name: name for name in _OTHERS}}.items()}
_OLD_DIFFUSERS = re.compile(r"_lora\.(down|up)\.weight$")
_PEFT_NAME = re.compile(
    r"(?<=\.lora_[AB])\.[^.]+(?=\.(?:weight|bias)$)"
)  # an adapter's, in a model's state dict
_ADAPTER_WORDS = re.compile(r"(?i)lora|lokr_|hada_|oft_|lycoris|[.](on_input|diff|diff_b|[wb]_norm)$")
_BUNDLED = re.compile(r"bundle_emb\.(.+?)\.(string_to_param\.\*|[^.]+)")
EMBEDDING = "bundle_emb."  # OneTrainer puts the embeddings trained along into the LoRA's file
_PREFIXES = {  # by component, in the names of tensors with `_` for `.`
    "unet": "lora_unet_ lycoris_unet_ lycoris_ unet_ model_diffusion_model_ diffusion_model_",
    "text_encoder": "lora_te1_ lora_te_ lycoris_te1_ lycoris_te_ text_encoder_ "
    "text_encoders_clip_l_transformer_",
    "text_encoder_2": "lora_te2_ lycoris_te2_ text_encoder_2_ text_encoders_clip_g_transformer_",
}

Layer = tuple[str, str]  # component and module path, by diffusers' names


class Key(NamedTuple):
    """A tensor's place: the layer's name as the file has it, and a field of FIELDS."""

    stem: str
    field: str


def parse(key: str) -> Key | None:
    """The place of a tensor by its name; None for names that no adapter has."""
    key = _PEFT_NAME.sub("", key.replace(".default.", ".").removesuffix(".default"))
    if m := _OLD_DIFFUSERS.search(key):
        return Key(key[: m.start()].replace(".processor.", "."), m[1])
    end = max((e for e in FIELDS if key.endswith(e)), key=len, default="")
    return Key(key.removesuffix(end).replace(".processor.", "."), FIELDS[end]) if end else None


def is_adapter(key: str) -> bool:
    """True for a name that only tensors of adapters have."""
    return bool(_ADAPTER_WORDS.search(key)) and not key.startswith(EMBEDDING)


def embedding_names(keys: Iterable[str]) -> list[str]:
    """Names of the embeddings that these keys bundle: `bundle_emb.NAME.clip_l` and the like."""
    return sorted({m[1] for key in keys if (m := _BUNDLED.fullmatch(key))})


def bundled(key: str) -> tuple[str, str]:
    """Name and part of a bundled embedding's key; ("", key) for other keys."""
    m = _BUNDLED.fullmatch(key)
    return (m[1], m[2]) if m else ("", key)


def grouped(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The tensors by stem and field; those without a place are left out. `.weight` counts for IA3 alone."""
    groups: dict[str, dict[str, Tensor]] = {}
    for name, t in tensors.items():
        if key := parse(name):
            groups.setdefault(key.stem, {})[key.field] = t
    for fields in groups.values():
        if "on_input" not in fields:
            fields.pop("weight", None)
    return {stem: fields for stem, fields in groups.items() if fields}


def layer_names(base: Base) -> dict[str, Layer]:
    """Every name of every layer of a base, with `_` for `.`, and prefixed by the component as files do."""
    names: dict[str, Layer] = {}
    for component, model in components(base).items():
        for path in _paths(model, component):
            for alias in _aliases(path, model, component):
                flat = alias.replace(".", "_")
                names |= {prefix + flat: (component, path) for prefix in _PREFIXES[component].split()}
                names.setdefault(flat, (component, path))  # PEFT names no component
    return names


def components(base: Base) -> dict[str, nn.Module]:
    """Components that an adapter may change, by diffusers' names."""
    names = ("text_encoder", "text_encoder_2")
    return {"unet": base.denoiser, **dict(zip(names, base.text_encoders, strict=False))}


def find_layer(names: Mapping[str, Layer], stem: str) -> Layer | None:
    """The layer of a stem, or None."""
    return names.get(stem.removeprefix("base_model.model.").replace(".", "_"))


def _paths(model: nn.Module, component: str) -> Iterable[str]:
    """Module paths of a model's layers with a weight; PEFT's own parts of them are left out."""
    for path, module in model.named_modules():
        layer = getattr(module, "base_layer", module)
        if hasattr(layer, "weight") and not re.search(r"lora_|base_layer", path):
            yield path
    if component == "unet":
        yield guidance.LAYER  # of a full consistency model, which the base may lack


def _aliases(path: str, model: Any, component: str) -> list[str]:
    if component == "unet":
        aliases = [path, original_name(path, model)]
    else:
        bare = path.removeprefix("text_model.")
        old = re.sub(r"\b([qkv])_proj\b", r"to_\1", bare).replace("out_proj", "to_out")  # diffusers 0.1x
        aliases = [f"{head}{tail}" for head in ("", "text_model.") for tail in (bare, old)]
    return [*aliases, *(a.removesuffix(".0") for a in aliases if a.endswith("to_out.0"))]


def original_name(path: str, unet: Any) -> str:
    """`unet_names.original_name` of a layer of this U-Net."""
    layers = unet.config.layers_per_block
    layers = layers if isinstance(layers, int) else layers[0]
    block = re.match(r"up_blocks\.(\d+)\.upsamplers", path)
    attention = bool(block and getattr(unet.up_blocks[int(block[1])], "attentions", None))
    return unet_names.original_name(path, layers, attention)
