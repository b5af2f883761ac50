"""Sources: the images that are painted over, and what they say of themselves.

What an image records goes into the record of what is made of it, under `parent`: so a refined image
knows its draft, and `chain.again` can repeat both.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image, ImageCms, ImageOps

from minikin.errors import BadPhoto, BadRecipe, reason
from minikin.images import metadata, xmp
from minikin.recipes import OF_PRESET, Paint, Rework

PictureLike = str | Path | Image.Image
R = TypeVar("R", bound=Rework)
_OF_THE_RUN = ("n", "batch", "device", "dtype", "engine", "size", "width", "height")


@dataclass(frozen=True)
class Source:
    """An image to paint over.

    image   RGB, upright
    file    its name, and sha256 its file's hash; "" for an image that is no file
    made    what it records of how it was made; {} when it is not Minikin's own
    said    prompt, negative and seed that another program wrote into it
    origin  what it says of its origin, a code of IPTC; None when it says nothing
    """

    image: Image.Image
    file: str = ""
    sha256: str = ""
    made: dict[str, Any] = field(default_factory=dict)
    said: dict[str, Any] = field(default_factory=dict)
    origin: str | None = None

    @classmethod
    def of(cls, picture: PictureLike | Source) -> Source:
        """Read an image; raises BadPhoto. One that is no file records what its `info` says."""
        if isinstance(picture, Source):
            return picture
        if isinstance(picture, Image.Image):
            told = _said(lambda: metadata.recorded(metadata.texts_of(picture)))
            return cls(plain(picture), **told, origin=xmp.source_type_of(picture))
        path = Path(picture)
        try:
            data = path.read_bytes()
            with Image.open(path, formats=("PNG", "JPEG", "WEBP")) as opened:
                image, origin = plain(ImageOps.exif_transpose(opened)), xmp.source_type_of(opened)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
            raise BadPhoto(f"{path} cannot be read as an image: {reason(e)}.") from e
        told = _said(lambda: metadata.read(path))
        return cls(image, path.name, hashlib.sha256(data).hexdigest(), **told, origin=origin)

    @property
    def pixels(self) -> str:
        """SHA-256 of the size and the pixels, whatever file they are in."""
        return pixels_hash(self.image)

    @property
    def source_type(self) -> str:
        """IPTC's code of what is painted on it: made throughout only where this image was, and says so."""
        if self.origin is None and self.made and "parent" not in self.made:
            return xmp.TRAINED  # its record says that it was painted from nothing
        told = self.origin or self.made.get(xmp.KEY)
        return xmp.TRAINED if told == xmp.TRAINED else xmp.COMPOSITE

    def parent(self) -> dict[str, Any]:
        """What an image made of this one records of it."""
        facts: dict[str, Any] = {"pixels": self.pixels, "size": list(self.image.size)}
        if self.file:
            facts |= {"file": self.file, "sha256": self.sha256}
        return facts | ({"made": self.made} if self.made else {})


def plain(image: Image.Image) -> Image.Image:
    """RGB in sRGB, which is what models paint in, and nothing but its pixels: no profile, no colour key."""
    profile, rgb = image.info.get("icc_profile"), image.convert("RGB")
    named = profile.replace(b"\0", b"").lower() if isinstance(profile, bytes) else b""
    if isinstance(profile, bytes) and (b"srgb" not in named or b"linear" in named):
        with suppress(ImageCms.PyCMSError, OSError, ValueError, TypeError):
            of = image if image.mode in ("RGB", "CMYK", "L") else rgb
            own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            rgb = ImageCms.profileToProfile(of, own, ImageCms.createProfile("sRGB"), outputMode="RGB") or rgb
    return Image.frombytes("RGB", rgb.size, rgb.tobytes())


def _said(read: Callable[[], metadata.Recorded]) -> dict[str, Any]:
    """`made` and `said` of what an image records."""
    try:
        found = read()
    except BadPhoto:  # it says nothing of itself
        found = metadata.Recorded({})
    made = found.recipe if isinstance(found.recipe.get("recipe"), dict) else {}
    seed = found.settings.get("Seed", "")
    said = {"prompt": found.prompt, "negative": found.negative} | ({"seed": seed} if seed.isdigit() else {})
    return {"made": made, "said": {} if made else said}


def pixels_hash(image: Image.Image) -> str:
    """SHA-256 of an image's size and RGB pixels."""
    size = f"{image.width}x{image.height} ".encode()
    return hashlib.sha256(size + image.convert("RGB").tobytes()).hexdigest()


def inherited(kind: type[R], source: Source, given: dict[str, Any]) -> R:
    """A recipe from what is asked for and, where nothing is, from the image's own.

    Another preset or base than the image's brings its own steps, guidance, scheduler and points.
    given  fields of the recipe; None is not given
    Raises BadRecipe; also when there is no prompt to be found.
    """
    asked = {k: v for k, v in given.items() if v is not None}
    told = source.made.get("recipe", source.said)
    own = {k: v for k, v in told.items() if k in Paint.model_fields and v not in (None, "")}
    if "seed" in source.made:
        own["seed"] = source.made["seed"]
    dropped = set(_OF_THE_RUN)
    if any(asked.get(k) not in (None, own.get(k)) for k in ("preset", "base")):
        dropped |= set(OF_PRESET)
    made: R = kind.make(**{k: v for k, v in own.items() if k not in dropped} | asked)
    if not made.prompt.strip():
        raise BadRecipe(
            f'{source.file or "The picture"} carries no prompt, so say what it shows: --prompt "...".'
        )
    return made
