"""Our sampling loop against the stock pipelines', to the bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from minikin import Studio
from minikin.generation import schedulers
from minikin.generation.request import resolve
from minikin.generation.sampler import scheduler_for, start_of
from minikin.models.base import Base
from minikin.recipes import Paint
from tests.conftest import FAMILIES

PROMPT, SEED, STEPS = "a cat on the beach", 5, 4
CASES = (
    *((family, scheduler) for family in FAMILIES for scheduler in (None, "Euler a")),
    ("sd15", "Heun"), ("sd21", "PNDM"), ("sdxl", "DPM++ 2M Karras"),
    *((family, scheduler) for family in ("pixart-alpha", "pixart-sigma") for scheduler in (None, "DDIM")),
)  # fmt: skip


def stock_images(pipe: Any, scheduler: str | None, guidance: float, negative: str, n: int = 2) -> np.ndarray:
    """Images of the pipeline itself, without Minikin."""
    before = pipe.scheduler
    pipe.scheduler = (
        schedulers.build(scheduler, before) if scheduler else type(before).from_config(before.config)
    )
    texts: dict[str, Any] = {"prompt": PROMPT, "num_images_per_prompt": n}  # encoded once, as ours
    if not hasattr(pipe, "unet"):
        texts |= {"negative_prompt": negative, "use_resolution_binning": False, "clean_caption": False}
    elif pipe.unet.config.time_cond_proj_dim is None:
        texts["negative_prompt"] = negative or None
    try:
        generators = [torch.Generator().manual_seed(SEED + i) for i in range(n)]
        images = pipe(
            **texts, num_inference_steps=STEPS, guidance_scale=guidance, generator=generators, height=64,
            width=64,
        ).images  # fmt: skip
    finally:
        pipe.scheduler = before
    return np.stack([np.asarray(image) for image in images])


@pytest.mark.parametrize(("family", "scheduler"), CASES)
def test_images_equal_the_stock_pipelines(
    family: str, scheduler: str | None, bases: dict[str, Base], pipelines: dict[str, Any]
) -> None:
    """With guidance and a negative prompt, with an empty one, and without guidance."""
    base, pipe = bases[family], pipelines[family]
    if base.has_guidance_embedding and scheduler:
        pytest.skip("paints with the LCM scheduler only")
    for guidance, negative in ((3.0, "a dog"), (3.0, ""), (1.0, "")):
        preset = None if base.has_guidance_embedding else "quality"
        ours = Studio(base).paint(
            PROMPT, n=2, seed=SEED, steps=STEPS, guidance=guidance, negative=negative, scheduler=scheduler,
            preset=preset, size="64", force=True,
        )  # fmt: skip
        theirs = stock_images(pipe, scheduler, guidance, negative)
        assert np.array_equal(np.stack([np.asarray(image) for image in ours]), theirs), (guidance, negative)


@pytest.mark.parametrize("scheduler", [None, "PNDM", "Heun", "Euler"])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_calls_of_the_unet_are_known_before(scheduler: str | None, steps: int, bases: dict[str, Base]) -> None:
    """The conditioning schedule counts calls; PNDM has one more than steps, Heun nearly two a step."""
    base = bases["sd15"]
    request = resolve(base, Paint(prompt="a cat", scheduler=scheduler, steps=steps, force=True))
    built = scheduler_for(base, request)
    built.set_timesteps(steps)
    assert start_of(base, request).calls == len(built.timesteps)


def test_the_comparison_can_fail(bases: dict[str, Base], pipelines: dict[str, Any]) -> None:
    """The control: another guidance is another image."""
    (image,) = Studio(bases["sd15"]).paint(PROMPT, seed=SEED, steps=STEPS, guidance=3.0, preset="quality")
    theirs = stock_images(pipelines["sd15"], None, 3.01, "", n=1)
    assert not np.array_equal(np.asarray(image), theirs[0])
