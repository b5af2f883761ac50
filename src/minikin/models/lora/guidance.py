"""Guidance embedding for a base without one, so that a LoRA can turn it into a full consistency model.

The U-Net of a full LCM adds a projection of its guidance embedding to the sinusoids of the timestep (Luo et
al. 2023, arXiv:2310.04378, section 4.3; `time_cond_proj_dim` in diffusers). A LoRA changes this layer starting
from zeros, because a U-Net with a zero projection equals one without.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

LAYER = "time_embedding.cond_proj"


def zero_projection(unet: Any, width: int) -> nn.Linear:
    """A projection of zeros from a guidance embedding of this width to the timestep's sinusoids."""
    inner = unet.time_embedding.linear_1
    layer = nn.Linear(
        width, inner.in_features, bias=False, device=inner.weight.device, dtype=inner.weight.dtype
    )
    nn.init.zeros_(layer.weight)
    return layer.requires_grad_(False)


@contextmanager
def embedded(unet: Any, layer: nn.Linear | None) -> Iterator[None]:
    """Context in which the U-Net has this projection, also in its configuration; None changes nothing."""
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
    """Widths of the guidance embeddings that these ((component, layer), change) items change."""
    return {c.down.shape[1] for layer, c in layers if layer == ("unet", LAYER) and hasattr(c, "down")}
