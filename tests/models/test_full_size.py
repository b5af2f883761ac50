"""The configurations at full size: layouts without weights, and one real step of SD 1.5 in `make soak`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import fewstep
from benchmarks.memory import full_size
from benchmarks.time_shares import shares
from diffusers import UNet2DConditionModel

from minikin import Studio
from minikin.images.photos import Photo
from minikin.models.attention import layout
from minikin.models.loading.architectures import ARCHITECTURES
from minikin.perfusion.attach import Concepts
from minikin.perfusion.covariance import Covariance
from minikin.perfusion.train import teach
from minikin.recipes import Teach


@pytest.mark.parametrize(("name", "width"), [("sd15", 24_960), ("sd21", 24_960), ("sdxl", 166_400)])
def test_layout(name: str, width: int) -> None:
    """On the meta device, which holds no weights: a key and a value for each channel of cross-attention.

    That files of this many values keep their size is tests/generation/test_conditioning_schedule.py's."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(ARCHITECTURES[name].unet)
    assert layout(unet).width == width and layout(unet).n_values == width // 2


@pytest.mark.soak
def test_one_training_and_one_sampling_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With random weights: as on miniatures, in 3.4 GB and a minute of processor."""
    monkeypatch.setattr("minikin.perfusion.train.EVALUATION", 1)  # of 16, at two seconds each
    base = full_size("sd15")
    assert base.architecture == "sd1"
    assert base.layout.width == 24_960
    photo = Photo("a", np.random.default_rng(0).integers(0, 255, (128, 128, 3), dtype=np.uint8))
    recipe = Teach.make(name="tom", category="cat", mode="gated", steps=1, batch=1, size=128, mask="none")
    unit = Covariance(torch.eye(768, dtype=torch.float64), 1, 1)
    tom = list(teach(base, [photo], recipe, unit))[-1].result  # type: ignore[union-attr]
    assert tom.n_values == 12_480
    assert tom.word_deltas[0].shape == (1, 768)
    assert tom.is_finite()
    assert any(d.abs().max() > 0 for d in tom.delta.values())
    path = tom.save(tmp_path / "tom.safetensors")
    assert path.stat().st_size <= 32_000
    studio = Studio(base)
    studio.add(str(path))
    (image,) = studio.paint("a photo of <tom>", steps=1, guidance=1, width=128, height=128)
    assert image.size == (128, 128)
    assert isinstance(studio.concepts, Concepts)


def test_the_gpu_script_runs_on_miniatures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script needs a GPU; here it runs on miniatures on the CPU."""
    out = tmp_path / "out.json"
    args = "gpu --miniature --device cpu --dtype float32 --steps 2 --batch 4 --only sd15 --json"
    monkeypatch.setattr("sys.argv", [*args.split(), str(out)])
    monkeypatch.setattr(gpu, "_median", lambda work, device: work() or 0.0)  # once instead of seven times
    gpu.main()
    rows = json.loads(out.read_text())["rows"]
    assert {"one training step, batch 4", "text-to-image, 30 steps, guided"} <= {r["what"] for r in rows}


@pytest.mark.slow
def test_the_few_step_gpu_script_runs_on_miniatures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out.json"
    args = "gpu --miniature --device cpu --dtype float32 --backends eager --only sd15 --json"
    monkeypatch.setattr("sys.argv", [*args.split(), str(out)])
    monkeypatch.setattr(fewstep, "CASES", fewstep.CASES[3:4])
    monkeypatch.setattr(fewstep, "_median", lambda work, device: work() or 0.0)
    monkeypatch.setattr(fewstep, "shares", lambda pipe, work, repeats: shares(pipe, work, 1, 0))
    fewstep.main()
    rows = json.loads(out.read_text())["rows"]
    assert [r["case"] for r in rows] == [f"sd15 LCM, 4 steps, 64 px, {d} decoder" for d in ("own", "tiny")]
