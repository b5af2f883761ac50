"""Loading of photos with their masks and captions.

Photos may have any size and aspect ratio; EXIF orientation is applied and all metadata is dropped. The mask
of the subject is an alpha channel or a file of the same name in `masks/`. The caption is in `NAME.txt`.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from minikin.errors import BadPhoto

FORMATS = ("JPEG", "PNG", "WEBP")
ENDINGS = (".jpg", ".jpeg", ".png", ".webp")
MAX_PIXELS = 50_000_000
MAX_BYTES = 50_000_000
MAX_PHOTOS = 200


@dataclass(frozen=True)
class Photo:
    """One photo: RGB uint8 (H, W, 3), its mask (H, W) in [0, 1] or None, its caption or ""."""

    name: str
    pixels: np.ndarray
    mask: np.ndarray | None = None
    caption: str = ""


def load_photos(where: str | Path) -> list[Photo]:
    """All photos of a folder in the order of their names, or one photo.

    Raises BadPhoto for an empty folder, too many photos, or a file that cannot be used.
    """
    where = Path(where)
    if where.is_file():
        return [load_photo(where)]
    if not where.is_dir():
        raise BadPhoto(f"There is no folder or file {where}. Give a folder of photos: 3 to 6 are best.")
    files = sorted(f for f in where.iterdir() if f.suffix.lower() in ENDINGS and f.is_file())
    if not files:
        raise BadPhoto(
            f"{where} holds no photos. Put 3 to 6 images ({', '.join(ENDINGS)}) of the same thing into it."
        )
    if len(files) > MAX_PHOTOS:
        raise BadPhoto(
            f"{where} holds {len(files)} photos; 3 to 6 are best to teach one concept, 1 to {MAX_PHOTOS} are "
            "accepted."
        )
    return [load_photo(f) for f in files]


def load_photo(path: Path) -> Photo:
    """One photo with its mask and caption. Raises BadPhoto."""
    image = open_image(path)
    mask = None
    if "A" in image.getbands():
        alpha = np.asarray(image.getchannel("A"), np.float32) / 255
        if alpha.min() < 0.99:
            mask = alpha
    pixels = np.asarray(on_white(image)).copy()
    beside = path.parent / "masks" / f"{path.stem}.png"
    if beside.is_file():
        mask = _mask(beside, pixels.shape[:2])
    text = path.with_suffix(".txt")
    caption = text.read_text(encoding="utf-8", errors="replace").strip() if text.is_file() else ""
    return Photo(path.name, pixels, mask, caption)


def open_image(path: Path) -> Image.Image:
    """Decode an untrusted image file: known formats, one frame, bounded size. Raises BadPhoto."""
    return decoded(path, path.name)


def decoded(source: Path | bytes, name: str) -> Image.Image:
    """Decode an untrusted image from a file or bytes; `name` is used in messages. Raises BadPhoto."""
    try:
        size = source.stat().st_size if isinstance(source, Path) else len(source)
        if size > MAX_BYTES:
            raise BadPhoto(
                f"{name} is {size / 1e6:.0f} MB; photos up to {MAX_BYTES / 1e6:.0f} MB are read. "
                "Save a smaller copy."
            )
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            file = source if isinstance(source, Path) else io.BytesIO(source)
            with Image.open(file, formats=FORMATS) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise BadPhoto(
                        f"{name} has {width}x{height} pixels; at most {MAX_PIXELS / 1e6:.0f} million "
                        "are read. Save a smaller copy."
                    )
                if min(width, height) < 16:
                    raise BadPhoto(f"{name} is only {width}x{height} pixels; at least 16x16 are needed.")
                if getattr(image, "n_frames", 1) > 1:
                    raise BadPhoto(f"{name} is animated. Save the frame you want as a still image.")
                keep = "RGBA" if "A" in image.getbands() or "transparency" in image.info else "RGB"
                return ImageOps.exif_transpose(image).convert(keep)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as e:
        raise BadPhoto(f"{name} has too many pixels. Save a smaller copy.") from e
    except FileNotFoundError:
        raise BadPhoto(f"There is no file {name}.") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as e:
        raise BadPhoto(
            f"{name} cannot be read as a JPEG, PNG or WebP image ({e}). Save it again, or take it "
            "out of the folder."
        ) from e


def on_white(image: Image.Image) -> Image.Image:
    """The image in RGB, on white where it is transparent."""
    if "A" not in image.getbands():
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def _mask(path: Path, shape: tuple[int, int]) -> np.ndarray:
    image = open_image(path)
    grey = image.getchannel("A") if "A" in image.getbands() else image.convert("L")
    if (grey.height, grey.width) != shape:
        grey = grey.resize((shape[1], shape[0]), Image.Resampling.BILINEAR)
    return np.asarray(grey, np.float32) / 255


@dataclass(frozen=True)
class Fit:
    """A photo as a square: pixels (S, S, 3) uint8, mask (S, S) or None, valid (S, S), 0 in padding."""

    pixels: np.ndarray
    mask: np.ndarray | None
    valid: np.ndarray


def fitted(photo: Photo, side: int) -> Fit:
    """Resize a photo into a square of `side` pixels without cropping; padding repeats its edges."""
    h, w = photo.pixels.shape[:2]
    scale = side / max(h, w)
    size = (max(1, round(w * scale)), max(1, round(h * scale)))
    top, left = (side - size[1]) // 2, (side - size[0]) // 2
    margins = ((top, side - size[1] - top), (left, side - size[0] - left))
    small = np.asarray(Image.fromarray(photo.pixels).resize(size, Image.Resampling.LANCZOS))
    valid = np.pad(np.ones((size[1], size[0]), np.float32), margins)
    mask = None
    if photo.mask is not None:
        grey = Image.fromarray((photo.mask * 255).astype(np.uint8))
        grey = grey.resize(size, Image.Resampling.BILINEAR)
        mask = np.pad(np.asarray(grey, np.float32) / 255, margins)
    return Fit(np.pad(small, (*margins, (0, 0)), mode="edge"), mask, valid)
