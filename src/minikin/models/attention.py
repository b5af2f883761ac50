"""Packed keys and values: the U-Net sees keys and values, never text.

The keys and values of cross-attention depend on the prompt alone. They are computed once per
prompt, concatenated over all sites on the last axis, and given to the U-Net as its
`encoder_hidden_states`; `PackedAttention` on every site slices out its own part. Nothing else in
the U-Net changes, its `state_dict` least of all, and every stock diffusers pipeline accepts packed
tensors as `prompt_embeds`.

    attach(unet)                      put the processors on
    kv = pack(unet, encodings)        (B, N, D) -> (B, N, 2 * sum of widths)
    detach(unet)                      take them off

With the processors on, plain text encodings still work: a site that is given something of the
text's own width behaves as the stock processor does. `pack` calls `to_k` and `to_v` themselves, so
adapters that wrap them (LoRA) are respected.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minikin.errors import BadModelFile
from minikin.models.regions import Steering


@dataclass(frozen=True)
class Site:
    """One cross-attention layer and its place in the packed tensor.

    The key occupies [start, start + width), the value the `width` numbers after it.
    """

    path: str
    width: int
    start: int

    @property
    def value(self) -> slice:
        return slice(self.start + self.width, self.start + 2 * self.width)


class Layout(NamedTuple):
    """All sites of a U-Net in order, the packed width and the text's width D."""

    sites: tuple[Site, ...]
    width: int
    text_width: int

    @property
    def n_values(self) -> int:
        return self.width // 2


class Addition(NamedTuple):
    """Differences to add: opening (B, N) times delta (sum of widths,) to the values, times keys to the keys."""

    opening: Tensor
    delta: Tensor
    keys: Tensor | None = None  # of concepts whose keys are not locked


def layout(unet: nn.Module) -> Layout:
    """Find the sites of a U-Net; raises BadModelFile if it has none."""
    sites, start, text_width = [], 0, 0
    for path, module in unet.named_modules():
        if path.endswith("attn2") and hasattr(module, "to_k"):
            to_k = getattr(module.to_k, "base_layer", module.to_k)  # under a LoRA wrapper
            sites.append(Site(path, to_k.out_features, start))
            start += 2 * to_k.out_features
            text_width = to_k.in_features
    if not sites:
        raise BadModelFile(
            "This U-Net has no cross-attention layers (attn2.to_k). Minikin works with text-to-image "
            "models of the Stable Diffusion 1, 2 and XL families."
        )
    return Layout(tuple(sites), start, text_width)


def pack(unet: nn.Module, encodings: Tensor, keys_from: Tensor | None = None,
         additions: Sequence[Addition] = (), shape: Layout | None = None) -> Tensor:  # fmt: skip
    """Keys and values of every site for these encodings, concatenated on the last axis.

    encodings  (B, N, D)   what values (and, unless `keys_from` is given, keys) are made of
    keys_from  (B, N, D)   what keys are made of (global key lock)
    additions  what each concept adds
    shape      `layout(unet)`, when it is at hand
    returns    (B, N, sum of 2 * width)
    """
    shape = shape or layout(unet)
    dtype = _weight_dtype(unet, shape)
    e = encodings.to(dtype)
    k_e = e if keys_from is None else keys_from.to(dtype)
    parts: list[Tensor] = []
    for site in shape.sites:
        attn: Any = unet.get_submodule(site.path)
        key, value = attn.to_k(k_e), attn.to_v(e)
        own = slice(site.start // 2, site.start // 2 + site.width)
        for opening, delta, keys in additions:
            value = value + (opening.unsqueeze(-1) * delta[own]).to(
                value.dtype
            )  # under autocast not its weight's
            if keys is not None:
                key = key + (opening.unsqueeze(-1) * keys[own]).to(key.dtype)
        parts += [key, value]
    return torch.cat(parts, dim=-1)


def attach(unet: Any) -> Layout:
    """Put `PackedAttention` on every cross-attention site; other processors stay as they are."""
    shape = layout(unet)
    by_path = {site.path: site for site in shape.sites}
    processors = dict(unet.attn_processors)
    for key in processors:
        site = by_path.get(key.removesuffix(".processor"))
        if site:
            processors[key] = PackedAttention(site, shape.width)
    unet.set_attn_processor(processors)
    return shape


def detach(unet: Any) -> None:
    """Give every cross-attention site the stock processor back."""
    from diffusers.models.attention_processor import AttnProcessor2_0

    unet.set_attn_processor({
        key: AttnProcessor2_0() if isinstance(p, PackedAttention) else p
        for key, p in unet.attn_processors.items()
    })  # fmt: skip


class PackedAttention:
    """Cross-attention of one site on its slice of the packed tensor.

    The same operations in the same order as diffusers' AttnProcessor2_0, so that results agree
    to the bit; only where keys and values come from differs.
    """

    def __init__(self, site: Site, packed_width: int) -> None:
        self.site, self.packed_width = site, packed_width
        self.record: list[Tensor] | None = None  # attention maps are kept here when it is a list
        self.steering: Steering | None = None  # set by `regions.steered`

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None, temb: Tensor | None = None, **_: Any,
    ) -> Tensor:  # fmt: skip
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
        if self.steering is not None and attention_mask is None:
            attention_mask = self.steering.bias(b, query.shape[2], query)
        if self.record is not None:
            weights = (query.float() @ key.float().transpose(-1, -2) * d**-0.5).softmax(-1)
            self.record.append(weights.mean(1))  # (B, positions, N), mean over heads
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
        start, width = self.site.start, self.site.width
        return context[..., start : start + width], context[..., start + width : start + 2 * width]


def _weight_dtype(unet: nn.Module, shape: Layout) -> torch.dtype:
    to_k: Any = unet.get_submodule(shape.sites[0].path + ".to_k")
    dtype: torch.dtype = getattr(to_k, "base_layer", to_k).weight.dtype
    return dtype
