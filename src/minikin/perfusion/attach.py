"""Concepts on an existing diffusers pipeline.

    pipe = StableDiffusionPipeline.from_pretrained(...)
    minikin = attach(pipe)
    minikin.add("tom.safetensors")
    pipe(**minikin("a photo of <tom> on the beach"), num_inference_steps=25)

This works with the stock text-to-image, image-to-image, inpainting and ControlNet pipelines, with IP-Adapter,
and with every attention processor. The pipeline still accepts plain prompts. `minikin.detach()` undoes it.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minikin.errors import BadRecipe
from minikin.models import attached, attention
from minikin.models.base import Base
from minikin.models.prompt import Prompt, parse
from minikin.perfusion import compatibility, concept_file
from minikin.perfusion.concept import NAME, Concept
from minikin.perfusion.conditioning import Conditioning, PreparedConcept, condition, prepare_concept
from minikin.perfusion.gate import Gate
from minikin.recipes import KeyLock

Texts = str | Sequence[str]
_ARGUMENTS = {"pooled": "pooled_prompt_embeds", "mask": "prompt_attention_mask"}  # of the stock pipelines


class Concepts:
    """The concepts that are loaded on one base, by name."""

    def __init__(self, base: Base) -> None:
        self.base = base
        self.loaded: dict[str, PreparedConcept] = {}

    def __repr__(self) -> str:
        described = [
            f"{name} ({p.concept.category}, {p.concept.mode})" for name, p in self.loaded.copy().items()
        ]
        return f"<{type(self).__name__} on {self.base!r}: {', '.join(described) or 'none'}>"

    def add(self, concept: Concept | str | Path, *, force: bool = False) -> Concept:
        """Load a concept; one from a file is known by the file's name too.

        force  also a gated one of another text encoder; see `compatibility.check`
        Raises BaseMismatch when it does not fit this base.
        """
        alias = ""
        if not isinstance(concept, Concept):
            path = Path(concept).expanduser()
            concept, alias = Concept.load(path), path.stem
        self.check(concept, force=force)
        prepared = prepare_concept(self.base, concept)
        self.loaded[concept.name] = prepared
        if NAME.fullmatch(alias):
            self.loaded[alias] = prepared
        return concept

    def check(self, concept: Concept, *, force: bool = False) -> None:
        """Raise BaseMismatch when a concept does not fit this base."""
        compatibility.check(self.base, concept, force=force)

    def digest(self, name: str) -> str:
        """SHA-256 of a loaded concept's content (see `concept_file.content`)."""
        return concept_file.content(self.loaded[name].concept)

    @property
    def categories(self) -> dict[str, str]:
        """Category of each loaded concept, by name."""
        return {name: prepared.concept.category for name, prepared in self.loaded.copy().items()}


class AttachedConcepts(Concepts):
    """The concepts on a diffusers pipeline; calling it makes the pipeline's arguments of a prompt."""

    def __init__(self, base: Base) -> None:
        super().__init__(base)
        if base.is_unet:
            attached.attach_control_networks(base.layout)

    @property
    def is_attached(self) -> bool:
        """False after `detach`, also that of another `attach` to the same U-Net."""
        return attention.is_attached(self.base.denoiser, self.base.layout)

    def add(self, concept: Concept | str | Path, *, force: bool = False) -> Concept:
        loaded = super().add(concept, force=force)
        if note := compatibility.difference_note(self.base, loaded):
            warnings.warn(note, stacklevel=2)
        return loaded

    def detach(self) -> None:
        """Give the pipeline back as it was; what was made of prompts before no longer works on it."""
        attention.detach(self.base.denoiser)

    @torch.no_grad()
    def __call__(
        self,
        prompt: Texts,
        negative: Texts = "",
        *,
        n: int = 1,
        lock: KeyLock = "local",
        gate: Gate | None = None,
        negative_prompt: Texts | None = None,
        prompt_2: Texts | None = None,
        negative_prompt_2: Texts | None = None,
    ) -> dict[str, Any]:
        """Keyword arguments for a stock pipeline call that generates `n` images of each prompt.

        prompt, negative  one or several; `negative_prompt`, diffusers' name, is the same as `negative`
        prompt_2          for SDXL's second text encoder, as in diffusers; without concepts

        Do not pass num_images_per_prompt to the pipeline: the tensors already have a batch of n.
        Raises BadRecipe for what a stock pipeline cannot follow.
        """
        self._check_ready()
        positives, negatives = self._prompts(prompt, _one_of(negative, negative_prompt))
        seconds = self._second_prompts(prompt_2, negative_prompt_2, positives, negatives)
        if self.base.has_guidance_embedding:  # full LCM and SANA-Sprint have no negative prompt
            negatives = []
        rows = self._conditioning(negatives, positives, n, lock, gate, seconds)
        # the default of PixArt and SANA is a text
        out: dict[str, Any] = {} if self.base.is_unet or not negatives else {"negative_prompt": None}
        for prefix, part in (("negative_", rows[: len(negatives)]), ("", rows[len(negatives) :])):
            if not part:
                continue
            out[f"{prefix}prompt_embeds"] = torch.cat([row.kv for row in part])
            for name in ("pooled", "mask"):
                tensors = [t for row in part if (t := getattr(row, name)) is not None]
                if tensors:
                    out[prefix + _ARGUMENTS[name]] = torch.cat(tensors)
        return out

    def _check_ready(self) -> None:
        if not self.is_attached:
            raise BadRecipe("These concepts were detached from their pipeline. Call attach(pipe) again.")
        if self.base.device.type == "meta":
            raise BadRecipe(
                "The pipeline's weights are elsewhere (enable_sequential_cpu_offload), and concepts need them "
                "before the pipeline runs. Use enable_model_cpu_offload."
            )
        if any(p.delta.device != self.base.device for p in self.loaded.values()):  # the pipeline was moved
            self.loaded = {name: prepare_concept(self.base, p.concept) for name, p in self.loaded.items()}

    def _prompts(self, prompt: Texts, negative: Texts) -> tuple[list[Prompt], list[Prompt | None]]:
        positives = [self._parsed(text) for text in _listed(prompt)]
        texts = _listed(negative)
        if len(texts) == 1:
            texts *= len(positives)
        if not positives or len(texts) != len(positives):
            raise BadRecipe(
                f"There are {len(positives)} prompts and {len(texts)} negative prompts. Give at least one "
                "prompt, and one negative prompt for all or one for each."
            )
        zeros = self.base.zeros_for_empty
        parsed = [None if zeros and not text else replace(self._parsed(text), negative=True) for text in texts]
        return positives, parsed

    def _parsed(self, text: str) -> Prompt:
        prompt = parse(text, self.categories)
        if prompt.loras or "<lora:" in prompt.text:
            raise BadRecipe(
                "<lora:...> in prompts works in Studio and on the command line only. For this pipeline, use "
                "pipe.load_lora_weights and pipe.set_adapters."
            )
        if any(use.box for use in prompt.uses):
            raise BadRecipe("Regions, as in <tom@left>, work in Studio and on the command line only.")
        if prompt.edits:
            raise BadRecipe("Prompts that change, as [a:b:0.5], work in Studio and on the command line only.")
        return prompt

    def _second_prompts(
        self,
        second: Texts | None,
        negative: Texts | None,
        positives: list[Prompt],
        negatives: list[Prompt | None],
    ) -> tuple[list[Prompt | None], list[Prompt]] | None:
        """The prompts of SDXL's second text encoder, negative and positive; None where they are the first's."""
        if second is None and negative is None:
            return None
        if not self.base.is_xl:
            raise BadRecipe("prompt_2 is for SDXL's second text encoder; this pipeline has one. Leave it out.")
        first = [p.source for p in positives], [p.source if p else "" for p in negatives]
        ours, theirs = self._prompts(second or first[0], first[1] if negative is None else negative)
        has_concepts = any(p.uses for p in (*positives, *negatives, *ours, *theirs) if p)
        if len(ours) != len(positives) or (has_concepts and (ours, theirs) != (positives, negatives)):
            raise BadRecipe(
                "prompt_2 says something else than a prompt with a concept, or for another number of prompts. "
                "A concept has a word in both text encoders at the same place: leave prompt_2 out."
            )
        return [a if b is None else b for a, b in zip(negatives, theirs, strict=True)], ours

    def _conditioning(
        self,
        negatives: list[Prompt | None],
        positives: list[Prompt],
        n: int,
        lock: KeyLock,
        gate: Gate | None,
        seconds: tuple[list[Prompt | None], list[Prompt]] | None,
    ) -> list[Conditioning]:
        """Of negative, then positive prompts; a U-Net's packed tensors with encodings (n, N, W + D)."""
        base, prompts = self.base, [*negatives, *positives]
        chunks = max(base.count_chunks(p) for p in prompts if p is not None)
        override = (lambda _: gate) if gate else None
        if not base.is_unet:
            return condition(base, prompts, self.loaded, lock=lock, gate=override, copies=n, chunks=chunks)
        plain = self._encodings(prompts, chunks, n, seconds)
        if seconds is None:
            parts = condition(base, prompts, self.loaded, lock=lock, gate=override, copies=n, chunks=chunks)
        else:
            kv = base.pack(torch.cat([e for e, _ in plain]))
            parts = [
                Conditioning(part, pooled) for part, (_, pooled) in zip(torch.split(kv, n), plain, strict=True)
            ]  # fmt: skip
        return [
            c._replace(kv=attached.with_encodings(c.kv.to(base.dtype), e))
            for c, (e, _) in zip(parts, plain, strict=True)
        ]

    def _encodings(
        self,
        prompts: list[Prompt | None],
        chunks: int,
        n: int,
        seconds: tuple[list[Prompt | None], list[Prompt]] | None,
    ) -> list[tuple[Tensor, Tensor | None]]:
        """Encodings (n, N, D) of each prompt with categories in place of concepts, and pooled."""
        others: Sequence[Prompt | None] = [*seconds[0], *seconds[1]][-len(prompts) :] if seconds else prompts
        out: list[tuple[Tensor, Tensor | None]] = []
        for prompt, second in zip(prompts, others, strict=True):
            pooled: Tensor | None
            if prompt is None and second is None:
                zeros, pooled = self.base.zero_encoding()
                e = zeros.repeat(1, chunks, 1)
            else:
                empty = Prompt("", "")
                encoded = self.base.encode([prompt or empty], chunks=chunks, second=[second or prompt or empty])
                e, pooled = encoded.e, encoded.pooled
            out.append((e.expand(n, -1, -1), None if pooled is None else pooled.expand(n, -1)))
        return out


def attach(pipe: Any, name: str = "custom") -> AttachedConcepts:
    """Let a diffusers pipeline read prompts with concepts, in place; see the module's docstring."""
    return AttachedConcepts(Base(pipe, name))


def _one_of(negative: Texts, negative_prompt: Texts | None) -> Texts:
    if negative_prompt is None:
        return negative
    if negative and negative != negative_prompt:
        raise BadRecipe("negative and negative_prompt are the same: give one of them.")
    return negative_prompt


def _listed(texts: Texts) -> list[str]:
    return [texts] if isinstance(texts, str) else list(texts)
