"""The true SD 1.5 configuration with random weights: one teaching step and one painting step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks.memory import full_size

from minikin import Studio
from minikin.bases.attached import Concepts
from minikin.bases.covariance import Covariance
from minikin.recipes import Teach
from minikin.teaching.photos import Photo
from minikin.teaching.teach import teach


@pytest.mark.slow
def test_one_step_of_each(tmp_path: Path) -> None:
    base = full_size("sd15")
    assert base.architecture == "sd1"
    assert base.layout.width == 24_960
    photo = Photo("a", np.random.default_rng(0).integers(0, 255, (256, 256, 3), dtype=np.uint8))
    recipe = Teach(name="tom", category="cat", mode="row", steps=1, batch=1, size=256, mask="none")
    tom = list(teach(base, [photo], recipe, None))[-1].result  # type: ignore[union-attr]
    assert tom.n_values == 12_480
    assert tom.is_finite()
    assert any(d.abs().max() > 0 for d in tom.delta.values())
    path = tom.save(tmp_path / "tom.safetensors")
    assert path.stat().st_size <= 32_000
    studio = Studio(base)
    studio.add(str(path))
    (image,) = studio.paint("a photo of <tom>", steps=1, guidance=1, width=256, height=256)
    assert image.size == (256, 256)
    gated = Teach(name="kim", category="cat", steps=1, batch=1, size=256, mask="none")
    unit = Covariance(torch.eye(768, dtype=torch.float64), 1, 1)
    kim = list(teach(base, [photo], gated, unit))[-1].result  # type: ignore[union-attr]
    assert kim.word_deltas[0].shape == (1, 768)
    assert isinstance(studio.concepts, Concepts)


def test_the_gpu_script_runs_on_miniatures(tmp_path: Path) -> None:
    """It waits for a GPU; that it runs at all is checked here."""
    import json
    import subprocess
    import sys

    out = tmp_path / "out.json"
    args = "--miniature --device cpu --dtype float32 --steps 2 --batch 4 --only sd15 --json"
    root = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-m", "benchmarks.gpu", *args.split(), str(out)], check=True, cwd=root,
                   capture_output=True)  # fmt: skip
    rows = json.loads(out.read_text())["rows"]
    assert {"one teaching step, batch 4", "painting, 30 steps, guided"} <= {r["what"] for r in rows}
