"""The evaluated model: a diffusers folder, run in large batches.

Attention runs as plain matrix products (diffusers' AttnProcessor), and the networks in bfloat16 autocast
where the processor has units for it; both are much faster on CPUs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minikin.errors import BadModelFile
from minikin.models import device as runtime
from minikin.models import precision
from minikin.models.loading.registry import tiny_folder

BATCH = 64  # images at once


@dataclass(frozen=True)
class Noise:
    """v-loss of n scenes (n,), and its means by quarter of the timesteps, least noise first."""

    each: np.ndarray
    quarters: tuple[float, float, float, float]


class Model:
    """A text-to-image model with the structure of Stable Diffusion.

    ref     a diffusers folder, or "tiny" for the embedded one
    device  cuda, mps, xpu or cpu; the best there is by default
    Raises BadModelFile when the folder cannot be opened, BadRecipe for an unknown device.
    """

    def __init__(self, ref: str | Path = "tiny", device: str | None = None) -> None:
        from diffusers import DDPMScheduler
        from diffusers.models.attention_processor import AttnProcessor

        self.device, _ = runtime.resolve(device, "float32")
        self.pipe = _open(tiny_folder() if str(ref) == "tiny" else Path(ref)).to(self.device)
        self.pipe.unet.set_attn_processor(AttnProcessor())
        self.pipe.unet.to(memory_format=torch.channels_last)
        # not the pipeline's scheduler, since some schedulers scale noise differently
        self.noise: Any = DDPMScheduler.from_config(self.pipe.scheduler.config)

    @torch.no_grad()
    def draw(
        self, prompts: Sequence[str], *, steps: int, guidance: float, seed: int, batch: int = BATCH
    ) -> Iterator[np.ndarray]:
        """Images (n, h, w, 3) uint8, a batch at a time.

        Image i starts from noise of the seed (seed, i), whatever the batch.
        """
        empty = self.encode([""])
        for start in range(0, len(prompts), batch):
            part = prompts[start : start + batch]
            numbers = range(start, start + len(part))
            yield self._draw(self.encode(part), empty, numbers, steps, guidance, seed)

    def _draw(
        self, text: Tensor, empty: Tensor, numbers: Sequence[int], steps: int, guidance: float, seed: int
    ) -> np.ndarray:
        unet, scheduler = self.pipe.unet, self.pipe.scheduler
        scheduler.set_timesteps(steps, device=self.device)
        side, n = unet.config.sample_size, len(numbers)
        shape = (unet.config.in_channels, side, side)
        x = torch.stack([torch.randn(shape, generator=_generator(seed, i)) for i in numbers])
        x = x.to(self.device) * scheduler.init_noise_sigma
        both = torch.cat([empty.expand(n, -1, -1), text])
        for t in scheduler.timesteps:
            doubled = scheduler.scale_model_input(torch.cat([x, x]), t)
            with self._autocast():
                out = unet(doubled, t, encoder_hidden_states=both).sample.float()
            without, with_text = out.chunk(2)
            x = scheduler.step(without + guidance * (with_text - without), t, x).prev_sample
        return self.decode(x)

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Text encodings (n, tokens, width)."""
        tokenizer = self.pipe.tokenizer
        ids = tokenizer(
            list(prompts),
            padding="max_length",
            truncation=True,
            max_length=tokenizer.model_max_length,
            return_tensors="pt",
        ).input_ids
        return torch.as_tensor(self.pipe.text_encoder(ids.to(self.device))[0].float())

    def decode(self, x: Tensor) -> np.ndarray:
        """Latents to images (n, h, w, 3) uint8."""
        vae = self.pipe.vae
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        with self._autocast():
            images = vae.decode(x / vae.config.scaling_factor + shift).sample.float()
        rounded = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        return np.asarray(rounded.permute(0, 2, 3, 1).cpu())

    def latents(self, images: np.ndarray) -> Tensor:
        """Images (n, h, w, 3) uint8 to latents; the mean of the distribution, without noise."""
        vae = self.pipe.vae
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        x = torch.from_numpy(images).permute(0, 3, 1, 2).float().to(self.device) / 127.5 - 1
        with self._autocast():
            mean = vae.encode(x).latent_dist.mean.float()
        return torch.as_tensor((mean - shift) * vae.config.scaling_factor)

    @torch.no_grad()
    def round_trip(self, images: np.ndarray) -> np.ndarray:
        """Images (n, h, w, 3) uint8 after encoding and decoding."""
        parts = range(0, len(images), BATCH)
        return np.concatenate([self.decode(self.latents(images[i : i + BATCH])) for i in parts])

    @torch.no_grad()
    def v_loss(self, images: np.ndarray, prompts: Sequence[str], seed: int) -> Noise:
        """Mean squared error of the predicted velocity, or of the noise for eps-prediction, with fixed noise.

        Image i gets one timestep from each quarter, so every quarter sees every image.
        """
        scheduler = self.noise
        total = int(scheduler.config.num_train_timesteps)
        losses = np.zeros((4, len(images)))
        for start in range(0, len(images), BATCH):
            here = slice(start, start + BATCH)
            x0, text = self.latents(images[here]), self.encode(prompts[here])
            for q in range(4):
                rng = np.random.default_rng((seed, start, q))
                t = torch.from_numpy(rng.integers(q * total // 4, (q + 1) * total // 4, len(x0))).to(
                    self.device
                )
                eps = torch.randn(x0.shape, generator=_generator(seed, start, q)).to(self.device)
                x_t = scheduler.add_noise(x0, eps, t)
                with self._autocast():
                    out = self.pipe.unet(x_t, t, encoder_hidden_states=text).sample.float()
                is_v = scheduler.config.prediction_type == "v_prediction"
                target = scheduler.get_velocity(x0, eps, t) if is_v else eps
                losses[q, here] = (out - target).square().mean((1, 2, 3)).cpu().numpy()
        by_quarter = [float(v) for v in losses.mean(1)]
        return Noise(losses.mean(0), (by_quarter[0], by_quarter[1], by_quarter[2], by_quarter[3]))

    @torch.no_grad()
    def times(self, *, steps: int, guidance: float, repeats: int = 5) -> dict[str, float]:
        """Best of some repeats: ms of one U-Net forward of one example, seconds of one image."""
        config = self.pipe.unet.config
        x = torch.randn(1, config.in_channels, config.sample_size, config.sample_size).to(self.device)
        text = self.encode(["a cat on the beach"])

        def forward() -> None:
            with self._autocast():
                self.pipe.unet(x, torch.tensor(500, device=self.device), encoder_hidden_states=text)

        def paint_one() -> None:
            for _ in self.draw(["a cat on the beach"], steps=steps, guidance=guidance, seed=0):
                pass

        return {
            "unet_forward_ms": 1000 * _best(forward, 4 * repeats, self.device),
            "picture_s": _best(paint_one, repeats, self.device),  # word: JSON key
            "threads": float(torch.get_num_threads()),
        }

    def _autocast(self) -> torch.autocast:
        return precision.autocast(self.device)


def _open(folder: Path) -> Any:
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    if not (folder / "model_index.json").is_file():
        raise BadModelFile(
            f"{folder} is not a diffusers folder: it has no model_index.json. Give the folder that has it."
        )
    try:
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(
            str(folder),
            local_files_only=True,
            use_safetensors=True,
            dtype=torch.float32,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    except Exception as e:  # diffusers has no one error of its own
        raise BadModelFile(f"The diffusers folder {folder} could not be opened: {e}") from e
    pipe.set_progress_bar_config(disable=True)
    return pipe


def psnr(images: np.ndarray, changed: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio of each image (n,), in dB of 255."""
    error = np.square(images.astype(np.float64) - changed).mean((1, 2, 3))
    return np.asarray(10 * np.log10(255**2 / np.maximum(error, 1e-12)))


def _best(work: Any, repeats: int, device: torch.device) -> float:
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def _generator(*seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> 1))
