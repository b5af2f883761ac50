"""Write a miniature pipeline as a single-file checkpoint in the original (LDM, SGM, OpenCLIP) layout."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
_TOP = {
    "conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2", "time_embedding.cond_proj": "time_embed.cond_proj",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0", "conv_out": "out.2",
}  # fmt: skip


def unet_name(name: str, layers: int, attention_up: list[bool]) -> str:
    """diffusers' name of a U-Net tensor to the original one."""
    for ours, theirs in _TOP.items():
        if name.startswith(ours + "."):
            return theirs + name[len(ours) :]
    kind, rest = name.split(".", 1)
    if kind == "mid_block":
        part, j, tail = rest.split(".", 2)
        place = f"middle_block.{1 if part == 'attentions' else 2 * int(j)}"
    else:
        i, part, j, tail = rest.split(".", 3)
        step = layers + 1
        if kind == "down_blocks":
            if part == "downsamplers":
                return f"input_blocks.{(int(i) + 1) * step}.0.op.{tail.removeprefix('conv.')}"
            place = f"input_blocks.{1 + int(i) * step + int(j)}.{int(part == 'attentions')}"
        else:
            if part == "upsamplers":
                return f"output_blocks.{int(i) * step + layers}.{1 + attention_up[int(i)]}.{tail}"
            place = f"output_blocks.{int(i) * step + int(j)}.{int(part == 'attentions')}"
    if part == "resnets":
        head, leaf = tail.split(".", 1)
        tail = f"{_RESNET[head]}.{leaf}"
    return f"{place}.{tail}"


def vae_name(name: str, n: int) -> str:
    """diffusers' name of a VAE tensor to the original one."""
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    name = name.replace("mid_block.attentions.0", "mid.attn_1")
    for ours, theirs in (
        ("group_norm", "norm"),
        ("to_q", "q"),
        ("to_k", "k"),
        ("to_v", "v"),
        ("to_out.0", "proj_out"),
    ):
        name = name.replace(f"attn_1.{ours}.", f"attn_1.{theirs}.")
    name = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d)\.resnets", lambda m: f"up.{n - 1 - int(m[1])}.block", name)
    return re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{n - 1 - int(m[1])}.upsample", name)


def openclip(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """A CLIP text model in OpenCLIP's layout (fused in_proj)."""
    out: dict[str, Tensor] = {}
    state = {k.removeprefix("text_model."): v for k, v in state.items()}
    for name, t in state.items():
        if m := re.match(r"encoder\.layers\.(\d+)\.self_attn\.q_proj\.(weight|bias)", name):
            parts = [state[f"encoder.layers.{m[1]}.self_attn.{x}_proj.{m[2]}"] for x in "qkv"]
            out[f"{prefix}transformer.resblocks.{m[1]}.attn.in_proj_{m[2]}"] = torch.cat(parts)
        elif re.search(r"self_attn\.[kv]_proj", name):
            continue
        elif name == "text_projection.weight":
            out[f"{prefix}text_projection"] = t.T.contiguous()
        else:
            new = re.sub(r"encoder\.layers\.(\d+)\.", r"transformer.resblocks.\1.", name)
            for ours, theirs in (
                ("self_attn.out_proj", "attn.out_proj"), ("layer_norm1", "ln_1"), ("layer_norm2", "ln_2"),
                ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj"), ("final_layer_norm", "ln_final"),
                ("embeddings.token_embedding", "token_embedding"),
                ("embeddings.position_embedding.weight", "positional_embedding"),
            ):  # fmt: skip
                new = new.replace(ours, theirs)
            if "position_ids" not in new:
                out[prefix + new] = t
    return out


def checkpoint(pipe: Any, family: str) -> dict[str, Tensor]:
    """All tensors of a pipeline under their original names."""
    c = pipe.unet.config
    attention_up = ["CrossAttn" in b for b in c.up_block_types]
    out = {
        "model.diffusion_model." + unet_name(k, c.layers_per_block, attention_up): v
        for k, v in pipe.unet.state_dict().items()
    }
    levels = len(pipe.vae.config.block_out_channels)
    for k, v in pipe.vae.state_dict().items():
        name = "first_stage_model." + vae_name(k, levels)
        square = v.ndim == 2 and "attn_1" in name
        out[name] = v[:, :, None, None] if square else v
    text = pipe.text_encoder.state_dict()
    clip = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in text.items()}
    if family == "sdxl":
        out |= {f"conditioner.embedders.0.transformer.{k}": v for k, v in clip.items()}
        out |= openclip(pipe.text_encoder_2.state_dict(), "conditioner.embedders.1.model.")
    elif family in ("sd21", "sd-turbo"):
        out |= openclip(text, "cond_stage_model.model.")
    else:
        out |= {f"cond_stage_model.transformer.{k}": v for k, v in clip.items()}
    return {k: v.contiguous() for k, v in out.items()}
