"""The networks of a distillation behind one interface: teacher, student, target, fake score.

A `Network` is a U-Net of a base's family. It packs keys and values with its own projections, so
that whatever is trained in to_k and to_v takes part, and answers with images and noise instead of
the raw prediction. The base's own U-Net is the frozen teacher; everything else is a copy of it:

    lora   the frozen copy with a LoRA on the layers LCM-LoRA was published with
    full   every weight, in float32
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
from minikin.models.lora.guidance import LAYER
from minikin.models.prompt import Prompt
from minikin.perfusion.attach import Concepts
from minikin.perfusion.conditioning import encoded

Kind = Literal["lora", "full"]
GUIDANCE_WIDTH = 256  # of the full LCM's guidance embedding
# Luo et al. 2023, arXiv:2311.05556, in diffusers' training script: attention, feed-forward, convolutions
TARGETS = (
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2",
    "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
)  # fmt: skip


class Texts(NamedTuple):
    """Encodings (B, N, D), SDXL's pooled embedding (B, P) or None, the whole prompt as one vector
    (B, S): the pooled embedding, or the encoding at the end token; and what concepts add."""

    e: Tensor
    pooled: Tensor | None
    summary: Tensor
    additions: tuple[Addition, ...] = ()

    def rows(self, which: Tensor) -> Texts:
        pooled = None if self.pooled is None else self.pooled[which]
        additions = tuple(a._replace(opening=a.opening[which]) for a in self.additions)
        return Texts(self.e[which], pooled, self.summary[which], additions)


class Encoder:
    """Captions to Texts, and the empty prompt of guidance.

    concepts  those that captions may name as <name>; None takes captions as they are, without any syntax
    """

    def __init__(self, base: Base, concepts: Concepts | None = None) -> None:
        self.base, self.concepts = base, concepts

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> Texts:
        prompts = [self._prompt(c) for c in captions]
        out = self.base.encode(prompts)
        e, pooled, additions = self._named(prompts, out.e, out.pooled)
        end = out.valid.sum(1) - 1
        at_end = e[torch.arange(len(e), device=e.device), end]
        return Texts(e, pooled, at_end if pooled is None else pooled, additions)

    def _prompt(self, caption: str) -> Prompt:
        return Prompt(caption, caption) if self.concepts is None else read(caption, self.concepts)

    def _named(
        self, prompts: Sequence[Prompt], e: Tensor, pooled: Tensor | None
    ) -> tuple[Tensor, Tensor | None, tuple[Addition, ...]]:
        """The encodings with those of concepts in place, and what they add; other rows as they were."""
        rows = [k for k, p in enumerate(prompts) if p.uses]
        if not rows or self.concepts is None:
            return e, pooled, ()
        own, own_pooled, additions = encoded(self.base, [prompts[k] for k in rows], self.concepts.loaded)
        e = e.clone()
        e[rows] = own.to(e)
        if pooled is not None and own_pooled is not None:
            pooled = pooled.clone()
            pooled[rows] = own_pooled.to(pooled)
        spread = []
        for a in additions:
            opening = torch.zeros(e.shape[:2], device=e.device, dtype=a.opening.dtype)
            opening[rows] = a.opening
            spread.append(a._replace(opening=opening))
        return e, pooled, tuple(spread)

    @torch.no_grad()
    def empty(self, n: int) -> Texts:
        if self.base.zeros_for_empty:
            e, pooled = self.base.zero_encoding()
            return Texts(e, pooled, pooled).rows(torch.zeros(n, dtype=torch.long))
        return self([""]).rows(torch.zeros(n, dtype=torch.long))


class Network(nn.Module):
    """A U-Net that answers (x_t, t, texts) with its estimate of image and noise, float32."""

    def __init__(self, base: Base, unet: Any, schedule: Schedule, *, autocast: bool = False) -> None:
        super().__init__()
        self.unet, self.schedule, self.autocast = unet, schedule, autocast
        self._base = base  # a dataclass, not a module: its U-Net does not become a part of this one
        self._layout = keysvalues.layout(unet)
        self._dtype = unet.conv_in.weight.dtype
        self.guidance = bool(unet.config.get("time_cond_proj_dim"))

    def __deepcopy__(self, memo: dict[int, Any]) -> Network:
        """The U-Net is copied; the base is not: a second pipeline in memory would serve nobody."""
        return Network(self._base, deepcopy(self.unet, memo), self.schedule, autocast=self.autocast)

    def forward(self, x_t: Tensor, t: Tensor, texts: Texts, w: Tensor | None = None) -> Estimate:
        """x_t (B, C, h, w), t (B,), w (B,) guidance scale minus 1, for a network with its embedding."""
        side = (x_t.shape[2] * self._base.factor, x_t.shape[3] * self._base.factor)
        more: dict[str, Any] = self._base.conditions(len(x_t), texts.pooled, side)
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
        """Inside, the outputs (B, C, h, w) of these modules of the U-Net are collected, call by call."""
        found: list[Tensor] = []

        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            found.append(output if isinstance(output, Tensor) else output[0])

        handles = [m.register_forward_hook(keep) for m in modules]
        try:
            yield found
        finally:
            for handle in handles:
                handle.remove()


@contextmanager
def _attention(x: Tensor) -> Iterator[None]:
    """On a CPU the backward of fused attention takes a fifth more of a step than plain products."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if x.device.type == "cpu" and torch.is_grad_enabled():
        with sdpa_kernel([SDPBackend.MATH]):
            yield
    else:
        yield


def teacher(base: Base, schedule: Schedule, *, autocast: bool = False) -> Network:
    """The base's own U-Net. Not copied: keep it inside `base.frozen()`."""
    return Network(base, base.unet, schedule, autocast=autocast)


def copied(
    base: Base, schedule: Schedule, kind: Kind, *, rank: int = 64, alpha: float | None = None, seed: int = 0,
    guidance: bool = False, autocast: bool = False, checkpointing: bool = False,
) -> Network:  # fmt: skip
    """A copy of the base's U-Net of which a LoRA or every weight is trained; at first equal to it.

    guidance       give it a new guidance embedding, which a LoRA starts at zero; equality of a full
                   student then begins with training
    checkpointing  trade time for memory in the backward pass
    Raises BadRecipe when the rank is larger than a layer.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = _with_guidance(base.unet) if guidance else deepcopy(base.unet)
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


def trained(network: nn.Module) -> list[nn.Parameter]:
    return [p for p in network.parameters() if p.requires_grad]


def _with_guidance(unet: Any) -> Any:
    # diffusers gives the fields it notes as defaults their defaults again, whatever they are set to
    config = {k: v for k, v in unet.config.items() if k != "_use_default_values"}
    copy = type(unet).from_config({**config, "time_cond_proj_dim": GUIDANCE_WIDTH})
    nn.Module.to(copy, unet.device, unet.dtype)  # without diffusers' advice on loading
    missing, unexpected = copy.load_state_dict(unet.state_dict(), strict=False)
    assert missing == ["time_embedding.cond_proj.weight"]
    assert not unexpected
    return copy


def _add_lora(unet: Any, rank: int, alpha: float | None, targets: Sequence[str]) -> None:
    from peft import LoraConfig

    name, most = min(_ranks(unet), key=lambda found: found[1])
    if rank > most:
        raise BadRecipe(
            f"A LoRA of rank {rank} is larger than layer {name} of this base, whose rank is {most}. "
            f"Use --rank {most} or less."
        )
    config = LoraConfig(
        r=rank, lora_alpha=rank if alpha is None else alpha, target_modules=list(targets), lora_dropout=0.0
    )
    unet.add_adapter(config)
    for p in unet.parameters():
        if p.requires_grad and p.dtype != torch.float64:
            p.data = p.data.float()


def _ranks(unet: nn.Module) -> Iterator[tuple[str, int]]:
    """The layers a LoRA is put on, and the rank of each."""
    for name, module in unet.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and any(name.endswith(f".{t}") for t in TARGETS):
            rows = module.weight.flatten(1)
            yield name, min(rows.shape)


class Learner(nn.Module):
    """All that a run trains or must remember, by name; its state is what can change, and no more.

    whole  the parts of which everything is kept: averaged targets and heads with their buffers
    """

    def __init__(self, parts: dict[str, nn.Module], whole: Sequence[str] = ()) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(parts)
        self.whole = frozenset(whole)

    def _changing(self) -> Iterator[tuple[str, Tensor]]:
        for part, module in self.parts.items():
            for name, p in module.named_parameters():
                if p.requires_grad or part in self.whole:
                    yield f"{part}.{name}", p
            if part in self.whole:
                for name, b in module.named_buffers():
                    yield f"{part}.{name}", b

    def state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:  # type: ignore[override]
        return {name: value.detach() for name, value in self._changing()}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Raises RuntimeError when names or shapes differ."""
        own = dict(self._changing())
        if own.keys() != state_dict.keys():
            differ = sorted(own.keys() ^ state_dict.keys())
            raise RuntimeError(f"{len(differ)} tensors differ, for example {differ[0]}")
        for name, value in own.items():
            if value.shape != state_dict[name].shape:
                raise RuntimeError(f"{name} has another shape")
            value.copy_(state_dict[name])
