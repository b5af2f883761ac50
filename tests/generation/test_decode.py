"""From latents to images when memory or precision run out: never a black image, never a crash."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from minikin import Studio
from minikin.errors import NanOrInf, OutOfMemory
from minikin.generation.decode import decode
from minikin.generation.tiling import tiled_autoencoder
from minikin.models.base import Base
from tests.conftest import command, equal


@pytest.fixture
def latents(tiny: Base) -> torch.Tensor:
    """Three images' worth, from the image of a gradient."""
    side = tiny.size_px
    ramp = torch.linspace(-1, 1, side).expand(3, 3, side, side).clone()
    with torch.no_grad():
        return tiny.to_latents(ramp * torch.tensor([0.3, 0.6, 0.9]).view(3, 1, 1, 1))


@contextmanager
def decoder(base: Base, before: Any, after: Any = lambda z, x: x) -> Iterator[list[tuple[int, torch.dtype]]]:
    """Inside, `before(z)` sees what is decoded and `after(z, pixels)` what comes out; yields the calls."""
    plain, calls = base.vae.decode, []

    def decode(z: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append((len(z), z.dtype))
        before(z)
        (pixels, *rest) = plain(z, *args, **kwargs)
        return (after(z, pixels), *rest)

    base.vae.decode = decode
    try:
        yield calls
    finally:
        base.vae.decode = plain


def near(a: list[Image.Image], b: list[Image.Image], within: float) -> None:
    for x, y in zip(a, b, strict=True):
        difference = np.abs(np.asarray(x, np.int16) - np.asarray(y, np.int16))
        assert difference.mean() <= within, difference.mean()


def nothing(z: torch.Tensor) -> None: ...


def short(most: int) -> Any:
    """A device on which no more than so many images fit."""

    def before(z: torch.Tensor) -> None:
        if len(z) > most:
            raise torch.OutOfMemoryError("planted")

    return before


def test_as_the_stock_pipeline_decodes(tiny: Base) -> None:
    """The same bytes as diffusers' own pipeline from the same noise."""
    studio = Studio(tiny)
    ours = studio.paint("a red car on grass", seed=3, steps=3, n=2)
    decoded: list[torch.Tensor] = []
    with decoder(tiny, lambda z: decoded.append(z.clone())):
        studio.paint("a red car on grass", seed=3, steps=3, n=2)
    pixels = tiny.vae.decode(decoded[0], return_dict=False)[0]
    stock = tiny.pipe.image_processor.postprocess(pixels.detach(), output_type="pil")
    assert all(equal(*pair) for pair in zip(ours, stock, strict=True))


def test_too_little_memory_for_the_batch(tiny: Base, latents: torch.Tensor) -> None:
    """Decoded one by one, the same to a grey value, and a message says so."""
    usual, messages = decode(tiny, latents), []
    with decoder(tiny, short(1)) as calls:
        split = decode(tiny, latents, messages.append)
    near(split, usual, 0.01)
    assert [n for n, _ in calls] == [3, 1, 1, 1] and "one by one" in messages[0]


def test_too_little_memory_for_an_image(tiny: Base, latents: torch.Tensor) -> None:
    """Decoded in tiles, the autoencoder as it was afterwards."""
    usual, messages = decode(tiny, latents), []
    before = (tiny.vae.use_tiling, tiny.vae.tile_sample_min_size)

    def whole(z: torch.Tensor) -> None:
        if not tiny.vae.use_tiling:
            raise torch.OutOfMemoryError("planted")

    with decoder(tiny, whole):
        tiled = decode(tiny, latents, messages.append)
    near(tiled, usual, 12)
    assert "in tiles" in messages[-1] and (tiny.vae.use_tiling, tiny.vae.tile_sample_min_size) == before


def test_no_memory_at_all_is_one_sentence(tiny: Base, monkeypatch: Any, capsys: Any, tmp_path: Path) -> None:
    """OutOfMemory, exit code 5, a smaller batch to try; the next image is painted."""
    with decoder(tiny, short(0)), pytest.raises(OutOfMemory, match="Try --batch 1"):
        Studio(tiny).paint("a cat", n=2, steps=1)
    assert len(Studio(tiny).paint("a cat", steps=1)) == 1
    monkeypatch.setattr(type(tiny.vae), "decode", lambda *a, **k: short(0)(torch.zeros(1)))
    code, _, err = command(monkeypatch, capsys, "paint", "a cat", "--steps", "1", "--out", tmp_path / "out")
    assert code == 5 and "Not enough memory" in err and not list(tmp_path.rglob("*.png"))


def _spoilt(rows: list[int], dtype: torch.dtype | None = None) -> Any:
    """An autoencoder that overflows in these rows, in this precision only."""

    def after(z: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
        if dtype is not None and z.dtype is not dtype:
            return pixels
        pixels = pixels.clone()
        pixels[[r for r in rows if r < len(pixels)]] = float("nan")
        return pixels

    return after


def test_overflow_in_half_precision_is_decoded_again(tiny: Base, latents: torch.Tensor) -> None:
    """Only the image that overflowed, in float32; the others keep their bytes; the precision is as before."""
    before = deepcopy(tiny.vae.state_dict())
    tiny.vae.to(torch.bfloat16)
    try:
        usual, messages = decode(tiny, latents), []
        with decoder(tiny, nothing, _spoilt([1], torch.bfloat16)) as calls:
            again = decode(tiny, latents, messages.append)
        assert tiny.vae.dtype is torch.bfloat16
    finally:
        tiny.vae.to(torch.float32).load_state_dict(before)  # what was rounded stays rounded
    assert calls == [(3, torch.bfloat16), (1, torch.float32)] and "float32" in messages[0]
    assert [equal(again[i], usual[i]) for i in (0, 2)] == [True, True]
    near(again, usual, 3)


def test_nan_in_latents_is_an_error(tiny: Base, latents: torch.Tensor) -> None:
    with decoder(tiny, nothing, _spoilt([0, 2])), pytest.raises(NanOrInf, match="2 of 3.*damaged") as e:
        decode(tiny, latents)
    assert (e.value.code, e.value.exit_code) == ("non_finite_output", 6)
    spoilt = latents.clone()
    spoilt[1, 0, 0, 0] = float("inf")
    with decoder(tiny, nothing) as calls, pytest.raises(NanOrInf, match="1 of 3.*--dtype float32"):
        decode(tiny, spoilt)
    assert calls == []  # known before anything is decoded


@pytest.mark.parametrize("stage", ["unet", "text_encoder"])
def test_nan_at_any_stage_is_an_error(tiny: Base, stage: str, tmp_path: Path) -> None:
    """NaN from the U-Net or the text encoder: the same error; the next image is as usual."""
    module = getattr(tiny.pipe, stage)
    layer = module.conv_out if stage == "unet" else module.get_input_embeddings()
    handle = layer.register_forward_hook(lambda m, i, out: out * float("nan"))
    try:
        with pytest.raises(NanOrInf):
            Studio(tiny).paint("a cat under a tree", steps=2)
    finally:
        handle.remove()
    assert np.asarray(Studio(tiny).paint("a cat under a tree", steps=2)[0]).std() > 1


def test_without_the_check_it_would_be_black(tiny: Base, latents: torch.Tensor) -> None:
    """The positive control: the image processor turns NaN into one black area."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pixels = tiny.vae.decode(latents[:1] * float("nan"), return_dict=False)[0]
        black = tiny.pipe.image_processor.postprocess(pixels.detach(), output_type="pil")[0]
    assert np.asarray(black).max() == 0


def test_refined_images_are_decoded_alike(tiny: Base) -> None:
    """Latents of img2img are decoded in the same function, in tiles where the image is large."""
    with tiled_autoencoder(tiny), decoder(tiny, nothing, _spoilt([0])), pytest.raises(NanOrInf):
        Studio(tiny).refine(Image.new("RGB", (tiny.size_px,) * 2, "green"), prompt="a cat", strength=0.3)
