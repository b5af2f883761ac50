"""The examples of README.md and docs/python.md run as they stand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.usefixtures("short_teaching")

ROOT = Path(__file__).parents[2]


def python_blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S)


@pytest.mark.slow
@pytest.mark.parametrize(("page", "n"), [("README.md", 1), ("docs/python.md", 3)])
def test_python_examples(page: str, n: int, tmp_path: Path, monkeypatch: Any) -> None:
    """All Python blocks, in order, in a folder with the checkout's examples and weights in reach."""
    blocks = python_blocks(page)
    assert len(blocks) == n
    for name in ("examples", "src"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    assert "steps=200)  # 40 seconds" in blocks[0]
    for block in blocks:
        exec(block.replace("steps=200", "steps=4"), scope)
    assert (tmp_path / "pot.safetensors").stat().st_size < 100_000
    assert (tmp_path / "pot.png").exists()
    assert scope["image"].size == (128, 128)


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120
