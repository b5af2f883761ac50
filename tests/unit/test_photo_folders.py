"""Folders as phones, Macs and Windows leave them: every file is used, or named with what to do."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageDraw

from minikin.errors import BadPhoto
from minikin.generation.canvas import read_mask
from minikin.generation.source import SourceImage
from minikin.images import photos as ph
from minikin.images import pixels
from minikin.images.photos import load_photo, load_photos
from minikin.server import decode
from minikin.server.limits import Limits


def image(size: tuple[int, int] = (96, 64)) -> Image.Image:
    canvas = Image.new("RGB", size, (200, 180, 90))
    ImageDraw.Draw(canvas).ellipse((10, 10, 50, 50), fill=(40, 60, 120))
    return canvas


def saved(kind: str, source: Image.Image | None = None, **options: Any) -> bytes:
    file = io.BytesIO()
    (source or image()).save(file, kind, **options)
    return file.getvalue()


def heic(source: Image.Image | None = None) -> bytes:
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.register_heif_opener()
    return saved("HEIF", source, quality=95)


GREY = np.asarray(image().convert("L"))
DEEP = Image.fromarray(GREY.astype(np.uint16) * 257)
RGB = np.asarray(image()).astype(float)
TURNED = Image.Exif()
TURNED[0x0112] = 6
HOLES = image().convert("P")
# name -> bytes, its mean colour; what phones, cameras, scanners and editors write
LINES = np.asarray(image().convert("1")).astype(float) * 255
FILES: dict[str, tuple[Any, Any]] = {
    "phone.jpg": (lambda: saved("MPO", save_all=True, append_images=[image((48, 32))]), RGB),
    "phone.HEIC": (heic, RGB),
    "sent.jpg": (heic, RGB),  # a HEIC that a messenger named so
    "web.avif": (lambda: saved("AVIF", quality=95), RGB),
    "browser.jfif": (lambda: saved("JPEG", quality=95), RGB),
    "print.jpg": (lambda: saved("JPEG", image().convert("CMYK"), quality=95), RGB),
    "grey16.png": (lambda: saved("PNG", DEEP), GREY),
    "grey16.tif": (lambda: saved("TIFF", DEEP), GREY),
    "grey32.tiff": (lambda: saved("TIFF", Image.fromarray(GREY.astype(np.int32) * 257)), GREY),
    "float.tiff": (lambda: saved("TIFF", Image.fromarray(GREY.astype(np.float32) / 255)), GREY),
    "colour.tif": (lambda: saved("TIFF"), RGB),
    "palette.gif": (lambda: saved("GIF", HOLES), RGB),
    "paint.bmp": (lambda: saved("BMP"), RGB),
    "both.png": (lambda: saved("PNG", image().convert("LA")), GREY),
    "lines.png": (lambda: saved("PNG", image().convert("1")), LINES),
    "noname": (lambda: saved("JPEG", quality=95), RGB),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_is_read_alike_everywhere(name: str, tmp_path: Path) -> None:
    """By teach, by refine and inpaint, as a mask, and by the server."""
    data, mean = FILES[name][0](), float(np.mean(FILES[name][1]))
    path = tmp_path / name
    path.write_bytes(data)
    (photo,) = load_photos(tmp_path)
    assert photo.pixels.shape == (64, 96, 3) and abs(photo.pixels.mean() - mean) < 2
    source = np.asarray(SourceImage.of(path).image)
    assert np.array_equal(source, photo.pixels)
    bright = np.asarray(Image.fromarray(photo.pixels).convert("L")) > 127
    assert np.array_equal(read_mask(path, (96, 64)), bright)
    if pixels.kind_of(data) in pixels.PHONE:
        assert np.array_equal(np.asarray(decode.decode(data, "image", Limits()).convert("RGB")), photo.pixels)


def test_colours_are_converted_from_their_profile_alike(tmp_path: Path) -> None:
    """A profile with red and green exchanged: taught, refined and sent to the server in sRGB."""
    raw = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for old, new in (
        (b"rXYZ", b"tmp "),
        (b"gXYZ", b"rXYZ"),
        (b"tmp ", b"gXYZ"),
        (b"s\0R\0G\0B", b"x\0x\0x\0x"),
    ):
        raw = raw.replace(old, new)
    path = tmp_path / "a.png"
    path.write_bytes(saved("PNG", Image.new("RGB", (96, 64), (250, 20, 20)), icc_profile=raw))
    pixels_ = load_photo(path).pixels
    assert pixels_[0, 0, 1] > 200 > pixels_[0, 0, 0]
    assert np.array_equal(pixels_, np.asarray(SourceImage.of(path).image))
    assert np.array_equal(pixels_, np.asarray(decode.decode(path.read_bytes(), "image", Limits())))


def test_orientation_and_transparency_alike(tmp_path: Path) -> None:
    """EXIF's rotation, and transparent parts of palettes and of grey images on white."""
    (tmp_path / "turned.jpg").write_bytes(saved("JPEG", exif=TURNED))
    (tmp_path / "holes.png").write_bytes(saved("PNG", HOLES, transparency=HOLES.getpixel((80, 5))))
    (tmp_path / "grey.png").write_bytes(saved("PNG", DEEP, transparency=int(np.asarray(DEEP)[5, 80])))
    for name, corner in (("turned.jpg", None), ("holes.png", 255), ("grey.png", 255)):
        path = tmp_path / name
        photo, server = load_photo(path), decode.decode(path.read_bytes(), "image", Limits())
        assert photo.pixels.shape[:2] == ((96, 64) if name == "turned.jpg" else (64, 96))
        assert np.array_equal(np.asarray(SourceImage.of(path).image), photo.pixels)
        assert server.size == (photo.pixels.shape[1], photo.pixels.shape[0])
        if corner:
            assert (photo.pixels[5, 80] == corner).all() and photo.mask is not None and server.mode == "RGBA"


def test_files_of_operating_systems_are_passed_over(tmp_path: Path) -> None:
    for name in "abc":
        image().save(tmp_path / f"{name}.jpg")
        (tmp_path / f"._{name}.jpg").write_bytes(
            b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        " + bytes(200)
        )
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", ".hidden.png"):
        (tmp_path / name).write_bytes(b"\xd0\xcf\x11\xe0" * 20)
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "__MACOSX" / "._a.jpg").write_bytes(b"x")
    notes: list[str] = []
    assert [p.name for p in load_photos(tmp_path, notes.append)] == ["a.jpg", "b.jpg", "c.jpg"]
    assert notes == []


def test_what_is_left_out_is_named(tmp_path: Path) -> None:
    image().save(tmp_path / "a.jpg")
    (tmp_path / "a.txt").write_text("a photo of {}")
    for name in ("film.mov", "raw.CR2", "raw.NEF", "layers.psd", "notes.txt"):
        (tmp_path / name).write_bytes(b"II*\0" if "raw" in name else b"something")
    os.mkfifo(tmp_path / "pipe.jpg")
    notes: list[str] = []
    assert len(load_photos(tmp_path, notes.append)) == 1
    assert notes == [
        "Left out: film.mov, layers.psd, notes.txt, pipe.jpg and 2 more. Save images of other kinds "
        "(camera raw, PSD, films) as JPEG or PNG."
    ]
    (tmp_path / "more").mkdir()
    image().save(tmp_path / "more" / "b.jpg")
    load_photos(tmp_path, notes.append)
    assert "more/" in notes[-1] or "and 3 more" in notes[-1]


def test_a_folder_of_folders_says_which_to_give(tmp_path: Path) -> None:
    for name in ("10_tom cat", "rex"):
        (tmp_path / name).mkdir()
        image().save(tmp_path / name / "a.jpg")
    with pytest.raises(BadPhoto, match="itself holds no photos, but folders of them: 10_tom cat/, rex/"):
        load_photos(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.mov").write_bytes(b"x")
    with pytest.raises(BadPhoto, match=r"holds no photos; a\.mov cannot be used"):
        load_photos(tmp_path / "other")


def test_heic_without_its_package_is_named(tmp_path: Path, monkeypatch: Any) -> None:
    """A folder of HEIC alone says so, with what to install; beside others none is left out without a word."""
    monkeypatch.setitem(__import__("sys").modules, "pillow_heif", None)
    for k in (1, 2):
        (tmp_path / f"IMG_{k}.HEIC").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64))
    with pytest.raises(BadPhoto, match=r"IMG_1\.HEIC, IMG_2\.HEIC: HEIC needs .*heic.*save as JPEG"):
        load_photos(tmp_path)
    with pytest.raises(BadPhoto, match=r"IMG_1\.HEIC is a HEIC image, .*heic.*save it as a JPEG"):
        load_photo(tmp_path / "IMG_1.HEIC")


CAPTION = "a photo of {}, синий 猫"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("name", ["a.txt", "A.TXT", "a.caption", "a.jpg.txt"])
def test_captions_of_every_editor(tmp_path: Path, encoding: str, name: str) -> None:
    image().save(tmp_path / "a.jpg")
    text = CAPTION if encoding[-2:] not in ("le", "be") else "a photo of {}, blue"
    (tmp_path / name).write_bytes(f"{text}\r\n".encode(encoding))
    assert load_photo(tmp_path / "a.jpg").caption == text


@pytest.mark.parametrize("encoding", ["cp1252", "cp1251", "shift_jis", "gb18030"])
def test_a_caption_in_an_old_encoding_is_named(tmp_path: Path, encoding: str) -> None:
    image().save(tmp_path / "a.jpg")
    text = {"cp1252": "a café", "cp1251": "синий"}.get(encoding, "青い猫")
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    with pytest.raises(BadPhoto, match=r"caption a\.txt is in an old encoding.*Save it as UTF-8"):
        load_photo(tmp_path / "a.jpg")


def test_captions_that_are_not_used_are_named(tmp_path: Path) -> None:
    image().save(tmp_path / "a.jpg")
    (tmp_path / "b.txt").write_text("of another name")
    notes: list[str] = []
    load_photos(tmp_path, notes.append)
    assert notes == ["Left out: b.txt. A caption has the name of its photo: NAME.txt."]
    (tmp_path / "a.txt").write_text("long " * 20_001)
    with pytest.raises(BadPhoto, match=r"caption a\.txt has more than 100,000 bytes\. Shorten it"):
        load_photos(tmp_path)


@pytest.mark.parametrize(
    ("where", "kind"),
    [("masks/a.png", "PNG"), ("masks/a.jpg", "JPEG"), ("masks/A.BMP", "BMP"), ("masks/a.gif", "GIF"),
     ("masks/a.webp", "WEBP"), ("masks/a.tif", "TIFF"), ("Masks/a.jpg.png", "PNG"), ("a-masklabel.png", "PNG"),
     ("a_mask.png", "PNG")],
)  # fmt: skip
def test_masks_of_any_format_and_name(tmp_path: Path, where: str, kind: str) -> None:
    image().save(tmp_path / "a.jpg")
    mask = Image.new("L", (96, 64))
    mask.paste(255, (0, 0, 48, 64))
    (tmp_path / where).parent.mkdir(exist_ok=True)
    mask.save(tmp_path / where, kind)
    notes: list[str] = []
    (photo,) = load_photos(tmp_path, notes.append)
    assert photo.mask is not None and abs(photo.mask.mean() - 0.5) < 0.02 and not notes


@pytest.mark.parametrize("mode", ["L", "P", "1", "I;16", "RGBA", "LA"])
def test_masks_of_any_mode(tmp_path: Path, mode: str) -> None:
    """16 bits, palettes, an opaque alpha channel, 0 and 1 for black and white."""
    image().save(tmp_path / "a.jpg")
    (tmp_path / "masks").mkdir()
    grey = np.zeros((64, 96), np.uint16)
    grey[:, :48] = 1
    if mode == "I;16":
        mask = Image.fromarray(grey * 65_535)
    elif mode == "P":
        mask = Image.fromarray(grey.astype(np.uint8), "P")
        mask.putpalette([0, 0, 0, 128, 0, 0])  # PASCAL VOC's first class
    else:
        value = 1 if mode == "L" else 255
        mask = Image.fromarray((grey * value).astype(np.uint8)).convert(mode)
    mask.save(tmp_path / "masks" / "a.png")
    photo = load_photo(tmp_path / "a.jpg")
    assert photo.mask is not None and photo.mask.mean() == 0.5 and photo.mask[0, 0] == 1
    assert read_mask(tmp_path / "masks" / "a.png", (96, 64)).mean() == 0.5


def test_a_mask_that_fits_no_photo_is_named(tmp_path: Path) -> None:
    image().save(tmp_path / "a.jpg")
    (tmp_path / "masks").mkdir()
    image().save(tmp_path / "masks" / "b.png")
    notes: list[str] = []
    load_photos(tmp_path, notes.append)
    assert "masks/b.png" in notes[0]
    image((64, 96)).save(tmp_path / "masks" / "a.png")
    with pytest.raises(BadPhoto, match=r"mask a\.png is 64x96, but its photo 96x64"):
        load_photos(tmp_path)


def test_every_reader_refuses_what_is_no_file(tmp_path: Path, monkeypatch: Any) -> None:
    """A pipe once hung; a small PNG of 178 million pixels took 2.6 GB."""
    monkeypatch.setattr(ph, "MAX_PIXELS", 5_000)
    os.mkfifo(tmp_path / "pipe.png")
    image().save(tmp_path / "large.png")
    (tmp_path / "folder.png").mkdir()
    for read in (SourceImage.of, load_photo, lambda p: read_mask(p, (96, 64))):
        for name, words in (
            ("pipe.png", "is a pipe, a device or a folder"), ("folder.png", "is a pipe|directory"),
            ("large.png", "has 96x64 pixels"), ("none.png", "cannot be read as an image: No such file"),
            ("a\0b.png", "cannot be read"),
        ):  # fmt: skip
            with pytest.raises(BadPhoto, match=words):
                read(tmp_path / name)  # type: ignore[operator]
        with pytest.raises(BadPhoto, match="is a pipe, a device"):
            read(Path("/dev/zero"))  # type: ignore[operator]
