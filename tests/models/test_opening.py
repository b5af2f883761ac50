"""Opening bases: several at once, openings that fail, and tiny's folder in stock diffusers without a dtype."""

from __future__ import annotations

import gc
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from minikin import Studio
from minikin.errors import BadModelFile
from minikin.models.base import Base
from minikin.models.loading.registry import open_base, tiny_folder
from minikin.models.precision import name_float32
from tests.conftest import build_pipeline


def process_state() -> tuple[Any, ...]:
    """What diffusers, accelerate and transformers replace while they open a model."""
    functions = (nn.Module.register_parameter, nn.Module.register_buffer, nn.init.normal_, nn.init.uniform_)
    return (*functions, torch.zeros, torch.get_default_dtype(), torch.get_default_device())


def together(*calls: Any) -> list[Any]:
    """Results of calls in threads that start at the same moment; an exception in place of a result."""
    barrier, results = threading.Barrier(len(calls)), [None] * len(calls)

    def run(k: int) -> None:
        barrier.wait()
        try:
            results[k] = calls[k]()
        except Exception as e:
            results[k] = e

    threads = [threading.Thread(target=run, args=(k,)) for k in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_several_bases_are_opened_at_once(tmp_path: Path, tiny: Base) -> None:
    """Folders and tiny, in several dtypes, from four threads: all work, and the process is as it was."""
    folder = tmp_path / "mini"
    build_pipeline("sd15", tmp_path / "configs").save_pretrained(folder)
    before = process_state()
    opened = together(
        lambda: Studio.open("tiny"), lambda: Studio.open(str(folder), dtype="bfloat16"),
        lambda: Studio.open("tiny"), lambda: open_base(str(folder)),
    )  # fmt: skip
    assert not [e for e in opened if isinstance(e, Exception)]
    assert process_state() == before
    a, b = (opened[k].paint("a cat", steps=1, seed=1)[0] for k in (0, 2))
    assert a.tobytes() == b.tobytes() == Studio(tiny).paint("a cat", steps=1, seed=1)[0].tobytes()
    assert opened[1].base.dtype is torch.bfloat16 and opened[3].dtype is torch.float32


@pytest.mark.parametrize("damage", ["text_encoder", "unet"])
def test_a_failed_opening_leaves_nothing_behind(tmp_path: Path, monkeypatch: Any, damage: str) -> None:
    """Beside an opening that works: the process, its memory and the user's folder are as before."""
    folder = tmp_path / "mini"
    build_pipeline("sd15", tmp_path / "configs").save_pretrained(folder)
    (weights,) = (folder / damage).glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    monkeypatch.setenv("MINIKIN_HOME", str(tmp_path / "home"))
    before = process_state()
    failed, opened = together(lambda: Studio.open(str(folder)), lambda: Studio.open("tiny"))
    assert isinstance(failed, BadModelFile) and isinstance(opened, Studio)
    assert process_state() == before
    assert not any((tmp_path / "home").rglob("*"))
    opened.paint("a cat", steps=1)
    del failed, opened
    gc.collect()
    unets = [o for o in gc.get_objects() if type(o).__name__ == "UNet2DConditionModel"]
    assert not [u for u in unets if str(folder) in str(u.config.get("_name_or_path"))]


def test_tiny_opens_in_stock_diffusers_without_a_dtype(tiny: Base) -> None:
    """Every part in float32, and the image is that of the opened base to the bit."""
    from diffusers import StableDiffusionPipeline

    stock = StableDiffusionPipeline.from_pretrained(tiny_folder())
    stock.set_progress_bar_config(disable=True)
    assert {m.dtype for m in (stock.unet, stock.vae, stock.text_encoder)} == {torch.float32}
    how = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "np"}
    image = stock("a cat", generator=torch.Generator().manual_seed(1), **how).images
    ours = tiny.pipe("a cat", generator=torch.Generator().manual_seed(1), **how).images
    assert (image == ours).all()


def test_a_folder_in_half_precision_names_float32(tmp_path: Path) -> None:
    """As students and stages of tiny are written: stock diffusers opens all parts in one dtype."""
    from diffusers import DiffusionPipeline

    build_pipeline("sdxl", tmp_path / "configs").to(torch.float16).save_pretrained(tmp_path / "half")
    configs = [json.loads(p.read_text()) for p in (tmp_path / "half").glob("text_encoder*/config.json")]
    assert [c["dtype"] for c in configs] == ["float16", "float16"]
    name_float32(tmp_path / "half")
    stock = DiffusionPipeline.from_pretrained(tmp_path / "half")
    parts = (stock.unet, stock.vae, stock.text_encoder, stock.text_encoder_2)
    assert {m.dtype for m in parts} == {torch.float32}
