"""Packed keys and values: cross-attention reads keys and values that were computed before the U-Net runs.

The keys and values of cross-attention depend on the prompt alone. `pack` computes them once per
prompt and concatenates them over all layers on the last axis. The result goes to the U-Net as
`encoder_hidden_states`, and the processor `PackedAttention` of each layer takes its slice. Nothing
else in the U-Net changes, and the `state_dict` stays the same. Every stock diffusers pipeline accepts
packed tensors as `prompt_embeds`.

    attach(unet)                      set the attention processors
    kv = pack(unet, encodings)        (B, N, D) -> (B, N, 2 * sum of widths)
    detach(unet)                      restore the stock processors

Plain text encodings still work while the processors are set: a layer that receives a tensor of the
text's width behaves as the stock processor does. `pack` calls the modules `to_k` and `to_v`, so
adapters that wrap them (LoRA) take effect.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minikin.errors import BadModelFile
from minikin.models.regions import RegionBias, attention_maps


@dataclass(frozen=True)
class CrossAttentionLayer:
    """One cross-attention layer and its slice of the packed tensor.

    path   its module name in the U-Net, for example mid_block.attentions.0.transformer_blocks.0.attn2
    width  output features of to_k and of to_v
    start  the key is at [start, start + width), the value at the `width` positions after it
    """

    path: str
    width: int
    start: int

    @property
    def value(self) -> slice:
        return slice(self.start + self.width, self.start + 2 * self.width)


class Layout(NamedTuple):
    """All cross-attention layers of a U-Net in order, the packed width and the text's width D."""

    layers: tuple[CrossAttentionLayer, ...]
    width: int
    text_width: int

    @property
    def n_values(self) -> int:
        """Sum of the widths of all value projections."""
        return self.width // 2


class Addition(NamedTuple):
    """Additions of one concept to packed values and keys.

    gate   (B, N)            how far the concept's gate is open at each token
    delta  (sum of widths,)  value difference in packed order; gate * delta is added to the values
    keys   (sum of widths,)  key difference, for concepts whose keys are not locked; else None
    """

    gate: Tensor
    delta: Tensor
    keys: Tensor | None = None


def layout(unet: nn.Module) -> Layout:
    """Find the cross-attention layers of a U-Net; raises BadModelFile if it has none."""
    layers, start, text_width = [], 0, 0
    for path, module in unet.named_modules():
        if path.endswith("attn2") and hasattr(module, "to_k"):
            to_k = getattr(module.to_k, "base_layer", module.to_k)  # under a LoRA wrapper
            layers.append(CrossAttentionLayer(path, to_k.out_features, start))
            start += 2 * to_k.out_features
            text_width = to_k.in_features
    if not layers:
        raise BadModelFile(
            "This U-Net has no cross-attention layers (attn2.to_k). Minikin works with text-to-image "
            "models of the Stable Diffusion 1, 2 and XL families."
        )
    return Layout(tuple(layers), start, text_width)


def pack(
    unet: nn.Module,
    encodings: Tensor,
    keys_from: Tensor | None = None,
    additions: Sequence[Addition] = (),
    shape: Layout | None = None,
) -> Tensor:
    """Keys and values of every cross-attention layer for these encodings, concatenated on the last axis.

    encodings  (B, N, D)  input of the value projections, and of the key projections without `keys_from`
    keys_from  (B, N, D)  input of the key projections (global key lock)
    additions  differences of the concepts
    shape      `layout(unet)`, if the caller has it
    returns    (B, N, sum of 2 * width)
    """
    shape = shape or layout(unet)
    weight = _first_weight(unet, shape)
    e = encodings.to(weight)
    k_e = e if keys_from is None else keys_from.to(weight)
    parts: list[Tensor] = []
    for layer in shape.layers:
        attn: Any = unet.get_submodule(layer.path)
        key, value = attn.to_k(k_e), attn.to_v(e)
        part = slice(layer.start // 2, layer.start // 2 + layer.width)
        for gate, delta, keys in additions:
            # under autocast the value's dtype is not its weight's
            value = value + (gate.unsqueeze(-1) * delta[part]).to(value.dtype)
            if keys is not None:
                key = key + (gate.unsqueeze(-1) * keys[part]).to(key.dtype)
        parts += [key, value]
    return torch.cat(parts, dim=-1)


def attach(unet: Any) -> Layout:
    """Set `PackedAttention` on every cross-attention layer; other processors stay as they are."""
    shape = layout(unet)
    by_path = {layer.path: layer for layer in shape.layers}
    processors = dict(unet.attn_processors)
    for key in processors:
        layer = by_path.get(key.removesuffix(".processor"))
        if layer:
            processors[key] = PackedAttention(layer, shape.width)
    unet.set_attn_processor(processors)
    return shape


def detach(unet: Any) -> None:
    """Restore the stock processor of every cross-attention layer."""
    from diffusers.models.attention_processor import AttnProcessor2_0

    unet.set_attn_processor(
        {
            key: AttnProcessor2_0() if isinstance(p, PackedAttention) else p
            for key, p in unet.attn_processors.items()
        }
    )


class PackedAttention:
    """Attention processor of one cross-attention layer; reads its slice of the packed tensor.

    It runs the same operations in the same order as diffusers' AttnProcessor2_0, so that results
    are bit-identical. Only the source of keys and values differs.
    """

    def __init__(self, layer: CrossAttentionLayer, packed_width: int) -> None:
        self.layer, self.packed_width = layer, packed_width
        self.record: list[Tensor] | None = None  # attention maps are appended here if it is a list
        self.region_bias: RegionBias | None = None  # set by `regions.region_bias_applied`

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        residual, shape = hidden_states, hidden_states.shape
        if hidden_states.ndim == 4:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        b = hidden_states.shape[0]
        query = attn.to_q(hidden_states)
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        key, value = self.key_value(attn, context)
        d = key.shape[-1] // attn.heads
        query, key, value = (x.view(b, -1, attn.heads, d).transpose(1, 2) for x in (query, key, value))
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, key.shape[2], b)
            attention_mask = attention_mask.view(b, attn.heads, -1, attention_mask.shape[-1])
        if self.region_bias is not None and attention_mask is None:
            attention_mask = self.region_bias.bias(b, query.shape[2], query)
            self.region_bias.observe(query, key)
        if self.record is not None:
            self.record.append(attention_maps(query, key))
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
        out = out.transpose(1, 2).reshape(b, -1, attn.heads * d).to(query.dtype)
        out = attn.to_out[1](attn.to_out[0](out))
        if len(shape) == 4:
            out = out.transpose(-1, -2).reshape(shape)
        if attn.residual_connection:
            out = out + residual
        return out / attn.rescale_output_factor  # type: ignore[no-any-return]

    def key_value(self, attn: Any, context: Tensor) -> tuple[Tensor, Tensor]:
        if context.shape[-1] != self.packed_width:  # plain text encodings
            return attn.to_k(context), attn.to_v(context)
        start, width = self.layer.start, self.layer.width
        return context[..., start : start + width], context[..., start + width : start + 2 * width]


def _first_weight(unet: nn.Module, shape: Layout) -> Tensor:
    to_k: Any = unet.get_submodule(shape.layers[0].path + ".to_k")
    weight: Tensor = getattr(to_k, "base_layer", to_k).weight
    return weight
