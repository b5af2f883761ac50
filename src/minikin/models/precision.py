"""Precision of weights: hardware support for bfloat16, and the dtype that a folder names.

Emulated bfloat16 takes at least twice as long as float32.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

CAPABILITIES = ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16")  # of x86 and ARM, as PyTorch names them


def has_fast_bfloat16(device: torch.device) -> bool:
    """True if the device computes in bfloat16 without emulation."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return any(bool(capabilities.get(name)) for name in CAPABILITIES)
    return True


def autocast(device: torch.device, enabled: bool = True) -> torch.autocast:
    """Autocast to bfloat16 over float32 weights, if it is enabled and the device supports it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled and has_fast_bfloat16(device))


def name_float32(folder: Path) -> None:
    """Name float32 in the configurations of a folder's text encoders, whatever dtype they are stored in.

    Without a dtype, diffusers opens its own parts in float32 and those of transformers in the dtype that their
    configuration names; a pipeline of both cannot paint.
    """
    for path in folder.glob("text_encoder*/config.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps({**config, "dtype": "float32"}, indent=2) + "\n", encoding="utf-8")
