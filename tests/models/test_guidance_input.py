"""A LoRA that makes a base a full consistency model: guidance becomes an input, and nothing stays behind."""

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
from minikin.models.prompt import parse
from minikin.recipes import Paint
from tests.helpers.distillings import CAPTIONS, captions_file, run, setting


@pytest.fixture(scope="module")
def made(bases: dict[str, Base], tmp_path_factory: Any) -> Path:
    """A student of `distill lcm --student lora`, four steps at a high rate."""
    out = tmp_path_factory.mktemp("lcm")
    found = run(
        bases["sd15"], out, captions_file(out), method="lcm", student="lora", guidance="2-8", half=False
    )
    assert isinstance(found[-1], events.Done)
    return Path(found[-1].result)


@pytest.fixture
def studio(bases: dict[str, Base], made: Path, tmp_path: Path, monkeypatch: Any) -> Studio:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.safetensors").write_bytes(made.read_bytes())
    return Studio(bases["sd15"])


def pixels(studio: Studio, prompt: str = "a cat <lora:mine:1>", **recipe: Any) -> np.ndarray:
    return np.asarray(studio.paint(prompt, seed=3, **recipe)[0], int)


def test_it_begins_as_the_teacher(bases: dict[str, Base]) -> None:
    """At every guidance scale, to the bit; the full student's embedding is not zero and differs."""
    x, t = torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(0)), torch.tensor([999, 499])
    for kind, same in (("lora", True), ("full", False)):
        s = setting(bases["sd15"], method="lcm", student=kind)
        texts = s.encoder(CAPTIONS[:2])
        with torch.no_grad():
            scale = torch.tensor([1.0, 7.0])
            teacher, student = (n(x, t, texts, scale).x0 for n in (s.teacher, s.copy(kind, guidance=True)))
        assert torch.allclose(teacher, student, atol=1e-6) is same


def test_the_file_is_an_ordinary_lora_of_one_more_layer(made: Path) -> None:
    names = {k.rpartition(".lora_")[0] for k in load_file(made)}
    assert f"unet.{guidance.LAYER}" in names and "unet.mid_block.attentions.0.proj_in" in names


def test_guidance_is_an_input(studio: Studio) -> None:
    """Other images, one row a step, no second pass; the header says how it is painted."""
    decided = studio.prepared(Paint(prompt="a cat"), parse("a cat <lora:mine:1>", {}))[0]
    assert decided.preset.name == "lcm" and decided.guidance == 5 and decided.timesteps == (999, 759, 499, 259)
    rows: list[int] = []
    hook = studio.base.unet.register_forward_pre_hook(lambda _m, args: rows.append(len(args[0])))
    try:
        low, high, again = (pixels(studio, guidance=g) for g in (2.0, 8.0, 8.0))
    finally:
        hook.remove()
    assert rows == [1] * 12 and np.array_equal(high, again) and np.abs(low - high).max() > 0
    said = [e.text for e in studio.painting(Paint(prompt="a cat <lora:mine:1>", negative="a dog"))
            if isinstance(e, events.Note)]  # fmt: skip
    assert len(said) == 1 and "negative prompt has no effect" in said[0]


def test_the_base_is_as_it_was(studio: Studio) -> None:
    """Images, tensors and configuration; between two uses, and after one that failed."""
    base, plain = studio.base, pixels(studio, "a cat", steps=2)
    names, config = list(base.unet.state_dict()), dict(base.unet.config)
    first = pixels(studio)
    assert not base.has_guidance_embedding and list(base.unet.state_dict()) == names
    assert dict(base.unet.config) == config and np.array_equal(pixels(studio, "a cat", steps=2), plain)
    adapters = Adapters(base)
    mine = adapters.get(Path("mine.safetensors"))
    with suppress(RuntimeError), adapters.using([(mine, 1.0)]):
        assert base.unet.config.time_cond_proj_dim
        assert not base.has_guidance_embedding, "who plans an image meanwhile plans it for the base"
        assert recognise(base).name == "quality"
        raise RuntimeError("planted")
    assert not base.has_guidance_embedding and np.array_equal(pixels(studio), first)


def test_stock_diffusers_samples_the_same(
    bases: dict[str, Base], pipelines: dict[str, Any], studio: Studio, made: Path
) -> None:
    """On a U-Net with a blank guidance input the stock LCM pipeline loads the file as any LoRA."""
    own = pipelines["sd15"]
    config = {k: v for k, v in own.unet.config.items() if k != "_use_default_values"}
    unet = diffusers.UNet2DConditionModel.from_config({**config, "time_cond_proj_dim": 256}).eval()
    unet.load_state_dict(own.unet.state_dict(), strict=False)
    torch.nn.init.zeros_(unet.time_embedding.cond_proj.weight)
    parts = {k: v for k, v in own.components.items() if k != "image_encoder"}
    pipe = diffusers.LatentConsistencyModelPipeline(
        **{**parts, "unet": unet, "scheduler": build("LCM", own.scheduler, {})}, requires_safety_checker=False
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(str(made.parent), weight_name=made.name)
    theirs = pipe("a cat", num_inference_steps=4, guidance_scale=5.0, height=64, width=64, output_type="np",
                  generator=torch.Generator().manual_seed(3)).images[0]  # fmt: skip
    ours = pixels(studio, guidance=5.0, width=64, height=64)
    assert np.abs(ours - np.round(theirs * 255)).max() <= 1
    assert lcm_times(1000, 20, 4) == pipe.scheduler.timesteps.tolist()


def test_one_guidance_input_at_a_time(
    studio: Studio, bases: dict[str, Base], made: Path, tmp_path: Path
) -> None:
    """Another width of embedding is another kind of model; a base that has its own input keeps it."""
    tensors = load_file(made)
    key = f"unet.{guidance.LAYER}.lora_A.weight"
    save_file({**tensors, key: tensors[key][:, :128].contiguous()}, tmp_path / "narrow.safetensors")
    with pytest.raises(BadRecipe, match="full consistency models of different kinds"):
        studio.paint("a cat <lora:mine:1> <lora:narrow:1>", guidance=5.0)
    with pytest.raises(BaseMismatch, match=r"changes unet\.time_embedding\.cond_proj"):
        lora_file.load(bases["lcm-sd15"], made, "mine")


def test_openvino_takes_it_too(studio: Studio) -> None:
    pytest.importorskip("openvino", reason="the extra minikin[openvino] is not installed")
    eager, fast = (pixels(studio, guidance=5.0, engine=e) for e in ("eager", "openvino"))
    assert np.abs(eager - fast).mean() <= 2
