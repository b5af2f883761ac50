"""Refining and inpainting: strength, seeds, every base and preset, tiles without seams."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks.seams import seams
from PIL import Image

from minikin import Concept, Studio, events
from minikin.errors import BadPhoto, BadRecipe
from minikin.generation import sampler, schedulers
from minikin.generation.initial_latents import InitialLatents
from minikin.generation.request import resolve
from minikin.generation.start_step import start_step
from minikin.generation.tiling import TiledDiffusion, tile_starts, tile_weight, tiled_autoencoder
from minikin.images.photos import Photo
from minikin.models import presets
from minikin.models.base import Base
from minikin.models.regions import Box, in_view
from minikin.recipes import Inpaint, Paint, Refine
from tests.conftest import ALL_FAMILIES, FAMILIES, build_pipeline
from tests.models.test_presets import STANDS_FOR, WORKS, Calls, provide

pytestmark = pytest.mark.usefixtures("short_teaching")

RED_CAR = "a photo of a red car in the snow"


def array(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"), np.int16)


def far(a: Image.Image, b: Image.Image) -> int:
    return int(np.abs(array(a) - array(b)).max())


def noise_image(width: int = 64, height: int = 64, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (height // 8, width // 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def every(bases: dict[str, Base], tmp_path_factory: Any) -> dict[str, Base]:
    """The miniatures of all architectures, and SD 1.5 with a U-Net for inpainting."""
    from diffusers import UNet2DConditionModel

    pipe = build_pipeline("sd15", tmp_path_factory.mktemp("inpainter"))
    torch.manual_seed(1)
    pipe.unet = UNet2DConditionModel.from_config(dict(pipe.unet.config) | {"in_channels": 9}).eval()
    return {**bases, "sd15-inpainting": Base(pipe, "sd15-inpainting")}


@pytest.fixture(scope="module")
def draft(tiny: Base) -> Image.Image:
    return Studio(tiny).paint(RED_CAR, seed=7, steps=6)[0]


@pytest.fixture
def mask() -> np.ndarray:
    """A mask of tiny's images that keeps to no grid."""
    pixels = np.zeros((128, 128), bool)
    pixels[45:101, 30:95] = True
    return pixels


# ---- the contract: every base ---------------------------------------------------------------------

ALL = (*ALL_FAMILIES, "sd15-inpainting")


@pytest.mark.parametrize("family", ALL)
def test_every_base_refines_and_inpaints(every: dict[str, Base], family: str) -> None:
    """Sizes on no grid, twice as large in tiles, under a mask to the byte, beyond the edge."""
    studio, image = Studio(every[family]), noise_image(72, 56)
    unet, vae = studio.base.denoiser.forward, studio.base.vae.use_tiling
    how: dict[str, Any] = {"prompt": "a cat", "steps": 2, "seed": 3}
    (same,) = studio.refine(image, strength=0.6, **how)
    (larger,) = studio.refine(image, size="2x", strength=0.6, **how)
    assert same.size == (72, 56) and larger.size == (144, 112)
    assert far(same, image) > 8 and array(larger).std() > 0
    where = np.zeros((56, 72), bool)
    where[20:41, 30:60] = True
    for only in (False, True):
        (result,) = studio.inpaint(image, where, only_masked=only, padding=8, **how)
        assert np.array_equal(array(result)[~where], array(image)[~where])
        assert far(result, image) > 8
    (wider,) = studio.inpaint(image, extend="left=20,down=9", **how)
    assert wider.size == (92, 65)
    assert np.array_equal(array(wider)[:56, 20:], array(image))
    assert studio.base.denoiser.forward == unet and studio.base.vae.use_tiling == vae  # all is as it was


@pytest.mark.parametrize("preset", ["quality", "turbo", "lcm-lora"])
def test_strength_one_on_zero_terminal_snr(tiny: Base, draft: Image.Image, preset: str) -> None:
    """Tiny begins at pure noise; with the stock rule x0 would come in besides, 4096 times smaller."""
    how: dict[str, Any] = {"preset": preset, "steps": 3, "seed": 5}
    (plain,) = Studio(tiny).paint("a cat", **how)
    (over,) = Studio(tiny).refine(draft, prompt="a cat", strength=1.0, **how)
    assert far(plain, over) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_strength_one_is_painting_from_noise(every: dict[str, Base], family: str) -> None:
    """Step for step, ancestral noise included: nothing of the image is left."""
    studio = Studio(every[family])
    how = {} if family.startswith("lcm") else {"scheduler": "Euler a"}
    (plain,) = studio.paint("a cat", steps=3, seed=5, **how)
    (over,) = studio.refine(noise_image(), prompt="a cat", steps=3, seed=5, strength=1.0, **how)
    assert far(plain, over) == 0


@pytest.mark.parametrize(
    ("family", "name"), [(f, n) for f in FAMILIES for n in presets.PRESETS if n in WORKS[f]]
)
def test_every_preset_refines(every: dict[str, Base], monkeypatch: Any, family: str, name: str) -> None:
    """A student begins at its image's noise level and runs its share of the steps, one row each."""
    architecture = Base.architecture
    family_of = property(lambda self: STANDS_FOR.get(self.name) or architecture.fget(self))
    monkeypatch.setattr(Base, "architecture", family_of)
    provide(every[family], name)
    with Calls(every[family]) as calls:
        how = {"scheduler": "DDIM"} if name == "quality" else {}  # PNDM, of some bases, calls once more
        Studio(every[family]).refine(noise_image(), prompt="a cat", preset=name, steps=4, strength=0.5, **how)
    assert calls.batch_sizes == [2 if name == "quality" else 1] * 2
    assert calls.timesteps[0] == 499 and calls.timesteps[1] < 260


# ---- strength -------------------------------------------------------------------------------------


def test_the_stock_rule_gives_no_step_and_ours_one(every: dict[str, Base]) -> None:
    """int(4 * 0.1) steps are none: stock image-to-image fails, or gives the image back."""
    from diffusers import DDIMScheduler, StableDiffusionImg2ImgPipeline

    base = every["sd15"]
    stock = StableDiffusionImg2ImgPipeline.from_pipe(base.pipe)
    stock.set_progress_bar_config(disable=True)
    stock.scheduler = DDIMScheduler.from_config(base.pipe.scheduler.config)  # PNDM's has one call more
    assert int(4 * 0.1) == 0
    with Calls(base) as calls:
        try:
            stock(prompt="a cat", image=noise_image(), strength=0.1, num_inference_steps=4)
        except (ValueError, IndexError, RuntimeError):
            pass
    assert calls.timesteps == []  # the positive control: not one step
    with Calls(base) as calls:
        (result,) = Studio(base).refine(noise_image(), prompt="a cat", strength=0.1, steps=4)
    assert calls.timesteps == [99] and far(result, noise_image()) > 0


@pytest.mark.parametrize(("steps", "strength", "run"), [
    (1, 0.01, 1), (1, 0.9, 1), (2, 0.5, 1), (4, 0.1, 1), (4, 0.25, 1), (4, 0.26, 2), (4, 0.5, 2), (4, 0.75, 3),
    (4, 0.99, 4), (4, 1.0, 4), (25, 0.4, 10), (10, 0.7, 7), (1000, 0.001, 1),
])  # fmt: skip
def test_steps_at_a_strength(tiny: Base, steps: int, strength: float, run: int) -> None:
    start = start_step(steps, "DDIMScheduler", strength)
    assert start.steps == run and start.steps + start.skipped == steps
    assert start.levels == (None if strength == 1 else round(1000 * strength))


@pytest.mark.parametrize("name", schedulers.SCHEDULERS)
def test_every_scheduler_starts_at_the_noise_of_the_strength(every: dict[str, Base], name: str) -> None:
    """At timestep 1000 * strength - 1, of whatever spacing: within a Karras schedule's rounding."""
    with Calls(every["sd15"]) as calls:
        (result,) = Studio(every["sd15"]).refine(
            noise_image(), prompt="a cat", strength=0.4, steps=5, scheduler=name
        )
    assert abs(calls.timesteps[0] - 399) <= 1 and all(t <= 400 for t in calls.timesteps)
    assert 2 <= len(calls.timesteps) <= 3  # Heun and PNDM look twice at some
    assert np.isfinite(array(result)).all()


@pytest.mark.parametrize("steps", [1, 2, 8, 30])
@pytest.mark.parametrize("strength", [0.02, 0.1, 0.35, 0.85])
def test_any_steps_at_any_strength(tiny: Base, steps: int, strength: float) -> None:
    """On tiny's zero terminal SNR, every scheduler ends in finite numbers after at least one step."""
    for name, (cls, _) in schedulers.SCHEDULERS.items():
        start = start_step(steps, cls, strength)
        scheduler = schedulers.build(name, tiny.pipe.scheduler, levels=start.levels)
        scheduler.set_timesteps(start.steps)
        x = torch.randn((1, 4, 4, 4), generator=torch.Generator().manual_seed(0))
        assert len(scheduler.timesteps) >= 1
        for t in scheduler.timesteps:
            x = scheduler.step(torch.zeros_like(scheduler.scale_model_input(x, t)), t, x).prev_sample
        assert torch.isfinite(x).all(), name


def test_as_stock_where_the_stock_rule_is_right(every: dict[str, Base]) -> None:
    """4 of 8 steps at strength 0.5 from the same latents: the stock pipeline's result, to rounding."""
    from diffusers import DDIMScheduler, StableDiffusionImg2ImgPipeline

    base = every["sd15"]
    stock = StableDiffusionImg2ImgPipeline.from_pipe(base.pipe)
    stock.set_progress_bar_config(disable=True)
    stock.scheduler = DDIMScheduler.from_config(base.pipe.scheduler.config, timestep_spacing="trailing")
    latents = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(1))
    recipe = Paint(prompt="a cat", steps=8, guidance=3.0, scheduler="DDIM", width=64, height=64)
    (ours,) = sampler.generate(base, resolve(base, recipe), [5], initial=InitialLatents(latents, 0.5))
    theirs = stock(prompt="a cat", image=latents, strength=0.5, num_inference_steps=8, guidance_scale=3.0,
                   generator=torch.Generator().manual_seed(5)).images[0]  # fmt: skip
    assert far(ours.image, theirs) <= 1


def test_less_strength_keeps_more(tiny: Base, draft: Image.Image) -> None:
    moved = []
    for strength in (0.1, 0.4, 0.8):
        (result,) = Studio(tiny).refine(draft, prompt=RED_CAR, steps=6, seed=1, strength=strength)
        moved.append(np.abs(array(result) - array(draft)).mean())
    assert moved[0] < moved[1] < moved[2]


@pytest.mark.parametrize("preset", ["turbo", "lcm-lora"])
def test_few_step_presets_refine_tiny(tiny: Base, draft: Image.Image, preset: str) -> None:
    """One step at low strength stays near the draft; the same at full strength does not (the control)."""
    studio, moved = Studio(tiny), []
    for strength, run in ((0.1, 1), (0.5, 2), (1.0, 4)):
        with Calls(tiny) as calls:
            (result,) = studio.refine(draft, prompt=RED_CAR, preset=preset, strength=strength, seed=1)
        assert len(calls.timesteps) == run
        moved.append(np.abs(array(result) - array(draft)).mean())
    assert moved[0] < 9 < moved[2]


def test_same_seed_same_image_in_any_batch(
    tiny: Base, draft: Image.Image, mask: np.ndarray, monkeypatch: Any
) -> None:  # fmt: skip
    """seed + i, whatever the batch, with the noise of an ancestral scheduler and of what is put back."""
    studio = Studio(tiny)
    how: dict[str, Any] = {"prompt": "a duck", "steps": 3, "scheduler": "Euler a", "strength": 0.7}
    latents: list[torch.Tensor] = []
    decode = sampler.decode
    monkeypatch.setattr(sampler, "decode", lambda base, x, *more: latents.append(x) or decode(base, x, *more))
    three = studio.inpaint(draft, mask, n=3, seed=40, batch=3, **how)
    (second,) = studio.inpaint(draft, mask, n=1, seed=41, **how)
    assert (latents[0][1] - latents[1][0]).abs().max() < 1e-4
    assert far(three[1], second) <= 1
    assert far(three[0], three[1]) > 8


def test_shares_are_of_the_whole_image(tiny: Base) -> None:
    """At strength 0.4 the first 60 % are over: the concept is there from the first step, and guidance
    that ends at half is off in all."""
    studio = Studio(tiny)
    image = noise_image(128, 128)
    for interval, rows in (("0-0.5", [1, 1, 1, 1]), ("0.5-1", [2, 2, 2, 2]), ("0-0.8", [2, 2, 1, 1])):
        with Calls(tiny) as calls:
            studio.refine(image, prompt="a cat", steps=10, strength=0.4, interval=interval)
        assert calls.batch_sizes == rows, interval


# ---- inpainting -----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [
    {}, {"preset": "turbo"}, {"only_masked": True, "padding": 8}, {"feather": 0}, {"strength": 0.5},
    {"tile": 64, "feather": 20},
])  # fmt: skip
def test_unmasked_pixels_stay_to_the_byte(
    tiny: Base, draft: Image.Image, mask: np.ndarray, how: dict[str, Any]
) -> None:  # fmt: skip
    (result,) = Studio(tiny).inpaint(draft, mask, "a yellow duck", **{"steps": 3, **how})
    assert np.array_equal(np.asarray(result)[~mask], np.asarray(draft)[~mask])
    assert np.abs(array(result)[mask] - array(draft)[mask]).mean() > 4


def test_the_prompt_appears_under_the_mask(tiny: Base, draft: Image.Image, mask: np.ndarray) -> None:
    """Yellow, where there was red."""
    (result,) = Studio(tiny).inpaint(draft, mask, "a photo of a yellow duck in the snow", steps=12, seed=2)
    before, after = (array(x)[mask].mean(0) for x in (draft, result))
    assert after[1] - after[2] > before[1] - before[2] + 20  # green beyond blue


def test_a_concept_goes_under_the_mask(bases: dict[str, Base]) -> None:
    """ "put <tom> here": the concept's name changes what is under the mask and nothing else."""
    studio = Studio(bases["sd15"])
    rng = np.random.default_rng(0)
    where = np.zeros((64, 64), np.float32)
    where[16:48, 16:48] = 1
    shots = [Photo("a", rng.integers(0, 255, (64, 64, 3), dtype=np.uint8), where)]
    tom: Concept = studio.teach(shots, name="tom", category="cat", mode="value", steps=3, batch=2)
    assert tom.name == "tom"
    image, how = noise_image(), {"steps": 2, "seed": 1}
    (with_tom,) = studio.inpaint(image, where > 0, "<tom>", **how)
    (cat,) = studio.inpaint(image, where > 0, "a cat", **how)
    (placed,) = studio.inpaint(image, where > 0, "<tom@left>", **how)
    assert far(with_tom, cat) > 0 and far(with_tom, placed) > 0
    assert np.array_equal(array(with_tom)[where == 0], array(cat)[where == 0])


def test_an_inpainting_model_sees_the_mask(every: dict[str, Base]) -> None:
    """Its U-Net's nine channels: the latents, the mask, and the image with grey under the mask."""
    base, inputs = every["sd15-inpainting"], []
    handle = base.denoiser.conv_in.register_forward_pre_hook(lambda _m, args: inputs.append(args[0].clone()))
    image = noise_image()
    where = np.zeros((64, 64), bool)
    where[:32] = True
    try:
        Studio(base).inpaint(image, where, "a cat", steps=1)
    finally:
        handle.remove()
    assert inputs[0].shape[1] == 9
    assert inputs[0][0, 4, :4].eq(1).all() and inputs[0][0, 4, 4:].eq(0).all()
    grey = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None] / 127.5 - 1
    grey[:, :, :32] = 0
    assert (inputs[0][:1, 5:] - base.to_latents(grey)).abs().max() < 1e-5
    with pytest.raises(BadRecipe, match="minikin inpaint"):
        Studio(base).paint("a cat")


# ---- tiled diffusion ------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "side"), [(8, 8), (5, 8), (9, 8), (16, 8), (17, 8), (100, 64), (128, 64)])
def test_tiles_cover_everything_and_overlap_by_half(length: int, side: int) -> None:
    starts = tile_starts(length, side)
    covered = np.zeros(length)
    for k in starts:
        assert 0 <= k <= max(0, length - side)
        covered[k : k + side] += 1
    assert covered.min() >= 1 and starts[-1] + side >= length
    assert all(b - a <= side / 2 for a, b in pairwise(starts))
    assert tile_weight(4, 6).min() > 0


def test_tiles_of_a_model_without_context_change_nothing(every: dict[str, Base]) -> None:
    """A U-Net that works on each place alone gives the same in tiles, as their weights sum to 1."""
    base = every["sd15"]
    plain = base.denoiser.forward
    base.denoiser.forward = lambda sample, *a, **k: (3 * sample + 1,)
    try:
        x = torch.randn(2, 4, 12, 20)
        tiled = TiledDiffusion((12, 20), 8).wrap(base, base.denoiser.forward)
        (result,) = tiled(x, 1, return_dict=False)
    finally:
        base.denoiser.forward = plain
    assert (result - (3 * x + 1)).abs().max() < 1e-5


def test_regions_keep_their_place_in_tiles() -> None:
    """The left half of the image is all of a tile in it, and nothing of one on the right."""
    left = Box(0, 0, 0.5, 1)
    assert in_view(left, Box(0, 0, 0.5, 1)) == Box(0, 0, 1, 1)
    assert in_view(left, Box(0.5, 0, 1, 1)).right == 0


def test_no_seams(tiny: Base, draft: Image.Image) -> None:
    """Tiled diffusion leaves no jump at the borders of tiles (1.0 is none); separate tiles do (5 to 12)."""
    studio, how = Studio(tiny), {"prompt": RED_CAR, "steps": 6, "strength": 0.5}
    (ours,) = studio.refine(draft, size="2x", seed=1, **how)  # type: ignore[arg-type]
    grown, naive = draft.resize((256, 256), Image.Resampling.LANCZOS), Image.new("RGB", (256, 256))
    for k, (x, y) in enumerate([(0, 0), (128, 0), (0, 128), (128, 128)]):
        tile = studio.refine(grown.crop((x, y, x + 128, y + 128)), seed=k, **how)[0]  # type: ignore[arg-type]
        naive.paste(tile, (x, y))
    borders = [64, 128, 192]
    assert seams(ours, borders, borders) < 1.6
    assert seams(naive, [128], [128]) > 3


def test_the_autoencoders_tiles_leave_no_seams(tiny: Base, draft: Image.Image) -> None:
    """In tiles of 128 px instead of whole: no jumps where tiles end, and nearly the same image."""
    from minikin.generation.decode import decode

    grown = draft.resize((256, 256), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.asarray(grown).copy()).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        whole = decode(tiny, tiny.to_latents(pixels))[0]
        with tiled_autoencoder(tiny, largest=128):
            tiled = decode(tiny, tiny.to_latents(pixels))[0]
    borders = [64, 128, 192]
    assert 0 < np.abs(array(tiled) - array(whole)).mean() < 6
    assert seams(tiled, borders, borders) < 1.6


# ---- recipes and errors -------------------------------------------------------------------------


def test_sizes_of_refined_images(bases: dict[str, Base]) -> None:
    assert Refine.make(size="2x").with_size((100, 50)).width == 200
    assert Refine.make(size="1.5x").with_size((100, 50)).height == 75
    assert Refine.make(width=50).with_size((100, 60)).height == 30
    assert Refine.make(size="64x48").with_size((9, 9)).height == 48
    with pytest.raises(BadRecipe, match="Choose another --size"):
        Refine.make(size="8x").with_size((1000, 1000))


@pytest.mark.parametrize(("values", "words"), [
    ({"extend": "lft=3"}, "left=64,right=64"), ({"width": 64}, "keeps its size"),
    ({"strength": 0}, "must be greater than 0"), ({"strength": 1.2}, "must be at most 1"),
    ({"feather": -1}, "at least 0"),
])  # fmt: skip
def test_bad_recipes_say_one_sentence(values: dict[str, Any], words: str) -> None:
    with pytest.raises(BadRecipe) as e:
        Inpaint.make(prompt="a", **values)
    assert words in str(e.value) and "\n" not in str(e.value)


def test_images_and_masks_that_are_refused(bases: dict[str, Base], tmp_path: Path) -> None:
    studio, image = Studio(bases["sd15"]), noise_image()
    with pytest.raises(BadRecipe, match="carries no prompt"):
        studio.refine(image)
    with pytest.raises(BadRecipe, match="Say what to paint"):
        studio.inpaint(image, prompt="a cat")
    with pytest.raises(BadPhoto, match="black everywhere"):
        studio.inpaint(image, np.zeros((64, 64), bool), "a cat")
    with pytest.raises(BadPhoto, match="The mask is 32x32, but the image 64x64"):
        studio.inpaint(image, Image.new("L", (32, 32), 255), "a cat")
    (tmp_path / "a.png").write_text("no image")
    with pytest.raises(BadPhoto, match="cannot be read as a JPEG, PNG"):
        studio.refine(tmp_path / "a.png", prompt="a cat")


def test_closing_the_generator_leaves_the_base_as_it_was(bases: dict[str, Base]) -> None:
    studio = Studio(bases["sd15"])
    plain = studio.base.denoiser.forward
    run = studio.refining(Refine(prompt="a cat", steps=50, strength=0.9, width=128, height=128), noise_image())
    assert isinstance(next(run), events.Progress)
    run.close()  # type: ignore[attr-defined]
    assert studio.base.denoiser.forward == plain
    assert len(studio.paint("a cat", steps=1)) == 1
