"""Safetensors files that are all header, but for a few values: enough to recognise a checkpoint."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_DTYPES = {
    torch.float16: "F16", torch.bfloat16: "BF16", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
KEY = "model.diffusion_model."
BIAS = KEY + "output_blocks.11.1.transformer_blocks.0.norm1.bias"


def header_only(
    path: Path,
    shapes: Mapping[str, list[int]],
    metadata: dict[str, str] | None = None,
    values: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write a file of these tensors without their bytes.

    values  tensors that are written with their bytes, float32 as float16
    """
    header: dict[str, Any] = {"__metadata__": metadata or {}}
    data = b""
    for name, tensor in (values or {}).items():
        tensor = tensor.half() if tensor.dtype == torch.float32 else tensor
        raw = tensor.view(torch.uint8).numpy().tobytes()
        header[name] = {
            "dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }  # fmt: skip
        data += raw
    for name, shape in shapes.items():
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [0, 0]}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def shapes(width: int, **more: list[int]) -> dict[str, list[int]]:
    """Tensors that name a family by the width of the text it reads."""
    parts = [
        "first_stage_model.x", "cond_stage_model.x", "conditioner.embedders.0.x", "conditioner.embedders.1.x",
    ]  # fmt: skip
    return {
        KEY + "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": [640, width],
        KEY + "input_blocks.0.0.weight": [320, 4, 3, 3], **{p: [1] for p in parts}, **more,
    }  # fmt: skip
