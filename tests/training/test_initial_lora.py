"""Initial LoRA: exact start, room for a larger rank, merging into a full student, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from minikin.distillation import initial_lora
from minikin.distillation.solver import Schedule
from minikin.distillation.student import Encoder, Kind, Network, copied, teacher
from minikin.errors import BaseMismatch, MinikinError
from minikin.models.base import Base
from minikin.models.lora import adapters
from minikin.recipes import Distill
from tests.helpers.distillings import captions_file, run

pytestmark = pytest.mark.usefixtures("no_curves", "one_thread")


@pytest.fixture(scope="module")
def lora(bases: dict[str, Base], tmp_path_factory: Any) -> Path:
    """A LoRA of rank 2, trained for three steps."""
    folder = tmp_path_factory.mktemp("start")
    how = {"method": "lcm-lora", "rank": 2, "alpha": 3, "lr": 0.05, "half": False}
    return run(bases["sd15"], folder / "out", captions_file(folder), **how)[-1].result


def answer(base: Base, network: Network) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    side = base.denoiser.config.sample_size
    x = torch.randn((2, base.denoiser.config.in_channels, side, side), generator=g)
    with torch.no_grad():
        return network(x, torch.tensor([999, 400]), Encoder(base)(["a cat", "a red chair"])).x0


@pytest.mark.parametrize(("kind", "rank", "alpha"), [("lora", 2, None), ("lora", 4, 1.0), ("full", 4, None)])
def test_student_starts_equal_to_base_and_lora(
    bases: dict[str, Base], lora: Path, kind: Kind, rank: int, alpha: float | None
) -> None:
    base = bases["sd15"]
    schedule = Schedule.of(base)
    student = copied(base, schedule, kind, rank=rank, alpha=alpha)
    plain = answer(base, student)
    initial_lora.apply(student, base, lora)
    loras = adapters.Adapters(base)
    with loras.using([(loras.get(lora), 1.0)]):
        expected = answer(base, teacher(base, schedule))
    assert (plain - expected).abs().max() > 1e-2  # the LoRA changes something
    assert torch.allclose(answer(base, student), expected, atol=2e-4)


def test_initial_lora_is_in_the_header(bases: dict[str, Base], lora: Path, tmp_path: Path) -> None:
    recipe: dict[str, Any] = {"method": "turbo", "student": "lora", "rank": 2, "start": str(lora)}
    path = run(bases["sd15"], tmp_path / "out", captions_file(tmp_path), **recipe)[-1].result
    with safe_open(path, "pt") as f:
        header = f.metadata()
    assert header["minikin.start"] == lora.stem
    assert str(lora.parent) not in str(header)  # no path of this machine


@pytest.mark.parametrize(
    ("ref", "rank", "message"),
    [
        ("lora", 1, "has rank 2, the student 1. Use --rank 2 or more"),
        ("nobody.safetensors", 2, "neither a file nor a preset with an adapter"),
        ("hyper", 2, "Preset 'hyper' has no adapter for"),
    ],
)
def test_loras_that_do_not_fit_are_refused(
    bases: dict[str, Base], lora: Path, tmp_path: Path, ref: str, rank: int, message: str
) -> None:
    recipe: dict[str, Any] = {"method": "lcm-lora", "rank": rank, "start": str(lora) if ref == "lora" else ref}
    with pytest.raises(MinikinError, match=message):
        run(bases["sd15"], tmp_path / "out", captions_file(tmp_path), **recipe)


def test_lora_of_another_architecture_is_refused(bases: dict[str, Base], lora: Path) -> None:
    other = bases["sdxl"]
    with pytest.raises(BaseMismatch):
        initial_lora.apply(copied(other, Schedule.of(other), "lora", rank=4), other, lora)


def test_tiny_adapters_by_preset_name(tiny: Base) -> None:
    assert initial_lora.find(tiny, "lcm-lora").name == "lcm-lora.safetensors"
    assert Distill.make(method="turbo", data="x", start="lcm-lora").start == "lcm-lora"
