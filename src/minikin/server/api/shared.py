"""Shared by OpenAI's and A1111's API: their fields as a recipe's, prompts from an image's metadata."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

from PIL import Image

from minikin.images.metadata import recorded_or_none, texts_of
from minikin.server import job_types

MIN_STRENGTH = 0.01  # for 0, which changes nothing with other servers: here at least one step runs


def known_fields(kind: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values that the recipe of this job type has a field for."""
    fields = job_types.recipe_model(kind).option_names()
    return {k: v for k, v in values.items() if v is not None and k in fields}


def seed_of(seed: int | None) -> int:
    """The request's seed, or a random one for None and for A1111's -1."""
    return secrets.randbelow(2**32) if seed in (None, -1) else int(seed or 0)


def prompts_or_recorded(prompt: str, negative: str | None, image: Image.Image) -> tuple[str, str]:
    """(prompt, negative prompt) of the request; without a prompt, those the image's metadata records."""
    record = None if prompt.strip() else recorded_or_none(texts_of(image))
    if record is None or not record.prompt:
        return prompt, negative or ""
    return record.prompt, negative or record.negative
