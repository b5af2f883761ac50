"""Every number of every stage: one model a stage, and presets for both machines and both worlds.

`cpu` has budgets in steps, so that it can be repeated exactly: the straight way to what tiny's own
weights came to by detours (docs/tiny.md; 709,000 of their 1,183,104 samples were AdamW's), some four
hours on two cores. `gpu` has budgets in minutes that are meant to leave, of 25 on an H100 with 16 cores, time
for the judges, starting and compiling. The wide world gets a wider U-Net on the GPU, as wide as 60 MB of
weights allow.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from minikin.errors import UnknownName
from minikin.recipes import Recipe
from minikin.training.plan import Plan

Preset = Literal["cpu", "gpu"]


class Pictures(Recipe):
    """Rendered scenes, kept on disk."""

    count: int = Field(110_592, ge=1, description="scenes of the world; they become the U-Net's latents")
    pairs: int = Field(
        36_864, ge=0, description="of these, scenes of pairs alone, besides those among the others"
    )
    others: int = Field(4_096, ge=0, description="scenes of the wide world, for the autoencoder alone")
    shard: int = Field(1024, ge=1, description="images in a file (50 MB)")
    seed: int = Field(1, ge=0, description="stream of scenes")
    backdrops: int = Field(40, ge=1, description="painted variants of a background")


class Autoencoder(Recipe):
    """Pixels to latents and back: trained without its last level, then grown by it, then the decoder alone."""

    channels: tuple[int, ...] = (16, 32, 64, 128, 128)
    latents: int = Field(32, ge=1, description="channels of the latents")
    first_latents: int = Field(8, ge=1, description="the same before the last level is there")
    crop: int = Field(64, ge=16, le=128, description="pixels of a side before the last level is there")
    noise: float = Field(0.05, ge=0, description="noise on the latents, of their deviation")
    held_out: int = Field(96, ge=1, description="scenes for the evaluation")
    first: Plan = Plan(
        steps=6000, batch=16, rate=1.5e-3, betas=(0.9, 0.98), weight_decay=1e-4, ema=0.998, decay=0.7
    )
    grown: Plan = Plan(
        steps=6000, batch=16, rate=1.0e-3, betas=(0.9, 0.98), weight_decay=1e-4, ema=0.999, decay=0.5
    )
    decoder: Plan = Plan(
        steps=3700, batch=16, optimizer="muon", rate=5e-4, betas=(0.9, 0.98), weight_decay=0.0, ema=0.998,
        decay=0.45,
    )  # fmt: skip


class Tokenizer(Recipe):
    """Byte-level BPE in CLIP's format."""

    size: int = Field(3584, ge=514, description="tokens, with 512 for bytes and two special ones")
    captions: int = Field(6000, ge=1, description="of the world; as many again of general captions")


class Text(Recipe):
    """The text tower."""

    layers: int = Field(3, ge=1)
    width: int = Field(256, ge=8)
    heads: int = Field(4, ge=1)
    context: int = Field(32, ge=8, description="tokens of a prompt")
    plan: Plan = Plan(
        steps=700, batch=128, rate=1e-3, betas=(0.9, 0.98), ema=0.99, decay=0.5, sample_minutes=3, log_steps=25
    )


class Latents(Recipe):
    """The images as latents, their captions as tokens."""

    captions: int = Field(4, ge=1, description="wordings of every scene")
    batch: int = Field(64, ge=1, description="images encoded at once")


class Unet(Recipe):
    """The diffusion model."""

    channels: tuple[int, ...] = (128, 256)
    head: int = Field(32, ge=1, description="channels of an attention head")
    groups: int = Field(16, ge=1, description="of the group norms")
    uniform: float = Field(0.25, ge=0, le=1, description="share of timesteps drawn uniformly")
    centre: float = Field(0.3, description="of the Laplace distribution of log-SNR")
    spread: float = Field(0.8, gt=0, description="of the same")
    drop: float = Field(0.1, ge=0, le=1, description="share of captions left out, for guidance")
    held_out: int = Field(256, ge=1, description="scenes for the evaluation")
    samples: int = Field(32, ge=1, description="sample prompts painted")
    sample_steps: int = Field(20, ge=1)
    guidance: float = 3.0
    plan: Plan = Plan(
        steps=6000,
        batch=128,
        optimizer="muon",
        rate=1e-3,
        betas=(0.9, 0.99),
        weight_decay=0.01,
        ema=0.9995,
        warmup=300,
        decay=0.22,
    )


class Adapters(Recipe):
    """The few-step students."""

    rank: int = Field(12, ge=1, description="of the LoRAs: 1.8 MB each for the small U-Net")
    steps: dict[str, int] = Field(
        default={"lcm-lora": 606, "turbo": 924, "tdm": 495},
        description="on scenes, by method of `minikin distill`: those of tiny's own",
    )
    named: dict[str, int] = Field(
        default={"lcm-lora": 1141, "lcm": 1032},
        description="on captions of which half name taught things (tiny.build.familiar); after `steps`, if any",
    )
    things: int = Field(12, ge=1, description="that are taught for it")
    things_steps: int = Field(150, ge=1, description="of teaching each")
    captions: int = Field(1024, ge=1, description="that name them, and as many that do not")
    teacher_steps: int = Field(10, ge=1, description="of the teacher's images for these captions")
    start: dict[str, str] = Field(
        default={"lcm": "lcm-lora", "turbo": "lcm-lora"},
        description="what a student begins as: another one made before it",
    )
    batch: dict[str, int] = Field(
        default={"lcm-lora": 32, "lcm": 32, "turbo": 16, "tdm": 16}, description="examples a step, by method"
    )
    scenes: int = Field(8192, ge=1, description="examples")
    save_minutes: float = Field(3.0, ge=0, description="between checkpoints")


class Build(Recipe):
    """The whole recipe."""

    world: str = "small"
    preset: Preset = "cpu"
    pictures: Pictures = Pictures()
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
    small = world == "small"
    if preset == "cpu":
        return Build(world=world, pictures=Pictures(others=4096 if small else 0))
    first = Autoencoder().first.model_copy(
        update=_gpu(minutes=1.5, batch=128, rate=2e-3, compile=True, sample_minutes=1.0)
    )
    grown = Autoencoder().grown.model_copy(
        update=_gpu(minutes=3.0, batch=128, rate=1.5e-3, compile=True, sample_minutes=1.0)
    )
    decoder = Autoencoder().decoder.model_copy(
        update=_gpu(minutes=1.0, batch=128, rate=8e-4, compile=True, sample_minutes=1.0)
    )
    text = Text().plan.model_copy(update=_gpu(minutes=2.0, batch=128, sample_minutes=1.0, steps=2500))
    unet = Unet().plan.model_copy(
        update=_gpu(minutes=8.5, batch=1024, rate=1.5e-3, compile=True, sample_minutes=3.0)
    )
    return Build(
        world=world,
        preset="gpu",
        pictures=Pictures(count=262_144 if small else 327_680, pairs=65_536, others=16_384 if small else 0),
        autoencoder=Autoencoder(crop=128, first=first, grown=grown, decoder=decoder),
        text=Text(plan=text),
        latents=Latents(batch=512),
        unet=Unet(channels=(128, 256) if small else (160, 320), plan=unet),
    )


def _gpu(**changes: object) -> dict[str, object]:
    return {"steps": None, "save_minutes": 2.0} | changes
