"""Planted painter and encoder for tests of sweeps: the scores of every grid point are known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from minikin import Concept, events
from minikin.evaluation.encoders import EncoderCard
from minikin.evaluation.prompts import prompt_templates
from minikin.evaluation.scores import References
from minikin.evaluation.sweep.sweep import SweepTask, sweep
from minikin.generation.request import resolve
from minikin.models.base import Base
from minikin.models.identity import Origin
from minikin.perfusion.operating_points import Point
from minikin.recipes import WHOLE, Paint, Sweep

SUBJECT_FIDELITY = {0.6: 0.55, 0.8: 0.62, 1.0: 0.75, 1.3: 0.80, 1.6: 0.85}  # by strength
PROMPT_FIDELITY = {0.6: 0.80, 0.8: 0.79, 1.0: 0.77, 1.3: 0.66, 1.6: 0.40}
BEST = {"tau": 0.25, "concept_start": 0.2}  # everything else costs a tenth of both
KNEE, ENDS = 1.0, (0.6, 1.3)  # the prompt fidelity of 1.6 is below 80 % of the best
SCALE = 60_000


def planted(strength: float, tau: float | None, concept_start: float, interval: Any) -> tuple[float, float]:
    """Subject and prompt fidelity of a grid point."""
    cost = 0.1 * ((tau != BEST["tau"]) + (concept_start != BEST["concept_start"]) + (interval != WHOLE))
    return SUBJECT_FIDELITY[strength] - cost, PROMPT_FIDELITY[strength] - cost


class PlantedEncoder:
    """Reads subject fidelity, prompt fidelity and the prompt's index off the pixels that `Painter` wrote."""

    name, has_text_encoder = "planted", True
    card = EncoderCard("planted", "tests", "Apache-2.0", "00ff" * 4)

    def _read(self, images: Sequence[Image.Image]) -> list[list[float]]:
        return [[int(v) for v in np.asarray(i)[0, :3].astype(np.int64) @ (65536, 256, 1)] for i in images]

    def encode_subjects(self, images: Sequence[Image.Image], masks: Any = None) -> Tensor:
        x = torch.tensor([row[0] / SCALE for row in self._read(images)])
        return torch.stack([x, (1 - x**2).sqrt()], 1)

    def encode_texts(self, captions: Sequence[str]) -> Tensor:
        return torch.eye(len(captions) + 1)[: len(captions)]

    def encode_images(self, images: Sequence[Image.Image]) -> Tensor:
        out = torch.zeros(len(images), PROMPTS + 1)
        for i, (_, y, number) in enumerate(self._read(images)):
            out[i, int(number)], out[i, -1] = y / SCALE, (1 - (y / SCALE) ** 2) ** 0.5
        return out


PROMPTS = 8
SEARCH = Sweep(
    concept="tom", taus=(0.15, 0.25), concept_starts=(0.0, 0.2), prompts=PROMPTS, seeds=2, photos="-"
)


class Painter:
    """Writes planted scores and noise by prompt and seed into pixels; `after` gets the number of calls."""

    def __init__(self, noise: float = 0.02, after: Callable[[int], None] = lambda _: None) -> None:
        self.sets, self.noise, self.after = 0, noise, after
        self.prompts = [t.replace("{}", "<tom>") for t in prompt_templates(SEARCH, "cat")]

    def __call__(self, recipe: Paint) -> list[Image.Image]:
        assert recipe.points and recipe.interval
        settings, images = recipe.points["tom"], []
        for seed in range(recipe.seed, recipe.seed + recipe.n):
            number = self.prompts.index(recipe.prompt)
            noise = self.noise * np.random.default_rng((seed, number)).normal(size=2)
            values = settings.strength, settings.tau, settings.concept_start, recipe.interval
            x, y = planted(*values) + noise
            row = [int(SCALE * x), int(SCALE * y), number]
            pixels = np.zeros((8, 8, 3), np.uint8)
            pixels[0, :3] = [(v // 65536, v // 256 % 256, v % 256) for v in row]
            images.append(Image.fromarray(pixels))
        self.sets += 1
        self.after(self.sets)
        return images


TOM = Concept(
    "tom", "cat", "gated", Origin("tiny", "f", "t"), (torch.zeros(1, 4),), torch.ones(4), torch.ones(4), {}
)


def task_on(base: Base) -> SweepTask:
    """A sweep of TOM on this base."""
    request = resolve(base, Paint(prompt="a cat", steps=5, guidance=3))
    references = References(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0]]))
    return SweepTask(SEARCH, TOM, request, {"base": "f", "concept": "c"}, PlantedEncoder(), references)


def run(task: SweepTask, out: Path, painter: Painter) -> tuple[dict[str, Point], list[events.Event]]:
    """Operating points and all events of a sweep."""
    all_events = list(sweep(task, out, painter))
    done = all_events[-1]
    assert isinstance(done, events.Done)
    return done.result, all_events


class ColourEncoder(PlantedEncoder):
    """Encodes mean colours, of any images."""

    def encode_subjects(self, images: Sequence[Image.Image], masks: Any = None) -> Tensor:
        small = [np.asarray(i.convert("RGB").resize((2, 2)), np.float32) for i in images]
        return torch.nn.functional.normalize(torch.tensor(np.stack(small)).flatten(1) - 128, dim=1)

    def encode_texts(self, captions: Sequence[str]) -> Tensor:
        return torch.nn.functional.normalize(torch.randn(len(captions), 12, generator=torch.Generator()), dim=1)

    encode_images = encode_subjects


QUICK = {"prompts": 4, "seeds": 1, "steps": 2, "strengths": "0.5,1.5", "concept_starts": "0.5", "taus": "0.15",
         "guidances": "3", "intervals": "0-1"}  # fmt: skip
