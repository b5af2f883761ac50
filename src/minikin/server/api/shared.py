"""What the borrowed dialects have in common: their fields as a recipe's, and an image's own words."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

from PIL import Image

from minikin.images.metadata import parse_parameters
from minikin.server import job_types


def known(kind: str, told: Mapping[str, Any]) -> dict[str, Any]:
    """Of what was said, what this kind's recipe has a field for."""
    fields = job_types.ready(kind).model_fields
    return {k: v for k, v in told.items() if v is not None and k in fields}


def seed_of(given: int | None) -> int:
    """A seed of ours for who names none; A1111's word for none is -1."""
    return secrets.randbelow(2**32) if given in (None, -1) else int(given or 0)


def words(prompt: str, negative: str | None, picture: Image.Image) -> tuple[str, str]:
    """Prompt and negative prompt; for who says nothing, what the image records."""
    own = str(picture.info.get("parameters", ""))
    if prompt.strip() or not own:
        return prompt, negative or ""
    recorded, avoided, _ = parse_parameters(own)
    return recorded, negative or avoided
