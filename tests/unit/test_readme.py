"""The README's examples run as they stand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_python_examples(tmp_path: Path, monkeypatch: Any) -> None:
    """All Python blocks, in order, in a folder with the checkout's examples and weights in reach."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert len(blocks) == 3
    for name in ("examples", "src"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    assert "steps=200)  # 40 seconds" in blocks[0]
    for block in blocks:
        exec(block.replace("steps=200", "steps=20"), scope)
    assert (tmp_path / "pot.safetensors").stat().st_size < 100_000
    assert (tmp_path / "pot.png").exists()
    assert scope["picture"].size == (128, 128)


def test_every_path_in_the_tree_exists() -> None:
    text = (ROOT / "README.md").read_text()
    for link in re.findall(r"\]\(((?:docs|src|benchmarks)/[^)]+)\)", text):
        path, _, heading = link.partition("#")
        assert (ROOT / path).exists(), link
        if heading:
            titles = re.findall(r"^#+ (.+)$", (ROOT / path).read_text(), re.M)
            assert heading in {re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles}, link
    for folder in ("cli", "perfusion", "models", "training", "generation", "evaluation", "tiny"):
        assert f"    {folder}/" in text
        assert (ROOT / "src" / "minikin" / folder).is_dir()
