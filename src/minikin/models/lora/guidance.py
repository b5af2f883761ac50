"""Guidance as an input of a base that has none, so that a LoRA can make it a full consistency model.

A full LCM's U-Net adds a projection of its guidance embedding to the sinusoids of the timestep (Luo et
al. 2023, arXiv:2310.04378, section 4.3; diffusers' `time_cond_proj_dim`). A LoRA that changes this layer
starts from zeros: a U-Net with a projection of zeros is the same as one without.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

LAYER = "time_embedding.cond_proj"


def blank(unet: Any, width: int) -> nn.Linear:
    """The projection (width -> the timestep's sinusoids) that changes nothing, for this U-Net."""
    inner = unet.time_embedding.linear_1
    layer = nn.Linear(
        width, inner.in_features, bias=False, device=inner.weight.device, dtype=inner.weight.dtype
    )
    nn.init.zeros_(layer.weight)
    return layer.requires_grad_(False)


@contextmanager
def embedded(unet: Any, layer: nn.Linear | None) -> Iterator[None]:
    """Inside, the U-Net has this projection, and its configuration says so; None changes nothing."""
    if layer is None:
        yield
        return
    before = unet._internal_dict
    unet.time_embedding.cond_proj = layer
    unet.register_to_config(time_cond_proj_dim=layer.in_features)
    try:
        yield
    finally:
        unet.time_embedding.cond_proj = None
        unet._internal_dict = before


def widths(layers: Any) -> set[int]:
    """Of the guidance embeddings that these (component, layer): pair entries want; mostly none or one."""
    return {pair.down.shape[1] for (component, name), pair in layers if (component, name) == ("unet", LAYER)}
