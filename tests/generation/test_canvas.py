"""Canvases: masks, margins, crops and the way painted pixels come back into an image."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from minikin.errors import BadPhoto
from minikin.generation import canvas as canvases
from minikin.generation.canvas import (
    blend_opacity,
    inpaint_canvas,
    mask_of_text,
    mask_text,
    read_mask,
    resize_canvas,
)


def sample_image(width: int = 50, height: int = 40) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))


def box(left: int, top: int, right: int, bottom: int, size: tuple[int, int] = (50, 40)) -> np.ndarray:
    mask = np.zeros((size[1], size[0]), bool)
    mask[top:bottom, left:right] = True
    return mask


def test_a_refined_image_comes_back_without_its_padding() -> None:
    canvas = resize_canvas(sample_image(), (50, 40), 32)
    assert canvas.padded == (64, 64) and canvas.init_image().size == (64, 64) and canvas.init_mask() is None
    assert canvas.paste_back(canvas.init_image(), 0).tobytes() == sample_image().tobytes()
    assert canvas.view == (0, 0, 64 / 50, 64 / 40)


def test_extensions_repeat_the_edge_and_start_at_a_latent_position() -> None:
    canvas = inpaint_canvas(sample_image(), None, (20, 10, 3, 0), 32, factor=16)
    assert canvas.image.size == (80, 43) and canvas.mask is not None
    assert canvas.mask[:, :20].all() and canvas.mask[:3].all() and not canvas.mask[3:, 20:70].any()
    assert canvas.offset == (12, 13)  # 20 + 12 and 3 + 13 are multiples of 16
    pixels = np.asarray(canvas.image)
    assert (pixels[3:, :20] == pixels[3:, 20:21]).all()
    ground = np.asarray(canvas.init_image())
    assert ground.shape[:2] == (64, 96) and canvas.init_mask().shape == (64, 96)  # type: ignore[union-attr]
    assert (ground[16:56, 32:82] == np.asarray(sample_image())).all()
    back = canvas.paste_back(canvas.init_image(), 0)
    assert back.tobytes() == canvas.image.tobytes()
    assert canvas.view.left == -12 / 80 and canvas.view.top == -13 / 43


def test_only_masked_is_an_enlarged_square_inside_the_image() -> None:
    canvas = inpaint_canvas(sample_image(), box(2, 30, 12, 34), (0, 0, 0, 0), 8, around=3, side=64)
    assert canvas.part == (0, 24, 16, 40)  # 10 + 2 * 3 wide, moved inside
    assert canvas.size == (64, 64)
    mask = canvas.init_mask()
    assert mask is not None and mask[24:40, 8:48].all() and mask.sum() == 16 * 40
    large = inpaint_canvas(sample_image(), box(0, 0, 50, 40), (0, 0, 0, 0), 8, around=0, side=32)
    assert large.size == (50, 40)  # never smaller than it is


@pytest.mark.parametrize("feather", [0, 1, 2, 5, 8, 30])
def test_the_blend_lies_inside_the_mask(feather: int) -> None:
    mask = box(5, 5, 45, 35)
    opacity = blend_opacity(mask, feather)
    assert not opacity[~mask].any()
    assert opacity[20, 25] > 240  # the middle
    row = opacity[20, 5:25].astype(int)
    assert (np.diff(row) >= 0).all()
    if feather == 0:
        assert (opacity[mask] == 255).all()
    if feather >= 5:
        assert row[0] < 60 < 200 < row[min(feather, 15)]


def test_a_thin_mask_is_generated_and_the_image_border_is_no_edge() -> None:
    assert blend_opacity(box(10, 10, 40, 12), 16).max() > 200
    assert blend_opacity(box(0, 0, 50, 20), 8)[5, 0] > 240


def test_outside_the_mask_no_byte_moves() -> None:
    mask = box(11, 7, 33, 29)
    for around in (None, 4):
        canvas = inpaint_canvas(sample_image(), mask, (0, 0, 0, 0), 32, around=around, side=64)
        black = canvas.paste_back(Image.new("RGB", canvas.padded), 6)
        assert (np.asarray(black)[~mask] == np.asarray(sample_image())[~mask]).all()
        assert np.asarray(black)[18, 22].max() < 20  # the control: inside they do


# ---- masks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "P", "RGBA", "LA"])
def test_white_is_masked_in_every_mode(mode: str, tmp_path: Path) -> None:
    mask = box(3, 4, 20, 30)
    Image.fromarray(mask.astype(np.uint8) * 255).convert("RGB").convert(mode).save(tmp_path / "m.png")
    assert np.array_equal(read_mask(tmp_path / "m.png", (50, 40)), mask)
    assert np.array_equal(read_mask(mask, (50, 40)), mask)


def test_transparent_is_masked_where_there_is_alpha() -> None:
    mask = box(3, 4, 20, 30)
    alpha = np.full((40, 50, 4), 255, np.uint8)
    alpha[mask, 3] = 0
    assert np.array_equal(read_mask(Image.fromarray(alpha), (50, 40)), mask)


def test_masks_are_short_texts() -> None:
    """A box in a few hundred characters, a brush of 1024 px in a tenth of what an image may hold."""
    mask = box(3, 4, 20, 30)
    assert np.array_equal(mask_of_text(mask_text(mask), (50, 40)), mask) and len(mask_text(mask)) < 300
    y, x = np.mgrid[:1024, :1024]
    stroke = np.hypot(x - 300 - 80 * np.sin(y / 90), (y - 500) / 9) < 45
    assert np.array_equal(mask_of_text(mask_text(stroke), (1024, 1024)), stroke)
    assert len(mask_text(stroke)) < 10_000


@pytest.mark.parametrize("text", ["", "no base64!", "aGVsbG8=", None, 7])
def test_a_damaged_mask_is_refused(text: Any) -> None:
    with pytest.raises(BadPhoto, match="cannot be read"):
        mask_of_text(text, (50, 40))


def test_other_files_are_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    sample_image(8, 8).save(buffer, "ICO")
    (tmp_path / "m.png").write_bytes(buffer.getvalue())
    with pytest.raises(BadPhoto, match="The mask .* cannot be read"):
        canvases.read_mask(tmp_path / "m.png", (8, 8))
    with pytest.raises(BadPhoto, match="The mask is 8x8, but the image 50x40"):
        read_mask(sample_image(8, 8), (50, 40))
