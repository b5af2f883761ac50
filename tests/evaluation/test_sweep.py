"""Sweeps: the planted optimum is found, no cell is generated twice, operating points are stored and used."""

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
from minikin.evaluation import experiment
from minikin.evaluation.cache import Cache
from minikin.evaluation.encoders import EncoderCard
from minikin.evaluation.scores import References
from minikin.evaluation.sweep.search import FIRST, max_images
from minikin.evaluation.sweep.sweep import SweepTask
from minikin.images.photos import Photo
from minikin.models.base import Base
from minikin.perfusion.operating_points import Point
from minikin.recipes import WHOLE, Sweep
from tests.conftest import command
from tests.helpers.browsers import Tags, render
from tests.helpers.sweeps import (
    BEST,
    ENDS,
    KNEE,
    PROMPT_FIDELITY,
    PROMPTS,
    QUICK,
    SEARCH,
    ColourEncoder,
    Painter,
    PlantedEncoder,
    planted,
    run,
    task_on,
)

pytestmark = pytest.mark.usefixtures("quick_disk")


@pytest.fixture(scope="module")
def task(bases: dict[str, Base]) -> SweepTask:
    return task_on(bases["sd15"])


@pytest.fixture(scope="module")
def swept(task: SweepTask, tmp_path_factory: Any) -> tuple[Path, Painter, dict[str, Point], list[events.Event]]:
    out, painter = tmp_path_factory.mktemp("sweep"), Painter()
    points, all_events = run(task, out, painter)
    return out, painter, points, all_events


# ---- the search ------------------------------------------------------------------------------------


def test_the_planted_knee_is_found(swept: Any) -> None:
    """5 strengths x 2 taus x 2 concept starts x 2 intervals; each point is as it was planted."""
    _, _, points, _ = swept
    assert points["balanced"].strength == KNEE
    assert (points["creative"].strength, points["faithful"].strength) == ENDS
    for point in points.values():
        assert (point.tau, point.concept_start, point.interval) == (BEST["tau"], BEST["concept_start"], WHOLE)
        x, y = planted(point.strength, point.tau, point.concept_start, point.interval)
        assert point.subject_fidelity == pytest.approx(x, abs=0.03)
        assert point.prompt_fidelity == pytest.approx(y, abs=0.03)
        assert point.encoder == "planted 00ff00ff00ff00ff"


def test_another_optimum_gives_another_answer(task: SweepTask, tmp_path: Path, monkeypatch: Any) -> None:
    """Positive control: where all strengths have equal prompt fidelity, the strongest is all three points."""
    monkeypatch.setattr("tests.helpers.sweeps.PROMPT_FIDELITY", dict.fromkeys(PROMPT_FIDELITY, 0.7))
    points, _ = run(task, tmp_path, Painter())
    assert {p.strength for p in points.values()} == {1.6}


def test_halving_saves_images(swept: Any) -> None:
    """A quarter goes on; the number of images is within the cost that was announced."""
    out, painter, _, all_events = swept
    facts = json.loads((out / "quality-5.json").read_text())
    tried = facts["tried"]
    assert tried == 40 and facts["second_round"] <= tried // 4 + 1
    done = {e.stage: e for e in all_events if isinstance(e, events.Progress)}
    images = sum(e.total for e in done.values())
    (note,) = [e.text for e in all_events if isinstance(e, events.Note)]
    most = max_images(tried, PROMPTS, 2)
    assert f"40 settings; at most {most} images of 0.0" in note
    cached = facts["second_round"] * FIRST  # of round 2, generated in round 1 already
    assert images - cached <= most < tried * PROMPTS * 2
    assert painter.sets == images - cached - len(facts["measured"]) * PROMPTS  # two seeds are one set


def test_reported_scores_are_of_fresh_images(swept: Any) -> None:
    """The last round has seeds of its own."""
    facts = json.loads((swept[0] / "quality-5.json").read_text())
    assert SEARCH.seed not in facts["seeds"] and len(set(facts["seeds"])) == 2
    n = {row["subject_fidelity"]["n"] for row in facts["measured"]}
    assert n == {PROMPTS * 2}


def test_killed_sweep_resumes_with_the_same_result(task: SweepTask, swept: Any, tmp_path: Path) -> None:
    """Killed three times, with torn lines; every cell is generated once, all files are equal."""
    whole, painter, points, _ = swept

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
        sets += some.sets - 1  # the last one was generated, but never recorded
        with open(tmp_path / "cache.jsonl", "ab") as f:
            f.write(b'{"cell":"torn')
    rest = Painter()
    resumed, _ = run(task, tmp_path, rest)
    assert resumed == points
    assert sets + rest.sets == painter.sets
    for name in ("quality-5.json", "quality-5.png", "quality-5.html"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes(), name
    nothing = Painter()
    assert run(task, tmp_path, nothing)[0] == points and nothing.sets == 0


def test_missing_images_and_other_encoders_are_redone(task: SweepTask, swept: Any, tmp_path: Path) -> None:
    import shutil

    whole, painter, points, _ = swept
    shutil.copytree(whole, tmp_path / "copy")
    lost = sorted((tmp_path / "copy" / "images").glob("*.jpg"))[0]
    lost.unlink()
    once = Painter()
    assert run(task, tmp_path / "copy", once)[0] == points and once.sets == 1 and lost.exists()

    class Other(PlantedEncoder):
        card = EncoderCard("planted", "tests", "Apache-2.0", "another")

    all_again = Painter()
    run(replace(task, encoder=Other()), tmp_path / "copy", all_again)
    assert all_again.sets == painter.sets
    other_photos = Painter()
    run(replace(task, references=References(torch.tensor([[0.6, 0.8]]))), tmp_path / "copy", other_photos)
    assert other_photos.sets > 0


def test_budget_samples_the_grid(task: SweepTask, tmp_path: Path) -> None:
    """As many as fit, the default one among them; the same again; too small a budget is an error."""
    limited = replace(task, recipe=SEARCH.model_copy(update={"budget_minutes": 0.5}))
    out = tmp_path / "a"
    Cache(out / "cache.jsonl").put_number(_seconds_key(task), 0.1)  # 300 images
    points, all_events = run(limited, out, Painter())
    facts = json.loads((out / "quality-5.json").read_text())
    assert 2 < facts["tried"] < 40 and facts["as_taught"]["strength"] == 1
    assert max_images(facts["tried"], PROMPTS, 2) <= 300 < max_images(facts["tried"] + 1, PROMPTS, 2)
    assert any("of 40, drawn" in e.text for e in all_events if isinstance(e, events.Note))
    nothing = Painter()
    assert run(limited, out, nothing)[0] == points and nothing.sets == 0
    with pytest.raises(BadRecipe, match="minutes are too few: two settings alone take .* seconds"):
        run(replace(task, recipe=SEARCH.model_copy(update={"budget_minutes": 1e-6})), out, Painter())


def _seconds_key(task: SweepTask) -> str:
    from minikin.evaluation.cache import key

    return f"seconds {key(task.dependencies)}"


# ---- files -------------------------------------------------------------------------------


def test_page_needs_no_network(swept: Any) -> None:
    """Images are inside, every address is in the page, tags are balanced, text is escaped."""
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
        assert f"{row['subject_fidelity']['value']:.3f}" in text
    assert "&lt;tom&gt; in the snow" in text and not re.search(r"<tom", text)


@pytest.mark.slow
def test_page_in_a_browser(swept: Any, tmp_path: Path) -> None:
    """Headless, offline: all images load, nothing is wider than the window, it is not blank."""
    page = render(swept[0] / "quality-5.html", tmp_path / "page.png")
    assert page["broken"] == 0 and page["images"] >= 24 and page["drawn"] > 300 and page["wide"] <= 0
    assert page["colours"] > 100


def test_drawing_has_the_three_points(swept: Any) -> None:
    image = Image.open(swept[0] / "quality-5.png").convert("RGB")
    assert image.width > 1000 and image.height > 700
    colours = {c for _, c in image.getcolors(maxcolors=10**6) or []}
    assert {(0xC2, 0x41, 0x0C), (0x15, 0x80, 0x3D), (0x7E, 0x22, 0xCE)} <= colours  # the three points


def test_without_matplotlib_nothing_is_generated(task: SweepTask, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(experiment, "find_spec", lambda _: None)
    painter = Painter()
    with pytest.raises(BadRecipe, match=r"pip install .*\[evaluation\]'"):
        run(task, tmp_path, painter)
    assert painter.sets == 0


def test_encoder_without_text_encoder_is_refused(task: SweepTask, tmp_path: Path) -> None:
    images_only = PlantedEncoder()
    images_only.has_text_encoder = False
    with pytest.raises(BadRecipe, match="planted has no text encoder"):
        run(replace(task, encoder=images_only), tmp_path, Painter())


# ---- through the Studio and the command line ----------------------------------------------------------


@pytest.fixture(scope="module")
def studio(bases: dict[str, Base]) -> Studio:
    return Studio(bases["sd15"])


@pytest.fixture
def file_of_tom(studio: Studio, tmp_path: Path, photos: list[Photo], monkeypatch: Any) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    concept = studio.teach(photos, name="tom", category="cat", mode="value", steps=3, batch=2, preview=False)
    concept.save("tom.safetensors")
    studio.concepts.loaded.pop("tom")
    yield tmp_path / "tom.safetensors"
    studio.concepts.loaded.pop("tom", None)


def test_points_are_stored_in_the_file_and_used(
    studio: Studio, file_of_tom: Path, photo_folder: Path, tmp_path: Path
) -> None:  # fmt: skip
    """From the command's recipe to `<tom>` in a prompt, in this process and in the next."""
    recipe = Sweep.make(concept="tom", base="sd15", photos=str(photo_folder), **QUICK)
    (*others, done) = studio.sweeping(recipe, tmp_path / "out", encoder=ColourEncoder())
    assert done.facts["stored"] == "tom.safetensors" or Path(done.facts["stored"]).samefile(file_of_tom)
    assert any(isinstance(e, events.Progress) for e in others)
    stored = Concept.load(file_of_tom).points
    assert stored.keys() == {"quality-2"} and set(stored["quality-2"]) == {"faithful", "balanced", "creative"}
    balanced = stored["quality-2"]["balanced"]
    assert balanced.strength == done.result["balanced"].strength
    prompt = f"<tom:{balanced.strength:g}>"
    want = studio.paint(prompt, steps=2, guidance=balanced.guidance, concept_start=balanced.concept_start)
    assert studio.paint("<tom>", steps=2) == want
    again = Studio(studio.base)
    again.add(str(file_of_tom))
    assert again.paint("<tom>", steps=2) == want
    times = [p.stat().st_mtime_ns for p in sorted((tmp_path / "out" / "images").iterdir())]
    list(
        studio.sweeping(recipe, tmp_path / "out", encoder=ColourEncoder())
    )  # now with points: they change nothing
    assert times == [p.stat().st_mtime_ns for p in sorted((tmp_path / "out" / "images").iterdir())]


def test_points_of_a_loaded_concept_stay_in_memory(
    studio: Studio, file_of_tom: Path, photo_folder: Path, tmp_path: Path
) -> None:  # fmt: skip
    studio.add(Concept.load(file_of_tom))
    before = file_of_tom.read_bytes()
    recipe = Sweep.make(concept="tom", base="sd15", photos=str(photo_folder), **QUICK)
    (*_, done) = studio.sweeping(recipe, tmp_path / "out", encoder=ColourEncoder())
    assert done.facts["stored"] is None and file_of_tom.read_bytes() == before
    assert studio.concepts.loaded["tom"].concept.points["quality-2"] == done.result


def test_mistakes_are_reported_before_anything_is_generated(
    studio: Studio, file_of_tom: Path, photo_folder: Path, tmp_path: Path
) -> None:  # fmt: skip
    def sweep(**values: Any) -> None:
        recipe = Sweep.make(**{"concept": "tom", "photos": str(photo_folder), **values})
        list(studio.sweeping(recipe, tmp_path / "out"))

    with pytest.raises(UnknownName, match="Unknown concept 'tim'. Did you mean 'tom'"):
        sweep(concept="tim")
    with pytest.raises(BadRecipe, match="no photos of 'tom' to compare with.*--photos FOLDER"):
        list(studio.sweeping(Sweep(concept="tom"), tmp_path / "out"))
    with pytest.raises(NoNetwork, match="clip-b32 .* is not on this machine"):
        sweep(encoder="clip-b32")
    with pytest.raises(UnknownName, match="Unknown encoder"):
        sweep(encoder="eagle")
    assert not (tmp_path / "out").exists()


def test_missing_encoder_weights(
    studio: Studio, file_of_tom: Path, photo_folder: Path, tmp_path: Path, monkeypatch: Any
) -> None:  # fmt: skip
    from minikin.tiny.encoders import weights

    monkeypatch.setattr(weights, "embedded", lambda kind: tmp_path / f"no-{kind}.safetensors")
    with pytest.raises(AssetError, match="encoder weights are missing"):
        list(studio.sweeping(Sweep(concept="tom", photos=str(photo_folder)), tmp_path / "out"))


def test_tiny_encoder_is_refused_for_other_bases(
    studio: Studio, file_of_tom: Path, photo_folder: Path, tmp_path: Path, monkeypatch: Any
) -> None:  # fmt: skip
    studio.add(Concept.load(file_of_tom))
    monkeypatch.setattr(Base, "architecture", "sd1")
    with pytest.raises(BadRecipe, match="encoder tiny knows tiny's sticker world alone.*--encoder clip-b32"):
        list(studio.sweeping(Sweep(concept="tom", photos=str(photo_folder)), tmp_path / "out"))


def test_command(
    file_of_tom: Path, photo_folder: Path, studio: Studio, monkeypatch: Any, capsys: Any
) -> None:  # fmt: skip
    """Names and files by default, one JSON object a line, the lock gone, errors with their exit codes."""
    from minikin.cli import sweep

    monkeypatch.setattr(sweep.Studio, "open", lambda *_, **__: studio)
    monkeypatch.setattr("minikin.evaluation.scores.open_encoder", lambda *_: ColourEncoder())

    def cli(*args: object) -> tuple[int, str, str]:
        return command(monkeypatch, capsys, *args)

    quick = [x for k, v in QUICK.items() for x in (f"--{k.replace('_', '-')}", v)]
    code, out, err = cli("sweep", "tom", "--photos", photo_folder, *quick)
    assert code == 0, err
    assert "3 settings; at most" in err
    assert "balanced" in out and "<tom> means balanced with preset quality-2" in out.replace("\n", " ")
    assert sorted(p.name for p in Path("tom-sweep").iterdir()) == [
        "cache.jsonl", "images", "quality-2.html", "quality-2.json", "quality-2.png",
    ]  # fmt: skip
    studio.concepts.loaded.pop("tom")
    code, out, _ = cli("sweep", "tom", "--photos", photo_folder, "--json", *quick)
    done = [json.loads(line) for line in out.splitlines()][-1]
    assert done["event"] == "done"
    assert done["points"]["balanced"]["judge"].startswith("planted ")  # word: key of the JSON output
    studio.concepts.loaded.pop("tom")
    assert cli("sweep", "nobody", *quick)[0] == 2
    code, _, err = cli("sweep", "tom", *quick)
    assert code == 2 and "--photos FOLDER" in err
    code, _, err = cli("sweep", "tom", "--strengths", "0.6,much")
    assert code == 2 and "strengths.1: must be a number" in err
