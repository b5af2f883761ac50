"""The demo, as a newcomer runs it: its claims are measured here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from minikin.cli import demo
from minikin.recipes.teach import BY_MODE


@pytest.mark.slow
def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two concepts taught and painted; subject fidelity beats the plain category; nothing drifted.

    Taught for a third of the usual steps: the whole demo is measured in docs/measurements.md."""
    monkeypatch.setitem(BY_MODE["value"], "max_steps", 100)
    facts = demo.run(tmp_path, as_json=True)
    assert facts["drift_of_the_category"] == 0
    for name, _ in demo.CONCEPTS:
        f = facts["concepts"][name]
        assert f["bytes"] < 100_000
        assert f["subject_fidelity"] > f["subject_fidelity_of_the_plain_category"] + 0.15
        assert f["scene_recognised"] >= 0.8
        assert (tmp_path / f"{name}.safetensors").stat().st_size == f["bytes"]
    assert json.loads((tmp_path / "demo.json").read_text()) == facts
    assert Image.open(tmp_path / "sheet.png").width > 900
