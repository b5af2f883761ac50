"""The dependency audit: what is pinned, what is too old; each rule is shown to fire."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version
from tools import audit

ROOT = Path(__file__).parents[2]


def problems(**changes: Any) -> list[str]:
    versions: dict[str, Any] = {
        "need": audit.direct_dependencies((ROOT / "pyproject.toml").read_text()),
        "pinned": audit.pins((ROOT / "constraints.txt").read_text()),
        "least": audit.floors((ROOT / "tools" / "floors.txt").read_text()), "there": audit.installed(),
    }  # fmt: skip
    return audit.problems(**{**versions, **changes})[0]


def test_everything_is_pinned_and_nothing_is_below_a_floor() -> None:
    assert problems() == []


def test_each_rule_fires() -> None:
    assert problems(need={"left-pad"}) == ["left-pad is not pinned in constraints.txt"]
    assert "CVE-2025-32434" in problems(there={"torch": Version("2.5.1")})[0]
    assert problems(pinned=audit.pins((ROOT / "constraints.txt").read_text()) | {"pillow": Version("9.0")})


@pytest.mark.parametrize("line", ["torch>=2", "torch", "git+https://example.org/x", "torch=="])
def test_pins_are_exact(line: str) -> None:
    with pytest.raises(ValueError):
        audit.pins(line)


def test_other_builds_of_a_version_are_that_version() -> None:
    pinned = {"torch": Version("2.13.0")}
    assert audit.problems(set(), pinned, {}, {"torch": Version("2.13.0+cpu")}) == ([], [])
    assert audit.problems(set(), pinned, {}, {"torch": Version("2.14.0")})[1]
