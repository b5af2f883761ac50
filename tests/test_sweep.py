"""Sweeps: the planted optimum is found, nothing is painted twice, and what is found is put to use."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from conftest import command
from minikin import Concept, Studio, events
from minikin.bases.base import Base
from minikin.concepts.concept import Origin
from minikin.concepts.points import Point
from minikin.errors import AssetError, BadRecipe, NoNetwork, UnknownName
from minikin.judging.intervals import Measured
from minikin.judging.judges import Card
from minikin.judging.scores import References
from minikin.judging.sweep import figure
from minikin.judging.sweep.cache import Cache, Seen
from minikin.judging.sweep.points import choose
from minikin.judging.sweep.search import FIRST, Standing, finalists, pictures, reaching, standing
from minikin.judging.sweep.settings import Setting, drawn, grid, texts
from minikin.judging.sweep.sweep import Task, sweep
from minikin.painting.plan import plan
from minikin.recipes import WHOLE, Paint, Sweep
from minikin.teaching.photos import Photo

# ---- a world in which every setting's likeness and alignment are known ------------------------------

pytestmark = pytest.mark.usefixtures("quick_disk")
LIKENESS = {0.6: 0.55, 0.8: 0.62, 1.0: 0.75, 1.3: 0.80, 1.6: 0.85}  # by strength
FOLLOWS = {0.6: 0.80, 0.8: 0.79, 1.0: 0.77, 1.3: 0.66, 1.6: 0.40}
BEST = {"tau": 0.25, "switch": 0.2}  # everything else costs a tenth of both
KNEE, ENDS = 1.0, (0.6, 1.3)  # 1.6 follows less than 80 % as well
SCALE = 60_000


def truth(strength: float, tau: float | None, switch: float, interval: Any) -> tuple[float, float]:
    """Likeness and alignment of a setting."""
    cost = 0.1 * ((tau != BEST["tau"]) + (switch != BEST["switch"]) + (interval != WHOLE))
    return LIKENESS[strength] - cost, FOLLOWS[strength] - cost


class Planted:
    """Reads likeness, alignment and the prompt's number off the pictures."""

    name, reads = "planted", True
    card = Card("planted", "tests", "Apache-2.0", "00ff" * 4)

    def _told(self, images: Sequence[Image.Image]) -> list[list[float]]:
        return [[int(v) for v in np.asarray(i)[0, :3].astype(np.int64) @ (65536, 256, 1)] for i in images]

    def likeness(self, images: Sequence[Image.Image], masks: Any = None) -> Tensor:
        x = torch.tensor([row[0] / SCALE for row in self._told(images)])
        return torch.stack([x, (1 - x**2).sqrt()], 1)

    def texts(self, captions: Sequence[str]) -> Tensor:
        return torch.eye(len(captions) + 1)[: len(captions)]

    def images(self, images: Sequence[Image.Image]) -> Tensor:
        out = torch.zeros(len(images), PROMPTS + 1)
        for i, (_, y, number) in enumerate(self._told(images)):
            out[i, int(number)], out[i, -1] = y / SCALE, (1 - (y / SCALE) ** 2) ** 0.5
        return out


PROMPTS = 8
SEARCH = Sweep(concept="tom", taus=(0.15, 0.25), switches=(0.0, 0.2), prompts=PROMPTS, seeds=2, photos="-")


class Painter:
    """Paints truth, with noise of a known size by prompt and seed; `after` is called with each set's count."""

    def __init__(self, noise: float = 0.02, after: Callable[[int], None] = lambda _: None) -> None:
        self.sets, self.noise, self.after = 0, noise, after
        self.prompts = [t.replace("{}", "<tom>") for t in texts(SEARCH, "cat")]

    def __call__(self, wish: Paint) -> list[Image.Image]:
        assert wish.points and wish.interval
        own, made = wish.points["tom"], []
        for seed in range(wish.seed, wish.seed + wish.n):
            number = self.prompts.index(wish.prompt)
            luck = self.noise * np.random.default_rng((seed, number)).normal(size=2)
            x, y = np.array(truth(own.strength, own.tau, own.switch, wish.interval)) + luck
            row = [int(SCALE * x), int(SCALE * y), number]
            pixels = np.zeros((8, 8, 3), np.uint8)
            pixels[0, :3] = [(v // 65536, v // 256 % 256, v % 256) for v in row]
            made.append(Image.fromarray(pixels))
        self.sets += 1
        self.after(self.sets)
        return made


@pytest.fixture(scope="module")
def tom() -> Concept:
    return Concept("tom", "cat", "gated", Origin("tiny", "f", "t"), (torch.zeros(1, 4),), torch.ones(4),
                   torch.ones(4), {})  # fmt: skip


@pytest.fixture(scope="module")
def task(bases: dict[str, Base], tom: Concept) -> Task:
    decided = plan(bases["sd15"], Paint(prompt="<tom>", steps=5, guidance=3))
    known = References(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0]]))
    return Task(SEARCH, tom, decided, {"base": "f", "concept": "c"}, Planted(), known)


def run(task: Task, out: Path, painter: Painter) -> tuple[dict[str, Point], list[events.Event]]:
    told = list(sweep(task, out, painter))
    done = told[-1]
    assert isinstance(done, events.Done)
    return done.result, told


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
    monkeypatch.setattr("test_sweep.FOLLOWS", dict.fromkeys(FOLLOWS, 0.7))
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
    assert f"40 settings; at most {most} pictures of 0.0" in note
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
    Cache(out / "cache.jsonl").keep(_seconds_key(task), 0.1)  # 300 pictures
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
    from minikin.judging.sweep.cache import key

    return f"seconds {key(task.target)}"


# ---- parts ----------------------------------------------------------------------------------------


def seen(likeness: float, right: float) -> Seen:
    return Seen(likeness, None, (right, 0.5, 0.4, 0.3))


def test_wrong_pictures_are_no_certainty() -> None:
    """4 of 4 pictures wrong: the bootstrap's interval is [0, 0], the reach is Wilson's 0.49."""
    none = standing(Setting(), range(1), [[seen(0.5, 0.1)] * 4], "recognised")
    assert none.recognised.value == none.recognised.high == 0 and none.alignment.value == 0.1
    assert none.reach[1] == pytest.approx(0.79, abs=0.01)  # one prompt
    right = standing(Setting(), range(1), [[seen(0.5, 0.9)]], "recognised")
    assert right.follows.value == 1 and right.held_out is None
    plain = standing(Setting(), range(1), [[seen(0.5, 0.9)]], "alignment")
    assert plain.follows.value == 0.9 == plain.reach[1]


def at(x: float, y: float, half: float = 0.0) -> Standing:
    a, b = Measured(x, x - half, x + half, 4), Measured(y, y - half, y + half, 4)
    return Standing(Setting(x, None, y), a, None, b, b, b, (x + half, y + half))


def test_who_goes_on() -> None:
    """Those on the front or whose intervals reach it; the taught one always; at most a quarter, at least 8."""
    front = [at(0.2, 0.9), at(0.5, 0.8), at(0.8, 0.3)]
    close, far = at(0.45, 0.75, 0.1), at(0.3, 0.3, 0.1)
    kept = reaching([far, *front, close, at(0.1, 0.1, 0.1)])
    assert kept == [far, *front, close]  # the first is the taught one
    many = [at(0.5, 0.5, 0.3) for _ in range(60)]
    assert len(reaching([far, *many, *front])) == 17  # 16 and the taught one
    assert len(reaching([at(0.5, 0.5, 0.3)] * 3 + [at(0.6, 0.6)])) == 4


def test_who_is_painted_anew() -> None:
    """A short front is filled up with its neighbours; a long one is thinned out, both ends kept."""
    few = [at(0.1, 0.1), at(0.9, 0.9), *(at(0.8 - k / 100, 0.8 - k / 100, 0.5) for k in range(20))]
    last = finalists(few)
    assert last[:3] == [few[0], few[1], few[2]] and len(last) == 1 + 8
    long = [at(k / 30, 1 - k / 30) for k in range(31)]
    last = finalists(long)
    assert len(last) <= 12 and long[0] in last and long[30] in last


def test_choosing_points() -> None:
    ends = choose([at(0.9, 0.1), at(0.8, 0.6), at(0.7, 0.75), at(0.3, 0.8), at(0.2, 0.2)])
    assert ends.front == (3, 2, 1, 0)
    assert ends.named == {"faithful": 2, "balanced": 2, "creative": 2}  # the rest is out of the useful span
    three = choose([at(0.8, 0.66), at(0.76, 0.78), at(0.5, 0.8)])
    assert three.named == {"faithful": 0, "balanced": 1, "creative": 2}
    apart = choose([at(0.9, 0.1), at(0.1, 0.9)])
    assert len(set(apart.named.values())) == 1  # nothing in the useful span: one point, the knee


def test_settings_that_come_to_the_same_are_one(bases: dict[str, Base], tom: Concept) -> None:
    base = bases["sd15"]

    def of(concept: Concept, steps: int, guidance: float, **more: Any) -> tuple[Setting, ...]:
        decided = plan(base, Paint(prompt="x", steps=steps, guidance=guidance))
        return grid(Sweep(concept="tom", **more), concept, decided)

    many = of(tom, 25, 4)
    assert len(many) == 5 * 3 * 2 * 4 * 2 and many[0] == Setting(1, 0.15, 4)
    assert {s.guidance for s in many} == {4, 6}
    four = of(tom, 4, 1)  # no guidance: no interval; 10 % of 4 steps is none, 20 and 35 % are one
    assert len(four) == 5 * 3 * 2 and {s.interval for s in four} == {WHOLE}
    assert {s.guidance for s in four} == {1} and {s.switch for s in four} == {0, 0.2}
    assert {s.switch for s in of(tom, 1, 1)} == {0} and len(of(tom, 1, 1)) == 15
    row = replace(tom, mode="row", word_deltas=())
    assert {s.tau for s in of(row, 4, 1)} == {None} and len(of(row, 4, 1)) == 10
    assert len(of(tom, 25, 4, strengths="1", taus="0.15", guidances="4", switches="0", intervals="0-1")) == 1
    some = drawn(many, 7, seed=1)
    assert len(set(some)) == 7 and some[0] == many[0] and some == drawn(many, 7, 1) != drawn(many, 7, 2)


def test_few_step_presets_have_one_guidance(bases: dict[str, Base], tom: Concept) -> None:
    decided = plan(bases["sd15"], Paint(prompt="x"))
    turbo = replace(decided, preset=replace(decided.preset, name="turbo", low=0, high=1))
    with pytest.raises(BadRecipe, match="turbo is made for guidance 0 to 1, not 4"):
        grid(Sweep(concept="tom", guidances="1,4"), tom, turbo)


def test_prompts_come_from_scenes_or_a_file(tmp_path: Path) -> None:
    usual = texts(Sweep(concept="tom"), "cat")
    assert len(set(usual)) == 12 and all(t.count("{}") == 1 for t in usual)
    assert not any("teapot" in t for t in texts(Sweep(concept="tom"), "teapot"))
    own = tmp_path / "own.txt"
    own.write_text("# mine\n{} on a boat\n\na painting of {}\nmy {} asleep\n{} in Paris\n")
    assert texts(Sweep(concept="tom", texts=str(own), prompts=4), "cat")[1] == "a painting of {}"
    with pytest.raises(BadRecipe, match="asks for 5 prompts, but there are 4 prompts in .*own.txt"):
        texts(Sweep(concept="tom", texts=str(own), prompts=5), "cat")
    own.write_text("a cat\n")
    with pytest.raises(BadRecipe, match='the line "a cat" does not'):
        texts(Sweep(concept="tom", texts=str(own)), "cat")
    with pytest.raises(BadRecipe, match="cannot be read"):
        texts(Sweep(concept="tom", texts=str(tmp_path / "none.txt")), "cat")
    with pytest.raises(BadRecipe, match="asks for 99 prompts"):
        texts(Sweep(concept="tom", prompts=99), "cat")


def test_a_cache_gives_back_what_it_took(tmp_path: Path) -> None:
    path = tmp_path / "a" / "cache.jsonl"
    one = (Seen(1 / 3, None, (0.1, 2 / 3)), Seen(0.5, 1e-17, ()))
    cache = Cache(path)
    cache.put("k", "e", one)
    cache.keep("seconds", 0.1)
    with open(path, "ab") as f:
        f.write(b'not json\n{"key":"x"}\n{"key": "torn')
    again = Cache(path)
    assert again.get("k", "e") == one and again.get("k", "other") is None and len(again) == 1
    assert again.number("seconds") == 0.1 and again.number("none") is None
    again.put("l", "e", one)
    assert len(Cache(path)) == 2


# ---- what is written -------------------------------------------------------------------------------


class Tags(HTMLParser):
    """Every address a page refers to, and whether its tags are closed in order."""

    EMPTY = frozenset({"meta", "img", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.open: list[str] = []
        self.cells = 0

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.addresses += [v for k, v in attrs if k in ("src", "href", "xlink:href", "data") and v]
        self.cells += tag == "td"
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_needs_no_network(swept: Any) -> None:
    """Pictures are inside, everything refers to the page itself, tags are sound, no text is raw."""
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
    """Headless Chromium, offline: all pictures load, nothing is wider than the window, it is not blank."""
    import shutil
    import subprocess

    browser = shutil.which("chromium")
    if not browser:
        pytest.skip("chromium is not installed")
    text = (swept[0] / "quality-5.html").read_text()
    check = """<script>addEventListener("load", () => { document.title = JSON.stringify({
      broken: [...document.images].filter(i => !i.naturalWidth).length, images: document.images.length,
      drawn: document.querySelector("svg").getBoundingClientRect().height,
      wide: document.documentElement.scrollWidth - innerWidth}); });</script></head>"""
    page = tmp_path / "page.html"
    page.write_text(text.replace("</head>", check))
    how = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND",
           f"--user-data-dir={tmp_path}/user", "--window-size=1000,1400"]  # fmt: skip
    dom = subprocess.run([*how, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120)
    (told,) = re.findall(r"<title>(\{.*?\})</title>", dom.stdout)
    found = json.loads(told.replace("&quot;", '"'))
    assert found["broken"] == 0 and found["images"] >= 24 and found["drawn"] > 300 and found["wide"] <= 0
    shot = tmp_path / "page.png"
    subprocess.run([*how, f"--screenshot={shot}", page.as_uri()], capture_output=True, timeout=120, check=True)
    assert len(Image.open(shot).convert("RGB").getcolors(maxcolors=10**6) or []) > 100


def test_the_drawing_is_a_picture(swept: Any) -> None:
    image = Image.open(swept[0] / "quality-5.png").convert("RGB")
    assert image.width > 1000 and image.height > 700
    colours = {c for _, c in image.getcolors(maxcolors=10**6) or []}
    assert {(0xC2, 0x41, 0x0C), (0x15, 0x80, 0x3D), (0x7E, 0x22, 0xCE)} <= colours  # the three points


def test_without_matplotlib_nothing_is_painted(task: Task, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(figure, "find_spec", lambda _: None)
    painter = Painter()
    with pytest.raises(BadRecipe, match=r"pip install 'minikin\[judge\]'"):
        run(task, tmp_path, painter)
    assert painter.sets == 0


def test_a_judge_that_does_not_read(task: Task, tmp_path: Path) -> None:
    blind = Planted()
    blind.reads = False
    with pytest.raises(BadRecipe, match="planted sees but does not read"):
        run(replace(task, judge=blind), tmp_path, Painter())


# ---- through the Studio and the command line ----------------------------------------------------------


class Plain(Planted):
    """Sees mean colours: enough to be a judge of anything."""

    def likeness(self, images: Sequence[Image.Image], masks: Any = None) -> Tensor:
        small = [np.asarray(i.convert("RGB").resize((2, 2)), np.float32) for i in images]
        return torch.nn.functional.normalize(torch.tensor(np.stack(small)).flatten(1) - 128, dim=1)

    def texts(self, captions: Sequence[str]) -> Tensor:
        return torch.nn.functional.normalize(torch.randn(len(captions), 12, generator=torch.Generator()), dim=1)

    images = likeness


QUICK = {"prompts": 4, "seeds": 1, "steps": 2, "strengths": "0.5,1.5", "switches": "0.5", "taus": "0.15",
         "guidances": "3", "intervals": "0-1"}  # fmt: skip


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
    from minikin.tiny.judges import weights

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
    monkeypatch.setattr("minikin.judging.sweep.opening.open_judge", lambda *_: Plain())

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
