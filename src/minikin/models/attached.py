"""Packed keys and values on a pipeline of the user's, whatever attention processors it has.

`attention.attach` sets a processor of its own, which other code may replace: IP-Adapter, attention slicing,
xFormers, fused projections, `set_attn_processor`. Here every cross-attention layer keeps the processor it has,
and the processor receives a view of the layer whose `to_k` and `to_v` take their slices of a packed tensor.

Encodings ride along at the end of the tensor (B, N, W + D), for networks beside the U-Net that read text:
ControlNets take them where they meet such a tensor.
"""

from __future__ import annotations

from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor

from minikin.models.attention import CrossAttentionLayer, Layout

_WIDTHS: set[int] = set()  # of the packed tensors that were ever made for an attached pipeline
_CONTROL_NETWORKS = ("ControlNetModel", "ControlNetUnionModel")


def attach_layers(unet: Any, layout: Layout) -> None:
    """Let every cross-attention layer read packed tensors; processors, weights and names stay."""
    for layer in layout.layers:
        attention = unet.get_submodule(layer.path)
        attention.forward = partial(_forward, attention, layer, layout.width)
    _WIDTHS.add(layout.width + layout.text_width)
    _attach_control_networks()


def detach_layers(unet: Any, layout: Layout) -> None:
    """Undo `attach_layers`."""
    for layer in layout.layers:
        unet.get_submodule(layer.path).__dict__.pop("forward", None)


def is_attached(unet: Any, layout: Layout) -> bool:
    """True after `attach_layers`, until anyone undoes it."""
    return all("forward" in vars(unet.get_submodule(layer.path)) for layer in layout.layers)


def with_encodings(packed: Tensor, encodings: Tensor) -> Tensor:
    """The tensor for `prompt_embeds`: packed keys and values (B, N, W), then encodings (B, N, D)."""
    return torch.cat([packed, encodings.to(packed)], -1)


def _forward(
    attention: Any,
    layer: CrossAttentionLayer,
    packed_width: int,
    hidden_states: Tensor,
    encoder_hidden_states: Any = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """The layer's own forward pass; a packed tensor meets a view of the layer."""
    text = encoder_hidden_states[0] if isinstance(encoder_hidden_states, tuple) else encoder_hidden_states
    packed = text is not None and text.shape[-1] >= packed_width
    view = _PackedView(attention, layer, packed_width) if packed else attention
    return type(attention).forward(view, hidden_states, encoder_hidden_states, *args, **kwargs)


class _PackedView:
    """An attention layer whose projections of the text are slices of a packed tensor."""

    def __init__(self, attention: Any, layer: CrossAttentionLayer, packed_width: int) -> None:
        self._attention, self._width = attention, packed_width
        start, middle, end = layer.start, layer.start + layer.width, layer.start + 2 * layer.width
        self._slices = {"to_k": slice(start, middle), "to_v": slice(middle, end), "to_kv": slice(start, end)}

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._attention, name)
        return partial(self._project, value, self._slices[name]) if name in self._slices else value

    def _project(self, projection: Any, part: slice, x: Tensor) -> Tensor:
        out: Tensor = x[..., part] if x.shape[-1] >= self._width else projection(x)
        return out


def _attach_control_networks() -> None:
    """Let ControlNets, which are loaded after this or before, take the encodings of a packed tensor."""
    import diffusers

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
