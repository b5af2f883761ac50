"""Fixtures: miniatures of every architecture, the embedded base, private folders."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

import numpy as np
import pytest
import torch
from PIL import Image

from minikin.bases.base import Base
from minikin.bases.opening.architectures import ARCHITECTURES, shrunk, write_configs
from minikin.teaching.photos import Photo

torch.set_num_threads(min(2, len(os.sched_getaffinity(0))))
FAMILIES = tuple(ARCHITECTURES)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What takes hours runs when it is asked for by its mark, never by accident."""
    if "soak" not in (config.option.markexpr or ""):
        items[:] = [item for item in items if not item.get_closest_marker("soak")]


@pytest.fixture(autouse=True)
def _own_folders(tmp_path_factory: Any, monkeypatch: Any) -> None:
    """Every test has its own data folder; the cache is shared within a run (C of tiny is in it)."""
    monkeypatch.setenv("MINIKIN_HOME", str(tmp_path_factory.mktemp("home")))
    shared = tmp_path_factory.getbasetemp() / "cache"
    monkeypatch.setenv("MINIKIN_CACHE", str(shared))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For what must be repeated bit for bit: with more, PyTorch's gradient of a convolution over a 1x1 map,
    the lowest level of the miniatures, was another one in 173 of 200 repetitions; larger maps' never was."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def quick_disk() -> Iterator[None]:
    """For what does not ask whether data survives a power cut."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda _: None)
        yield


def filling(writes: int) -> Callable[[int], None]:
    """An os.fsync of a disk that is full after so many writes."""
    real, left = os.fsync, iter(range(writes))

    def fsync(handle: int) -> None:
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    return fsync


def command(monkeypatch: Any, capsys: Any, *args: object) -> tuple[int, str, str]:
    """Run `minikin args`; exit code, standard output, standard error."""
    from minikin.cli.app import main

    monkeypatch.setattr("sys.argv", ["minikin", *map(str, args)])
    code = 0
    try:
        main()
    except SystemExit as e:
        code = int(e.code or 0)
    told = capsys.readouterr()
    return code, told.out, told.err


def build_pipeline(name: str, folder: Path, seed: int = 0) -> Any:
    """A miniature pipeline with random weights, as a diffusers folder and opened."""
    import diffusers
    import transformers

    configs = write_configs(shrunk(ARCHITECTURES[name]), folder)
    torch.manual_seed(seed)
    unet = diffusers.UNet2DConditionModel.from_config(
        diffusers.UNet2DConditionModel.load_config(configs / "unet")
    )
    for p in unet.parameters():  # away from symmetric starts, so that every path matters
        if p.ndim == 1:
            p.data.add_(0.1 * torch.randn_like(p))
    parts: dict[str, Any] = {"unet": unet}
    parts["vae"] = diffusers.AutoencoderKL.from_config(diffusers.AutoencoderKL.load_config(configs / "vae"))
    config = diffusers.DDIMScheduler.load_config(configs / "scheduler")
    parts["scheduler"] = getattr(diffusers, config["_class_name"]).from_config(config)
    for k, tail in enumerate(["", "_2"][: len(ARCHITECTURES[name].texts)]):
        config = transformers.CLIPTextConfig.from_pretrained(configs / f"text_encoder{tail}")
        cls = transformers.CLIPTextModelWithProjection if k else transformers.CLIPTextModel
        parts[f"text_encoder{tail}"] = cls(config)
        parts[f"tokenizer{tail}"] = transformers.CLIPTokenizer.from_pretrained(configs / f"tokenizer{tail}")
    cls = getattr(diffusers, ARCHITECTURES[name].pipeline)
    if name != "sdxl":
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    for part in parts.values():
        if isinstance(part, torch.nn.Module):
            part.eval()  # as from_pretrained leaves it
    pipe = cls(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def pipelines(tmp_path_factory: Any) -> dict[str, Any]:
    """One miniature pipeline of every architecture, without Minikin on it."""
    return {n: build_pipeline(n, tmp_path_factory.mktemp(f"mini-{n}")) for n in FAMILIES}


@pytest.fixture(scope="session")
def bases(tmp_path_factory: Any) -> dict[str, Base]:
    """The same miniatures as bases (same weights: same seeds)."""
    return {n: Base(build_pipeline(n, tmp_path_factory.mktemp(f"base-{n}")), n) for n in FAMILIES}


@pytest.fixture(scope="session")
def tiny() -> Base:
    """The embedded base."""
    from minikin.bases.opening.registry import open_base

    return open_base("tiny", device="cpu")


@pytest.fixture
def photos() -> list[Photo]:
    """Three small pictures with a coloured square as the subject, and its mask."""
    rng = np.random.default_rng(0)
    made = []
    for k in range(3):
        pixels = rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)
        mask = np.zeros((64, 64), np.float32)
        mask[16:48, 16:48] = 1
        pixels[16:48, 16:48] = (220, 60, 90)
        made.append(Photo(f"{k}.png", pixels, mask))
    return made


@pytest.fixture
def photo_folder(tmp_path: Path, photos: list[Photo]) -> Path:
    """The photos as files with masks beside them."""
    folder = tmp_path / "photos"
    (folder / "masks").mkdir(parents=True)
    for p in photos:
        Image.fromarray(p.pixels).save(folder / p.name)
        assert p.mask is not None
        Image.fromarray((p.mask * 255).astype(np.uint8)).save(folder / "masks" / p.name)
    return folder
