"""Encoding of images. Every image file is written here, so that every one carries the mark.

The mark is an iTXt chunk in PNG, APP1 in JPEG and the XMP chunk in WebP. With a `Signer`, Content Credentials
(C2PA) are added last, because they sign every other byte.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minikin.errors import BadRecipe
from minikin.files import atomic_write
from minikin.images.xmp import NONE, PNG_KEY, TRAINED, packet, source_type_of

if TYPE_CHECKING:
    from PIL.Image import Image

    from minikin.images.credentials import Signer

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


@dataclass(frozen=True)
class Marking:
    """How images are marked.

    on      write the XMP mark
    signer  signs marked images; None for no Content Credentials
    """

    on: bool = True
    signer: Signer | None = None

    def encode(
        self, image: Image, format: str = "PNG", *, source_type: str | None = None, info: Any = None,
        **options: Any,
    ) -> bytes:  # fmt: skip
        """Encode a Pillow image; returns the bytes of the file.

        source_type  IPTC's code, or NONE for an image that no model made; by default the image's, and TRAINED
                     for an image that has none, so that a caller's omission marks too much, not too little
        info         text chunks of a PNG (PngInfo)
        options      Pillow's options of the format
        Raises BadCredentials if the image cannot be signed.
        """
        code = source_type_of(image) if source_type is None else source_type
        code = TRAINED if code is None else code
        if self.on and code != NONE:
            if format == "PNG":
                info = _with_packet(info, packet(code))
            else:
                options["xmp"] = packet(code).encode()
        if info is not None:
            options["pnginfo"] = info
        buffer = io.BytesIO()
        image.save(buffer, format, **options)
        if self.signer and code != NONE:
            return self.signer.signed(buffer.getvalue(), format, code)
        return buffer.getvalue()

    @classmethod
    def of(cls, mark: bool = True, certificate: Path | None = None, key: Path | None = None) -> Marking:
        """The marking for command-line options. Raises BadRecipe and BadCredentials."""
        from minikin.images.credentials import Signer

        signer = Signer.open(certificate, key)
        if signer and not mark:
            raise BadRecipe(
                "Content Credentials mark an image as AI-generated, so --no-mark contradicts --c2pa-cert."
            )
        return cls(mark, signer)

    @property
    def unsigned(self) -> Marking:
        """The same without a signature: for previews and live images."""
        return Marking(self.on)


MARKED = Marking()


def save_image(image: Image, path: str | Path, marking: Marking = MARKED, **options: Any) -> Path:
    """Write a marked image atomically, as PNG, JPEG or WebP by the suffix; returns the path.

    options  of `Marking.encode` (`info`, `source_type`) and of Pillow, for example quality=90
    Raises BadRecipe for another suffix, and StorageError.
    """
    path = Path(path)
    format = FORMATS.get(path.suffix.lower())
    if format is None:
        raise BadRecipe(f"Images are saved as {', '.join(FORMATS)}, but the name is {path.name}.")
    if format == "JPEG" and image.mode != "RGB":
        image = image.convert("RGB")
    return atomic_write(path, marking.encode(image, format, **options))


def _with_packet(info: Any, text: str) -> Any:
    """A copy of the PNG text chunks with the XMP packet added."""
    from PIL.PngImagePlugin import PngInfo

    marked = PngInfo()
    marked.chunks = [*info.chunks] if info else []
    marked.add_itxt(PNG_KEY, text)
    return marked
