"""Training time of example concepts on tiny (goal: the plateau of subject fidelity in <= 60 s on two cores).

`run` trains until early stopping. `trace` measures subject fidelity every 20 of 240 steps, and reports after
how many seconds of training it first was within 5 % of its plateau (the mean of the last four measurements).
Subject fidelity: benchmarks/colour_fidelity.py, inside the subject's mask, eight images.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks import colour_fidelity
from minikin import Concept, Studio, events
from minikin.images.photos import load_photos
from minikin.perfusion.covariance import covariance
from minikin.perfusion.masks import image_mask
from minikin.perfusion.train import teach
from minikin.recipes import Teach
from minikin.studio.generation import last

EXAMPLES = Path(__file__).parents[1] / "examples"
SCENES = ("in the snow", "in the forest", "at night", "on a blue background")
STEPS, EVERY = 240, 20


def run() -> list[dict[str, Any]]:
    studio = Studio.open("tiny", device="cpu")
    rows = []
    for name, category in (("my_teapot", "teapot"), ("my_backpack", "backpack")):
        for mode in ("gated", "value"):
            recipe = Teach(name=name, category=category, mode=mode, sample_every=0)
            start = time.perf_counter()
            facts = last(studio.teaching(EXAMPLES / name, recipe)).facts
            seconds = time.perf_counter() - start
            rows.append({"what": f"teach {name}, {mode}: {facts['steps']} steps, best at {facts['best_step']}",
                         "value": f"{seconds:.1f} s", "bar": "<= 60 s", "holds": seconds <= 60})  # fmt: skip
    return rows + trace("my_backpack", "backpack") + trace("my_dog", "dog")


def trace(name: str, category: str) -> list[dict[str, Any]]:
    """Subject fidelity after every EVERY steps, and when it reached its plateau."""
    studio = Studio.open("tiny", device="cpu")
    photos = load_photos(EXAMPLES / name)
    references = [colour_fidelity.descriptor(p.pixels, p.mask) for p in photos if p.mask is not None]
    curve: list[tuple[float, float]] = []
    spent = 0.0  # on measuring
    recipe = Teach.make(name=name, category=category, mode="gated", steps=STEPS, sample_every=EVERY)

    def measure(concept: Concept) -> Image.Image:
        nonlocal spent
        start = time.perf_counter()
        studio.add(concept)
        images = [i for s in SCENES for i in studio.paint(f"a photo of <{name}> {s}", n=2, seed=7)]
        masks = [image_mask(studio.base, i, category) for i in images]
        values = [
            colour_fidelity.subject_fidelity(np.asarray(i), m, references)
            for i, m in zip(images, masks, strict=True)
        ]
        now = time.perf_counter()
        curve.append((start - started - spent, float(np.mean(values))))
        spent += now - start
        return images[0]

    c = covariance(studio.base)  # once per base
    started = time.perf_counter()
    *_, done = teach(studio.base, photos, recipe, c, sample=measure)
    assert isinstance(done, events.Done)
    plateau = float(np.mean([v for _, v in curve[-4:]]))
    reached, steps = next((s, EVERY * (k + 1)) for k, (s, v) in enumerate(curve) if v >= 0.95 * plateau)
    values = " ".join(f"{v:.2f}" for _, v in curve)
    return [{"what": f"{name}: plateau of subject fidelity ({plateau:.2f}) after {steps} steps; {values}",
             "value": f"{reached:.1f} s", "bar": "<= 60 s", "holds": reached <= 60}]  # fmt: skip
