"""Networks of a distillation behind one interface: teacher, student, target network, fake score.

A `Network` wraps a U-Net of the base's architecture. It packs keys and values with this U-Net's
projections, so that trained to_k and to_v take effect, and converts the raw prediction into x0 and
noise. The base's U-Net is the frozen teacher; every other network is a copy of it:

    lora   a frozen copy with a LoRA on the layers of the published LCM-LoRA
    full   a copy with every weight trainable, in float32
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from minikin.distillation.concept_captions import read
from minikin.distillation.solver import Estimate, Schedule, guidance_embedding
from minikin.errors import BadRecipe
from minikin.models import attention as keysvalues
from minikin.models.attention import Addition
from minikin.models.base import Base
from minikin.models.loading.lock import opening
from minikin.models.lora.guidance import LAYER
from minikin.models.prompt import Prompt
from minikin.perfusion.attach import Concepts
from minikin.perfusion.conditioning import encoded

Kind = Literal["lora", "full"]
GUIDANCE_WIDTH = 256  # of the full LCM's guidance embedding
# Luo et al. 2023, arXiv:2311.05556, in diffusers' training script: attention, feed-forward, convolutions
TARGETS = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "proj_in",
    "proj_out",
    "ff.net.0.proj",
    "ff.net.2",
    "conv1",
    "conv2",
    "conv_shortcut",
    "downsamplers.0.conv",
    "upsamplers.0.conv",
    "time_emb_proj",
)


class Texts(NamedTuple):
    """Encoded captions.

    e          encodings (B, N, D)
    pooled     SDXL's pooled embedding (B, P), or None
    summary    the whole caption as one vector (B, S): pooled, or the encoding at the end token
    additions  keys and values that concepts add
    """

    e: Tensor
    pooled: Tensor | None
    summary: Tensor
    additions: tuple[Addition, ...] = ()

    def rows(self, which: Tensor) -> Texts:
        pooled = None if self.pooled is None else self.pooled[which]
        additions = tuple(a._replace(gate=a.gate[which]) for a in self.additions)
        return Texts(self.e[which], pooled, self.summary[which], additions)


class Encoder:
    """Encodes captions, and the empty prompt for guidance.

    concepts  concepts that captions may name as <name>; with None captions have no syntax
    """

    def __init__(self, base: Base, concepts: Concepts | None = None) -> None:
        self.base, self.concepts = base, concepts

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> Texts:
        prompts = [self._prompt(c) for c in captions]
        out = self.base.encode(prompts)
        e, pooled, additions = self._with_concepts(prompts, out.e, out.pooled)
        end = out.valid.sum(1) - 1
        at_end = e[torch.arange(len(e), device=e.device), end]
        return Texts(e, pooled, at_end if pooled is None else pooled, additions)

    def _prompt(self, caption: str) -> Prompt:
        return Prompt(caption, caption) if self.concepts is None else read(caption, self.concepts)

    def _with_concepts(
        self, prompts: Sequence[Prompt], e: Tensor, pooled: Tensor | None
    ) -> tuple[Tensor, Tensor | None, tuple[Addition, ...]]:
        """Encodings and additions with the concepts' in the rows that name one; other rows are unchanged."""
        rows = [k for k, p in enumerate(prompts) if p.uses]
        if not rows or self.concepts is None:
            return e, pooled, ()
        encodings, encodings_pooled, additions = encoded(
            self.base, [prompts[k] for k in rows], self.concepts.loaded
        )
        e = e.clone()
        e[rows] = encodings.to(e)
        if pooled is not None and encodings_pooled is not None:
            pooled = pooled.clone()
            pooled[rows] = encodings_pooled.to(pooled)
        spread_additions = []
        for a in additions:
            gate = torch.zeros(e.shape[:2], device=e.device, dtype=a.gate.dtype)
            gate[rows] = a.gate
            spread_additions.append(a._replace(gate=gate))
        return e, pooled, tuple(spread_additions)

    @torch.no_grad()
    def empty(self, n: int) -> Texts:
        if self.base.zeros_for_empty:
            e, pooled = self.base.zero_encoding()
            return Texts(e, pooled, pooled).rows(torch.zeros(n, dtype=torch.long))
        return self([""]).rows(torch.zeros(n, dtype=torch.long))


class Network(nn.Module):
    """U-Net whose output for (x_t, t, texts) is an estimate of x0 and noise, float32."""

    def __init__(self, base: Base, unet: Any, schedule: Schedule, *, autocast: bool = False) -> None:
        super().__init__()
        self.unet, self.schedule, self.autocast = unet, schedule, autocast
        self._base = base  # a dataclass, not a module, so its U-Net is no submodule of this one
        self._layout = keysvalues.layout(unet)
        self._dtype = unet.conv_in.weight.dtype
        self.guidance = bool(unet.config.get("time_cond_proj_dim"))

    def __deepcopy__(self, memo: dict[int, Any]) -> Network:
        """A copy of the U-Net that shares the base, to spare the memory of a second pipeline."""
        return Network(self._base, deepcopy(self.unet, memo), self.schedule, autocast=self.autocast)

    def forward(self, x_t: Tensor, t: Tensor, texts: Texts, w: Tensor | None = None) -> Estimate:
        """Estimate for x_t (B, C, h, w) at t (B,); w (B,) is the scale minus 1, with a guidance embedding."""
        side = (x_t.shape[2] * self._base.vae_scale_factor, x_t.shape[3] * self._base.vae_scale_factor)
        more: dict[str, Any] = self._base.added_conditions(len(x_t), texts.pooled, side)
        for condition in more.values():
            condition.update({k: v.to(self._dtype) for k, v in condition.items()})
        if self.guidance:
            assert w is not None
            width = int(self.unet.config["time_cond_proj_dim"])
            more["timestep_cond"] = guidance_embedding(w.float(), width).to(x_t.device, self._dtype)
        with torch.autocast(x_t.device.type, torch.bfloat16, enabled=self.autocast), _attention(x_t):
            kv = keysvalues.pack(self.unet, texts.e, additions=texts.additions, shape=self._layout)
            out = self.unet(x_t.to(self._dtype), t.to(x_t.device), kv, return_dict=False, **more)[0]
        return self.schedule.estimate(out.float() if self._dtype != torch.float64 else out, x_t, t)

    @contextmanager
    def watching(self, modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
        """Context that collects the outputs (B, C, h, w) of these modules of the U-Net, in order of calls."""
        outputs: list[Tensor] = []

        def collect(_module: nn.Module, _inputs: Any, output: Any) -> None:
            outputs.append(output if isinstance(output, Tensor) else output[0])

        handles = [m.register_forward_hook(collect) for m in modules]
        try:
            yield outputs
        finally:
            for handle in handles:
                handle.remove()


@contextmanager
def _attention(x: Tensor) -> Iterator[None]:
    """Plain attention for training on a CPU, where a step with fused attention takes a fifth longer."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if x.device.type == "cpu" and torch.is_grad_enabled():
        with sdpa_kernel([SDPBackend.MATH]):
            yield
    else:
        yield


def teacher(base: Base, schedule: Schedule, *, autocast: bool = False) -> Network:
    """The base's U-Net as a network. It is not copied, so use it inside `base.frozen()`."""
    return Network(base, base.denoiser, schedule, autocast=autocast)


@opening()
def copied(
    base: Base,
    schedule: Schedule,
    kind: Kind,
    *,
    rank: int = 64,
    alpha: float | None = None,
    seed: int = 0,
    guidance: bool = False,
    autocast: bool = False,
    checkpointing: bool = False,
) -> Network:
    """A trainable copy of the base's U-Net, by a LoRA or in every weight; its outputs start equal.

    guidance       add a guidance embedding, zero for a LoRA and random for a full student, whose
                   outputs then start a little different
    checkpointing  gradient checkpointing: less memory, slower backward pass
    Raises BadRecipe when the rank is larger than a layer's.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = _with_guidance(base.denoiser) if guidance else deepcopy(base.denoiser)
        unet.requires_grad_(kind == "full")
        if kind == "full":
            unet.to(torch.float32)
        else:
            if guidance:
                torch.nn.init.zeros_(unet.time_embedding.cond_proj.weight)
            _add_lora(unet, rank, alpha, [*TARGETS, LAYER] if guidance else TARGETS)
    keysvalues.attach(unet)
    if checkpointing:
        unet.enable_gradient_checkpointing()
    unet.train()
    return Network(base, unet, schedule, autocast=autocast)


def _with_guidance(unet: Any) -> Any:
    # without this diffusers resets fields in _use_default_values, whatever they are set to
    config = {k: v for k, v in unet.config.items() if k != "_use_default_values"}
    copy = type(unet).from_config({**config, "time_cond_proj_dim": GUIDANCE_WIDTH})
    nn.Module.to(copy, unet.device, unet.dtype)  # not copy.to, which logs a warning about dtypes
    missing, unexpected = copy.load_state_dict(unet.state_dict(), strict=False)
    assert missing == ["time_embedding.cond_proj.weight"]
    assert not unexpected
    return copy


def _add_lora(unet: Any, rank: int, alpha: float | None, targets: Sequence[str]) -> None:
    from peft import LoraConfig

    name, smallest = min(_ranks(unet), key=lambda layer: layer[1])
    if rank > smallest:
        raise BadRecipe(
            f"A LoRA of rank {rank} is larger than layer {name} of this base, whose rank is {smallest}. "
            f"Use --rank {smallest} or less."
        )
    config = LoraConfig(
        r=rank, lora_alpha=rank if alpha is None else alpha, target_modules=list(targets), lora_dropout=0.0
    )
    unet.add_adapter(config)
    for p in unet.parameters():
        if p.requires_grad and p.dtype != torch.float64:
            p.data = p.data.float()


def _ranks(unet: nn.Module) -> Iterator[tuple[str, int]]:
    """Layers that get a LoRA, and the largest rank of each."""
    for name, module in unet.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and any(name.endswith(f".{t}") for t in TARGETS):
            rows = module.weight.flatten(1)
            yield name, min(rows.shape)
