"""Names of a U-Net's layers: diffusers' and those of the original code, which ComfyUI and A1111 have, too."""

from __future__ import annotations

import re

_TOP = {
    "conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2", "time_embedding.cond_proj": "time_embed.cond_proj",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0", "conv_out": "out.2",
}  # fmt: skip
_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
_BLOCK = re.compile(r"(?:(down|up)_blocks\.(\d+)|mid_block)\.(\w+)\.(\d+)(?:\.(.+))?")


def original_name(path: str, layers: int = 2, attention: bool = True) -> str:
    """The name of a U-Net's layer in the original code (LDM, sgm); paths of other parts stay as they are.

    path       its module name in diffusers, without ".weight"
    layers     ResNets of each block on the way down; 2 in Stable Diffusion
    attention  true if the block of an upsampler has attention
    """
    m = _BLOCK.fullmatch(path)
    if path in _TOP or m is None:
        return _TOP.get(path, path)
    side, block, part, index, tail = m[1], int(m[2] or 0), m[3], int(m[4]), m[5] or ""
    if part == "resnets":
        tail = _RESNET.get(tail, tail)
    if side is None:
        return f"middle_block.{1 if part == 'attentions' else 2 * index}.{tail}"
    first = block * (layers + 1)
    if part == "downsamplers":
        return f"input_blocks.{first + layers + 1}.0.op"
    if part == "upsamplers":
        return f"output_blocks.{first + layers}.{1 + attention}.{tail}"
    name, number = ("input_blocks", 1 + first + index) if side == "down" else ("output_blocks", first + index)
    return f"{name}.{number}.{int(part == 'attentions')}.{tail}"
