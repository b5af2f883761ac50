"""Minikin for a diffusers pipeline you already have.

    pipe = StableDiffusionPipeline.from_pretrained(...)
    minikin = attach(pipe)
    minikin.add("tom.safetensors")
    pipe(**minikin("a photo of <tom> on the beach"), num_inference_steps=25)

Works with the stock text-to-image, image-to-image and inpainting pipelines. Plain prompts given to
the pipeline itself go on working as before.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from minikin.errors import BadRecipe, BaseMismatch
from minikin.models.base import Base
from minikin.models.prompt import parse
from minikin.perfusion import concept_file
from minikin.perfusion.compatibility import compatibility
from minikin.perfusion.concept import Concept
from minikin.perfusion.conditioning import Loaded, condition, load
from minikin.perfusion.edit import Gate
from minikin.recipes import KeyLock

_WHY = {
    "stranger": "the layers of its U-Net do not match",
    "other text encoder": "its text encoder is another one",
}


class Concepts:
    """The concepts in use on one base, loaded once each."""

    def __init__(self, base: Base) -> None:
        self.base = base
        self.loaded: dict[str, Loaded] = {}

    def add(self, concept: Concept | str | Path) -> Concept:
        """Load a concept; raises BaseMismatch when it does not belong to this base."""
        if not isinstance(concept, Concept):
            concept = Concept.load(concept)
        self.check(concept)
        self.loaded[concept.name] = load(self.base, concept)
        return concept

    def check(self, concept: Concept) -> None:
        """Raise BaseMismatch when a concept does not belong to this base."""
        verdict = compatibility(self.base, concept)
        if verdict in _WHY:
            raise BaseMismatch(
                f"Concept '{concept.name}' was taught on {concept.origin.architecture} "
                f"({concept.origin.fingerprint[:8]}); the open base is {self.base.name}, "
                f"{self.base.architecture} ({self.base.fingerprint[:8]}): {_WHY[verdict]}. Open the base "
                "it was made for, or teach it again on this one."
            )

    def digest(self, name: str) -> str:
        """SHA-256 of a concept's content, the same wherever and whenever it is loaded."""
        return concept_file.content(self.loaded[name].concept)

    @property
    def categories(self) -> dict[str, str]:
        return {name: one.concept.category for name, one in self.loaded.copy().items()}

    @torch.no_grad()
    def __call__(
        self, prompt: str, negative: str = "", *, n: int = 1, lock: KeyLock = "local",
        gate: Gate | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """Keyword arguments for a stock pipeline call that paints `n` images.

        Give the pipeline no num_images_per_prompt: the tensors already have n rows.
        """
        base = self.base
        change = (lambda _: gate) if gate else None
        prompts = [parse(p, self.categories) for p in (negative, prompt)]
        if any(p.loras for p in prompts):
            raise BadRecipe(
                "On a pipeline of your own, put LoRAs on with pipe.load_lora_weights and pipe.set_adapters; "
                "<lora:...> in prompts is for Studio and the command line."
            )
        no = None if base.zeros_for_empty and not negative else prompts[0]
        if base.has_guidance_embedding:  # full LCM has no negative prompt
            (yes,) = condition(base, prompts[1:], self.loaded, lock=lock, gate=change, copies=n)
            return {"prompt_embeds": yes.kv.to(base.dtype)}
        both = condition(base, [no, prompts[1]], self.loaded, lock=lock, gate=change, copies=n)
        out: dict[str, Any] = {}
        for prefix, one in zip(("negative_", ""), both, strict=True):
            out[f"{prefix}prompt_embeds"] = one.kv.to(base.dtype)
            if one.pooled is not None:
                out[f"{prefix}pooled_prompt_embeds"] = one.pooled
        return out


def attach(pipe: Any, name: str = "custom") -> Concepts:
    """Put Minikin on a diffusers pipeline, in place. See the module's text."""
    return Concepts(Base(pipe, name))
