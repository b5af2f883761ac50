"""Untrusted images, decoded in a child process with limited memory and time.

An image arrives as bytes or as base64, never as a URL. Data without the signature of one of the formats of
phones, browsers and generators is rejected at once; the rest is decoded in a child process by the reader that
the command line uses (`images/pixels.py`), and rebuilt from pixels, without metadata. What a broken or hostile
file does to a decoder happens there. Few children run at a time: each may take a gigabyte.
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
from pathlib import Path

from PIL import Image

import minikin
from minikin.images.pixels import MAX_SCANS, PHONE, kind_of, scans
from minikin.images.xmp import with_source_type
from minikin.server.errors import RequestRejected
from minikin.server.limits import Limits

_DATA = re.compile(r"data:image/[\w.+-]{1,20};base64,")
MAX_CHILDREN, WAIT_S = 3, 2.0  # seconds that a further one waits for a free slot
WALL = 6  # a child may take this many times `Limits.decode_s` by the clock, as it shares the processors
_slots = threading.BoundedSemaphore(MAX_CHILDREN)
_SCRIPT = """
import resource, sys
root, memory, seconds, pixels, least = sys.argv[1], *map(int, sys.argv[2:6])
resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
sys.path.insert(0, root)
import json
from minikin.images import pixels as reader
data = sys.stdin.buffer.read()
try:
    got = reader.decode(data, pixels, least, reader.PHONE)
except reader.Refused as e:
    sys.stderr.write(e.code)
    sys.exit(3)
head = json.dumps([got.image.mode, *got.image.size, got.texts, got.origin, got.animated])
sys.stdout.buffer.write(head.encode() + b"\\n" + got.image.tobytes())
"""
_ROOT = str(Path(minikin.__file__).parents[1])
_REASONS = {
    "unsupported_image": (415, "is not a JPEG, PNG, WebP, AVIF or HEIC image; save it as a JPEG or PNG"),
    "heic_missing": (
        415,
        "is a HEIC image, which this server reads where its extra heic is installed; send a JPEG",
    ),
    "avif_missing": (415, "is an AVIF image, which this server cannot read; send a JPEG or PNG"),
    "image_too_large": (413, "has too many pixels: at most {mpx:.0f} million are read"),
    "image_too_small": (422, "is smaller than 8 pixels"),
    "image_corrupt": (422, "is damaged or incomplete"),
    "too_many_scans": (422, f"is a JPEG of more than {MAX_SCANS} scans, and usual are ten; save it again"),
    "image_animated": (422, "is animated; save the frame you want as a still image"),
}
_LEAST = 8  # pixels of the shorter side


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
        body = text[head.end() if head else 0 :].encode("ascii")
        data = base64.b64decode(body.translate(None, b" \t\r\n"), validate=True)  # `base64 FILE` breaks lines
    except (binascii.Error, ValueError):
        why = f"{what} is not base64: send the file's bytes in A-Z, a-z, 0-9, + and /, padded with =."
        raise RequestRejected(why, status=422, code="invalid_image", param=what) from None
    return decode(data, what, limits)


def decode(data: bytes, what: str, limits: Limits, *, still: bool = False) -> Image.Image:
    """An RGB or RGBA image from untrusted bytes; blocks; raises RequestRejected.

    Its `info` holds the texts that record how it was generated and its source type (`images.xmp`), where it
    has them, and nothing else.
    still  reject an animated image, of which otherwise the first frame is read
    """
    if len(data) > limits.image:
        raise RequestRejected(
            f"{what} has {len(data) / 1e6:.0f} MB; at most {limits.image / 1e6:.0f} MB are read.",
            status=413, code="image_too_large", param=what,
        )  # fmt: skip
    reject = partial(_rejection, what, limits)
    if kind_of(data) not in PHONE:
        raise reject("unsupported_image")
    bounds = (limits.decode_memory, max(1, round(limits.decode_s)), limits.image_pixels, _LEAST)
    arguments = [_ROOT, *map(str, bounds)]
    if scans(data) > MAX_SCANS:  # before a slot: each costs a pass over the whole image
        raise reject("too_many_scans")
    if not _slots.acquire(timeout=WAIT_S):
        raise _busy()
    try:
        child = subprocess.run(
            [sys.executable, "-I", "-c", _SCRIPT, *arguments], input=data, capture_output=True,
            timeout=WALL * limits.decode_s, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as e:  # no process, memory, file handle or processor for it
        raise _busy() from e
    finally:
        _slots.release()
    if child.returncode != 0:
        code = child.stderr.decode("ascii", "replace").strip()
        raise reject(code if code in _REASONS else "image_corrupt")
    head, _, body = child.stdout.partition(b"\n")
    mode, width, height, texts, origin, animated = json.loads(head)
    if animated and still:
        raise reject("image_animated")
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
