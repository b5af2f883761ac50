"""Sweeps: the planted optimum is found, nothing is painted twice, and what is found is put to use."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from minikin import Concept, Studio, events
from minikin.errors import AssetError, BadRecipe, NoNetwork, UnknownName
from minikin.evaluation.encoders import Card
from minikin.evaluation.scores import References
from minikin.evaluation.sweep import figure
from minikin.evaluation.sweep.cache import Cache
from minikin.evaluation.sweep.search import FIRST, pictures
from minikin.evaluation.sweep.sweep import Task
from minikin.images.photos import Photo
from minikin.models.base import Base
from minikin.perfusion.operating_points import Point
from minikin.recipes import WHOLE, Sweep
from tests.conftest import command
from tests.helpers.browsers import Tags, shown
from tests.helpers.sweeps import (
    BEST,
    ENDS,
    FOLLOWS,
    KNEE,
    PROMPTS,
    QUICK,
    SEARCH,
    Painter,
    Plain,
    Planted,
    run,
    task_on,
    truth,
)

pytestmark = pytest.mark.usefixtures("quick_disk")


@pytest.fixture(scope="module")
def task(bases: dict[str, Base]) -> Task:
    return task_on(bases["sd15"])


@pytest.fixture(scope="module")
def swept(task: Task, tmp_path_factory: Any) -> tuple[Path, Painter, dict[str, Point], list[events.Event]]:
    out, painter = tmp_path_factory.mktemp("sweep"), Painter()
    found, told = run(task, out, painter)
    return out, painter, found, told


# ---- the search ------------------------------------------------------------------------------------


def test_the_planted_knee_is_found(swept: Any) -> None:
    """5 strengths x 2 taus x 2 switches x 2 intervals; each point is as it was planted."""
    _, _, found, _ = swept
    assert found["balanced"].strength == KNEE
    assert (found["creative"].strength, found["faithful"].strength) == ENDS
    for point in found.values():
        assert (point.tau, point.switch, point.interval) == (BEST["tau"], BEST["switch"], WHOLE)
        x, y = truth(point.strength, point.tau, point.switch, point.interval)
        assert point.likeness == pytest.approx(x, abs=0.03) and point.follows == pytest.approx(y, abs=0.03)
        assert point.judge == "planted 00ff00ff00ff00ff"


def test_another_optimum_gives_another_answer(task: Task, tmp_path: Path, monkeypatch: Any) -> None:
    """Positive control: where every strength follows as well, the strongest is all three points."""
    monkeypatch.setattr("sweeps.FOLLOWS", dict.fromkeys(FOLLOWS, 0.7))
    found, _ = run(task, tmp_path, Painter())
    assert {p.strength for p in found.values()} == {1.6}


def test_halving_spares_pictures(swept: Any) -> None:
    """A quarter goes on; all of it is within what was said before it began."""
    out, painter, _, told = swept
    facts = json.loads((out / "quality-5.json").read_text())
    tried = facts["tried"]
    assert tried == 40 and facts["second_round"] <= tried // 4 + 1
    done = {e.stage: e for e in told if isinstance(e, events.Progress)}
    painted = sum(e.total for e in done.values())
    (note,) = [e.text for e in told if isinstance(e, events.Note)]
    most = pictures(tried, PROMPTS, 2)
    assert f"40 settings; at most {most} images of 0.0" in note
    again = facts["second_round"] * FIRST  # of round 2, seen in round 1 already
    assert painted - again <= most < tried * PROMPTS * 2
    assert painter.sets == painted - again - len(facts["measured"]) * PROMPTS  # two seeds are one set


def test_what_is_reported_was_painted_anew(swept: Any) -> None:
    """Seeds of the last round are its own."""
    facts = json.loads((swept[0] / "quality-5.json").read_text())
    assert SEARCH.seed not in facts["seeds"] and len(set(facts["seeds"])) == 2
    n = {row["likeness"]["n"] for row in facts["measured"]}
    assert n == {PROMPTS * 2}


def test_a_killed_sweep_goes_on_with_the_same_result(task: Task, swept: Any, tmp_path: Path) -> None:
    """Killed three times, once in the middle of a line; every set is painted once, all files are equal."""
    whole, painter, found, _ = swept

    def die_at(n: int) -> Callable[[int], None]:
        def after(done: int) -> None:
            if done == n:
                raise KeyboardInterrupt

        return after

    sets = 0
    for n in (1, 40, 90):
        some = Painter(after=die_at(n))
        with pytest.raises(KeyboardInterrupt):
            run(task, tmp_path, some)
        sets += some.sets - 1  # the last one was painted, but never told
        with open(tmp_path / "cache.jsonl", "ab") as f:
            f.write(b'{"key":"torn')
    rest = Painter()
    again, _ = run(task, tmp_path, rest)
    assert again == found
    assert sets + rest.sets == painter.sets
    for name in ("quality-5.json", "quality-5.png", "quality-5.html"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes(), name
    nothing = Painter()
    assert run(task, tmp_path, nothing)[0] == found and nothing.sets == 0


def test_what_is_missing_or_of_another_eye_is_painted_again(task: Task, swept: Any, tmp_path: Path) -> None:
    import shutil

    whole, painter, found, _ = swept
    shutil.copytree(whole, tmp_path / "copy")
    lost = sorted((tmp_path / "copy" / "pictures").glob("*.jpg"))[0]
    lost.unlink()
    one = Painter()
    assert run(task, tmp_path / "copy", one)[0] == found and one.sets == 1 and lost.exists()

    class Other(Planted):
        card = Card("planted", "tests", "Apache-2.0", "another")

    all_again = Painter()
    run(replace(task, judge=Other()), tmp_path / "copy", all_again)
    assert all_again.sets == painter.sets
    other_photos = Painter()
    run(replace(task, known=References(torch.tensor([[0.6, 0.8]]))), tmp_path / "copy", other_photos)
    assert other_photos.sets > 0


def test_a_budget_draws_settings(task: Task, tmp_path: Path) -> None:
    """As many as fit, the taught one among them; the same again; none is an error that says the least."""
    tiny = replace(task, recipe=SEARCH.model_copy(update={"budget_minutes": 0.5}))
    out = tmp_path / "a"
    Cache(out / "cache.jsonl").keep(_seconds_key(task), 0.1)  # 300 images
    found, told = run(tiny, out, Painter())
    facts = json.loads((out / "quality-5.json").read_text())
    assert 2 < facts["tried"] < 40 and facts["taught"]["strength"] == 1
    assert pictures(facts["tried"], PROMPTS, 2) <= 300 < pictures(facts["tried"] + 1, PROMPTS, 2)
    assert any("of 40, drawn" in e.text for e in told if isinstance(e, events.Note))
    nothing = Painter()
    assert run(tiny, out, nothing)[0] == found and nothing.sets == 0
    with pytest.raises(BadRecipe, match="minutes are too few: two settings alone take .* seconds"):
        run(replace(task, recipe=SEARCH.model_copy(update={"budget_minutes": 1e-6})), out, Painter())


def _seconds_key(task: Task) -> str:
    from minikin.evaluation.sweep.cache import key

    return f"seconds {key(task.target)}"


# ---- what is written -------------------------------------------------------------------------------


def test_the_page_needs_no_network(swept: Any) -> None:
    """Images are inside, everything refers to the page itself, tags are sound, no text is raw."""
    text = (swept[0] / "quality-5.html").read_text()
    tags = Tags()
    tags.feed(text)
    assert not tags.open
    assert all(a.startswith(("data:image/", "#")) for a in tags.addresses)
    assert sum(a.startswith("data:image/jpeg") for a in tags.addresses) >= 4 * 6  # in the table
    assert sum(a.startswith("data:image/png") for a in tags.addresses) >= 4  # in the drawing
    assert "<script" not in text and "url(http" not in text and "@import" not in text
    facts = json.loads((swept[0] / "quality-5.json").read_text())
    assert tags.cells == 11 * len(facts["measured"])
    for row in facts["measured"]:
        assert f"{row['likeness']['value']:.3f}" in text
    assert "&lt;tom&gt; in the snow" in text and not re.search(r"<tom", text)


@pytest.mark.slow
def test_a_browser_shows_the_page(swept: Any, tmp_path: Path) -> None:
    """Headless, offline: all images load, nothing is wider than the window, it is not blank."""
    found = shown(swept[0] / "quality-5.html", tmp_path / "page.png")
    assert found["broken"] == 0 and found["images"] >= 24 and found["drawn"] > 300 and found["wide"] <= 0
    assert found["colours"] > 100


def test_the_drawing_is_a_picture(swept: Any) -> None:
    image = Image.open(swept[0] / "quality-5.png").convert("RGB")
    assert image.width > 1000 and image.height > 700
    colours = {c for _, c in image.getcolors(maxcolors=10**6) or []}
    assert {(0xC2, 0x41, 0x0C), (0x15, 0x80, 0x3D), (0x7E, 0x22, 0xCE)} <= colours  # the three points


def test_without_matplotlib_nothing_is_painted(task: Task, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(figure, "find_spec", lambda _: None)
    painter = Painter()
    with pytest.raises(BadRecipe, match=r"pip install -e '\.\[judge\]'"):
        run(task, tmp_path, painter)
    assert painter.sets == 0


def test_a_judge_that_does_not_read(task: Task, tmp_path: Path) -> None:
    blind = Planted()
    blind.reads = False
    with pytest.raises(BadRecipe, match="planted sees but does not read"):
        run(replace(task, judge=blind), tmp_path, Painter())


# ---- through the Studio and the command line ----------------------------------------------------------


@pytest.fixture(scope="module")
def studio(bases: dict[str, Base]) -> Studio:
    return Studio(bases["sd15"])


@pytest.fixture
def file_of_tom(studio: Studio, tmp_path: Path, photos: list[Photo], monkeypatch: Any) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    taught = studio.teach(photos, name="tom", category="cat", mode="row", steps=3, batch=2, preview=False)
    taught.save("tom.safetensors")
    studio.concepts.loaded.pop("tom")
    yield tmp_path / "tom.safetensors"
    studio.concepts.loaded.pop("tom", None)


def test_points_land_in_the_file_and_are_painted_with(
    studio: Studio, file_of_tom: Path, photo_folder: Path, tmp_path: Path
) -> None:  # fmt: skip
    """From the command's recipe to `<tom>` in a prompt, in this process and in the next."""
    recipe = Sweep.make(concept="tom", base="sd15", photos=str(photo_folder), **QUICK)
    (*told, done) = studio.sweeping(recipe, tmp_path / "out", judge=Plain())
    assert done.facts["stored"] == "tom.safetensors" or Path(done.facts["stored"]).samefile(file_of_tom)
    assert any(isinstance(e, events.Progress) for e in told)
    stored = Concept.load(file_of_tom).points
    assert stored.keys() == {"quality-2"} and set(stored["quality-2"]) == {"faithful", "balanced", "creative"}
    balanced = stored["quality-2"]["balanced"]
    assert balanced.strength == done.result["balanced"].strength
    prompt = f"<tom:{balanced.strength:g}>"
    want = studio.paint(prompt, steps=2, guidance=balanced.guidance, switch=balanced.switch)
    assert studio.paint("<tom>", steps=2) == want
    again = Studio(studio.base)
    again.add(str(file_of_tom))
    assert again.paint("<tom>", steps=2) == want
    kept = [p.stat().st_mtime_ns for p in sorted((tmp_path / "out" / "pictures").iterdir())]
    list(studio.sweeping(recipe, tmp_path / "out", judge=Plain()))  # now with points: they change nothing
    assert kept == [p.stat().st_mtime_ns for p in sorted((tmp_path / "out" / "pictures").iterdir())]


def test_a_concept_in_use_needs_no_file(
    studio: Studio, file_of_tom: Path, photo_folder: Path, tmp_path: Path
) -> None:  # fmt: skip
    studio.add(Concept.load(file_of_tom))
    before = file_of_tom.read_bytes()
    recipe = Sweep.make(concept="tom", base="sd15", photos=str(photo_folder), **QUICK)
    (*_, done) = studio.sweeping(recipe, tmp_path / "out", judge=Plain())
    assert done.facts["stored"] is None and file_of_tom.read_bytes() == before
    assert studio.concepts.loaded["tom"].concept.points["quality-2"] == done.result


def test_what_is_wrong_is_said_before_anything_is_painted(
    studio: Studio, file_of_tom: Path, photo_folder: Path, tmp_path: Path
) -> None:  # fmt: skip
    def asked(**values: Any) -> None:
        made = Sweep.make(**{"concept": "tom", "photos": str(photo_folder), **values})
        list(studio.sweeping(made, tmp_path / "out"))

    with pytest.raises(UnknownName, match="Unknown concept 'tim'. Did you mean 'tom'"):
        asked(concept="tim")
    with pytest.raises(BadRecipe, match="no photos of 'tom' to compare with.*--photos FOLDER"):
        list(studio.sweeping(Sweep(concept="tom"), tmp_path / "out"))
    with pytest.raises(NoNetwork, match="clip-b32 .* is not on this machine"):
        asked(judge="clip-b32")
    with pytest.raises(UnknownName, match="Unknown judge"):
        asked(judge="eagle")
    assert not (tmp_path / "out").exists()


def test_a_missing_judge(
    studio: Studio, file_of_tom: Path, photo_folder: Path, tmp_path: Path, monkeypatch: Any
) -> None:  # fmt: skip
    from minikin.tiny.encoders import weights

    monkeypatch.setattr(weights, "embedded", lambda kind: tmp_path / f"no-{kind}.safetensors")
    with pytest.raises(AssetError, match="weights of the judge are missing"):
        list(studio.sweeping(Sweep(concept="tom", photos=str(photo_folder)), tmp_path / "out"))


def test_tiny_s_judge_knows_tiny_s_world_alone(
    studio: Studio, file_of_tom: Path, photo_folder: Path, tmp_path: Path, monkeypatch: Any
) -> None:  # fmt: skip
    studio.add(Concept.load(file_of_tom))
    monkeypatch.setattr(Base, "architecture", "sd1")
    with pytest.raises(BadRecipe, match="judge tiny knows tiny's own world alone.*--judge clip-b32"):
        list(studio.sweeping(Sweep(concept="tom", photos=str(photo_folder)), tmp_path / "out"))


def test_the_command(
    file_of_tom: Path, photo_folder: Path, studio: Studio, monkeypatch: Any, capsys: Any
) -> None:  # fmt: skip
    """Names and files by default, one JSON object a line, the lock gone, errors with their exit codes."""
    from minikin.cli import sweep

    monkeypatch.setattr(sweep.Studio, "open", lambda *_, **__: studio)
    monkeypatch.setattr("minikin.evaluation.sweep.task.open_judge", lambda *_: Plain())

    def cli(*args: object) -> tuple[int, str, str]:
        return command(monkeypatch, capsys, *args)

    quick = [x for k, v in QUICK.items() for x in (f"--{k}", v)]
    code, out, err = cli("sweep", "tom", "--photos", photo_folder, *quick)
    assert code == 0, err
    assert "3 settings; at most" in err
    assert "balanced" in out and "<tom> means balanced with preset quality-2" in out.replace("\n", " ")
    assert sorted(p.name for p in Path("tom-sweep").iterdir()) == [
        "cache.jsonl", "pictures", "quality-2.html", "quality-2.json", "quality-2.png",
    ]  # fmt: skip
    studio.concepts.loaded.pop("tom")
    code, out, _ = cli("sweep", "tom", "--photos", photo_folder, "--json", *quick)
    done = [json.loads(line) for line in out.splitlines()][-1]
    assert done["event"] == "done" and done["points"]["balanced"]["judge"].startswith("planted ")
    studio.concepts.loaded.pop("tom")
    assert cli("sweep", "nobody", *quick)[0] == 2
    code, _, err = cli("sweep", "tom", *quick)
    assert code == 2 and "--photos FOLDER" in err
    code, _, err = cli("sweep", "tom", "--strengths", "0.6,much")
    assert code == 2 and "strengths.1: must be a valid number" in err
