"""Tensors of checkpoints: names of earlier tools, diffusers' names for the original ones, and what is missing.

All of it works on tensors of the meta device, too: names and shapes of a header suffice to tell whether a
checkpoint can be opened.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minikin.errors import BadModelFile
from minikin.models import safetensors_header
from minikin.models.loading.architectures import Architecture

UNET = "model.diffusion_model."
_OLD_CLIP = re.compile(  # Stable Diffusion 1 of 2022, and SDXL's first text encoder likewise
    r"((?:cond_stage_model|conditioner\.embedders\.0)\.transformer\.)(embeddings|encoder|final_layer_norm)\."
)
_PROJECTION = ".text_projection.weight"
_OLD_ATTENTION = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
_LDM_ATTENTION = {".to_q.": ".q.", ".to_k.": ".k.", ".to_v.": ".v.", ".to_out.0.": ".proj_out."}
MAX_LISTED = 5  # names in a message
LARGEST_READ = 1 << 20  # bytes of a tensor that is looked at before a checkpoint is opened


def renamed(name: str) -> str:
    """The original (LDM, SGM) name of a tensor that another tool named otherwise."""
    name = _OLD_CLIP.sub(r"\1text_model.\2.", name)
    if name.startswith(("cond_stage_model.model.", "conditioner.embedders.1.model.")):
        return name.removesuffix(".weight") if name.endswith(_PROJECTION) else name
    if name.startswith("first_stage_model.") and ".mid.attn_1." in name:
        for table in (_OLD_ATTENTION, _LDM_ATTENTION):
            for other, original in table.items():
                name = name.replace(other, original)
    return name


def with_original_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under their original names. A projection that was a linear layer's weight is transposed."""
    return {
        renamed(name): t.T.contiguous() if name != renamed(name) and name.endswith(_PROJECTION) else t
        for name, t in tensors.items()
    }


def to_diffusers(tensors: Mapping[str, Tensor], a: Architecture) -> dict[str, dict[str, Tensor]]:
    """The tensors of each component of a pipeline under diffusers' names. Raises BadModelFile."""
    from diffusers.loaders.single_file_utils import (
        convert_ldm_clip_checkpoint,
        convert_ldm_unet_checkpoint,
        convert_ldm_vae_checkpoint,
        convert_open_clip_checkpoint,
    )

    state = with_original_names(tensors)
    try:
        unet = convert_ldm_unet_checkpoint(state, a.unet)
    except KeyError as e:  # the only names that it does not merely look for
        raise BadModelFile(f"it has no tensor named {UNET}{str(e)[1:-1]}") from None
    guidance = state.get(f"{UNET}time_embed.cond_proj.weight")
    if guidance is not None:
        unet["time_embedding.cond_proj.weight"] = guidance
    parts = {"unet": unet, "vae": convert_ldm_vae_checkpoint(state, a.vae)}
    for k, part in enumerate(["text_encoder", "text_encoder_2"][: len(a.texts)]):
        if k == 0 and a.name != "sd2":
            converted = convert_ldm_clip_checkpoint(state)
        else:
            prefix = "conditioner.embedders.1.model." if k else "cond_stage_model.model."
            converted = convert_open_clip_checkpoint(empty_part(part, a.texts[k]), state, prefix=prefix)
        parts[part] = {plain(name): t for name, t in converted.items()}
    return parts


def plain(name: str) -> str:
    """The name of a tensor of a text encoder, whose models wrap one another in some versions."""
    return name.removeprefix("text_model.")


def empty_part(part: str, config: Mapping[str, Any], kind: str = "") -> torch.nn.Module:
    """A component of a pipeline without weights, on the meta device.

    kind  class of diffusers or transformers; the component's usual one by default
    """
    import diffusers
    import transformers
    from accelerate import init_empty_weights  # type: ignore[import-untyped]

    usual = {
        "unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel",
        "text_encoder_2": "CLIPTextModelWithProjection",
    }  # fmt: skip
    kind = kind or usual[part]
    with init_empty_weights():
        if part in ("unet", "transformer", "vae"):
            model = getattr(diffusers, kind).from_config(dict(config))
        else:
            cls = getattr(transformers, kind)
            model = cls(cls.config_class(**config))
    empty: torch.nn.Module = model
    return empty


def missing(model: torch.nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Names of tensors that a component needs and that are absent or of another shape.

    shapes  of what is there, by name; a 1x1 convolution may stand for a linear layer
    """
    there = {_current(name): shape for name, shape in shapes.items()}
    wrong, tied = [], getattr(model, "_tied_weights_keys", None) or {}
    for name, tensor in model.state_dict().items():
        same = tied.get(name, name) if isinstance(tied, dict) else name  # files hold weights used twice once
        shape = there.get(_current(name), there.get(_current(same)))
        if shape is None:
            wrong.append(name)
        elif tuple(n for n in shape if n != 1) != tuple(n for n in tensor.shape if n != 1):
            wrong.append(f"{name} ({_by(shape)} in place of {_by(tensor.shape)})")
    return wrong


def _current(name: str) -> str:
    """The name of today's diffusers and transformers."""
    if ".mid_block.attentions." in name:
        for old, new in _OLD_ATTENTION.items():
            name = name.replace(old, new)
    return plain(name)


def _by(shape: Any) -> str:
    return "x".join(str(n) for n in shape) or "a number"


def filled(part: str, config: Mapping[str, Any], state: Mapping[str, Tensor], dtype: Any) -> torch.nn.Module:
    """A component of a pipeline with its weights in `dtype`; `missing` has found nothing."""
    model = empty_part(part, config)
    weights = {_current(name): t for name, t in state.items()}
    tensors = {
        name: weights[_current(name)].reshape(empty.shape).to(dtype)
        for name, empty in model.state_dict().items()
    }
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def incomplete(where: str, wrong: Mapping[str, list[str]]) -> str:
    """The sentence for a checkpoint with these missing tensors by component."""
    n = sum(len(names) for names in wrong.values())
    listed = [f"{part}: {', '.join(names[:MAX_LISTED])}" for part, names in wrong.items() if names]
    more = ", ..." if any(len(names) > MAX_LISTED for names in wrong.values()) else ""
    tensors = "1 tensor is" if n == 1 else f"{n} tensors are"
    return (
        f"{where} is incomplete: {tensors} missing or of another shape ({'; '.join(listed)}{more}). Get the "
        "full checkpoint again; one that a tool has trimmed or merged in part cannot be opened."
    )


_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


def read_tensor(path: Path, name: str) -> Tensor | None:
    """One small tensor of a safetensors file as float32; None where there is none, or a damaged one."""
    with open(path, "rb") as f, suppress(ValueError, KeyError, RuntimeError, OSError):
        n = int.from_bytes(f.read(8), "little")
        entry = safetensors_header.parse(f.read(n))[0][name]
        begin, end = entry["data_offsets"]
        if begin < end <= begin + LARGEST_READ:
            f.seek(8 + n + begin)
            return torch.frombuffer(bytearray(f.read(end - begin)), dtype=_DTYPES[entry["dtype"]]).float()
    return None
