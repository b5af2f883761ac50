"""Teaching: deterministic, resumable bit for bit, safe to interrupt, honest when it diverges."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from minikin import Concept, Studio, events
from minikin.errors import BadRecipe, Diverged
from minikin.images.photos import Photo
from minikin.models.base import Base
from minikin.models.prompt import parse
from minikin.perfusion import concept_file
from minikin.perfusion import loop as loops
from minikin.perfusion.category import caution
from minikin.perfusion.covariance import Covariance
from minikin.perfusion.key_lock import LOCK_TEMPLATES, category_encoding, prompt_for
from minikin.perfusion.objective import Student
from minikin.perfusion.train import Batches, prepare, teach
from minikin.recipes import Teach
from minikin.tiny import vocabulary

pytestmark = pytest.mark.usefixtures("one_thread")


def identity(base: Base) -> Covariance:
    return Covariance(torch.eye(base.layout.text_width, dtype=torch.float64), 1, 1)


def run(base: Base, photos: list[Photo], **kwargs: Any) -> events.Done:
    """Teach with a unit covariance; the Done event."""
    how = {k: kwargs.pop(k) for k in ("checkpoint", "resume", "stop", "save_every") if k in kwargs}
    recipe = Teach.make(**{"name": "tom", "category": "cat", "batch": 2, "mode": "gated", **kwargs})
    c = identity(base) if recipe.mode == "gated" else None
    done = None
    for done in teach(base, photos, recipe, c, **how):
        pass
    assert isinstance(done, events.Done)
    return done


@pytest.mark.parametrize("mode", ["gated", "row"])
def test_equal_seeds_give_equal_files(bases: dict[str, Base], photos: list[Photo], mode: str) -> None:
    a, b, other = (
        concept_file.to_bytes(run(bases["sd15"], photos, mode=mode, steps=6, seed=s).result) for s in (1, 1, 2)
    )
    assert a == b
    assert a != other


@pytest.mark.parametrize("keys", ["locked", "trained"])
def test_resume_is_bit_exact(bases: dict[str, Base], photos: list[Photo], tmp_path: Path, keys: str) -> None:
    """12 steps = 5 + interruption + resume, also after evaluations and with the average of i*."""
    base, checkpoint = bases["sd15"], tmp_path / "c.safetensors"
    whole = run(base, photos, max_steps=24, keys=keys).result
    stop = threading.Event()
    recipe = Teach.make(name="tom", category="cat", batch=2, mode="gated", max_steps=24, keys=keys)
    for event in teach(base, photos, recipe, identity(base), checkpoint=checkpoint, stop=stop):
        if isinstance(event, events.Progress) and event.done == 13:
            stop.set()
    assert checkpoint.exists()
    resumed = run(base, photos, max_steps=24, keys=keys, checkpoint=checkpoint, resume=True)
    assert resumed.facts["steps"] == 24
    assert concept_file.to_bytes(resumed.result) == concept_file.to_bytes(whole)
    moved = [float(k.abs().max()) for k in whole.keys.values()]
    assert moved == [] if keys == "locked" else min(moved) > 0


def test_checkpoint_of_another_run_is_refused(
    bases: dict[str, Base], photos: list[Photo], tmp_path: Path
) -> None:
    checkpoint = tmp_path / "c.safetensors"
    run(bases["sd15"], photos, steps=4, checkpoint=checkpoint, save_every=2)
    with pytest.raises(BadRecipe, match=r"another run \(seed differ"):
        run(bases["sd15"], photos, steps=4, seed=9, checkpoint=checkpoint, resume=True)


def test_checkpoint_with_another_covariance_is_refused(
    bases: dict[str, Base], photos: list[Photo], tmp_path: Path
) -> None:  # fmt: skip
    """The metric i* was averaged in belongs to the run: its hash is checked."""
    base, checkpoint = bases["sd15"], tmp_path / "c.safetensors"
    run(base, photos, steps=2, checkpoint=checkpoint, save_every=2)
    other = Covariance(torch.eye(base.layout.text_width, dtype=torch.float64) * 2, 1, 1)
    recipe = Teach(name="tom", category="cat", mode="gated", batch=2, steps=2)
    with pytest.raises(BadRecipe, match=r"another run \(covariance differ"):
        list(teach(base, photos, recipe, other, checkpoint=checkpoint, resume=True))


def test_interrupting_leaves_a_usable_concept(bases: dict[str, Base], photos: list[Photo]) -> None:
    stop = threading.Event()
    stop.set()
    done = run(bases["sd15"], photos, steps=50, stop=stop)
    assert done.facts["interrupted"] and done.facts["steps"] == 1
    assert done.result.is_finite()


def arguments(photos: Path, out: Path, *more: str) -> list[str]:
    return ["teach", str(photos), "--name", "tom", "--category", "cat", "--batch", "4", "--sample-every", "0",
            "--no-preview", "--out", str(out), *more]  # fmt: skip


@pytest.mark.slow
def test_killed_teaching_resumes_to_the_same_file(photo_folder: Path, tmp_path: Path, cli: Any) -> None:
    """kill -9 in the middle of `minikin teach`; `--resume` ends with the file of an unbroken run.

    The verb, in mode "gated"; random moments, in mode "row", are tests/robustness/test_kills.py's.
    """
    whole, broken = tmp_path / "whole.safetensors", tmp_path / "broken.safetensors"
    how = ("--mode", "gated", "--max-steps", "34")
    assert cli(*arguments(photo_folder, whole, *how))[0] == 0
    checkpoint = tmp_path / "broken-teaching" / "checkpoint.safetensors"
    command = [sys.executable, "-m", "minikin", *arguments(photo_folder, broken, *how)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert checkpoint.exists()
    assert not broken.exists()
    assert cli(*arguments(photo_folder, broken, *how, "--resume"))[0] == 0
    assert broken.read_bytes() == whole.read_bytes()
    assert not checkpoint.exists()


def test_ctrl_c_saves_a_usable_concept(
    photo_folder: Path, tmp_path: Path, cli: Any, monkeypatch: Any
) -> None:  # fmt: skip
    """SIGINT: the step is finished, the concept and the checkpoint are written, exit code 130."""
    out, step = tmp_path / "tom.safetensors", loops.Loop._step

    def interrupted(self: loops.Loop) -> float | None:
        if self.progress.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self)

    monkeypatch.setattr(loops.Loop, "_step", interrupted)
    assert cli(*arguments(photo_folder, out, "--mode", "row", "--steps", "5000"))[0] == 130
    checkpoint = tmp_path / "tom-teaching" / "checkpoint.safetensors"
    assert json.loads(loops.read_checkpoint(checkpoint)[1]["progress"])["step"] == 3
    assert concept_file.load(out).is_finite()


def test_one_photo_is_enough(photo_folder: Path) -> None:
    """One-shot: a single file instead of a folder."""
    one = next(p for p in sorted(photo_folder.iterdir()) if p.is_file())
    tom = Studio.open("tiny").teach(one, name="tom", category="cat", steps=2, batch=2, preview=False)
    assert tom.is_finite() and tom.recipe["photos"] == 1


def test_preview_travels_in_the_file(photo_folder: Path, tmp_path: Path) -> None:
    """A taught concept shows itself: a small JPEG, within the file's cap, left out on request."""
    recipe = {"name": "tom", "category": "cat", "steps": 1, "batch": 1, "mode": "row"}
    tom = Studio.open("tiny").teach(photo_folder, **recipe)
    path = tom.save(tmp_path / "tom.safetensors")
    shown = Image.open(io.BytesIO(Concept.load(path).preview))
    assert (shown.format, shown.size) == ("JPEG", (96, 96)) and path.stat().st_size < 12_000
    assert Studio.open("tiny").teach(photo_folder, preview=False, **recipe).preview == b""


def test_a_failed_teaching_leaves_the_concepts_as_they_were(
    bases: dict[str, Base], photos: list[Photo], monkeypatch: Any
) -> None:  # fmt: skip
    """Diverging after a sample was painted: the half-taught concept replaces nothing and is not in use."""
    studio, how = Studio(bases["sd15"]), {"mode": "row", "batch": 1, "preview": False}
    tom = studio.teach(photos, name="tom", category="cat", steps=1, **how)
    step = loops.Loop._step

    def fail(self: loops.Loop) -> float | None:
        if self.progress.step:
            raise Diverged("Teaching diverged.")
        return step(self)

    monkeypatch.setattr(loops.Loop, "_step", fail)
    for name in ("tom", "rex"):
        seen: list[events.Event] = []
        recipe = Teach.make(name=name, category="dog", steps=5, sample_every=1, **how)
        with pytest.raises(Diverged):
            seen.extend(studio.teaching(photos, recipe))
        assert [e.caption for e in seen if isinstance(e, events.Picture)] == ["masks", "step-0001"]
    assert studio.concepts.loaded["tom"].concept is tom and list(studio.concepts.loaded) == ["tom"]


def test_concept_at_any_position_uses_one_target(bases: dict[str, Base]) -> None:
    """Position 5 or 40 of the prompt: the same value difference (CDY stores one per position)."""
    base = bases["sd15"]
    recipe = Teach(name="tom", category="cat", mode="row")
    student = Student(base, recipe, category_encoding(base, "cat"), None)
    with torch.no_grad():
        student.delta += torch.randn(student.delta.shape, generator=torch.Generator().manual_seed(0))
    early = parse("a photo of <tom>", {"tom": "cat"})
    late = parse("a " + "very " * 36 + "old photo of <tom>", {"tom": "cat"})
    for prompt in (early, late):
        out = base.encode([prompt])
        (at,) = out.positions[0]
        plain = base.pack(out.e)
        moved = student.condition([prompt])[0] - plain
        rows = moved.detach().abs().sum(-1)[0].nonzero().flatten().tolist()
        assert rows == [at[-1]]
        values = torch.cat([moved[0, at[-1], s.value] for s in base.layout.sites])
        assert torch.allclose(values, student.delta, atol=1e-5)
    assert at[-1] == 42


def test_several_tokens(bases: dict[str, Base]) -> None:
    """A two-token category: two word vectors, positions aligned with the twin, last one edited."""
    base = bases["sdxl"]
    prompt = prompt_for("a photo of {}", "rex", "teddy bear")
    out = base.encode([prompt])
    assert out.positions[0][0] == (5, 6) and prompt.text == "a photo of a teddy bear"
    words = base.word_vectors("teddy bear")
    assert [len(w) for w in words] == [2, 2]
    same = base.encode([prompt], {"rex": words})
    assert torch.allclose(same.e, out.e, atol=1e-6)
    other = base.encode([prompt], {"rex": [w + 1 for w in words]})
    assert torch.equal(other.e[0, :5], out.e[0, :5]) and not torch.allclose(other.e[0, 5:], out.e[0, 5:])


def test_category_encoding_is_a_fixed_mean(bases: dict[str, Base]) -> None:
    """Deterministic template mean, not the first random batch."""
    base = bases["sd15"]
    a, b = (category_encoding(base, "cat") for _ in range(2))
    assert torch.equal(a, b)
    rows = [base.encode([p := prompt_for(t, "x", "cat")]).e[0, base.encode([p]).positions[0][0][-1]]
            for t in LOCK_TEMPLATES]  # fmt: skip
    assert torch.allclose(a, torch.stack(rows).mean(0), atol=1e-5)


def test_i_star_is_a_running_average(bases: dict[str, Base], photos: list[Photo]) -> None:
    """i* <- 0.99 i* + 0.01 e, starting at the category's encoding."""
    base = bases["sd15"]
    student = Student(
        base, Teach(name="t", category="cat"), category_encoding(base, "cat"), identity(base).inverse
    )
    start = student.i_star.clone()
    e = torch.ones_like(start)
    student.averaged(e)
    assert torch.allclose(student.i_star, 0.99 * start + 0.01)


def test_values_start_at_the_category(bases: dict[str, Base], photos: list[Photo]) -> None:
    """o*_V starts as W_V e_category: delta is zero; and no weight decay pulls it back later."""
    base = bases["sd15"]
    recipe = Teach(name="tom", category="cat", mode="gated", batch=2)
    student = Student(base, recipe, category_encoding(base, "cat"), identity(base).inverse)
    assert student.delta.abs().max() == 0
    prepared = prepare(base, photos, recipe)
    batches = Batches(base, prepared, recipe)
    one = loops.Loop(student, batches.at, batches.evaluation(), max_steps=1)
    assert all(g["weight_decay"] == 0 for g in one.optimizer.param_groups)
    assert [g["lr"] for g in one.optimizer.param_groups] == [0.03, 0.006]


def test_batches_do_not_depend_on_history(bases: dict[str, Base], photos: list[Photo]) -> None:
    base = bases["sd21"]
    recipe = Teach(name="tom", category="cat", batch=4)
    batches = Batches(base, prepare(base, photos, recipe), recipe)
    first = batches.at(7)
    batches.at(3)
    again = batches.at(7)
    assert torch.equal(first.x_t, again.x_t) and torch.equal(first.t, again.t)
    assert len(set((first.t // 250).tolist())) == 4  # one timestep from each quarter


def test_targets_follow_the_prediction_type(bases: dict[str, Base], photos: list[Photo]) -> None:
    """epsilon: the noise; v: alpha eps - sigma x0. A perfect prediction must cost nothing."""
    for family in ("sd15", "sd21"):
        base = bases[family]
        recipe = Teach(name="tom", category="cat", batch=3)
        prepared = prepare(base, photos, recipe)
        b = Batches(base, prepared, recipe).at(0)
        abar = base.pipe.scheduler.alphas_cumprod[b.t].view(-1, 1, 1, 1)
        x0 = (b.x_t - (1 - abar).sqrt() * b.target) / abar.sqrt()
        if base.prediction == "v_prediction":
            x0 = abar.sqrt() * b.x_t - (1 - abar).sqrt() * b.target
        known = prepared.latents.flatten(0, 1)
        nearest = (x0[:, None] - known[None]).abs().amax((2, 3, 4)).amin(1)
        assert nearest.max() < 2e-2


class _Nan:
    """A student whose loss (or, after the step, whose weights) are not finite at chosen calls."""

    def __init__(self, student: Student, bad: set[int], where: str = "loss") -> None:
        self.student, self.bad, self.where, self.calls = student, bad, where, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.student, name)

    def loss(self, batch: Any) -> Any:
        value, e = self.student.loss(batch)
        if torch.is_grad_enabled():
            self.calls += 1
            if self.calls in self.bad and self.where == "loss":
                value = value * float("nan")
        return value, e

    def averaged(self, e_concept: Any) -> None:
        self.student.averaged(e_concept)
        if self.calls in self.bad and self.where == "weights":
            with torch.no_grad():
                self.student.delta.fill_(float("nan"))


def sick_loop(
    base: Base, photos: list[Photo], bad: set[int], steps: int, where: str = "loss"
) -> loops.Loop:  # fmt: skip
    recipe = Teach(name="tom", category="cat", mode="gated", batch=2)
    student = Student(base, recipe, category_encoding(base, "cat"), identity(base).inverse)
    batches = Batches(base, prepare(base, photos, recipe), recipe)
    return loops.Loop(
        _Nan(student, bad, where), batches.at, batches.evaluation(), max_steps=steps, fixed=True  # type: ignore[arg-type]
    )  # fmt: skip


@pytest.mark.parametrize(
    ("family", "name", "words"),
    [("lcm-sd15", "x", r"'x' is already distilled \(lcm\)"), ("sd15", "sd-turbo", r"distilled \(turbo\)"),
     ("sdxl", "juggernaut-lightning", r"distilled \(lightning\)")],
)  # fmt: skip
def test_students_of_few_steps_are_not_taught(
    bases: dict[str, Base], photos: list[Photo], family: str, name: str, words: str
) -> None:  # fmt: skip
    """A full LCM, known by its guidance embedding, and what is called a turbo: the original is named."""
    base = Base(bases[family].pipe, name)
    with pytest.raises(BadRecipe, match=rf"{words}.*Teach on the model it was made from.*--base tiny"):
        run(base, photos, steps=1)


def test_one_bad_step_is_skipped(bases: dict[str, Base], photos: list[Photo]) -> None:
    loop = sick_loop(bases["sd15"], photos, {3}, 6)
    steps = [s.step for s in loop]
    assert steps == [1, 2, 4, 5, 6] and loop.progress.skipped == 1 and loop.progress.rollbacks == 0
    assert loop.student.is_finite()


@pytest.mark.parametrize(("where", "bad"), [("loss", {3, 4, 5}), ("weights", {3})])
def test_three_bad_steps_roll_back_at_half_the_rate(
    bases: dict[str, Base], photos: list[Photo], where: str, bad: set[int]
) -> None:  # fmt: skip
    """Also when the weights themselves are lost: one bad step, after which every loss is bad."""
    loop = sick_loop(bases["sd15"], photos, bad, 5, where)
    start = loop.student.state()
    list(loop)
    assert loop.progress.rollbacks == 1 and loop.progress.rate == 0.5 and loop.progress.skipped == 3
    for name, value in loop.student.state().items():
        assert torch.equal(value, start[name]), name  # the last good state: step 0


def test_hopeless_run_fails_clearly(bases: dict[str, Base], photos: list[Photo]) -> None:
    with pytest.raises(Diverged, match="diverged at step"):
        list(sick_loop(bases["sd15"], photos, set(range(2, 99)), 50))


@pytest.mark.parametrize("fixed", [False, True])
def test_keeps_the_best_state_unless_steps_are_fixed(
    bases: dict[str, Base], photos: list[Photo], monkeypatch: Any, fixed: bool
) -> None:  # fmt: skip
    """Evaluations 3, 1, 2: the concept is that of the second, with all that belongs to it."""
    monkeypatch.setattr(loops, "EVAL_EVERY", 1)
    loop = sick_loop(bases["sd15"], photos, set(), 3)
    loop.fixed, loop.evaluation, real, values = fixed, [None], loop.student.student.loss, iter((3.0, 1.0, 2.0))  # type: ignore

    def loss(batch: Any) -> Any:
        return real(batch) if batch is not None else (torch.tensor(next(values)), None)

    loop.student.student.loss = loss  # type: ignore[attr-defined]
    states = [loop.student.state() for _ in loop]
    loop.finish()
    kept = states[2 if fixed else 1]
    assert loop.progress.best_step == 2 and not torch.equal(states[1]["delta"], states[2]["delta"])
    assert all(torch.equal(v, kept[k]) for k, v in loop.student.state().items())


def test_stops_by_itself(bases: dict[str, Base], photos: list[Photo]) -> None:
    """A flat evaluation ends the run; an improving one does not."""
    loop = sick_loop(bases["sd15"], photos, set(), 500)
    loop.fixed = False
    loop.progress.history = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.09, 0.08, 0.07, 0.06]
    assert not loop.converged()
    loop.progress.history += [0.06, 0.0601, 0.0599, 0.06, 0.0602, 0.06]
    assert loop.converged()


def test_mask_weights_the_loss_once(bases: dict[str, Base], photos: list[Photo]) -> None:
    """Mask times squared error, not (Mask times error) squared as in CDY."""
    base = bases["sd15"]
    recipe = Teach(name="tom", category="cat", mode="gated", batch=2)
    student = Student(base, recipe, category_encoding(base, "cat"), identity(base).inverse)
    b = Batches(base, prepare(base, photos, recipe), recipe).at(0)
    with torch.no_grad():
        full = float(student.loss(replace(b, mask=torch.ones_like(b.mask)))[0])
        half = float(student.loss(replace(b, mask=0.5 * torch.ones_like(b.mask)))[0])
    assert abs(half - 0.5 * full) < 1e-5 * full


@pytest.mark.parametrize("mode", ["row", "gated"])
def test_keep_holds_what_is_around_the_subject(
    bases: dict[str, Base], photos: list[Photo], monkeypatch: Any, mode: str
) -> None:
    """Masked error, plus keep times how far the prediction moves from the plain category's outside the mask."""
    base = bases["sd15"]
    recipes = [Teach(name="tom", category="cat", batch=2, mode=mode, keep=k) for k in (0.0, 0.5)]
    c = identity(base).inverse if mode == "gated" else None
    off, on = (Student(base, r, category_encoding(base, "cat"), c) for r in recipes)
    b = Batches(base, prepare(base, photos, recipes[0]), recipes[0]).at(0)
    b = replace(b, mask=torch.linspace(0, 1, b.mask.numel()).view_as(b.mask))
    with torch.no_grad():
        for student in (off, on):
            student.delta += 0.3
        mine, _, _ = on.condition(b.prompts)
        plain = base.pack(base.encode(b.prompts).e)
        moved = base.unet(b.x_t, b.t, mine).sample - base.unet(b.x_t, b.t, plain).sample
        around = float((moved.square() * (1 - b.mask)).mean())
        assert around > 1e-7
        assert float(on.loss(b)[0]) == pytest.approx(float(off.loss(b)[0]) + 0.5 * around, rel=1e-4)
        calls: list[int] = []
        forward = base.unet.forward
        monkeypatch.setattr(base.unet, "forward", lambda *a, **k: calls.append(1) or forward(*a, **k))
        on.loss(b)
        on.loss(replace(b, mask=torch.ones_like(b.mask)))
        off.loss(b)
        assert len(calls) == 2 + 1 + 1  # nothing around it, nothing to keep: no second call


def test_the_modes_defaults() -> None:
    """Each mode has its own rate and weight; what is asked for stands."""
    row, gated = (Teach.make(name="tom", category="cat", mode=m) for m in (None, "gated"))
    assert (row.mode, row.value_rate, row.keep, row.max_steps) == ("row", 0.1, 0.2, 300)
    assert (gated.mode, gated.value_rate, gated.keep, gated.max_steps) == ("gated", 0.03, 0.0, 400)
    asked = Teach.make(name="tom", category="cat", mode="gated", keep=0.2, value_rate=0.05)
    assert (asked.value_rate, asked.keep) == (0.05, 0.2)


# ---- the category's words ------------------------------------------------------------------------

EVERYDAY = [
    "cat",
    "dog",
    "chair",
    "teapot",
    "backpack",
    "guitar",
    "car",
    "robot",
    "teddy bear",
    "red vase",
    "Mug",
]
RARER = ["plushie", "corgi", "labradoodle", "wristwatch", "gargoyle", "t-shirt", "schnauzer", "toy poodle"]
NONSENSE = ["qwzrt", "a xqzvk", "hjklm toy"]


def test_a_category_that_is_no_word_is_told(bases: dict[str, Base], tiny: Base) -> None:
    """CLIP's vocabulary has pieces of rarer words, tiny's holds the words of its captions whole."""
    clip = bases["sd15"]
    assert {word: caution(clip, word) for word in EVERYDAY + RARER if caution(clip, word)} == {}
    known = [*EVERYDAY, *vocabulary.CATEGORIES]
    assert {word: caution(tiny, word) for word in known if caution(tiny, word)} == {}
    for base in (clip, tiny):
        for word in NONSENSE:
            assert "so it probably does not know it" in caution(base, word), word
    assert all(caution(tiny, word) for word in ("plushie", "corgi", "labradoodle"))
    assert "'qwzrt' (4 pieces)" in caution(clip, "red qwzrt") and "red" not in caution(clip, "red qwzrt")[:90]


def test_teaching_says_it(bases: dict[str, Base], photos: list[Photo]) -> None:
    def told(category: str) -> list[events.Event]:
        recipe = Teach(name="tom", category=category, batch=2, mode="row", steps=1)
        return [
            e for e in teach(bases["sd15"], photos, recipe, None) if isinstance(e, events.Note) and e.warning
        ]

    (one,) = told("qwzrt")
    assert isinstance(one, events.Note) and "such as 'cat' or 'teddy bear'" in one.text
    assert told("cat") == []
