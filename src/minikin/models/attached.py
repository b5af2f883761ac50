"""Packed tensors on a pipeline of the user's that has ControlNets, which read text beside the U-Net.

Encodings ride along at the end of the tensor (B, N, W + D), and ControlNets take them where they meet it.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
from torch import Tensor

from minikin.models.attention import Layout

_WIDTHS: set[int] = set()  # of the packed tensors that were ever made for an attached pipeline
_CONTROL_NETWORKS = ("ControlNetModel", "ControlNetUnionModel")


def with_encodings(packed: Tensor, encodings: Tensor) -> Tensor:
    """The tensor for `prompt_embeds`: packed keys and values (B, N, W), then encodings (B, N, D)."""
    return torch.cat([packed, encodings.to(packed)], -1)


def attach_control_networks(layout: Layout) -> None:
    """Let ControlNets, which are loaded after this or before, take the encodings of a packed tensor."""
    import diffusers

    _WIDTHS.add(layout.width + layout.text_width)

    for name in _CONTROL_NETWORKS:
        network = getattr(diffusers, name, None)
        if network is None or hasattr(network.forward, "reads_packed"):
            continue
        network.forward = _reading_encodings(network.forward)


def _reading_encodings(forward: Any) -> Any:
    @wraps(forward)
    def wrapped(
        self: Any, sample: Tensor, timestep: Any, encoder_hidden_states: Tensor, *a: Any, **k: Any
    ) -> Any:
        if encoder_hidden_states.shape[-1] in _WIDTHS:
            width = self.config.cross_attention_dim
            encoder_hidden_states = encoder_hidden_states[..., -width:].contiguous()
        return forward(self, sample, timestep, encoder_hidden_states, *a, **k)

    wrapped.reads_packed = True  # type: ignore[attr-defined]
    return wrapped
