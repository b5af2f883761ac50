"""Images to bytes: the one place where an image becomes a file, so that none leaves without its mark.

PNG takes the mark as an iTXt chunk, JPEG in APP1, WebP in its XMP chunk. With a `Signer`, Content
Credentials (C2PA) are put in besides, last of all, because they sign every other byte.
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

    on      the XMP mark; off only where somebody asked for it
    signer  signs what is marked; None for no Content Credentials
    """

    on: bool = True
    signer: Signer | None = None

    def encode(
        self, image: Image, format: str = "PNG", *, source_type: str | None = None, info: Any = None,
        **options: Any,
    ) -> bytes:  # fmt: skip
        """An image of PIL as the bytes of a file.

        source_type  a code of IPTC, NONE for what no model painted; what the image says by default, and
                     TRAINED when it says nothing: whoever forgets this marks too much, not too little
        info         PNG's text chunks (PngInfo)
        options      Pillow's, of the format
        Raises BadCredentials when it cannot be signed.
        """
        told = source_type_of(image) if source_type is None else source_type
        told = TRAINED if told is None else told
        if self.on and told != NONE:
            if format == "PNG":
                info = _with(info, packet(told))
            else:
                options["xmp"] = packet(told).encode()
        if info is not None:
            options["pnginfo"] = info
        buffer = io.BytesIO()
        image.save(buffer, format, **options)
        if self.signer and told != NONE:
            return self.signer.signed(buffer.getvalue(), format, told)
        return buffer.getvalue()

    @classmethod
    def of(cls, mark: bool = True, certificate: Path | None = None, key: Path | None = None) -> Marking:
        """As it is asked for on the command line. Raises BadRecipe, BadCredentials."""
        from minikin.images.credentials import Signer

        signer = Signer.open(certificate, key)
        if signer and not mark:
            raise BadRecipe(
                "Content Credentials say that an image was made: --no-mark contradicts --c2pa-cert."
            )
        return cls(mark, signer)

    @property
    def unsigned(self) -> Marking:
        """For what is shown and gone: previews and live images carry the mark alone."""
        return Marking(self.on)


MARKED = Marking()


def save_image(image: Image, path: str | Path, marking: Marking = MARKED, **options: Any) -> Path:
    """Write an image with its mark, atomically; PNG, JPEG or WebP by the file's name. Returns the path.

    options  those of `Marking.encode` (`info`, `source_type`), and Pillow's of the format: `quality=90`
    Raises BadRecipe for another suffix, StorageError.
    """
    path = Path(path)
    format = FORMATS.get(path.suffix.lower())
    if format is None:
        raise BadRecipe(f"Images are saved as {', '.join(FORMATS)}, but the name is {path.name}.")
    if format == "JPEG" and image.mode != "RGB":
        image = image.convert("RGB")
    return atomic_write(path, marking.encode(image, format, **options))


def _with(info: Any, text: str) -> Any:
    """PNG texts with the packet besides; the caller's own are left as they are."""
    from PIL.PngImagePlugin import PngInfo

    marked = PngInfo()
    marked.chunks = [*info.chunks] if info else []
    marked.add_itxt(PNG_KEY, text)
    return marked
