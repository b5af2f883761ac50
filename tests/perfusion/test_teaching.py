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

import numpy as np
import pytest
import torch
from PIL import Image

from minikin import Concept, Studio, events
from minikin.errors import BadRecipe, Diverged
from minikin.images.photos import Photo
from minikin.models.base import Base
from minikin.models.prompt import parse
from minikin.perfusion import concept_file
from minikin.perfusion import train as training
from minikin.perfusion.category import unknown_word_warning
from minikin.perfusion.covariance import Covariance
from minikin.perfusion.key_lock import LOCK_TEMPLATES, category_encoding, prompt_for
from minikin.perfusion.objective import TrainableConcept
from minikin.perfusion.train import Batches, prepare, teach, unused_captions
from minikin.recipes import Teach
from minikin.tiny import vocabulary
from minikin.training import checkpoint as checkpoints
from minikin.training.trainer import StepContext, Trainer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def bases(flat_bases: dict[str, Base]) -> dict[str, Base]:
    """Two levels: what is tried here does not depend on how many there are."""
    return flat_bases


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


@pytest.mark.parametrize("mode", ["gated", "value"])
def test_equal_seeds_give_equal_files(bases: dict[str, Base], photos: list[Photo], mode: str) -> None:
    a, b, other = (
        concept_file.to_bytes(run(bases["sd15"], photos, mode=mode, steps=6, seed=s).result) for s in (1, 1, 2)
    )
    assert a == b
    assert a != other


def stopped_at(step: int, base: Base, photos: list[Photo], checkpoint: Path, **recipe: Any) -> None:
    """Teach, and stop after a step."""
    stop = threading.Event()
    options = Teach.make(**{"name": "tom", "category": "cat", "batch": 2, "mode": "gated", **recipe})
    for event in teach(base, photos, options, identity(base), checkpoint=checkpoint, stop=stop):
        if isinstance(event, events.Progress) and event.done == step:
            stop.set()


def test_everything_a_concept_trains_is_in_the_checkpoint(
    bases: dict[str, Base], photos: list[Photo], tmp_path: Path
) -> None:
    """Values, keys, words and i*, after evaluations: stopped and resumed, the file is the uninterrupted one's.

    That the loop resumes to the bit after every fault is tests/training/test_trainer.py's.
    """
    base, checkpoint, options = bases["sd15"], tmp_path / "c.safetensors", {"max_steps": 12, "keys": "trained"}
    whole = run(base, photos, **options).result
    stopped_at(11, base, photos, checkpoint, **options)
    assert checkpoints.read(checkpoint)[1]["state"]["step"] == 11
    resumed = run(base, photos, **options, checkpoint=checkpoint, resume=True)
    assert resumed.facts["steps"] == 12
    assert concept_file.to_bytes(resumed.result) == concept_file.to_bytes(whole)
    assert min(float(k.abs().max()) for k in whole.keys.values()) > 0


def test_a_checkpoint_of_version_0_1_is_continued(
    bases: dict[str, Base], photos: list[Photo], tmp_path: Path
) -> None:
    """Its tensors, progress and facts under the names they had: the result is that of an uninterrupted run."""
    from safetensors.torch import save_file

    base, checkpoint = bases["sd15"], tmp_path / "c.safetensors"
    whole = run(base, photos, max_steps=12).result
    stopped_at(11, base, photos, checkpoint, max_steps=12)
    tensors, meta = checkpoints.read(checkpoint)
    old_names = {
        k: k.replace("model.", "student.", 1).replace(".words.", ".word.") for k in tensors
    }  # fmt: skip
    state = {k: meta["state"][k] for k in ("step", "best_step", "best", "history", "rollbacks", "skipped")}
    present_to_old = {new: old for old, new in Teach.RENAMED.items()}
    options = {*present_to_old, "mode", "beta", "tau", "positions", "mask", "flip", "size", "seed", "batch"}
    facts = {
        present_to_old.get(k, k): v for k, v in meta["facts"].items()
        if k in options or k in ("name", "category", "base", "text_encoder", "captions")
    } | former_identity(base, photos, max_steps=12)  # fmt: skip
    header = {"progress": json.dumps({**state, "rate": 1.0}), "facts": json.dumps(facts)}
    save_file({old_names[k]: v for k, v in tensors.items()}, checkpoint, header)
    resumed = run(base, photos, max_steps=12, checkpoint=checkpoint, resume=True)
    assert resumed.facts["steps"] == 12
    assert concept_file.to_bytes(resumed.result) == concept_file.to_bytes(whole)
    save_file({old_names[k]: v for k, v in tensors.items()}, checkpoint, header)
    with pytest.raises(BadRecipe, match="another run: value_lr is 0.03 there and 0.05 here"):
        run(base, photos, max_steps=12, value_lr=0.05, checkpoint=checkpoint, resume=True)


def former_identity(base: Base, photos: list[Photo], **recipe: Any) -> dict[str, Any]:
    """The facts about photos and covariance that checkpoints had before they held on every machine."""
    options = Teach.make(**{"name": "tom", "category": "cat", "batch": 2, "mode": "gated", **recipe})
    return training._former_identity(prepare(base, photos, options), identity(base))


def test_resuming_does_not_depend_on_the_machine(
    bases: dict[str, Base], photos: list[Photo], tmp_path: Path, monkeypatch: Any
) -> None:
    """Latents and covariance with other last bits, as on another machine, are the same run; other photos are
    not, nor are other captions."""
    base, checkpoint, options = bases["sd15"], tmp_path / "c.safetensors", {"max_steps": 12}
    stopped_at(5, base, photos, checkpoint, **options)
    encode = Base.to_latents
    monkeypatch.setattr(Base, "to_latents", lambda self, x: encode(self, x) * (1 + 1e-6))
    here = replace(identity(base), c=identity(base).c * (1 + 1e-9), corpus=identity(base).hash)
    recipe = Teach.make(name="tom", category="cat", batch=2, mode="gated", **options)
    again = list(teach(base, photos, recipe, here, checkpoint=checkpoint, resume=True))
    assert not [e for e in again if isinstance(e, events.Note) and e.warning]
    assert any("going on after step 5" in e.text for e in again if isinstance(e, events.Note))
    other = np.where(photos[0].pixels > 250, 0, photos[0].pixels)
    for changed in (replace(photos[0], pixels=other), replace(photos[0], caption="a red <tom> on a hill")):
        with pytest.raises(BadRecipe, match="another run: pixels is .* there and .* here"):
            run(base, [changed, *photos[1:]], **options, checkpoint=checkpoint, resume=True)


def test_captions_that_are_not_used_are_quoted(photos: list[Photo]) -> None:
    """Those without the category or the concept's name, of which there is one or there are many."""
    recipe = Teach.make(name="tom", category="cat")

    def warning(*captions: str) -> str:
        return unused_captions([replace(photos[0], caption=c) for c in captions], recipe)

    assert warning("", "a cat on a chair", "<tom> sleeps", "a photo of {}") == ""
    assert "do not say 'cat', or <tom> once: 'a dog', 'cats'. Add" in warning("a cat", "a dog", "cats")
    assert "'1', '2', '3' and 2 more." in warning(*"12345")


@pytest.mark.parametrize("elsewhere", [False, True])
def test_checkpoints_of_before_are_resumed_with_a_note_where_they_cannot_tell(
    bases: dict[str, Base], photos: list[Photo], tmp_path: Path, monkeypatch: Any, elsewhere: bool
) -> None:
    """Earlier checkpoints hold a hash of the latents: resumed here, and elsewhere with a warning."""
    base, checkpoint, options = bases["sd15"], tmp_path / "c.safetensors", {"max_steps": 12}
    stopped_at(5, base, photos, checkpoint, **options)
    tensors, meta = checkpoints.read(checkpoint)
    before = {k: v for k, v in meta["facts"].items() if k not in ("pixels", "corpus")}
    facts = before | former_identity(base, photos, **options)
    checkpoints.write(checkpoint, tensors, {**meta, "facts": facts})
    if elsewhere:
        encode = Base.to_latents
        monkeypatch.setattr(Base, "to_latents", lambda self, x: encode(self, x) * (1 + 1e-6))
    recipe = Teach.make(name="tom", category="cat", batch=2, mode="gated", **options)
    again = list(teach(base, photos, recipe, identity(base), checkpoint=checkpoint, resume=True))
    notes = [e for e in again if isinstance(e, events.Note)]
    assert any("cannot tell on another machine" in e.text for e in notes if e.warning) is elsewhere
    assert any("going on after step 5" in e.text for e in notes)


def test_checkpoint_of_another_run_is_refused(
    bases: dict[str, Base], photos: list[Photo], tmp_path: Path
) -> None:
    checkpoint = tmp_path / "c.safetensors"
    run(bases["sd15"], photos, steps=4, checkpoint=checkpoint, save_every=2)
    with pytest.raises(BadRecipe, match="another run: seed is 0 there and 9 here"):
        run(bases["sd15"], photos, steps=4, seed=9, checkpoint=checkpoint, resume=True)


def test_checkpoint_with_another_covariance_is_refused(
    bases: dict[str, Base], photos: list[Photo], tmp_path: Path
) -> None:  # fmt: skip
    """The metric i* was averaged in belongs to the run: its hash is checked."""
    base, checkpoint = bases["sd15"], tmp_path / "c.safetensors"
    run(base, photos, steps=2, checkpoint=checkpoint, save_every=2)
    other = Covariance(torch.eye(base.layout.text_width, dtype=torch.float64) * 2, 1, 1)
    recipe = Teach(name="tom", category="cat", mode="gated", batch=2, steps=2)
    with pytest.raises(BadRecipe, match="another run: corpus is .* there and .* here"):
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

    The verb, in mode "gated"; random moments, in mode "value", are tests/robustness/test_kills.py's.
    """
    whole, broken = tmp_path / "whole.safetensors", tmp_path / "broken.safetensors"
    how = ("--mode", "gated", "--max-steps", "34")  # saved after 25
    assert cli(*arguments(photo_folder, whole, *how))[0] == 0
    checkpoint = tmp_path / "broken-teaching" / "checkpoint.safetensors"
    command = [sys.executable, "-m", "minikin", *arguments(photo_folder, broken, *how)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def saved() -> int:
        return checkpoints.read(checkpoint)[1]["state"]["step"] if checkpoint.exists() else 0

    while not saved() and process.poll() is None:
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert 0 < saved() < 34
    assert not broken.exists()
    assert cli(*arguments(photo_folder, broken, *how, "--resume"))[0] == 0
    assert broken.read_bytes() == whole.read_bytes()
    assert not checkpoint.exists()


def test_ctrl_c_saves_a_usable_concept(
    photo_folder: Path, tmp_path: Path, cli: Any, monkeypatch: Any
) -> None:  # fmt: skip
    """SIGINT: the step is finished, the concept and the checkpoint are written, exit code 130."""
    out, step = tmp_path / "tom.safetensors", Trainer.step

    def interrupted(self: Trainer, ctx: StepContext, *rest: Any) -> Any:
        if ctx.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, ctx, *rest)

    monkeypatch.setattr(Trainer, "step", interrupted)
    assert cli(*arguments(photo_folder, out, "--mode", "value", "--steps", "5000"))[0] == 130
    checkpoint = tmp_path / "tom-teaching" / "checkpoint.safetensors"
    assert checkpoints.read(checkpoint)[1]["state"]["step"] == 3
    assert concept_file.load(out).is_finite()


def test_one_photo_is_enough(photo_folder: Path) -> None:
    """One-shot: a single file instead of a folder."""
    photo = next(p for p in sorted(photo_folder.iterdir()) if p.is_file())
    tom = Studio.open("tiny").teach(photo, name="tom", category="cat", steps=2, batch=2, preview=False)
    assert tom.is_finite() and tom.recipe["photos"] == 1


def test_preview_travels_in_the_file(photo_folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """A taught concept shows itself: a small JPEG, within the file's cap, left out on request."""
    monkeypatch.setattr(training, "EVALUATION", 1)
    recipe = {"name": "tom", "category": "cat", "steps": 1, "batch": 1, "mode": "value"}
    tom = Studio.open("tiny").teach(photo_folder, **recipe)
    path = tom.save(tmp_path / "tom.safetensors")
    preview = Image.open(io.BytesIO(Concept.load(path).preview))
    assert (preview.format, preview.size) == ("JPEG", (96, 96)) and path.stat().st_size < 12_000
    assert Studio.open("tiny").teach(photo_folder, preview=False, **recipe).preview == b""


def test_a_failed_teaching_leaves_the_concepts_as_they_were(
    bases: dict[str, Base], photos: list[Photo], monkeypatch: Any
) -> None:  # fmt: skip
    """Diverging after a sample was painted: the half-taught concept replaces nothing and is not in use."""
    studio, how = Studio(bases["sd15"]), {"mode": "value", "batch": 1, "preview": False}
    tom = studio.teach(photos, name="tom", category="cat", steps=1, **how)
    step = Trainer.step

    def fail(self: Trainer, ctx: StepContext, *rest: Any) -> Any:
        if ctx.step:
            raise Diverged("Teaching diverged.")
        return step(self, ctx, *rest)

    monkeypatch.setattr(Trainer, "step", fail)
    for name in ("tom", "rex"):
        received: list[events.Event] = []
        recipe = Teach.make(name=name, category="dog", steps=5, sample_every=1, **how)
        with pytest.raises(Diverged):
            received.extend(studio.teaching(photos, recipe))
        assert [e.caption for e in received if isinstance(e, events.ImageReady)] == ["masks", "step-0001"]
    assert studio.concepts.loaded["tom"].concept is tom and list(studio.concepts.loaded) == ["tom"]


def test_concept_at_any_position_uses_one_target(bases: dict[str, Base]) -> None:
    """Position 5 or 40 of the prompt: the same value difference (CDY stores one per position)."""
    base = bases["sd15"]
    recipe = Teach(name="tom", category="cat", mode="value")
    student = TrainableConcept(base, recipe, category_encoding(base, "cat"), None)
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
        values = torch.cat([moved[0, at[-1], s.value] for s in base.layout.layers])
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
    student = TrainableConcept(
        base, Teach(name="t", category="cat"), category_encoding(base, "cat"), identity(base).inverse
    )
    start = student.i_star.clone()
    e = torch.ones_like(start)
    student.update_i_star(e)
    assert torch.allclose(student.i_star, 0.99 * start + 0.01)


def test_values_start_at_the_category(bases: dict[str, Base], photos: list[Photo]) -> None:
    """o*_V starts as W_V e_category: delta is zero; and no weight decay pulls it back later."""
    base = bases["sd15"]
    recipe = Teach(name="tom", category="cat", mode="gated", batch=2)
    student = TrainableConcept(base, recipe, category_encoding(base, "cat"), identity(base).inverse)
    assert student.delta.abs().max() == 0
    trainer, _ = trainer_of(student, photos)
    list(trainer.train(lambda ctx, _: {"loss": student.delta.square().sum()}))
    assert all(g["weight_decay"] == 0 for g in trainer.optimizer.param_groups)
    assert [g["lr"] for g in trainer.optimizer.param_groups] == [0.03, 0.006]


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
        if base.prediction_type == "v_prediction":
            x0 = abar.sqrt() * b.x_t - (1 - abar).sqrt() * b.target
        latents = prepared.latents.flatten(0, 1)
        nearest = (x0[:, None] - latents[None]).abs().amax((2, 3, 4)).amin(1)
        assert nearest.max() < 2e-2


def trainer_of(concept: TrainableConcept, photos: list[Photo], steps: int = 1) -> tuple[Trainer, Batches]:
    """The trainer that `teach` would use, for so many steps, and the batches."""
    base, recipe = concept.base, concept.recipe.model_copy(update={"steps": steps})
    trainer = Trainer(
        None, concept, training._config(base, recipe, 25), device=base.device, stage="teaching",
        groups=concept.param_groups(),
    )  # fmt: skip
    return trainer, Batches(base, prepare(base, photos, recipe), recipe)


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


@pytest.mark.parametrize("where", ["loss", "weights"])
def test_a_roll_back_restores_the_whole_concept(
    bases: dict[str, Base], photos: list[Photo], monkeypatch: Any, where: str
) -> None:
    """NaN from step 3 on, in every loss or left in the weights by one step: values, words and i* are again
    those of the last checkpoint, step 0, and training goes on at half the learning rate with other batches."""
    base = bases["sd15"]
    recipe = Teach(name="tom", category="cat", mode="gated", batch=2)
    concept = TrainableConcept(base, recipe, category_encoding(base, "cat"), identity(base).inverse)
    trainer, batches = trainer_of(concept, photos, steps=12)
    start = {k: v.clone() for k, v in concept.state_dict().items()}
    restored: list[dict[str, Any]] = []
    loss, update, roll_back = TrainableConcept.loss, TrainableConcept.update_i_star, Trainer._roll_back

    def fails() -> bool:
        return trainer.state.rollbacks == 0 and trainer.state.step >= 3

    def failing(self: TrainableConcept, batch: Any) -> Any:
        value, e = loss(self, batch)
        return (value * float("nan") if fails() and where == "loss" and value.requires_grad else value), e

    def overflowing(self: TrainableConcept, e_concept: Any) -> None:
        update(self, e_concept)
        if fails() and where == "weights":
            with torch.no_grad():
                self.delta.fill_(float("nan"))

    def rolled_back(self: Trainer, step: int) -> Any:
        note = roll_back(self, step)
        restored.append({k: v.clone() for k, v in concept.state_dict().items()})
        return note

    monkeypatch.setattr(TrainableConcept, "loss", failing)
    monkeypatch.setattr(TrainableConcept, "update_i_star", overflowing)
    monkeypatch.setattr(Trainer, "_roll_back", rolled_back)
    with base.frozen():
        list(training._train(trainer, concept, batches, None))
    s = trainer.state
    assert (len(restored), s.rollbacks, s.lr_scale, s.step, s.skipped) == (1, 1, 0.5, 12, 5)
    assert all(torch.equal(v, restored[0][k]) for k, v in start.items())
    assert checkpoints.is_finite(concept)
    assert not torch.equal(batches.at(3).x_t, batches.at(3, rollbacks=1).x_t)


def test_hopeless_run_fails_clearly(bases: dict[str, Base], photos: list[Photo], monkeypatch: Any) -> None:
    monkeypatch.setattr(TrainableConcept, "loss", lambda self, _: (self.delta.sum() * float("nan"), None))
    with pytest.raises(Diverged, match=r"teaching diverged at step .*lower learning rate.*--dtype float32"):
        run(bases["sd15"], photos, steps=50)


@pytest.mark.parametrize("fixed", [False, True])
def test_stops_by_itself_with_the_best_state_unless_steps_are_fixed(
    bases: dict[str, Base], photos: list[Photo], monkeypatch: Any, fixed: bool
) -> None:
    """An evaluation every 10 steps; the plateau of six and its 0.4 % are `teach`'s own."""
    base = bases["sd15"]
    budget = {"steps": 20} if fixed else {"max_steps": 20}
    recipe = Teach(name="tom", category="cat", mode="gated", batch=2, **budget)
    config = training._config(base, recipe, 25)
    assert (config.evaluate_steps, config.patience, config.min_gain) == (10, None if fixed else 6, 0.004)
    values, states = iter((1.0, 2.0)), []
    loss = TrainableConcept.loss

    def evaluated(self: TrainableConcept, batch: Any) -> Any:
        if torch.is_grad_enabled():
            return loss(self, batch)
        states.append({k: v.clone() for k, v in self.state_dict().items()})
        return torch.tensor(next(values)), None

    monkeypatch.setattr(Batches, "evaluation", lambda self: [None])
    monkeypatch.setattr(TrainableConcept, "loss", evaluated)
    done = run(base, photos, **budget)
    assert (done.facts["best_step"], done.facts["evaluation"]) == (10, [1.0, 2.0])
    assert not torch.equal(states[0]["i_star"], states[1]["i_star"])
    assert torch.equal(done.result.i_star, states[1 if fixed else 0]["i_star"])
    values = torch.cat(list(done.result.delta.values()))
    assert torch.equal(values, states[1 if fixed else 0]["delta"])


def test_mask_weights_the_loss_once(bases: dict[str, Base], photos: list[Photo]) -> None:
    """Mask times squared error, not (Mask times error) squared as in CDY."""
    base = bases["sd15"]
    recipe = Teach(name="tom", category="cat", mode="gated", batch=2)
    student = TrainableConcept(base, recipe, category_encoding(base, "cat"), identity(base).inverse)
    b = Batches(base, prepare(base, photos, recipe), recipe).at(0)
    with torch.no_grad():
        full = float(student.loss(replace(b, mask=torch.ones_like(b.mask)))[0])
        half = float(student.loss(replace(b, mask=0.5 * torch.ones_like(b.mask)))[0])
    assert abs(half - 0.5 * full) < 1e-5 * full


@pytest.mark.parametrize("mode", ["value", "gated"])
def test_prior_weight_preserves_what_is_around_the_subject(
    bases: dict[str, Base], photos: list[Photo], monkeypatch: Any, mode: str
) -> None:
    """Masked error, plus prior_weight times the squared distance from the plain prediction outside the mask."""
    base = bases["sd15"]
    recipes = [Teach(name="tom", category="cat", batch=2, mode=mode, prior_weight=k) for k in (0.0, 0.5)]
    c = identity(base).inverse if mode == "gated" else None
    off, on = (TrainableConcept(base, r, category_encoding(base, "cat"), c) for r in recipes)
    b = Batches(base, prepare(base, photos, recipes[0]), recipes[0]).at(0)
    b = replace(b, mask=torch.linspace(0, 1, b.mask.numel()).view_as(b.mask))
    with torch.no_grad():
        for student in (off, on):
            student.delta += 0.3
        mine, _, _ = on.condition(b.prompts)
        plain = base.pack(base.encode(b.prompts).e)
        moved = base.denoiser(b.x_t, b.t, mine).sample - base.denoiser(b.x_t, b.t, plain).sample
        around = float((moved.square() * (1 - b.mask)).mean())
        assert around > 1e-7
        assert float(on.loss(b)[0]) == pytest.approx(float(off.loss(b)[0]) + 0.5 * around, rel=1e-4)
        calls: list[int] = []
        forward = base.denoiser.forward
        monkeypatch.setattr(base.denoiser, "forward", lambda *a, **k: calls.append(1) or forward(*a, **k))
        on.loss(b)
        on.loss(replace(b, mask=torch.ones_like(b.mask)))
        off.loss(b)
        assert len(calls) == 2 + 1 + 1  # nothing around it, nothing to preserve: no second call


def test_the_modes_defaults() -> None:
    """Each mode has its learning rate and weight; an explicit option stands."""
    row, gated = (Teach.make(name="tom", category="cat", mode=m) for m in (None, "gated"))
    assert (row.mode, row.value_lr, row.prior_weight, row.max_steps) == ("value", 0.1, 0.2, 300)
    assert (gated.mode, gated.value_lr, gated.prior_weight, gated.max_steps) == ("gated", 0.03, 0.0, 400)
    explicit = Teach.make(name="tom", category="cat", mode="gated", prior_weight=0.2, value_lr=0.05)
    assert (explicit.value_lr, explicit.prior_weight) == (0.05, 0.2)


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
    assert {word: text for word in EVERYDAY + RARER if (text := unknown_word_warning(clip, word))} == {}
    words = [*EVERYDAY, *vocabulary.CATEGORIES]
    assert {word: text for word in words if (text := unknown_word_warning(tiny, word))} == {}
    for base in (clip, tiny):
        for word in NONSENSE:
            assert "so it probably does not know it" in unknown_word_warning(base, word), word
    assert all(unknown_word_warning(tiny, word) for word in ("plushie", "corgi", "labradoodle"))
    text = unknown_word_warning(clip, "red qwzrt")
    assert "'qwzrt' (4 tokens)" in text and "red" not in text[:110]


def test_teaching_says_it(bases: dict[str, Base], photos: list[Photo]) -> None:
    def warnings(category: str) -> list[events.Event]:
        recipe = Teach(name="tom", category=category, batch=2, mode="value", steps=1)
        return [
            e for e in teach(bases["sd15"], photos, recipe, None) if isinstance(e, events.Note) and e.warning
        ]

    (warning,) = warnings("qwzrt")
    assert isinstance(warning, events.Note) and "such as 'cat' or 'teddy bear'" in warning.text
    assert warnings("cat") == []
