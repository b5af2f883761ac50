"""Untrusted images, decoded in a child process with limited memory and time.

An image arrives as bytes or as base64, never as a URL. Data without the signature of one of the three formats
is rejected at once; the rest is decoded in a child process and rebuilt from pixels, without metadata. What a
broken or hostile file does to a decoder happens there. Few children run at a time: each may take a gigabyte.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
import subprocess
import sys
import threading
from functools import partial

from PIL import Image

from minikin.images.xmp import with_source_type
from minikin.server.errors import RequestRejected
from minikin.server.limits import Limits

_SIGNATURES = re.compile(rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|RIFF....WEBP", re.DOTALL)  # JPEG, PNG, WebP
_DATA = re.compile(r"data:image/[\w.+-]{1,20};base64,")
MAX_CHILDREN, WAIT_S = 3, 2.0  # seconds that a further one waits for a free slot
_slots = threading.BoundedSemaphore(MAX_CHILDREN)
_SCRIPT = r"""
import sys, resource
memory, seconds, pixels = map(int, sys.argv[1:4])
resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
import io, json, re, warnings
from PIL import Image, ImageCms, ImageOps
ORIGIN = rb"DigitalSourceType\s*(?:=\s*[\"']|>\s*)http://cv\.iptc\.org/newscodes/digitalsourcetype/(\w{1,60})"
warnings.simplefilter("error")
Image.MAX_IMAGE_PIXELS = pixels
def refuse(code):
    sys.stderr.write(code); sys.exit(3)
data = sys.stdin.buffer.read()
if data[8:16] == b"WEBPVP8X":  # Pillow before 13 makes its canvas before it looks at the size
    width, height = (1 + int.from_bytes(data[k:k + 3], "little") for k in (24, 27))
    if width * height > pixels:
        refuse("image_too_large")
try:
    image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP"))
except (Image.DecompressionBombError, Image.DecompressionBombWarning):
    refuse("image_too_large")
except Exception:  # a decoder that fails on a hostile file may raise anything; the child ends with it
    refuse("unsupported_image")
if image.width * image.height > pixels:
    refuse("image_too_large")
if min(image.size) < 8:
    refuse("image_too_small")
try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = {k: image.info.get(k) for k in ("parameters", "minikin")}
        texts = {k: v[:100000] for k, v in found.items() if isinstance(v, str)}
        packet = image.info.get("xmp")
        mark = re.search(ORIGIN, packet[:100000]) if isinstance(packet, bytes) else None
        origin = mark[1].decode() if mark else None
        image = ImageOps.exif_transpose(image)
        keep = "RGBA" if "A" in image.getbands() or "transparency" in image.info else "RGB"
        profile, whole = image.info.get("icc_profile"), image.convert(keep)
        named = profile.replace(b"\0", b"").lower() if isinstance(profile, bytes) else b"srgb"
        if image.mode in ("RGB", "RGBA", "CMYK") and (b"srgb" not in named or b"linear" in named):
            try:  # as generation.source does
                of = image if image.mode == "CMYK" else image.convert("RGB")
                own, srgb = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
                rgb = ImageCms.profileToProfile(of, own, srgb, outputMode="RGB")
                if keep == "RGBA":
                    rgb.putalpha(whole.getchannel("A"))
                whole = rgb
            except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
                pass  # a profile that is none: the colours as they are
        image = whole
except Exception:  # as above
    refuse("image_corrupt")
head = json.dumps([keep, image.width, image.height, texts, origin])
sys.stdout.buffer.write(head.encode() + b"\n" + image.tobytes())
"""
_REASONS = {
    "unsupported_image": (415, "is not a JPEG, PNG or WebP image"),
    "image_too_large": (413, "has too many pixels: at most {mpx:.0f} million are read"),
    "image_too_small": (422, "is smaller than 8 pixels"),
    "image_corrupt": (422, "is damaged or incomplete"),
}


def from_base64(text: object, what: str, limits: Limits) -> Image.Image:
    """An image from base64, with or without `data:image/...;base64,`; raises RequestRejected."""
    if not isinstance(text, str):
        raise RequestRejected(
            f"{what} is not a string; send the image as base64.", status=422, code="invalid_image", param=what
        )
    if re.match(r"\s*[a-z][a-z0-9+.-]*://", text[:64], re.IGNORECASE):
        raise RequestRejected(
            "Image URLs are disabled. Send base64 data.", status=400, code="url_inputs_disabled", param=what
        )  # fmt: skip
    try:
        head = _DATA.match(text[:64])
        data = base64.b64decode(text[head.end() if head else 0 :], validate=True)
    except (binascii.Error, ValueError):
        raise RequestRejected(f"{what} is not base64.", status=422, code="invalid_image", param=what) from None
    return decode(data, what, limits)


def decode(data: bytes, what: str, limits: Limits) -> Image.Image:
    """An RGB or RGBA image from untrusted bytes; blocks; raises RequestRejected.

    Its `info` holds the texts that record how it was generated and its source type (`images.xmp`), where it
    has them, and nothing else.
    """
    if len(data) > limits.image:
        raise RequestRejected(
            f"{what} has {len(data) / 1e6:.0f} MB; at most {limits.image / 1e6:.0f} MB are read.",
            status=413, code="image_too_large", param=what,
        )  # fmt: skip
    reject = partial(_rejection, what, limits)
    if not _SIGNATURES.match(data):
        raise reject("unsupported_image")
    arguments = [str(limits.decode_memory), str(max(1, round(limits.decode_s))), str(limits.image_pixels)]
    if not _slots.acquire(timeout=WAIT_S):
        raise _busy()
    try:
        child = subprocess.run(
            [sys.executable, "-I", "-c", _SCRIPT, *arguments], input=data, capture_output=True,
            timeout=limits.decode_s, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise reject("image_corrupt") from None
    except OSError as e:  # no process, memory or file handle left for the child
        raise _busy() from e
    finally:
        _slots.release()
    if child.returncode != 0:
        code = child.stderr.decode("ascii", "replace").strip()
        raise reject(code if code in _REASONS else "image_corrupt")
    head, _, body = child.stdout.partition(b"\n")
    mode, width, height, texts, origin = json.loads(head)
    image = Image.frombytes(mode, (width, height), body)
    image.info = dict(texts)
    return image if origin is None else with_source_type(image, origin)


def _busy() -> RequestRejected:
    message = "The server cannot decode images at the moment; try again."
    return RequestRejected(message, status=503, code="busy", retry_s=5)


def _rejection(what: str, limits: Limits, code: str) -> RequestRejected:
    status, why = _REASONS[code]
    return RequestRejected(
        f"{what} {why.format(mpx=limits.image_pixels / 1e6)}.", status=status, code=code, param=what
    )  # fmt: skip
