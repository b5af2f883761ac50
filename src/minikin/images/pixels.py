"""The one reader of untrusted images: pixels as 8-bit RGB or RGBA in sRGB, upright, and the texts beside them.

Commands read files with it (`images/photos.py`), the server runs it in a child process with limits
(`server/decode.py`), so a file looks the same everywhere. It imports little, because that child starts for each
image. Of several images in a file (a phone's preview, gain map or burst; frames) the first is read.
"""

from __future__ import annotations

import io
import re
import struct
import warnings
from contextlib import suppress
from typing import NamedTuple

from PIL import Image, ImageChops, ImageCms, ImageOps

from minikin.images.texts import texts_of
from minikin.images.xmp import source_type_of

PHONE = ("JPEG", "PNG", "WEBP", "AVIF", "HEIF")  # what cameras, browsers and image generators write
ALL = (*PHONE, "TIFF", "BMP", "GIF")  # and editors
MAX_SCANS = 64  # of a JPEG; progressive ones have about 10, and each costs a pass over the whole image
END_OF_IMAGE, START_OF_SCAN = 0xD9, 0xDA
_MARKER = re.compile(rb"\xff+[\xc0-\xcf\xd9-\xfe]")  # of JPEG's segments, all but the end's with a length
_MAGIC = (
    ("JPEG", rb"\xff\xd8\xff"), ("PNG", rb"\x89PNG\r\n\x1a\n"), ("WEBP", rb"RIFF....WEBP"),
    ("AVIF", rb"....ftyp(?:avi[fs]|(?:mif1|msf1)....(?:....){0,8}?avif)"),
    ("HEIF", rb"....ftyp(?:hei[cxms]|hev[cxms]|mif1|msf1)"), ("TIFF", rb"II[*+]\0|MM\0[*+]"), ("BMP", rb"BM"),
    ("GIF", rb"GIF8[79]a"),
)  # fmt: skip
_DAMAGED = (
    OSError,
    ValueError,
    SyntaxError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    struct.error,
)


class Refused(Exception):
    """An image that is not read: the code is a key of the callers' messages, `detail` the library's words."""

    def __init__(self, code: str, detail: str = "", size: tuple[int, int] = (0, 0)) -> None:
        super().__init__(code)
        self.code, self.detail, self.size = code, detail, size


class Decoded(NamedTuple):
    """What an image file holds.

    image     RGB, or RGBA where it is transparent somewhere or could be
    texts     what generators wrote into it, by the keys of `images/texts.py`
    origin    IPTC's code of its origin (`images/xmp.py`); None when it states none
    animated  whether there are further frames
    """

    image: Image.Image
    texts: dict[str, str]
    origin: str | None
    animated: bool


def kind_of(data: bytes) -> str:
    """The format of a file by its first bytes; "" for any other."""
    head = data[:48]
    return next((name for name, magic in _MAGIC if re.match(magic, head, re.DOTALL)), "")


def decode(data: bytes, most: int, least: int = 1, kinds: tuple[str, ...] = ALL) -> Decoded:
    """Read an image.

    most   pixels that it may have; least: pixels of its shorter side
    Raises Refused.
    """
    kind = kind_of(data)
    if kind not in kinds:
        raise Refused("unsupported_image")
    if kind == "HEIF":
        try:
            import pillow_heif
        except ImportError:
            raise Refused("heic_missing") from None
        pillow_heif.register_heif_opener(thumbnails=False)
    if scans(data) > MAX_SCANS:
        raise Refused("too_many_scans")
    if data[8:16] == b"WEBPVP8X":  # Pillow before 13 makes its canvas before it looks at the size
        width, height = (1 + int.from_bytes(data[k : k + 3], "little") for k in (24, 27))
        if width * height > most:
            raise Refused("image_too_large", size=(width, height))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a broken EXIF or MPF segment, and of sizes, which are checked here
        try:
            image = Image.open(io.BytesIO(data), formats=(kind,))
        except Image.DecompressionBombError:
            raise Refused("image_too_large") from None
        except _DAMAGED as e:
            raise Refused(
                "avif_missing" if kind == "AVIF" and not _has_avif() else "unsupported_image", str(e)
            ) from e
        with image:
            if image.width * image.height > most:
                raise Refused("image_too_large", size=image.size)
            if min(image.size) < least:
                raise Refused("image_too_small", size=image.size)
            try:
                animated = kind in ("PNG", "WEBP", "GIF", "AVIF") and getattr(image, "n_frames", 1) > 1
                image.load()
                texts, origin = texts_of(image), source_type_of(image)
                return Decoded(in_srgb(_upright(image)), texts, origin, animated)
            except _DAMAGED as e:
                raise Refused("image_corrupt", str(e)) from e


def scans(data: bytes) -> int:
    """Number of scans of a JPEG's image (SOS markers, ITU T.81 B.1.1); 0 for other formats.

    Segments are skipped by their lengths: previews and profiles inside them have markers of their own.
    """
    n, at = 0, 2
    while data.startswith(b"\xff\xd8") and (marker := _MARKER.search(data, at)):
        kind, at = marker[0][-1], marker.end()
        if kind == END_OF_IMAGE:
            break
        n += kind == START_OF_SCAN
        at += int.from_bytes(data[at : at + 2])
    return n


def in_srgb(image: Image.Image) -> Image.Image:
    """An image of any mode as 8-bit RGB, or RGBA if it has transparency, converted from its colour profile.

    Nothing but pixels is kept: no profile, no colour key, no metadata.
    """
    profile = image.info.get("icc_profile")
    image = _eight_bits(image) if image.mode.startswith(("I", "F")) else image
    alpha = None
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        whole = image.convert("RGBA")
        rgb, alpha = whole.convert("RGB"), whole.getchannel("A")
    else:
        rgb = _of_lab(image) if image.mode == "LAB" else image.convert("RGB")
    text = profile.replace(b"\0", b"").lower() if isinstance(profile, bytes) else b""
    if isinstance(profile, bytes) and (b"srgb" not in text or b"linear" in text):
        with suppress(ImageCms.PyCMSError, OSError, ValueError, TypeError):  # a profile that is none
            source = image if image.mode in ("RGB", "CMYK", "L") else rgb
            source_profile, srgb = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
            rgb = ImageCms.profileToProfile(source, source_profile, srgb, outputMode="RGB") or rgb
    pixels = Image.frombytes("RGB", rgb.size, rgb.tobytes())
    if alpha is not None:
        pixels.putalpha(alpha)
    return pixels


def on_white(image: Image.Image) -> Image.Image:
    """The image in RGB, on white where it is transparent."""
    if "A" not in image.getbands():
        return image.convert("RGB")
    if image.getchannel("A").getextrema() == (255, 255):
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except _DAMAGED:  # EXIF that is none; the pixels are sound
        return image


def _eight_bits(image: Image.Image) -> Image.Image:
    """A grey image of 16 or 32 bits scaled to 8; Pillow itself clips it to white."""
    key, tags = image.info.get("transparency"), getattr(image, "tag_v2", {})
    wide = image if image.mode in ("I", "F") else image.convert("I")
    low, high = (float(v) for v in wide.getextrema())  # type: ignore[arg-type]
    if not (abs(low) < float("inf") and abs(high) < float("inf")):
        raise ValueError("it has values that are NaN or Inf")
    if image.mode.startswith("I;"):
        top = 2.0 ** int(re.sub(r"\D", "", image.mode) or 16) - 1
    else:  # these formats do not say what white is: 1, 255 and 65535 are usual
        usual = (1, 255, 65_535) if image.mode == "F" else (255, 65_535, 2**31 - 1)
        top = next((float(t) for t in usual if high <= t), high)
    grey = wide.convert("F").point(lambda v: v * (255 / top) + 0.5).convert("L")
    if tags.get(262) == 0:  # TIFF: white is zero
        grey = ImageChops.invert(grey)
    grey.info = {"transparency": round(key * 255 / top)} if isinstance(key, int) else {}
    return grey


def _of_lab(image: Image.Image) -> Image.Image:
    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    rgb = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
    assert rgb is not None
    return rgb


def _has_avif() -> bool:
    from PIL import features

    return bool(features.check("avif"))
