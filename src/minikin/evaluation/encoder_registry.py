"""Opens the image and text encoders of evaluation by name. Opening one never downloads."""

from __future__ import annotations

from minikin.errors import UnknownName
from minikin.evaluation.encoders import Encoder
from minikin.evaluation.published_encoders import PUBLISHED, open_published
from minikin.evaluation.tiny_encoders import open_embedded
from minikin.models.device import resolve


def names() -> list[str]:
    """Names of all encoders, the embedded one first."""
    return ["tiny", *PUBLISHED]


def open_encoder(name: str = "tiny", device: str | None = None) -> Encoder:
    """Open an encoder by name.

    device  cuda, mps, xpu or cpu; the best available one by default
    Raises UnknownName; NoNetwork when its weights are not on this machine; BadModelFile or AssetError
    when they are damaged or belong to another model.
    """
    where, _ = resolve(device, "float32")
    if name == "tiny":
        return open_embedded(device=where)
    if name not in PUBLISHED:
        raise UnknownName("encoder", name, names())
    return open_published(name, where)
