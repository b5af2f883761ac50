"""Painting against the stock diffusers pipeline on the same work (bar: never slower), and per image."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.measure import timed
from minikin import Studio
from minikin.models.loading.registry import tiny_folder

PROMPT, STEPS = "a photo of a cat on the beach", 25


def run() -> list[dict[str, Any]]:
    from diffusers import StableDiffusionPipeline

    studio = Studio.open("tiny", device="cpu")
    stock = StableDiffusionPipeline.from_pretrained(tiny_folder(), dtype=torch.float32)
    stock.set_progress_bar_config(disable=True)

    def theirs() -> None:
        g = [torch.Generator().manual_seed(1)]
        stock(PROMPT, num_inference_steps=STEPS, guidance_scale=4.0, generator=g)

    def ours() -> None:
        studio.paint(PROMPT, steps=STEPS, guidance=4.0, seed=1)

    ratios, mine = [], []
    for _ in range(7):  # alternately, so that a busy minute meets both
        a, b = timed(theirs, 2, 1)["median_ms"], timed(ours, 2, 1)["median_ms"]
        ratios.append(b / a)
        mine.append(b)
    ratios.sort()
    mine.sort()
    t, kv = torch.tensor(500), torch.randn(2, studio.base.n_tokens, studio.base.layout.width)
    c = studio.base.unet.config
    x = torch.randn(2, c.in_channels, c.sample_size, c.sample_size)
    with torch.no_grad():
        one = timed(lambda: studio.base.unet(x[:1], t, kv[:1]), 30)["median_ms"]
        two = timed(lambda: studio.base.unet(x, t, kv), 30)["median_ms"]
    return [
        {"what": "minikin / stock diffusers, 25 steps (7 runs: least, median, most)",
         "value": f"{ratios[0]:.2f} {ratios[3]:.2f} {ratios[-1]:.2f}", "bar": "<= 1",
         "holds": ratios[3] <= 1.0},
        {"what": "one image, 25 steps with guidance", "value": f"{mine[3]:.0f} ms", "bar": "<= 1500 ms",
         "holds": mine[3] <= 1500},
        {"what": "one U-Net forward, batch 1", "value": f"{one:.1f} ms", "bar": "<= 20 ms", "holds": one <= 20},
        {"what": "one U-Net forward, batch 2 (guidance)", "value": f"{two:.1f} ms"},
    ]  # fmt: skip
