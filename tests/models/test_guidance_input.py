"""LoRAs that turn a base into a full consistency model, with guidance as an input of its U-Net."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from minikin import Studio, events
from minikin.distillation.solver import lcm_times
from minikin.errors import BadRecipe, BaseMismatch
from minikin.generation.schedulers import build
from minikin.models.base import Base
from minikin.models.lora import guidance, lora_file
from minikin.models.lora.adapters import Adapters
from minikin.models.presets import recognise
from minikin.recipes import Paint
from tests.helpers.distillings import CAPTIONS, captions_file, context, run


@pytest.fixture(scope="module")
def bases(flat_bases: dict[str, Base]) -> dict[str, Base]:
    """Two levels: what is tried here does not depend on how many there are."""
    return flat_bases


@pytest.fixture(scope="module")
def pipelines(flat_pipelines: dict[str, Any]) -> dict[str, Any]:
    return flat_pipelines


@pytest.fixture(scope="module")
def student_file(bases: dict[str, Base], tmp_path_factory: Any) -> Path:
    """A LoRA of `distill lcm --student lora`, after two steps at a high learning rate."""
    out = tmp_path_factory.mktemp("lcm")
    received = run(
        bases["sd15"],
        out,
        captions_file(out),
        method="lcm",
        student="lora",
        guidance="2-8",
        half=False,
        steps=2,
    )
    assert isinstance(received[-1], events.Done)
    return Path(received[-1].result)


@pytest.fixture
def studio(bases: dict[str, Base], student_file: Path, tmp_path: Path, monkeypatch: Any) -> Studio:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.safetensors").write_bytes(student_file.read_bytes())
    return Studio(bases["sd15"])


def pixels(studio: Studio, prompt: str = "a cat <lora:mine:1>", **recipe: Any) -> np.ndarray:
    return np.asarray(studio.paint(prompt, seed=3, **recipe)[0], int)


def test_the_student_starts_as_the_teacher(bases: dict[str, Base]) -> None:
    """Bit-identical at every guidance scale; the embedding of a full student is not zero and differs."""
    x, t = torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(0)), torch.tensor([999, 499])
    for kind, same in (("lora", True), ("full", False)):
        s = context(bases["sd15"], method="lcm", student=kind)
        texts = s.encoder(CAPTIONS[:2])
        with torch.no_grad():
            scale = torch.tensor([1.0, 7.0])
            teacher, student = (n(x, t, texts, scale).x0 for n in (s.teacher, s.copy(kind, guidance=True)))
        assert torch.allclose(teacher, student, atol=1e-6) is same


def test_the_file_is_a_lora_with_one_more_layer(student_file: Path) -> None:
    names = {k.rpartition(".lora_")[0] for k in load_file(student_file)}
    assert f"unet.{guidance.LAYER}" in names and "unet.mid_block.attentions.0.proj_in" in names


def test_guidance_scale_changes_images_without_a_second_pass(studio: Studio) -> None:
    """Other images with one U-Net call per step; the metadata states the sampler."""
    decided = studio.resolve(Paint(prompt="a cat <lora:mine:1>"))
    assert decided.preset.name == "lcm" and decided.guidance == 5 and decided.timesteps == (999, 759, 499, 259)
    rows: list[int] = []
    hook = studio.base.denoiser.register_forward_pre_hook(lambda _m, args: rows.append(len(args[0])))
    try:
        low, high, again = (pixels(studio, guidance=g) for g in (2.0, 8.0, 8.0))
    finally:
        hook.remove()
    assert rows == [1] * 12 and np.array_equal(high, again) and np.abs(low - high).max() > 0
    notes = [e.text for e in studio.painting(Paint(prompt="a cat <lora:mine:1>", negative="a dog"))
            if isinstance(e, events.Note)]  # fmt: skip
    assert len(notes) == 1 and "negative prompt has no effect" in notes[0]


def test_the_base_is_unchanged_afterwards(studio: Studio) -> None:
    """Images, tensors and configuration, between two uses and after a failed one."""
    base, plain = studio.base, pixels(studio, "a cat", steps=2)
    names, config = list(base.denoiser.state_dict()), dict(base.denoiser.config)
    first = pixels(studio)
    assert not base.has_guidance_embedding and list(base.denoiser.state_dict()) == names
    assert dict(base.denoiser.config) == config and np.array_equal(pixels(studio, "a cat", steps=2), plain)
    adapters = Adapters(base)
    mine = adapters.get(Path("mine.safetensors"))
    with suppress(RuntimeError), adapters.using([(mine, 1.0)]):
        assert base.denoiser.config.time_cond_proj_dim
        assert not base.has_guidance_embedding, "who plans an image meanwhile plans it for the base"
        assert recognise(base).name == "quality"
        raise RuntimeError("planted")
    assert not base.has_guidance_embedding and np.array_equal(pixels(studio), first)


def test_stock_diffusers_samples_the_same(
    bases: dict[str, Base], pipelines: dict[str, Any], studio: Studio, student_file: Path
) -> None:
    """The stock LCM pipeline loads the file as a LoRA on a U-Net with a zero guidance projection."""
    stock = pipelines["sd15"]
    config = {k: v for k, v in stock.unet.config.items() if k != "_use_default_values"}
    unet = diffusers.UNet2DConditionModel.from_config({**config, "time_cond_proj_dim": 256}).eval()
    unet.load_state_dict(stock.unet.state_dict(), strict=False)
    torch.nn.init.zeros_(unet.time_embedding.cond_proj.weight)
    parts = {k: v for k, v in stock.components.items() if k != "image_encoder"}
    pipe = diffusers.LatentConsistencyModelPipeline(
        **{**parts, "unet": unet, "scheduler": build("LCM", stock.scheduler, {})}, requires_safety_checker=False
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(str(student_file.parent), weight_name=student_file.name)
    theirs = pipe("a cat", num_inference_steps=4, guidance_scale=5.0, height=64, width=64, output_type="np",
                  generator=torch.Generator().manual_seed(3)).images[0]  # fmt: skip
    ours = pixels(studio, guidance=5.0, width=64, height=64)
    assert np.abs(ours - np.round(theirs * 255)).max() <= 1
    assert lcm_times(1000, 20, 4) == pipe.scheduler.timesteps.tolist()


def test_only_one_guidance_input_at_a_time(
    studio: Studio, bases: dict[str, Base], student_file: Path, tmp_path: Path
) -> None:
    """Embeddings of different widths exclude each other; a base with a guidance input keeps it."""
    tensors = load_file(student_file)
    key = f"unet.{guidance.LAYER}.lora_A.weight"
    save_file({**tensors, key: tensors[key][:, :128].contiguous()}, tmp_path / "narrow.safetensors")
    with pytest.raises(BadRecipe, match="full consistency models of different kinds"):
        studio.paint("a cat <lora:mine:1> <lora:narrow:1>", guidance=5.0)
    with pytest.raises(BaseMismatch, match=r"changes unet\.time_embedding\.cond_proj"):
        lora_file.load(bases["lcm-sd15"], student_file, "mine")


def test_openvino_supports_guidance_inputs(studio: Studio) -> None:
    pytest.importorskip("openvino", reason="the extra minikin[openvino] is not installed")
    eager, fast = (pixels(studio, guidance=5.0, backend=e) for e in ("eager", "openvino"))
    assert np.abs(eager - fast).mean() <= 2
