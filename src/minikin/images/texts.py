"""Texts in which image generators record how an image was made: PNG chunks, EXIF, XMP, comments; in any script.

`parameters` holds A1111's infotext or another tool's JSON wherever it was written: A1111 and Forge put it into
a PNG's chunk or EXIF's UserComment, SwarmUI and Fooocus likewise, Draw Things into XMP, others into a JPEG's
comment. `images/metadata.py` parses them. What cameras and editors write there is left alone.
"""

from __future__ import annotations

import html
import re
import struct
from contextlib import suppress
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import iTXt

PARAMETERS, RECORD = "parameters", "minikin"
# chunks of A1111, Minikin, ComfyUI, InvokeAI (3 and later, 2, 1), NovelAI and Easy Diffusion
KEYS = (
    PARAMETERS, RECORD, "prompt", "workflow", "invokeai_metadata", "sd-metadata", "Dream", "Comment",
    "Software", "negative_prompt", "seed", "num_inference_steps", "guidance_scale", "sampler_name", "width",
    "height",
)  # fmt: skip
_EASY = KEYS[KEYS.index("negative_prompt") :]
MAX_CHARACTERS = 1 << 20  # of one text; a workflow of ComfyUI may have some 100,000
_EXIF_IFD, _USER_COMMENT, _DESCRIPTION, _XP_COMMENT = 0x8769, 0x9286, 0x010E, 0x9C9C
_GENERATED = re.compile(r"(?:^|\s)Steps: *\d|^\s*\{")  # infotext or JSON, not the name of a camera
_NODES = re.compile(r"(prompt|workflow): ?(?=\{)", re.IGNORECASE)
_XMP = re.compile(r"<exif:UserComment>\s*(?:<rdf:Alt>\s*<rdf:li[^>]*>)?([^<]{1,100000})")
_BROKEN = (OSError, ValueError, SyntaxError, TypeError, LookupError, AttributeError, struct.error)


def texts_of(image: Image.Image) -> dict[str, str]:
    """Texts of an opened image by key, `parameters` from wherever it is written."""
    texts = {}
    for key in KEYS:
        value = image.info.get(key)
        if isinstance(value, str) and len(value) <= MAX_CHARACTERS:
            texts[key] = value if isinstance(value, iTXt) else _of_utf8(value)
    if not texts.get("Software", "").startswith("NovelAI"):  # also of editors and cameras
        texts.pop("Comment", None), texts.pop("Software", None)
    if "num_inference_steps" not in texts:  # not of Easy Diffusion
        texts = {k: v for k, v in texts.items() if k not in _EASY}
    with suppress(*_BROKEN):  # EXIF that is none
        for text in _exif_texts(image):
            if match := _NODES.match(text):  # ComfyUI's nodes that save WebP and JPEG
                texts.setdefault(match[1].lower(), text[match.end() :])
            elif _GENERATED.search(text):
                texts.setdefault(PARAMETERS, text)
    if PARAMETERS not in texts:
        for text in (_xmp_comment(image), _decoded(image.info.get("comment", b""))):
            if _GENERATED.search(text):
                texts.setdefault(PARAMETERS, text)
    return texts


def _exif_texts(image: Image.Image) -> list[str]:
    """Texts of EXIF that generators use, wherever they put them; the best known places first."""
    exif = image.getexif()
    if not exif:
        return []
    inner = exif.get_ifd(_EXIF_IFD)
    comments = [_decoded(ifd.get(_USER_COMMENT, b"")) for ifd in (inner, exif)]
    xp = exif.get(_XP_COMMENT, b"")
    xp = bytes(xp) if isinstance(xp, bytes | tuple) else b""
    others = [exif.get(tag) for tag in (0x0110, 0x010F, _DESCRIPTION)]  # Model and Make: ComfyUI
    others += [value for tag, value in exif.items() if 0x0100 < tag < 0x0110 and isinstance(value, str)]
    texts = [*comments, *(v for v in others if isinstance(v, str)), xp.decode("utf-16-le", "replace")]
    return [_of_utf8(text).strip("\0\ufeff") for text in texts if 0 < len(text) <= MAX_CHARACTERS]


def _decoded(raw: Any) -> str:
    """EXIF's UserComment: 8 bytes name the encoding, but tools write UTF-16 of both byte orders and UTF-8.

    Of the readings as Unicode that is taken which has the most ASCII: names of settings are in ASCII in every
    infotext, and in the wrong byte order they are Chinese.
    """
    if isinstance(raw, str):
        return raw
    raw = bytes(raw) if isinstance(raw, bytes | bytearray) else b""
    if len(raw) > 4 * MAX_CHARACTERS:
        return ""
    head, body = raw[:8], raw[8:]
    has_prefix = head.rstrip(b"\0 ").upper() in (b"UNICODE", b"ASCII", b"JIS", b"")
    body = body if has_prefix else raw
    readings = [_of_utf8(body.decode("utf-8", "replace"))]
    if body[:2] in (b"\xff\xfe", b"\xfe\xff"):
        readings = [body.decode("utf-16", "replace")]
    elif head.startswith(b"UNICODE") or b"\0" in body.strip(b"\0"):
        readings += [body[: len(body) // 2 * 2].decode(f"utf-16-{order}", "replace") for order in ("be", "le")]
    readings = [text.strip("\0\ufeff") for text in readings]
    return max(readings, key=lambda text: sum(" " <= c <= "~" for c in text) - 2 * text.count("\0"))


def _of_utf8(text: str) -> str:
    """The text that was UTF-8 where PNG and EXIF want Latin-1 or ASCII, as many tools write it."""
    if text.isascii():
        return text
    with suppress(UnicodeError):
        return text.encode("latin-1").decode("utf-8")
    return text


def _xmp_comment(image: Image.Image) -> str:
    packet = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp") or ""
    text = packet[:400_000].decode("utf-8", "replace") if isinstance(packet, bytes) else str(packet)[:400_000]
    match = _XMP.search(text)
    return html.unescape(match[1]) if match else ""
