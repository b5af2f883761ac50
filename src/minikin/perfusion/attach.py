"""Concepts on an existing diffusers pipeline.

    pipe = StableDiffusionPipeline.from_pretrained(...)
    minikin = attach(pipe)
    minikin.add("tom.safetensors")
    pipe(**minikin("a photo of <tom> on the beach"), num_inference_steps=25)

This works with the stock text-to-image, image-to-image and inpainting pipelines. The pipeline still accepts
plain prompts.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from minikin.errors import BadRecipe, BaseMismatch
from minikin.models.base import Base
from minikin.models.prompt import parse
from minikin.perfusion import concept_file
from minikin.perfusion.compatibility import compatibility
from minikin.perfusion.concept import Concept
from minikin.perfusion.conditioning import PreparedConcept, condition, prepare_concept
from minikin.perfusion.gate import Gate
from minikin.recipes import KeyLock

_MISMATCHES = {
    "other layers": "the layers of its U-Net do not match",
    "other text encoder": "its text encoder is another one",
}


class Concepts:
    """The concepts that are loaded on one base, by name."""

    def __init__(self, base: Base) -> None:
        self.base = base
        self.loaded: dict[str, PreparedConcept] = {}

    def add(self, concept: Concept | str | Path) -> Concept:
        """Load a concept; raises BaseMismatch when it does not fit this base."""
        if not isinstance(concept, Concept):
            concept = Concept.load(concept)
        self.check(concept)
        self.loaded[concept.name] = prepare_concept(self.base, concept)
        return concept

    def check(self, concept: Concept) -> None:
        """Raise BaseMismatch when a concept does not fit this base."""
        verdict = compatibility(self.base, concept)
        if verdict in _MISMATCHES:
            raise BaseMismatch(
                f"Concept '{concept.name}' was taught on {concept.origin.architecture} "
                f"({concept.origin.fingerprint[:8]}); the open base is {self.base.name}, "
                f"{self.base.architecture} ({self.base.fingerprint[:8]}): {_MISMATCHES[verdict]}. Open the "
                "base it was made for, or teach it again on this one."
            )

    def digest(self, name: str) -> str:
        """SHA-256 of a loaded concept's content (see `concept_file.content`)."""
        return concept_file.content(self.loaded[name].concept)

    @property
    def categories(self) -> dict[str, str]:
        """Category of each loaded concept, by name."""
        return {name: prepared.concept.category for name, prepared in self.loaded.copy().items()}

    @torch.no_grad()
    def __call__(
        self, prompt: str, negative: str = "", *, n: int = 1, lock: KeyLock = "local", gate: Gate | None = None
    ) -> dict[str, Any]:
        """Keyword arguments for a stock pipeline call that generates `n` images.

        Do not pass num_images_per_prompt to the pipeline: the tensors already have a batch of n.
        """
        base = self.base
        override = (lambda _: gate) if gate else None
        prompts = [parse(p, self.categories) for p in (negative, prompt)]
        if any(p.loras for p in prompts):
            raise BadRecipe(
                "<lora:...> in prompts works in Studio and on the command line only. For this pipeline, use "
                "pipe.load_lora_weights and pipe.set_adapters."
            )
        if any(p.edits for p in prompts):
            raise BadRecipe(
                "[a:b:0.5] and [a|b] in prompts work in Studio and on the command line only: a stock pipeline "
                "has one prompt for all steps. Write \\[ for a plain bracket."
            )
        for note in dict.fromkeys(note for p in prompts for note in p.notes):
            warnings.warn(note, stacklevel=2)
        unconditional = None if base.zeros_for_empty and not negative else prompts[0]
        if base.has_guidance_embedding:  # full LCM has no negative prompt
            (positive,) = condition(base, prompts[1:], self.loaded, lock=lock, gate=override, copies=n)
            return {"prompt_embeds": positive.kv.to(base.dtype)}
        both = condition(base, [unconditional, prompts[1]], self.loaded, lock=lock, gate=override, copies=n)
        out: dict[str, Any] = {}
        for prefix, conditioning in zip(("negative_", ""), both, strict=True):
            out[f"{prefix}prompt_embeds"] = conditioning.kv.to(base.dtype)
            if conditioning.pooled is not None:
                out[f"{prefix}pooled_prompt_embeds"] = conditioning.pooled
        return out


def attach(pipe: Any, name: str = "custom") -> Concepts:
    """Set Minikin's attention processors on a diffusers pipeline, in place; see the module's docstring."""
    return Concepts(Base(pipe, name))
