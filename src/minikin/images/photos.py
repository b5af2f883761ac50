"""Loading of photos with their masks and captions, from a file or a folder.

Photos may have any size and aspect ratio; EXIF orientation is applied and all metadata is dropped. The mask of
the subject is an alpha channel, or an image of the same name in `masks/` or with `-masklabel` or `_mask` behind
it. The caption is in `NAME.txt` or `NAME.caption`. Every file of a folder is used, or named with what to do.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from minikin.errors import BadPhoto, extra, reason
from minikin.files import read_small
from minikin.images import pixels
from minikin.images.pixels import Decoded, on_white
from minikin.images.plain_text import decode_text

__all__ = [
    "Fit", "Photo", "decoded", "fitted", "load_photo", "load_photos", "on_white", "open_image", "read_image",
]  # fmt: skip
ENDINGS = (
    ".jpg", ".jpeg", ".jfif", ".jpe", ".png", ".webp", ".avif", ".heic", ".heif", ".hif", ".tif", ".tiff",
    ".bmp", ".gif",
)  # fmt: skip
_HEIC = (".heic", ".heif", ".hif")
MAX_PIXELS = 50_000_000
MAX_BYTES = 50_000_000
MAX_PHOTOS = 200
MAX_CAPTION = 100_000  # bytes
MIN_SIDE = 16
_CAPTIONS = (".txt", ".caption")
_MASK_MARKS = ("-masklabel", "_mask", "-mask", ".mask")  # OneTrainer's, and what people write
_LITTER = ("thumbs.db", "desktop.ini", "__macosx")  # of operating systems, as are names with a dot in front
_PARTS = ("masks", "unseen")  # folders that belong to a folder of photos
_REASONS = {
    "unsupported_image": "cannot be read as a JPEG, PNG, WebP, AVIF, HEIC, TIFF, BMP or GIF image{detail}. "
    "Save it as a JPEG or PNG, or take it out of the folder.",
    "image_corrupt": "cannot be read: it is damaged or incomplete{detail}. Save it again, or take it out of "
    "the folder.",
    "image_too_large": "cannot be read as an image: it has {size}; at most {most:.0f} million are read. Save a "
    "smaller copy.",
    "image_too_small": "is only {size}; at least {least}x{least} are needed.",
    "too_many_scans": "is a JPEG of more scans than any camera or program writes. Save it again.",
    "heic_missing": "is a HEIC image, which needs a further package: {heic}. Or save it as a JPEG.",
    "avif_missing": "is an AVIF image, which this Pillow cannot read. Save it as a JPEG or PNG.",
}


@dataclass(frozen=True)
class Photo:
    """One photo: RGB uint8 (H, W, 3), its mask (H, W) in [0, 1] or None, its caption or ""."""

    name: str
    pixels: np.ndarray
    mask: np.ndarray | None = None
    caption: str = ""


def load_photos(where: str | Path, note: Callable[[str], None] | None = None) -> list[Photo]:
    """All photos of a folder in the order of their names, or one photo.

    note  is called with one sentence when files of the folder are left out
    Raises BadPhoto for an empty folder, too many photos, or a file that cannot be used.
    """
    where = Path(where)
    if os.path.isfile(where):  # False for names that are too long
        return [load_photo(where)]
    if not os.path.isdir(where):
        raise BadPhoto(f"There is no folder or file {where}. Give a folder of photos: 3 to 6 are best.")
    try:
        listed = _Listing(where)
    except OSError as e:
        raise BadPhoto(f"The folder {where} cannot be read: {reason(e)}.") from e
    if not listed.photos:
        raise BadPhoto(_nothing(where, listed))
    if len(listed.photos) > MAX_PHOTOS:
        raise BadPhoto(
            f"{where} holds {len(listed.photos)} photos; 3 to 6 are best to teach one concept, 1 to "
            f"{MAX_PHOTOS} are accepted."
        )
    _check_heic(listed.photos)
    if note and (text := listed.left_out()):
        note(text)
    return [_load(path, listed) for path in listed.photos]


def _check_heic(files: list[Path]) -> None:
    """Raise BadPhoto that names all HEIC images where their package is missing."""
    names = [p.name for p in files if p.suffix.lower() in _HEIC]
    if names and find_spec("pillow_heif") is None:
        raise BadPhoto(f"{_some(names)}: HEIC needs a further package: {extra('heic')}. Or save as JPEG.")


def load_photo(path: Path) -> Photo:
    """One photo with its mask and caption. Raises BadPhoto."""
    return _load(path, _Listing(path.parent))


def open_image(path: Path) -> Image.Image:
    """Decode an untrusted image file: RGB or RGBA, one frame, bounded size. Raises BadPhoto."""
    return decoded(path, path.name)


def decoded(source: Path | bytes, name: str) -> Image.Image:
    """Decode an untrusted photo from a file or bytes; `name` is used in messages. Raises BadPhoto."""
    photo = read_image(source, name, least=MIN_SIDE)
    if photo.animated:
        raise BadPhoto(f"{name} is animated. Save the frame you want as a still image.")
    return photo.image


def read_image(source: Path | bytes, name: str = "", least: int = 1) -> Decoded:
    """Pixels and texts of an untrusted image from a file or bytes. Raises BadPhoto.

    name   used in messages; the path by default
    least  pixels of the shorter side
    """
    name = name or str(source if isinstance(source, Path) else "The image")
    data = read_bytes(source, name) if isinstance(source, Path) else source
    try:
        if len(data) > MAX_BYTES:
            raise BadPhoto(_too_many_bytes(name, len(data)))
        return pixels.decode(data, MAX_PIXELS, least)
    except pixels.Refused as e:
        detail = f" ({e.detail})" if e.detail else ""
        size = f"{e.size[0]}x{e.size[1]} pixels" if e.size[0] else "too many pixels"
        why = _REASONS[e.code].format(
            detail=detail, size=size, most=MAX_PIXELS / 1e6, least=least, heic=extra("heic")
        )  # fmt: skip
        raise BadPhoto(f"{name} {why}") from e


def read_bytes(path: Path, name: str = "") -> bytes:
    """The bytes of an image file; a pipe, a device or a folder is none. Raises BadPhoto."""
    name = name or str(path)
    try:
        data = read_small(path, MAX_BYTES)
    except (OSError, ValueError) as e:
        raise BadPhoto(f"{name} cannot be read as an image: {reason(e)}.") from e
    if data is None:
        if os.path.isfile(path):
            raise BadPhoto(_too_many_bytes(name, path.stat().st_size))
        raise BadPhoto(f"{name} is a pipe, a device or a folder. Give the file of an image.")
    return data


def _too_many_bytes(name: str, size: int) -> str:
    return (
        f"{name} is {size / 1e6:.0f} MB; photos up to {MAX_BYTES / 1e6:.0f} MB are read. Save a smaller copy."
    )


# ---- folders --------------------------------------------------------------------------------------


class _Listing:
    """What lies in a folder: photos, their masks and captions by name, and everything else."""

    def __init__(self, folder: Path) -> None:
        entries = [p for p in sorted(folder.iterdir()) if not is_litter(p.name)]
        self.folders = [p for p in entries if p.is_dir() and p.name.lower() not in _PARTS]
        files = [p for p in entries if p.is_file()]
        self._captions = _by_name(p for p in files if p.suffix.lower() in _CAPTIONS)
        images = [p for p in files if _is_image(p)]
        stems = {p.stem.lower() for p in images}
        marked = [p for p in images if (stem := _without_mark(p)) is not None and stem in stems]
        self.photos = [p for p in images if p not in marked]
        masks = [m for f in entries if f.is_dir() and f.name.lower() == "masks" for m in sorted(f.iterdir())]
        self._masks = _by_name(m for m in masks if m.is_file() and not is_litter(m.name) and _is_image(m))
        self._masks |= {_without_mark(p) or "": p for p in marked}
        names = {k for p in self.photos for k in (p.stem.lower(), p.name.lower())}
        used = {*self.photos, *marked, *(p for stem, p in self._captions.items() if stem in names)}
        self.others = [p.name for p in entries if p not in used and not p.is_dir()]
        self.others += [f"masks/{p.name}" for stem, p in self._masks.items() if stem not in names]

    def mask(self, photo: Path) -> Path | None:
        return self._masks.get(photo.stem.lower()) or self._masks.get(photo.name.lower())

    def caption(self, photo: Path) -> Path | None:
        return self._captions.get(photo.stem.lower()) or self._captions.get(photo.name.lower())

    def left_out(self) -> str:
        """A sentence that names what is not used; "" where there is nothing."""
        folders = [f"{p.name}/" for p in self.folders if _holds_images(p)]
        if not self.others and not folders:
            return ""
        advice = "Save images of other kinds (camera raw, PSD, films) as JPEG or PNG"
        if all(name.lower().endswith(_CAPTIONS) for name in self.others):
            advice = "A caption has the name of its photo: NAME.txt"
        if folders:
            advice = "Photos in folders inside are not read: put them beside the others, or give that folder"
        return f"Left out: {_some([*self.others, *folders])}. {advice}."


def _load(path: Path, listed: _Listing) -> Photo:
    image = open_image(path)
    mask = alpha_mask(image)
    rgb = np.asarray(on_white(image)).copy()
    if beside := listed.mask(path):
        mask = _mask(beside, rgb.shape[:2])
    text = listed.caption(path)
    return Photo(path.name, rgb, mask, _caption(text) if text else "")


def _caption(path: Path) -> str:
    try:
        data = read_small(path, MAX_CAPTION)
        if data is None:
            raise BadPhoto(f"The caption {path.name} has more than {MAX_CAPTION:,} bytes. Shorten it.")
        text = decode_text(data)
    except OSError as e:
        raise BadPhoto(f"The caption {path.name} cannot be read: {reason(e)}.") from e
    except UnicodeError:
        raise BadPhoto(
            f"The caption {path.name} is in an old encoding that does not say which it is. Save it as UTF-8."
        ) from None
    return text.strip("\0 \n\t")


def _nothing(where: Path, listed: _Listing) -> str:
    inside = [f"{p.name}/" for p in listed.folders if _holds_images(p)]
    if inside:
        return f"{where} itself holds no photos, but folders of them: {_some(inside)}. Give one of these."
    others = f"; {_some(listed.others)} cannot be used" if listed.others else ""
    return (
        f"{where} holds no photos{others}. Put 3 to 6 images (JPEG, PNG, WebP, HEIC) of the same thing into it."
    )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more


def is_litter(name: str) -> bool:
    """Whether a file of this name is one that operating systems leave everywhere."""
    return name.startswith(".") or name.lower() in _LITTER


def _is_image(path: Path) -> bool:
    """Whether a file is an image that is read: by its ending, or for odd endings by its first bytes."""
    if path.suffix.lower() in ENDINGS:
        return True
    try:
        with open(path, "rb") as f:
            return pixels.kind_of(f.read(48)) in pixels.PHONE
    except OSError:
        return False


def _holds_images(folder: Path) -> bool:
    try:
        return any(p.suffix.lower() in ENDINGS and not is_litter(p.name) for p in folder.rglob("*"))
    except OSError:
        return False


def _without_mark(path: Path) -> str | None:
    """The stem of the photo that a mask's name belongs to; None for a name that is no mask's."""
    stem = path.stem.lower()
    return next((stem.removesuffix(m) for m in _MASK_MARKS if stem.endswith(m)), None)


def _by_name(files: Iterable[Path]) -> dict[str, Path]:
    return {p.stem.lower(): p for p in files}


def _mask(path: Path, shape: tuple[int, int]) -> np.ndarray:
    image = read_image(path, path.name).image
    height, width = shape
    if abs(image.width * height - image.height * width) > 0.05 * image.height * width:
        raise BadPhoto(
            f"The mask {path.name} is {image.width}x{image.height}, but its photo {width}x{height}: they must "
            "be of one shape."
        )
    grey = grey_of_mask(image)
    if grey.size != (width, height):
        grey = grey.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(grey, np.float32) / 255


def alpha_mask(image: Image.Image) -> np.ndarray | None:
    """The alpha channel (H, W) in [0, 1]; None where there is none, or it is opaque everywhere."""
    if "A" not in image.getbands():
        return None
    alpha = np.asarray(image.getchannel("A"), np.float32) / 255
    return alpha if alpha.min() < 0.99 else None


def grey_of_mask(image: Image.Image) -> Image.Image:
    """A mask (RGB or RGBA) in grey: its alpha where that says something, else its brightness.

    Two values of which neither is bright (0 and 1, or the colours of a segmentation) become black and white.
    """
    if "A" in image.getbands():
        alpha = image.getchannel("A")
        if alpha.getextrema() != (255, 255):
            return alpha
    grey = image.convert("L")
    values = [k for k, count in enumerate(grey.histogram()) if count]
    if len(values) == 2 and values[1] < 128:
        return grey.point(lambda v: 255 if v == values[1] else 0)
    return grey


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
