"""Cross-attention with concepts: each entry of a batch adds its own value differences.

`patched` sets one patch for each cross-attention layer, and a wrapper around the call of the model. The wrapper
hands the additions that the entries of the CONDITIONING brought to the patches, by the entries' uuid.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any
from uuid import uuid4

import torch
import torch.nn.functional as F
from comfy.ldm.modules.attention import optimized_attention, optimized_attention_masked
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from minikin.errors import BadRecipe, BaseMismatch
from minikin.models.regions import AttentionRegions, RegionBias, region_bias_of
from minikin.models.unet_names import original_name

from .concepts import ConceptInUse
from .conditioning import KEY, Additions

ROUNDING = 0.01  # of encodings that ComfyUI holds in bfloat16
MOST_ENTRIES = 16  # whose regions are remembered; each sampling has a few
Block = tuple[str, int, int]  # ComfyUI's: input, middle or output, its number, the transformer layer in it


def block_of(path: str, layers: int = 2) -> Block:
    """The block of the layer that diffusers names "down_blocks.1.attentions.0.transformer_blocks.2.attn2".

    layers  ResNets of each block on the way down
    """
    name, number, *_, layer, _ = original_name(path, layers).split(".")
    kind = name.split("_")[0]
    return kind, 0 if kind == "middle" else int(number), int(layer)


def patched(model: Any, uses: Sequence[ConceptInUse]) -> Any:
    """A clone of a MODEL that follows the additions in its CONDITIONING; raises BaseMismatch for other layers.

    A patch of another node (IP-Adapter) that is there already goes on: it gets the changed values.
    """
    for use in uses:
        _check(model, use)
    clone = model.clone()
    if any(isinstance(p, ConceptAttention) for p in _patches(clone).values()):
        return clone
    for path in uses[0].concept.delta if uses else ():
        block = block_of(path, _resnets(clone))
        before = _patches(clone).get(block) or _patches(clone).get(block[:2])
        clone.set_model_attn2_replace(ConceptAttention(path, before), *block)
    clone.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, AdditionsByEntry())
    return clone


class ConceptAttention:
    """One cross-attention layer (q, k, v after their projections -> its output before to_out)."""

    def __init__(self, path: str, before: Callable[..., Tensor] | None) -> None:
        self.path, self.before = path, before
        self.others: list[tuple[Callable[..., Tensor], dict[str, Any]]] = []

    def add(self, callback: Callable[..., Tensor], **options: Any) -> None:
        """Another patch whose output is added to this one's; IP-Adapter calls it on a patch that it meets."""
        self.others.append((callback, options))

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
        entries = [options.get(KEY, {}).get(uuid) for uuid in options.get("uuids", ())]
        mask = None
        if any(entry is not None for entry in entries):
            k = self._added(k, entries, "keys")
            v = self._added(v, entries, "deltas")
            mask = self._mask(q, k, entries, options)
        out = self._attention(q, k, v, options, mask)
        for callback, its_options in self.others:
            out = out + callback(out, q, k, v, options, **its_options)
        return out

    def _added(self, x: Tensor, entries: list[Any], kind: str) -> Tensor:
        """Keys or values (B, N, width) with the differences of each entry's concepts."""
        parts = []
        for entry, part in zip(entries, x.chunk(len(entries)), strict=True):
            for name, gate in entry.additions.gates.items() if entry else ():
                difference = getattr(entry.additions, kind)[name].get(self.path)
                if difference is not None:
                    part = part + (entry.tokens(gate, part.shape[1])[:, None] * difference).to(part)
            parts.append(part)
        return torch.cat(parts)

    def _mask(self, q: Tensor, k: Tensor, entries: list[Any], options: dict[str, Any]) -> Tensor | None:
        """The attention bias (B, positions, N) of the entries' regions; None where there are none."""
        rows = len(q) // len(entries)
        biases = [
            entry.bias(qs, ks, options) if entry else None
            for entry, qs, ks in zip(entries, q.chunk(len(entries)), k.chunk(len(entries)), strict=True)
        ]
        if all(bias is None for bias in biases):
            return None
        nothing = q.new_zeros(rows, q.shape[1], k.shape[1])
        return torch.cat([nothing if bias is None else bias for bias in biases])

    def _attention(
        self, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any], mask: Tensor | None
    ) -> Tensor:
        if self.before is not None:
            if mask is not None:
                raise BadRecipe(
                    "Another node replaces this model's cross-attention and takes no regions. Put it after the "
                    "Minikin node, or use one concept without a region."
                )
            return self.before(q, k, v, options)
        heads, precision = options["n_heads"], options.get("attn_precision")
        if mask is None:
            return optimized_attention(q, k, v, heads, attn_precision=precision, transformer_options=options)
        return optimized_attention_masked(
            q, k, v, heads, mask, attn_precision=precision, transformer_options=options
        )


class Entry:
    """The additions of one entry of a CONDITIONING while it is sampled, with the state of its regions."""

    def __init__(self, additions: Additions, length: int) -> None:
        self.additions = additions
        self.length = length  # tokens of the entry; more than those of the prompt after ConditioningConcat
        self.regions: dict[tuple[int, ...], RegionBias | None] = {}  # by rows and size of the latents
        self.sigma: float | None = None

    def tokens(self, x: Tensor, n: int) -> Tensor:
        """Values of the prompt's tokens (..., N) for n tokens: ComfyUI repeats a shorter entry of a batch."""
        padded = F.pad(x, (0, self.length - x.shape[-1]))
        return padded.repeat(*[1] * (x.ndim - 1), n // self.length)

    def step(self, sigma: float, share: float) -> None:
        """Called before every call of the model, with the share of the steps done."""
        if self.sigma is not None and sigma != self.sigma:
            for regions in self.regions.values():
                if regions:
                    regions.after_step(share)
        self.sigma = sigma

    def bias(self, q: Tensor, k: Tensor, options: dict[str, Any]) -> Tensor | None:
        """(rows, positions, N) of this entry's rows of one layer."""
        rows, height, width = len(q), *options["original_shape"][-2:]
        which = rows, height, width
        if which not in self.regions:
            self.regions[which] = region_bias_of(self.additions.regions, rows, (height, width))
        regions = self.regions[which]
        if regions is None:
            return None
        bias = regions.bias(rows, q.shape[1], q)
        if isinstance(regions, AttentionRegions):
            heads = options["n_heads"]
            regions.observe(_by_head(q, heads), _by_head(k[:, : self.additions.e.shape[1]], heads))
        return None if bias is None else self.tokens(bias[:, 0], k.shape[1])


class AdditionsByEntry:
    """The wrapper around each call of the model: additions by the uuid of the entries that brought them."""

    def __init__(self) -> None:
        self.entries: dict[Any, Entry] = {}  # by uuid, the last ones used
        self.checked: dict[tuple[Any, int], bool] = {}  # by uuid and encodings: are they the additions' own

    def __call__(
        self,
        call: Callable[..., Any],
        model: Any,
        conds: Any,
        x: Tensor,
        timestep: Tensor,
        options: dict[str, Any],
    ) -> Any:
        conds = [cond and [self._own(c) for c in cond] for cond in conds]
        here = [c for cond in conds for c in cond or () if KEY in c]
        for c in here:  # the last ones used stay: a sampler may ask for each prompt in a call of its own
            entry = self.entries.pop(c["uuid"], None) or Entry(c[KEY], _encodings(c).shape[1])
            self.entries[c["uuid"]] = entry
        while len(self.entries) > max(MOST_ENTRIES, len(here)):
            del self.entries[next(iter(self.entries))]
        transformer = options.get("transformer_options", {})
        sigma, sigmas = float(timestep[0]), transformer.get("sample_sigmas")
        share = 0.0 if sigmas is None else float((sigmas > sigma).sum()) / max(1, len(sigmas) - 1)
        for c in here:
            self.entries[c["uuid"]].step(sigma, share)
        return call(
            model, conds, x, timestep, {**options, "transformer_options": {**transformer, KEY: self.entries}}
        )

    def _own(self, c: dict[str, Any]) -> dict[str, Any]:
        """The entry without additions and with another uuid, if its encodings are not those they belong to.

        Nodes copy an entry's options to other encodings: ConditioningZeroOut, ConditioningAverage, and ComfyUI
        itself, which gives the negative prompt the area of the positive one.
        """
        if KEY not in c:
            return c
        which = c["uuid"], id(_encodings(c))
        if which not in self.checked:
            e = c[KEY].e
            difference = (_encodings(c)[:, : e.shape[1]].to(e) - e).abs().max()
            self.checked = {} if len(self.checked) > MOST_ENTRIES else self.checked
            self.checked[which] = bool(difference <= ROUNDING * e.abs().max())
            if not self.checked[which]:
                logging.info(
                    "Minikin: encodings that were changed after its node are painted without concepts."
                )
        if self.checked[which]:
            return c
        return {name: value for name, value in c.items() if name != KEY} | {"uuid": uuid4()}


def _encodings(c: dict[str, Any]) -> Tensor:
    e: Tensor = c["model_conds"]["c_crossattn"].cond
    return e


def _by_head(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _patches(model: Any) -> dict[Any, Any]:
    options: dict[Any, Any] = model.model_options["transformer_options"].get("patches_replace", {})
    patches: dict[Any, Any] = options.get("attn2", {})
    return patches


def _resnets(model: Any) -> int:
    number: int = model.get_model_object("diffusion_model").num_res_blocks[0]
    return number


def _check(model: Any, use: ConceptInUse) -> None:
    """Raise BaseMismatch unless the model has the cross-attention layers that the concept was taught on."""
    unet = model.get_model_object("diffusion_model")
    if not hasattr(unet, "num_res_blocks"):
        raise BaseMismatch(
            f"This model is a {type(unet).__name__}; concepts for ComfyUI are of U-Nets: Stable Diffusion 1.x, "
            "2.x and XL. Load a checkpoint of one of these."
        )
    there = {
        name: m.to_v.out_features
        for name, m in unet.named_modules()
        if name.endswith("attn2") and hasattr(m, "to_v")
    }
    concept = use.concept
    taught = {original_name(path, _resnets(model)): d.numel() for path, d in concept.delta.items()}
    if there != taught:
        raise BaseMismatch(
            f"Concept '{concept.name}' was taught on {concept.origin.architecture}, which has {len(taught)} "
            f"cross-attention layers; this model has {len(there)}, or others. Load a checkpoint of its family, "
            "or teach the concept on this one."
        )
