"""A generated image together with the record that goes into its metadata."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from PIL import Image


@dataclass(frozen=True)
class GeneratedImage:
    """One image.

    seed     of the CPU generator that drew its noise
    verdict  of the content filter (`content_filter.Filtering`); None where it has no objection
    record   how the image was made (`request.ImageRequest.record_of`), as its metadata says it
    """

    image: Image.Image
    seed: int
    verdict: dict[str, Any] | None = None
    record: dict[str, Any] = field(default_factory=dict)
