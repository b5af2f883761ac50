"""What travels with the package stays small: the sizes that issue and docs/tiny.md promise."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

import minikin

ROOT = Path(__file__).parents[2]
TINY = Path(minikin.__file__).parent / "tiny"
MB = 1_000_000
# folder -> most bytes of its safetensors files together
MOST = {
    "weights": 40 * MB,
    "encoders/weights": 8 * MB,
    "adapters": 8 * MB,
}


@pytest.mark.parametrize("folder", MOST)
def test_weights_stay_small(folder: str) -> None:
    weights = list((TINY / folder).rglob("*.safetensors"))
    assert weights and sum(p.stat().st_size for p in weights) <= MOST[folder]


def test_everything_of_the_model_is_weights() -> None:
    """Besides, the folder holds configurations and the tokenizer: no optimizer state, no samples."""
    rest = [p for p in (TINY / "weights").rglob("*") if p.is_file() and p.suffix != ".safetensors"]
    assert {p.suffix for p in rest} == {".json", ".md"} and sum(p.stat().st_size for p in rest) < 0.3 * MB


def test_the_tree_stays_small() -> None:
    """Everything that is tracked, 64 MB at most: an image too many is noticed here."""
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("no checkout")
    assert (
        sum((ROOT / p).stat().st_size for p in listed.stdout.split("\0") if p and (ROOT / p).is_file())
        < 64 * MB
    )
