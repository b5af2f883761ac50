"""The verdict of a content filter on an image."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Verdict:
    """A filter's verdict on one image; labels name the kinds of content."""

    objects: bool
    labels: tuple[str, ...] = ()
