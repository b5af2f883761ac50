"""Photos: every size, ratio and orientation; every unusable file refused in words; nothing leaks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from minikin.errors import BadPhoto, NoNetwork
from minikin.images import photos as ph
from minikin.images.photos import fitted, load_photo, load_photos
from minikin.models.base import Base
from minikin.perfusion.train import prepare
from minikin.recipes import Teach


def save(path: Path, size: tuple[int, int] = (60, 40), mode: str = "RGB", **kwargs: Any) -> Path:
    rng = np.random.default_rng(1)
    bands = {"RGB": 3, "RGBA": 4, "L": 1}[mode]
    a = rng.integers(0, 255, (size[1], size[0], bands), dtype=np.uint8).squeeze()
    Image.fromarray(a).save(path, **kwargs)
    return path


@pytest.mark.parametrize("name", ["a.jpg", "a.JPEG", "a.png", "a.webp"])
@pytest.mark.parametrize("size", [(60, 40), (40, 60), (64, 64), (200, 17)])
def test_any_format_size_and_ratio(tmp_path: Path, name: str, size: tuple[int, int]) -> None:
    photo = load_photo(save(tmp_path / name, size))
    assert photo.pixels.shape == (size[1], size[0], 3)
    fit = fitted(photo, 64)
    assert fit.pixels.shape == (64, 64, 3)
    assert abs(fit.valid.mean() - min(size) / max(size)) < 0.02  # nothing cropped


def test_orientation_is_honoured(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    photo = load_photo(save(tmp_path / "a.jpg", (60, 40), exif=exif))
    assert photo.pixels.shape == (60, 40, 3)


def test_alpha_is_the_mask(tmp_path: Path) -> None:
    a = np.zeros((32, 32, 4), np.uint8)
    a[8:24, 8:24] = 255
    Image.fromarray(a).save(tmp_path / "a.png")
    photo = load_photo(tmp_path / "a.png")
    assert photo.mask is not None and photo.mask.sum() == 256
    assert (photo.pixels[0, 0] == 255).all()  # transparent becomes white


def test_opaque_alpha_is_no_mask(tmp_path: Path) -> None:
    Image.new("RGBA", (32, 32), (9, 9, 9, 255)).save(tmp_path / "a.png")
    assert load_photo(tmp_path / "a.png").mask is None


def test_mask_and_caption_beside_a_photo(photo_folder: Path) -> None:
    (photo_folder / "1.txt").write_text("  a photo of {} in a room \n")
    photos = load_photos(photo_folder)
    assert [p.name for p in photos] == ["0.png", "1.png", "2.png"]
    assert all(p.mask is not None and p.mask.mean() == 0.25 for p in photos)
    assert photos[1].caption == "a photo of {} in a room"


def test_one_photo_works(photo_folder: Path) -> None:
    assert len(load_photos(photo_folder / "0.png")) == 1


def test_refusals(tmp_path: Path, monkeypatch: Any) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    cases: list[tuple[Path, str]] = [(empty, "holds no photos"), (tmp_path / "nowhere", "There is no folder")]
    noise = tmp_path / "noise.jpg"
    noise.write_bytes(b"\xff\xd8" + bytes(500))
    cut = save(tmp_path / "cut.png")
    cut.write_bytes(cut.read_bytes()[:-900])
    frames = [Image.new("RGB", (32, 32), c) for c in ("red", "blue")]
    frames[0].save(tmp_path / "film.webp", save_all=True, append_images=frames[1:])
    cases += [(noise, "cannot be read"), (cut, "cannot be read"), (tmp_path / "film.webp", "is animated")]
    cases += [(save(tmp_path / "small.png", (8, 8)), "at least 16x16")]
    disguised = tmp_path / "eps.png"
    disguised.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 50 50\n")
    cases.append((disguised, "cannot be read"))
    for path, words in cases:
        with pytest.raises(BadPhoto, match=words):
            load_photos(path)
    huge = save(tmp_path / "huge.png", (300, 300))
    monkeypatch.setattr(ph, "MAX_PIXELS", 50_000)
    with pytest.raises(BadPhoto, match="300x300 pixels"):
        load_photo(huge)
    monkeypatch.setattr(ph, "MAX_BYTES", 1000)
    with pytest.raises(BadPhoto, match="Save a smaller copy"):
        load_photo(huge)


def test_pixel_bomb_is_refused_quickly(tmp_path: Path) -> None:
    """A small file of 400 million pixels: refused from its header."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0))
    path = tmp_path / "bomb.png"
    path.write_bytes(bomb + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b""))
    with pytest.raises(BadPhoto, match="pixels"):
        load_photo(path)


def test_nothing_of_a_photo_reaches_the_concept_file(tmp_path: Path, bases: dict[str, Base]) -> None:
    """Sentinel words in EXIF, comment, file name and caption do not occur in the file."""
    from minikin import Studio
    from minikin.perfusion import concept_file

    exif = Image.Exif()
    exif[0x010E] = "SENTINEL-EXIF"
    exif[0x8825] = {1: "N", 2: (52.0, 30.0, 0.0)}  # GPS
    folder = tmp_path / "photos"
    folder.mkdir()
    save(folder / "SENTINEL-NAME.jpg", (64, 64), exif=exif, comment=b"SENTINEL-COMMENT")
    (folder / "SENTINEL-NAME.txt").write_text("SENTINEL-CAPTION {}")
    concept = Studio(bases["sd15"]).teach(folder, name="tom", category="cat", mode="value", steps=2, batch=1)
    assert b"SENTINEL" not in concept_file.to_bytes(concept)


@pytest.mark.parametrize("kind", ["attention", "none"])
def test_masks_without_any_given(bases: dict[str, Base], tmp_path: Path, kind: str) -> None:
    """Soft masks in [0, 1] that are zero in added margins."""
    photo = load_photo(save(tmp_path / "a.png", (64, 32)))
    recipe = Teach(name="tom", category="cat", mask=kind)  # type: ignore[arg-type]
    masks = prepare(bases["sd15"], [photo], recipe).masks
    assert masks.shape == (1, 2, 1, 8, 8) and 0 <= masks.min() and masks.max() <= 1
    assert masks[..., :2, :].max() == 0 and masks[..., -2:, :].max() == 0
    assert masks.max() > 0.5


def test_clipseg_without_weights_says_what_to_do(bases: dict[str, Base], tmp_path: Path) -> None:
    photo = load_photo(save(tmp_path / "a.png", (64, 64)))
    with pytest.raises(NoNetwork, match="use --mask attention"):
        prepare(bases["sd15"], [photo], Teach(name="tom", category="cat", mask="clipseg"))


def test_clipseg_masks_with_random_weights(bases: dict[str, Base], tmp_path: Path, tiny: Base) -> None:
    """The CLIPSeg path runs on a miniature of it: masks in [0, 1] with a maximum of 1 each."""
    import transformers

    from minikin.models.loading.registry import models_folder

    text = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4,
            "vocab_size": 49408}  # fmt: skip
    vision = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 3, "num_attention_heads": 4,
              "image_size": 64, "patch_size": 16}  # fmt: skip
    config = transformers.CLIPSegConfig(
        text_config=text, vision_config=vision, projection_dim=32, extract_layers=[0, 1, 2], reduce_dim=16,
        decoder_num_attention_heads=2, decoder_intermediate_size=32,
    )  # fmt: skip
    folder = models_folder() / "clipseg"
    transformers.CLIPSegForImageSegmentation(config).save_pretrained(folder)
    processor = transformers.CLIPSegProcessor(
        transformers.ViTImageProcessor(size={"height": 64, "width": 64}), bases["sd15"].tokenizers[0]
    )
    processor.save_pretrained(folder)
    photo = load_photo(save(tmp_path / "a.png", (64, 64)))
    recipe = Teach(name="tom", category="cat", mask="clipseg")
    masks = prepare(bases["sd15"], [photo, photo], recipe).masks
    assert masks.shape == (2, 2, 1, 8, 8)
    assert masks.min() >= 0
    assert masks.max() <= 1
