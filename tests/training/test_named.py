"""Concepts that captions of a distillation name: given to teacher and student as painting gives them."""

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
from tests.generation.test_together import made
from tests.helpers.distillings import CAPTIONS, captions_file, picture_folder, run
from tests.training.test_distilling import equal, result

pytestmark = pytest.mark.usefixtures("no_curves", "one_thread")
LINES = ["a <tom> on the beach", "a dog in the snow", "a <rex:0.6> beside <tom>", "a red car"]


@pytest.fixture
def folder(bases: dict[str, Base], tmp_path: Path) -> Path:
    return filled(bases["sd15"], tmp_path / "concepts")


def filled(base: Base, out: Path) -> Path:
    """A row and a gated concept of a miniature, as files."""
    out.mkdir()
    for seed, (name, mode) in enumerate((("tom", "row"), ("rex", "gated"))):
        made(base, name, seed, mode).save(out / f"{name}.safetensors")
    return out


def concepts(base: Base, folder: Path, lines: list[str]) -> Any:
    return concept_captions.find(base, str(folder), find(str(captions_file(folder.parent, lines))))


def packed(network: Network, texts: Any, monkeypatch: Any) -> torch.Tensor:
    """What this network gives its own U-Net."""
    seen = []
    pack = attention.pack

    def kept(*args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(pack(*args, **kwargs))
        return seen[-1]

    with monkeypatch.context() as m, torch.no_grad():
        m.setattr(attention, "pack", kept)
        x = torch.zeros(len(texts.e), 4, 8, 8)
        network(x, torch.full((len(x),), 499), texts)
    (one,) = seen
    return one


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
@pytest.mark.parametrize("half", [False, True], ids=["float32", "autocast"])
def test_the_teacher_is_given_what_painting_gives(
    bases: dict[str, Base], tmp_path: Path, monkeypatch: Any, name: str, half: bool
) -> None:
    """Keys, values and SDXL's pooled embedding equal `condition`'s; plain captions are what they were."""
    base = bases[name]
    found = concepts(base, filled(base, tmp_path / "concepts"), LINES)
    texts, plain = Encoder(base, found)(LINES), Encoder(base)(LINES)
    own = teacher(base, Schedule.of(base), autocast=half)
    kv = packed(own, texts, monkeypatch)
    assert kv.dtype == packed(own, plain, monkeypatch).dtype == (torch.bfloat16 if half else torch.float32)
    painted = condition(base, [parse(c, found.categories) for c in LINES], found.loaded)
    for k in range(len(LINES)):
        assert torch.allclose(kv[k].float(), painted[k].kv[0], atol=0.1 if half else 1e-5), LINES[k]
        pooled = painted[k].pooled
        assert pooled is None or torch.allclose(texts.pooled[k], pooled[0], atol=1e-5)  # type: ignore[index]
    assert torch.equal(texts.e[[1, 3]], plain.e[[1, 3]]) and not texts.additions[0].opening[[1, 3]].any()
    assert not torch.allclose(kv[0].float(), packed(own, plain, monkeypatch)[0].float(), atol=0.2)
    which = torch.tensor([2, 0])
    assert torch.allclose(packed(own, texts.rows(which), monkeypatch).float(), kv[which].float(), atol=1e-2)


def test_a_student_adds_the_same_to_its_own(bases: dict[str, Base], folder: Path, monkeypatch: Any) -> None:
    """Whatever it has learnt of to_v: the difference between with and without is the teacher's."""
    base = bases["sd15"]
    found = concepts(base, folder, LINES)
    texts = Encoder(base, found)(LINES)
    student = copied(base, Schedule.of(base), "lora", rank=4)
    with torch.no_grad():
        for name, p in student.named_parameters():
            if "lora_B" in name:
                p.add_(0.1)
    without = texts._replace(additions=())
    mine = packed(student, texts, monkeypatch) - packed(student, without, monkeypatch)
    own = teacher(base, Schedule.of(base))
    theirs = packed(own, texts, monkeypatch) - packed(own, without, monkeypatch)
    assert torch.allclose(mine, theirs, atol=1e-5) and theirs.abs().max() > 1e-2


@pytest.mark.parametrize("method", ["lcm-lora", "tdm", "turbo"])
def test_from_end_to_end(bases: dict[str, Base], folder: Path, method: str) -> None:
    """The teacher paints the concepts, the student learns; other concepts are another run."""
    base, out = bases["sd15"], folder.parent / "out"
    data = captions_file(folder.parent, LINES)
    done = run(base, out, data, method=method, concepts=str(folder))[-1]
    assert isinstance(done, events.Done) and done.facts["steps"] == 4
    plain = run(base, folder.parent / "plain", captions_file(folder.parent, [
        c.replace("<tom>", "cat").replace("<rex:0.6>", "cat") for c in LINES
    ]), method=method)[-1]  # fmt: skip
    assert isinstance(plain, events.Done) and not equal(result(out), result(folder.parent / "plain"))
    captions_file(folder.parent, LINES)
    moved = folder.rename(folder.parent / "elsewhere")
    again = run(base, out, data, method=method, concepts=str(moved), resume=True, steps=6)[-1]
    assert isinstance(again, events.Done) and again.facts["steps"] == 6, "the same concepts in another place"
    folder = moved
    made(base, "tom", 7, "row").save(folder / "tom.safetensors")
    with pytest.raises(BadRecipe, match="concepts"):
        run(base, out, data, method=method, concepts=str(folder), resume=True, steps=8)


def test_pictures_whose_captions_name_concepts(bases: dict[str, Base], folder: Path) -> None:
    pictures = picture_folder(folder.parent / "p")
    (pictures / "0.txt").write_text("a <tom> on the beach")
    done = run(bases["sd15"], folder.parent / "out", pictures, method="lcm-lora", concepts=str(folder))[-1]
    assert isinstance(done, events.Done)


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
