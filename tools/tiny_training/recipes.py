"""Recipes: all numbers of all stages, one model a stage, with presets for CPU and GPU and for both worlds.

They are for the next model: autoencoder and U-Net have other shapes than the shipped ones (docs/tiny.md).
`cpu` has budgets in steps, so that it can be repeated exactly. `gpu` has budgets in minutes, which leave of 25
on an H100 with 16 cores some time for the encoders, starting and compiling. The wide world gets a wider
U-Net on the GPU, as wide as 60 MB of weights allow.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from minikin.errors import UnknownName
from minikin.recipes import Recipe
from minikin.training.config import TrainingConfig

Preset = Literal["cpu", "gpu"]


class Images(Recipe):
    """Rendered scenes, cached on disk."""

    count: int = Field(110_592, ge=1, description="scenes of the world, for the U-Net")
    pairs: int = Field(36_864, ge=0, description="of these, scenes of pairs only")
    things: int = Field(14_336, ge=1, description="images of things in patterns, for the autoencoder alone")
    photos: Path | None = Field(None, description="folder of photos, for the backgrounds of some of these")
    shard: int = Field(1024, ge=1, description="images in a file (50 MB)")
    seed: int = Field(1, ge=0, description="of the scenes")
    backdrops: int = Field(40, ge=1, description="variants of a background")


class Autoencoder(Recipe):
    """The autoencoder, trained on crops around things."""

    channels: tuple[int, ...] = (16, 32, 64, 128)
    latents: int = Field(16, ge=1, description="channels of the latents")
    crop: int = Field(64, ge=16, le=128, description="pixels of a side in training")
    noise: float = Field(0.02, ge=0, description="mean noise on the latents, of their deviation")
    inside: float = Field(2.0, ge=0, description="extra weight of the pixels inside things")
    held_out: int = Field(96, ge=1, description="scenes for the evaluation")
    plan: TrainingConfig = TrainingConfig(
        steps=20_000,
        batch=16,
        optimizer="muon",
        lr=2e-3,
        betas=(0.9, 0.98),
        weight_decay=0.0,
        ema=0.998,
        decay=0.35,
    )


class Tokenizer(Recipe):
    """Byte-level BPE in CLIP's format."""

    size: int = Field(3584, ge=514, description="tokens, with 512 for bytes and two special ones")
    captions: int = Field(6000, ge=1, description="of the world; as many again of general captions")


class Text(Recipe):
    """The text encoder."""

    layers: int = Field(3, ge=1)
    width: int = Field(256, ge=8)
    heads: int = Field(4, ge=1)
    context: int = Field(32, ge=8, description="tokens of a prompt")
    plan: TrainingConfig = TrainingConfig(
        steps=700, batch=128, lr=1e-3, betas=(0.9, 0.98), ema=0.99, decay=0.5, sample_minutes=3, log_steps=25
    )


class Latents(Recipe):
    """Latents of the images and tokens of the captions."""

    captions: int = Field(4, ge=1, description="wordings of every scene")
    batch: int = Field(64, ge=1, description="images encoded at once")


class Unet(Recipe):
    """The diffusion model."""

    channels: tuple[int, ...] = (64, 128, 256)
    convolutional: int = Field(1, ge=0, description="first levels without attention, as the last has none")
    head: int = Field(32, ge=1, description="channels of an attention head")
    groups: int = Field(16, ge=1, description="of the group norms")
    uniform: float = Field(0.25, ge=0, le=1, description="share of timesteps drawn uniformly")
    centre: float = Field(0.3, description="of the Laplace distribution of log-SNR")
    spread: float = Field(0.8, gt=0, description="of the same")
    drop: float = Field(0.1, ge=0, le=1, description="share of captions left out, for guidance")
    held_out: int = Field(256, ge=1, description="scenes for the evaluation")
    samples: int = Field(32, ge=1, description="prompts of the sample sheet")
    sample_steps: int = Field(20, ge=1)
    guidance: float = 3.0
    plan: TrainingConfig = TrainingConfig(
        steps=16_000,
        batch=64,
        optimizer="muon",
        lr=2.5e-3,
        betas=(0.9, 0.99),
        weight_decay=0.01,
        ema=0.9995,
        warmup=100,
        decay=0.22,
    )


class Adapters(Recipe):
    """The few-step LoRAs."""

    rank: int = Field(12, ge=1, description="of the LoRAs: 1.8 MB each for the small U-Net")
    steps: dict[str, int] = Field(
        default={"lcm-lora": 606, "turbo": 924, "tdm": 495},
        description="on scenes, by method of `minikin distill`: those of tiny's own",
    )
    with_concepts: dict[str, int] = Field(
        default={"lcm-lora": 1141, "lcm": 1032},
        description="on captions of which half name in-domain concepts; after `steps`, if any",
    )
    things: int = Field(12, ge=1, description="in-domain concepts")
    things_steps: int = Field(150, ge=1, description="of teaching each concept")
    captions: int = Field(1024, ge=1, description="that name a concept, and as many that do not")
    teacher_steps: int = Field(10, ge=1, description="of the teacher's images for these captions")
    start: dict[str, str] = Field(
        default={"lcm": "lcm-lora", "turbo": "lcm-lora"},
        description="initial LoRA of a student: that of another method, trained before",
    )
    batch: dict[str, int] = Field(
        default={"lcm-lora": 32, "lcm": 32, "turbo": 16, "tdm": 16}, description="examples a step, by method"
    )
    scenes: int = Field(8192, ge=1, description="examples")
    save_minutes: float = Field(3.0, ge=0, description="between checkpoints")


class Build(Recipe):
    """Recipe of the whole build."""

    world: str = "small"
    preset: Preset = "cpu"
    images: Images = Images()
    autoencoder: Autoencoder = Autoencoder()
    tokenizer: Tokenizer = Tokenizer()
    text: Text = Text()
    latents: Latents = Latents()
    unet: Unet = Unet()
    adapters: Adapters = Adapters()


def recipe(world: str, preset: str) -> Build:
    """The recipe for a world and a machine. Raises UnknownName."""
    from minikin.tiny.vocabulary import WORLDS

    if world not in WORLDS:
        raise UnknownName("world", world, WORLDS)
    if preset not in ("cpu", "gpu"):
        raise UnknownName("preset", preset, ("cpu", "gpu"))
    small = world != "wide"
    if preset == "cpu":
        return Build(world=world)
    autoencoder = Autoencoder().plan.model_copy(
        update=_gpu(minutes=5.0, batch=256, lr=3e-3, compile=True, sample_minutes=1.0)
    )
    text = Text().plan.model_copy(update=_gpu(minutes=2.0, batch=128, sample_minutes=1.0, steps=2500))
    unet = Unet().plan.model_copy(
        update=_gpu(minutes=8.5, batch=1024, lr=1.5e-3, compile=True, sample_minutes=3.0)
    )
    return Build(
        world=world,
        preset="gpu",
        images=Images(count=262_144 if small else 327_680, pairs=65_536, things=65_536),
        autoencoder=Autoencoder(plan=autoencoder),
        text=Text(plan=text),
        latents=Latents(batch=512),
        unet=Unet(channels=(64, 128, 256) if small else (64, 160, 320), plan=unet),
    )


def _gpu(**changes: object) -> dict[str, object]:
    return {"steps": None, "save_minutes": 2.0} | changes
