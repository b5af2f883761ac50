"""Where bfloat16 is quick: processors without units for it imitate it, at twice the time of float32 or more."""

from __future__ import annotations

import torch

UNITS = ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16")  # of x86 and of ARM processors, as PyTorch names them


def quick(device: torch.device) -> bool:
    """Whether bfloat16 is computed there, not imitated."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        have = torch.cpu.get_capabilities()
        return any(bool(have.get(unit)) for unit in UNITS)
    return True


def autocast(device: torch.device, wanted: bool = True) -> torch.autocast:
    """Inside, networks compute in bfloat16 over float32 weights, if that is wanted and quick."""
    return torch.autocast(device.type, torch.bfloat16, enabled=wanted and quick(device))
