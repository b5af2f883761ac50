"""Miniatures have two levels here: training is about losses and the loop, not the number of blocks."""

from __future__ import annotations

from typing import Any

import pytest

from minikin.models.base import Base


@pytest.fixture(scope="session")
def bases(flat_bases: dict[str, Base]) -> dict[str, Base]:
    return flat_bases


@pytest.fixture(scope="session")
def pipelines(flat_pipelines: dict[str, Any]) -> dict[str, Any]:
    return flat_pipelines
