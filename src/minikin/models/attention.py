"""Packed keys and values: cross-attention reads keys and values that were computed before the denoiser runs.

The keys and values of cross-attention depend on the prompt alone. `pack` computes them once per prompt and
concatenates them over all layers on the last axis. The result goes to the denoiser, a U-Net or a diffusion
transformer, as `encoder_hidden_states`. Each layer keeps its attention processor, which receives a view of
the layer: `to_k` and `to_v` of the view return the layer's slices of the packed tensor. So query and key
norms, masks and every attention backend work as before, and the `state_dict` stays the same.

    attach(denoiser)                      let every cross-attention layer read packed tensors
    e = project(denoiser, encodings)      (B, N, D of the text encoder) -> (B, N, D of to_k and to_v)
    kv = pack(denoiser, e)                (B, N, D) -> (B, N, 2 * sum of widths)
    detach(denoiser)                      undo `attach`

Plain text encodings still work after `attach`. Every stock diffusers pipeline accepts packed tensors as
`prompt_embeds`. `pack` calls the modules `to_k` and `to_v`, so adapters that wrap them (LoRA) take effect.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from minikin.errors import BadModelFile, BadRecipe
from minikin.models.families import NAMES
from minikin.models.regions import RegionBias, attention_maps

# modules of a transformer that text encodings pass before all layers: of PixArt, and both of SANA
TEXT_PROJECTION = ("caption_projection", "caption_norm")
# processors of diffusers that compute what AttnProcessor2_0 computes, without scaled_dot_product_attention
_EQUIVALENT = ("AttnProcessor", "SlicedAttnProcessor", "XFormersAttnProcessor")


@dataclass(frozen=True)
class CrossAttentionLayer:
    """One cross-attention layer and its slice of the packed tensor.

    path   its module name in the denoiser, for example mid_block.attentions.0.transformer_blocks.0.attn2
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
    """All cross-attention layers of a denoiser in order, the packed width and the width D that they read."""

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


def layout(denoiser: nn.Module) -> Layout:
    """Find the cross-attention layers of a denoiser; raises BadModelFile if it has none."""
    layers, start, text_width = [], 0, 0
    for path, module in denoiser.named_modules():
        if path.endswith("attn2") and hasattr(module, "to_k"):
            to_k = getattr(module.to_k, "base_layer", module.to_k)  # under a LoRA wrapper
            layers.append(CrossAttentionLayer(path, to_k.out_features, start))
            start += 2 * to_k.out_features
            text_width = to_k.in_features
    if not layers:
        raise BadModelFile(
            f"This {type(denoiser).__name__} has no cross-attention layers (attn2.to_k), so its text has no "
            f"keys and values that could be computed once per prompt. Open a model of the families {NAMES}."
        )
    return Layout(tuple(layers), start, text_width)


def text_projection(denoiser: nn.Module) -> list[nn.Module]:
    """The modules that text encodings pass before they reach the layers; [] for U-Nets."""
    modules = (getattr(denoiser, name, None) for name in TEXT_PROJECTION)
    return [module for module in modules if module is not None]


def project(denoiser: nn.Module, encodings: Tensor) -> Tensor:
    """Encodings (B, N, D of the text encoder) as `to_k` and `to_v` read them (B, N, D); for U-Nets the same.

    The projection is not linear, so the edit of Perfusion acts after it.
    """
    for module in text_projection(denoiser):
        encodings = module(encodings.to(next(module.parameters())))
    return encodings


def pack(
    denoiser: nn.Module,
    encodings: Tensor,
    keys_from: Tensor | None = None,
    additions: Sequence[Addition] = (),
    shape: Layout | None = None,
) -> Tensor:
    """Keys and values of every cross-attention layer for these encodings, concatenated on the last axis.

    encodings  (B, N, D)  input of the value projections, and of the key projections without `keys_from`
    keys_from  (B, N, D)  input of the key projections (global key lock)
    additions  differences of the concepts
    shape      `layout(denoiser)`, if the caller has it
    returns    (B, N, sum of 2 * width)
    """
    shape = shape or layout(denoiser)
    weight = _first_weight(denoiser, shape)
    e = encodings.to(weight)
    k_e = e if keys_from is None else keys_from.to(weight)
    parts: list[Tensor] = []
    for layer in shape.layers:
        attn: Any = denoiser.get_submodule(layer.path)
        key, value = attn.to_k(k_e), attn.to_v(e)
        part = slice(layer.start // 2, layer.start // 2 + layer.width)
        for gate, delta, keys in additions:
            # under autocast the value's dtype is not its weight's
            value = value + (gate.unsqueeze(-1) * delta[part]).to(value.dtype)
            if keys is not None:
                key = key + (gate.unsqueeze(-1) * keys[part]).to(key.dtype)
        parts += [key, value]
    return torch.cat(parts, dim=-1)


def attach(denoiser: Any) -> Layout:
    """Let every cross-attention layer read packed tensors; processors, weights and names stay."""
    shape = layout(denoiser)
    for layer in shape.layers:
        attention = denoiser.get_submodule(layer.path)
        attention.forward = PackedLayer(attention, layer, shape.width)
    if text_projection(denoiser):
        setattr(denoiser, _forward_name(denoiser), _PackedTransformer(denoiser, shape.width))
    return shape


def _forward_name(module: nn.Module) -> str:
    """The attribute with the module's forward pass, also inside a hook of accelerate (CPU offload)."""
    return "_old_forward" if "_old_forward" in vars(module) else "forward"


def detach(denoiser: Any) -> None:
    """Undo `attach`."""
    for module in denoiser.modules():
        if isinstance(vars(module).get("forward"), PackedLayer | _PackedTransformer):
            del module.forward
        if isinstance(vars(module).get("_old_forward"), PackedLayer | _PackedTransformer):
            module._old_forward = MethodType(type(module).forward, module)


def is_attached(denoiser: nn.Module, shape: Layout) -> bool:
    """True after `attach`, until anyone undoes it."""
    return all("forward" in vars(denoiser.get_submodule(layer.path)) for layer in shape.layers)


def packed_layers(denoiser: nn.Module) -> list[PackedLayer]:
    """The forward passes of all layers after `attach`."""
    forwards = (vars(module).get("forward") for module in denoiser.modules())
    return [forward for forward in forwards if isinstance(forward, PackedLayer)]


class PackedLayer:
    """Forward pass of one cross-attention layer, whose processor reads its slice of a packed tensor.

    record       attention maps are appended here if it is a list
    region_bias  is added to the attention scores; set by `regions.region_bias_applied`
    Raises BadRecipe for either, where the processor does not call PyTorch's scaled_dot_product_attention.
    """

    def __init__(self, attention: Any, layer: CrossAttentionLayer, packed_width: int) -> None:
        self.attention, self.packed_width = attention, packed_width
        start, middle, end = layer.start, layer.start + layer.width, layer.start + 2 * layer.width
        self.slices = {"to_k": slice(start, middle), "to_v": slice(middle, end), "to_kv": slice(start, end)}
        self.record: list[Tensor] | None = None
        self.region_bias: RegionBias | None = None

    def __call__(
        self, hidden_states: Tensor, encoder_hidden_states: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        text = encoder_hidden_states
        text = text[0] if isinstance(text, tuple) else text  # with IP-Adapter's encodings of images
        packed = text is not None and text.shape[-1] >= self.packed_width
        scores = _Scores(self) if self.record is not None or self.region_bias else None
        others = self._projections() if packed else {}
        if scores and type(self.attention.processor).__name__ in _EQUIVALENT:
            from diffusers.models.attention_processor import AttnProcessor2_0

            others["processor"] = AttnProcessor2_0()
        view = _View(self.attention, others) if others else self.attention
        with scores or nullcontext():
            out = type(self.attention).forward(view, hidden_states, encoder_hidden_states, *args, **kwargs)
        if scores and not scores.calls:
            raise BadRecipe(
                f"The attention processor {type(self.attention.processor).__name__} computes its scores by "
                "itself, so regions and masks from attention do not reach it. Set diffusers' AttnProcessor2_0."
            )
        return out

    def _projections(self) -> dict[str, Any]:
        names = [name for name in self.slices if hasattr(self.attention, name)]
        return {name: partial(self._slice, getattr(self.attention, name), self.slices[name]) for name in names}

    def _slice(self, projection: Any, part: slice, x: Tensor) -> Tensor:
        out: Tensor = x[..., part] if x.shape[-1] >= self.packed_width else projection(x)
        return out

    def mask(self, query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor | None:
        """The attention mask with the region bias; records attention maps on the way."""
        if self.region_bias is not None:
            bias = self.region_bias.bias(query.shape[0], query.shape[2], query)
            self.region_bias.observe(query, key, mask)
            mask = bias if mask is None else mask if bias is None else mask + bias
        if self.record is not None:
            self.record.append(attention_maps(query, key, mask))
        return mask


class _View:
    """An object with other values for some of its attributes."""

    def __init__(self, wrapped: Any, others: Mapping[str, Any]) -> None:
        self._wrapped, self._others = wrapped, others

    def __getattr__(self, name: str) -> Any:
        return self._others[name] if name in self._others else getattr(self._wrapped, name)


class _Scores(TorchFunctionMode):
    """Inside, scaled_dot_product_attention has the mask of `PackedLayer.mask`."""

    def __init__(self, layer: PackedLayer) -> None:
        super().__init__()
        self.layer, self.calls = layer, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        self.calls += 1
        inputs = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | kwargs
        inputs["attn_mask"] = self.layer.mask(inputs["query"], inputs["key"], inputs.get("attn_mask"))
        return func(**inputs)


class _PackedTransformer:
    """Forward pass of a transformer that projects its text: packed tensors pass by the projection."""

    def __init__(self, model: Any, packed_width: int) -> None:
        self.model, self.packed_width = model, packed_width

    def __call__(
        self, hidden_states: Tensor, encoder_hidden_states: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        packed = encoder_hidden_states is not None and encoder_hidden_states.shape[-1] == self.packed_width
        view = _View(self.model, self._passing_by(encoder_hidden_states)) if packed else self.model
        return type(self.model).forward(view, hidden_states, encoder_hidden_states, *args, **kwargs)

    def _passing_by(self, packed: Tensor) -> dict[str, Any]:
        """What stands in for the projection; between SANA's two modules the tensor has another shape."""
        if not hasattr(self.model, "caption_norm"):
            return dict.fromkeys(TEXT_PROJECTION)
        return {"caption_projection": lambda text: text.contiguous(), "caption_norm": lambda _: packed}


def _first_weight(denoiser: nn.Module, shape: Layout) -> Tensor:
    to_k: Any = denoiser.get_submodule(shape.layers[0].path + ".to_k")
    weight: Tensor = getattr(to_k, "base_layer", to_k).weight
    return weight
