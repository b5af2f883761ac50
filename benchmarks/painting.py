"""Text-to-image against the stock diffusers pipeline on the same work (goal: never slower), and per image."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.measure import alternating, spread, timed
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

    pairs = alternating(theirs, ours, 7, 2, 1)
    ratios, milliseconds = sorted(b / a for a, b in pairs), sorted(b for _, b in pairs)
    t, kv = torch.tensor(500), torch.randn(2, studio.base.n_tokens, studio.base.layout.width)
    c = studio.base.denoiser.config
    x = torch.randn(2, c.in_channels, c.sample_size, c.sample_size)
    with torch.no_grad():
        single = timed(lambda: studio.base.denoiser(x[:1], t, kv[:1]), 30)["median_ms"]
        guided = timed(lambda: studio.base.denoiser(x, t, kv), 30)["median_ms"]
    return [
        {"what": "minikin / stock diffusers, 25 steps (7 runs: least, median, most)",
         "value": spread(ratios), "bar": "<= 1",
         "holds": ratios[3] <= 1.0},
        {"what": "one image, 25 steps with guidance", "value": f"{milliseconds[3]:.0f} ms",
         "bar": "<= 1500 ms",
         "holds": milliseconds[3] <= 1500},
        {"what": "one U-Net forward, batch 1", "value": f"{single:.1f} ms", "bar": "<= 20 ms",
         "holds": single <= 20},
        {"what": "one U-Net forward, batch 2 (guidance)", "value": f"{guided:.1f} ms"},
    ]  # fmt: skip
