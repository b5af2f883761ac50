"""A world in which every setting's likeness and alignment are known, for tests of sweeps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from minikin import Concept, events
from minikin.evaluation.encoders import Card
from minikin.evaluation.scores import References
from minikin.evaluation.sweep.settings import texts
from minikin.evaluation.sweep.sweep import Task, sweep
from minikin.generation.plan import plan
from minikin.models.base import Base
from minikin.models.identity import Origin
from minikin.perfusion.operating_points import Point
from minikin.recipes import WHOLE, Paint, Sweep

LIKENESS = {0.6: 0.55, 0.8: 0.62, 1.0: 0.75, 1.3: 0.80, 1.6: 0.85}  # by strength
FOLLOWS = {0.6: 0.80, 0.8: 0.79, 1.0: 0.77, 1.3: 0.66, 1.6: 0.40}
BEST = {"tau": 0.25, "switch": 0.2}  # everything else costs a tenth of both
KNEE, ENDS = 1.0, (0.6, 1.3)  # 1.6 follows less than 80 % as well
SCALE = 60_000


def truth(strength: float, tau: float | None, switch: float, interval: Any) -> tuple[float, float]:
    """Likeness and alignment of a setting."""
    cost = 0.1 * ((tau != BEST["tau"]) + (switch != BEST["switch"]) + (interval != WHOLE))
    return LIKENESS[strength] - cost, FOLLOWS[strength] - cost


class Planted:
    """Reads likeness, alignment and the prompt's number off the images."""

    name, reads = "planted", True
    card = Card("planted", "tests", "Apache-2.0", "00ff" * 4)

    def _told(self, images: Sequence[Image.Image]) -> list[list[float]]:
        return [[int(v) for v in np.asarray(i)[0, :3].astype(np.int64) @ (65536, 256, 1)] for i in images]

    def likeness(self, images: Sequence[Image.Image], masks: Any = None) -> Tensor:
        x = torch.tensor([row[0] / SCALE for row in self._told(images)])
        return torch.stack([x, (1 - x**2).sqrt()], 1)

    def texts(self, captions: Sequence[str]) -> Tensor:
        return torch.eye(len(captions) + 1)[: len(captions)]

    def images(self, images: Sequence[Image.Image]) -> Tensor:
        out = torch.zeros(len(images), PROMPTS + 1)
        for i, (_, y, number) in enumerate(self._told(images)):
            out[i, int(number)], out[i, -1] = y / SCALE, (1 - (y / SCALE) ** 2) ** 0.5
        return out


PROMPTS = 8
SEARCH = Sweep(concept="tom", taus=(0.15, 0.25), switches=(0.0, 0.2), prompts=PROMPTS, seeds=2, photos="-")


class Painter:
    """Paints truth, with noise of a known size by prompt and seed; `after` is called with each set's count."""

    def __init__(self, noise: float = 0.02, after: Callable[[int], None] = lambda _: None) -> None:
        self.sets, self.noise, self.after = 0, noise, after
        self.prompts = [t.replace("{}", "<tom>") for t in texts(SEARCH, "cat")]

    def __call__(self, wish: Paint) -> list[Image.Image]:
        assert wish.points and wish.interval
        own, made = wish.points["tom"], []
        for seed in range(wish.seed, wish.seed + wish.n):
            number = self.prompts.index(wish.prompt)
            luck = self.noise * np.random.default_rng((seed, number)).normal(size=2)
            x, y = np.array(truth(own.strength, own.tau, own.switch, wish.interval)) + luck
            row = [int(SCALE * x), int(SCALE * y), number]
            pixels = np.zeros((8, 8, 3), np.uint8)
            pixels[0, :3] = [(v // 65536, v // 256 % 256, v % 256) for v in row]
            made.append(Image.fromarray(pixels))
        self.sets += 1
        self.after(self.sets)
        return made


TOM = Concept("tom", "cat", "gated", Origin("tiny", "f", "t"), (torch.zeros(1, 4),), torch.ones(4),
              torch.ones(4), {})  # fmt: skip


def task_on(base: Base) -> Task:
    """The search for tom's points."""
    decided = plan(base, Paint(prompt="<tom>", steps=5, guidance=3))
    known = References(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0]]))
    return Task(SEARCH, TOM, decided, {"base": "f", "concept": "c"}, Planted(), known)


def run(task: Task, out: Path, painter: Painter) -> tuple[dict[str, Point], list[events.Event]]:
    told = list(sweep(task, out, painter))
    done = told[-1]
    assert isinstance(done, events.Done)
    return done.result, told


class Plain(Planted):
    """Sees mean colours: enough to be a judge of anything."""

    def likeness(self, images: Sequence[Image.Image], masks: Any = None) -> Tensor:
        small = [np.asarray(i.convert("RGB").resize((2, 2)), np.float32) for i in images]
        return torch.nn.functional.normalize(torch.tensor(np.stack(small)).flatten(1) - 128, dim=1)

    def texts(self, captions: Sequence[str]) -> Tensor:
        return torch.nn.functional.normalize(torch.randn(len(captions), 12, generator=torch.Generator()), dim=1)

    images = likeness


QUICK = {"prompts": 4, "seeds": 1, "steps": 2, "strengths": "0.5,1.5", "switches": "0.5", "taus": "0.15",
         "guidances": "3", "intervals": "0-1"}  # fmt: skip
