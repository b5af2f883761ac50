"""Concept captions: teacher and student get the conditioning that generation computes for the same prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from minikin import events
from minikin.distillation import concept_captions
from minikin.distillation.solver import Schedule
from minikin.distillation.sources import find
from minikin.distillation.student import Encoder, Network, copied, teacher
from minikin.errors import BadRecipe, BaseMismatch, UnknownName
from minikin.models import attention
from minikin.models.base import Base
from minikin.models.prompt import Prompt, parse
from minikin.perfusion.conditioning import condition
from tests.helpers.concepts import random_concept
from tests.helpers.distillings import CAPTIONS, captions_file, image_folder, run
from tests.training.test_distilling import equal, result

pytestmark = pytest.mark.usefixtures("no_curves", "one_thread")
LINES = ["a <tom> on the beach", "a dog in the snow", "a <rex:0.6> beside <tom>", "a red car"]


@pytest.fixture
def folder(bases: dict[str, Base], tmp_path: Path) -> Path:
    return filled(bases["sd15"], tmp_path / "concepts")


def filled(base: Base, out: Path) -> Path:
    """A row and a gated concept of a miniature, as files."""
    out.mkdir()
    for seed, (name, mode) in enumerate((("tom", "value"), ("rex", "gated"))):
        random_concept(base, name, seed, mode).save(out / f"{name}.safetensors")
    return out


def concepts(base: Base, folder: Path, lines: list[str]) -> Any:
    return concept_captions.find(base, str(folder), find(str(captions_file(folder.parent, lines))))


def packed(network: Network, texts: Any, monkeypatch: Any) -> torch.Tensor:
    """Packed keys and values that this network passes to its U-Net."""
    packed_keys = []
    pack = attention.pack

    def record(*args: Any, **kwargs: Any) -> torch.Tensor:
        packed_keys.append(pack(*args, **kwargs))
        return packed_keys[-1]

    with monkeypatch.context() as m, torch.no_grad():
        m.setattr(attention, "pack", record)
        x = torch.zeros(len(texts.e), 4, 8, 8)
        network(x, torch.full((len(x),), 499), texts)
    (only,) = packed_keys
    return only


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
@pytest.mark.parametrize("half", [False, True], ids=["float32", "autocast"])
def test_teacher_gets_the_same_conditioning_as_generation(
    bases: dict[str, Base], tmp_path: Path, monkeypatch: Any, name: str, half: bool
) -> None:
    """Keys, values and SDXL's pooled embedding equal `condition`'s; plain captions are unchanged."""
    base = bases[name]
    loaded = concepts(base, filled(base, tmp_path / "concepts"), LINES)
    texts, plain = Encoder(base, loaded)(LINES), Encoder(base)(LINES)
    teacher_network = teacher(base, Schedule.of(base), autocast=half)
    kv = packed(teacher_network, texts, monkeypatch)
    assert (
        kv.dtype
        == packed(teacher_network, plain, monkeypatch).dtype
        == (torch.bfloat16 if half else torch.float32)
    )
    conditioning = condition(base, [parse(c, loaded.categories) for c in LINES], loaded.loaded)
    for k in range(len(LINES)):
        assert torch.allclose(kv[k].float(), conditioning[k].kv[0], atol=0.1 if half else 1e-5), LINES[k]
        pooled = conditioning[k].pooled
        assert pooled is None or torch.allclose(texts.pooled[k], pooled[0], atol=1e-5)  # type: ignore[index]
    assert torch.equal(texts.e[[1, 3]], plain.e[[1, 3]]) and not texts.additions[0].gate[[1, 3]].any()
    assert not torch.allclose(kv[0].float(), packed(teacher_network, plain, monkeypatch)[0].float(), atol=0.2)
    which = torch.tensor([2, 0])
    assert torch.allclose(
        packed(teacher_network, texts.rows(which), monkeypatch).float(), kv[which].float(), atol=1e-2
    )


def test_student_adds_concept_values_to_its_projections(
    bases: dict[str, Base], folder: Path, monkeypatch: Any
) -> None:
    """With a trained to_v the difference that concepts make is still that of the teacher."""
    base = bases["sd15"]
    loaded = concepts(base, folder, LINES)
    texts = Encoder(base, loaded)(LINES)
    student = copied(base, Schedule.of(base), "lora", rank=4)
    with torch.no_grad():
        for name, p in student.named_parameters():
            if "lora_B" in name:
                p.add_(0.1)
    without = texts._replace(additions=())
    mine = packed(student, texts, monkeypatch) - packed(student, without, monkeypatch)
    teacher_network = teacher(base, Schedule.of(base))
    theirs = packed(teacher_network, texts, monkeypatch) - packed(teacher_network, without, monkeypatch)
    assert torch.allclose(mine, theirs, atol=1e-5) and theirs.abs().max() > 1e-2


@pytest.mark.parametrize("method", ["lcm-lora", "tdm", pytest.param("turbo", marks=pytest.mark.soak)])
def test_end_to_end(bases: dict[str, Base], folder: Path, method: str) -> None:
    """Images of the concepts by the teacher train the student; other concepts are another run.

    Turbo's data are LCM-LoRA's, images of the teacher; TDM's are the captions alone."""
    base, out = bases["sd15"], folder.parent / "out"
    data = captions_file(folder.parent, LINES)
    done = run(base, out, data, method=method, concepts=str(folder), steps=2)[-1]
    assert isinstance(done, events.Done) and done.facts["steps"] == 2
    plain = run(
        base,
        folder.parent / "plain",
        captions_file(folder.parent, [c.replace("<tom>", "cat").replace("<rex:0.6>", "cat") for c in LINES]),
        method=method,
        steps=2,
    )[-1]
    assert isinstance(plain, events.Done) and not equal(result(out), result(folder.parent / "plain"))
    captions_file(folder.parent, LINES)
    moved = folder.rename(folder.parent / "elsewhere")
    again = run(base, out, data, method=method, concepts=str(moved), resume=True, steps=3)[-1]
    assert isinstance(again, events.Done) and again.facts["steps"] == 3, "the same concepts in another place"
    folder = moved
    random_concept(base, "tom", 7, "value").save(folder / "tom.safetensors")
    with pytest.raises(BadRecipe, match="concepts"):
        run(base, out, data, method=method, concepts=str(folder), resume=True, steps=4)


def test_images_whose_captions_name_concepts(bases: dict[str, Base], folder: Path) -> None:
    images = image_folder(folder.parent / "p")
    (images / "0.txt").write_text("a <tom> on the beach")
    options = {"method": "lcm-lora", "concepts": str(folder), "steps": 1}
    assert isinstance(run(bases["sd15"], folder.parent / "out", images, **options)[-1], events.Done)


def test_without_it_captions_have_no_syntax(bases: dict[str, Base]) -> None:
    """Angle brackets of strangers' captions are characters."""
    base, line = bases["sd15"], "a <tom> (on) the beach"
    texts = Encoder(base)([line])
    assert texts.additions == () and torch.equal(texts.e, base.encode([Prompt(line, line)]).e)


def test_what_is_wrong_is_said(bases: dict[str, Base], folder: Path, tmp_path: Path) -> None:
    base = bases["sd15"]
    for place, lines, wrong, words in (
        (tmp_path / "nothing", LINES, BadRecipe, "no folder of concept files"),
        (folder, CAPTIONS, BadRecipe, "No caption names"),
        (folder, ["a <tim> here"], UnknownName, "Did you mean.*tom"),
        (folder, ["a <tom> here", "a <tom:9> there"], BadRecipe, "'a <tom:9> there' cannot be used"),
        (folder, ["a <tom@left>"], BadRecipe, "a region"),
        (folder, ["a <tom> <lora:x:1>"], BadRecipe, "a LoRA"),
        (folder, ["word " * 200 + "<tom>"], BadRecipe, "lies beyond"),
    ):
        with pytest.raises(wrong, match=words):
            concept_captions.find(base, str(place), find(str(captions_file(tmp_path, lines))))
    with pytest.raises(BaseMismatch, match="teach it again"):
        concepts(bases["sdxl"], folder, LINES)
    assert concept_captions.find(base, None, find(str(captions_file(tmp_path, LINES)))) is None
