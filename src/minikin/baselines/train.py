"""Photos to what a baseline makes of them: Minikin's own photos, noise, templates and loop.

    for event in teach(base, photos, Baseline.make(method="dreambooth-lora", ...), Path("out")): ...

Writes below `out`: the files other tools read, baseline.json, log.jsonl and curve.png; and a checkpoint
while the run is not finished. The loop is `Run`: seeded by step, resumable bit for bit, and Ctrl-C saves.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from minikin import events
from minikin.baselines import methods
from minikin.baselines.class_images import class_pictures, prompt
from minikin.baselines.method import Method
from minikin.baselines.result import Learned, token_ids
from minikin.baselines.student import CHECKPOINTING_FROM, Student
from minikin.distillation.student import Learner, trained
from minikin.errors import BadPhoto, BadRecipe
from minikin.images.photos import Photo
from minikin.models.base import Base
from minikin.models.prompt import Prompt, parse
from minikin.perfusion.concept import check_category, check_name
from minikin.perfusion.objective import Batch
from minikin.perfusion.train import Batches, Prepared, prepare
from minikin.perfusion.train import check as check_base
from minikin.recipes import Baseline, Teach
from minikin.training.plan import Plan, Turn
from minikin.training.run import Group, Run

# of a recipe: what may change between a run and its resumption
FREE = {"base", "name", "steps", "accumulation", "class_pictures", "save_minutes", "device"}

Look = Callable[[int, Learned], None]


def teach(
    base: Base, photos: Sequence[Photo], recipe: Baseline, out: Path, *, resume: bool = False,
    look: Look | None = None, look_at: Sequence[int] = (),
) -> Iterator[events.Event]:  # fmt: skip
    """Teach by a baseline; the last event is Done with what was `Learned`.

    resume   go on from the checkpoint in `out`; without it a run there is an error
    look     is called after the steps in `look_at` with the step and what has been learned so far
    Ctrl-C saves a checkpoint, then raises KeyboardInterrupt.
    Raises UnknownName, BadRecipe, BadPhoto, Diverged, OutOfMemory, StorageError.
    """
    r = recipe.settled(base.architecture == "tiny")
    word = check(base, photos, r)
    yield from _earlier(out, resume)
    method = methods.method(r.method)
    painted = yield from _class_pictures(base, r)
    started = time.monotonic()
    with base.frozen():
        phrase = method.phrase(word, r.category)
        own = _taught(base, photos, r, method, phrase, word)
        classes = _of_the_category(base, painted, r) if painted else None
        student = method.student(base, r, word)
        if own.latents.shape[-1] * base.factor >= CHECKPOINTING_FROM:
            student.unet.enable_gradient_checkpointing()
        n_trained = sum(p.numel() for p in trained(student))
        yield events.Note(f"{r.method}: {n_trained:,} numbers, {len(photos)} photos as '{phrase}'.")

        def result(step: int) -> Learned:
            facts = {**r.model_dump(mode="json", exclude=FREE), "steps": step, "photos": len(photos)}
            parts = vars(method.kept(student))
            return Learned(r.method, r.name, r.category, word, phrase, base.origin, facts=facts, **parts)

        def after(turn: Turn) -> None:
            if look and turn.step + 1 in look_at:
                look(turn.step + 1, result(turn.step + 1))

        run = Run(
            out, Learner({"student": student}), _plan(r), device=base.device, stage=r.method,
            groups=[Group(trained(student), r.rate or 0.0, r.clip)],
            facts=_identity(base, r, word, own, classes),
        )  # fmt: skip
        loss = _loss(base, method, student, own, classes, r)
        try:
            yield from run.train(loss, after=after)
        except KeyboardInterrupt:
            yield events.Note(f"{r.method}: stopped after step {run.state.step}; go on with --resume.")
            raise
        learned = result(run.state.step)
    files = methods.save(base, learned, out)
    run.path.unlink(missing_ok=True)
    preparing = time.monotonic() - started - run.state.seconds
    yield events.Done(
        learned, _costs(base, r, run, files) | {"preparing": round(preparing, 2), "trained": n_trained}
    )


def _class_pictures(base: Base, r: Baseline) -> Generator[events.Event, None, list[Photo]]:
    """The base's own images of the category, where the method preserves it."""
    painted: list[Photo] = []
    if r.prior:
        assert r.class_pictures is not None
        for event in class_pictures(base, r.category, r.class_pictures):
            if isinstance(event, events.Done):
                painted = event.result
            else:
                yield event
    return painted


def _costs(base: Base, r: Baseline, run: Run, files: Sequence[Path]) -> dict[str, Any]:
    """What a finished run took, and what it wrote."""
    return {
        "steps": run.state.step, "seconds": round(run.state.seconds, 2), "skipped": run.state.skipped,
        "files": [str(f) for f in files], "bytes": sum(f.stat().st_size for f in files),
        "sizes": methods.size_table(r.method, base, r.rank),
    }  # fmt: skip


def check(base: Base, photos: Sequence[Photo], recipe: Baseline) -> str:
    """The rare word of this recipe on this base; raises BadPhoto or BadRecipe when it cannot be taught."""
    if not photos:
        raise BadPhoto("There are no photos. Give a folder with 3 to 6 images of the same thing.")
    check_name(recipe.name)
    check_category(recipe.category)
    check_base(base, _as_teach(recipe))
    if recipe.prior and recipe.method == "textual-inversion":
        raise BadRecipe(
            "Textual inversion leaves the category as it is and has no prior loss; leave --prior out."
        )
    if recipe.word is not None:
        token_ids(base, recipe.word)
        return recipe.word
    for word in methods.method(recipe.method).rare:
        if all(len(t(word, add_special_tokens=False).input_ids) == 1 for t in base.tokenizers):
            return word
    raise BadRecipe(
        f"None of the usual rare words is one token of '{base.name}'. Give --word one that is, and that means "
        "nothing to this base."
    )


def _earlier(out: Path, resume: bool) -> Iterator[events.Note]:
    begun = (out / "checkpoint.safetensors").exists()
    if (begun and not resume) or (out / methods.CARD).exists():
        how = "Go on with it by --resume, or choose" if begun else "Choose"
        raise BadRecipe(f"{out} holds an earlier run. {how} another --out to start anew.")
    if resume and not begun:
        yield events.Note(f"There is no checkpoint in {out}; starting anew.", warning=True)


# ---- data -----------------------------------------------------------------------------------------


def _as_teach(r: Baseline, **other: Any) -> Teach:
    """The part of the recipe that prepares photos and draws batches, in the words of Minikin's own."""
    keep = ("name", "category", "batch", "mask", "flip", "size", "seed")
    made: Teach = Teach.make(**{k: getattr(r, k) for k in keep} | other)
    return made


def _taught(
    base: Base, photos: Sequence[Photo], r: Baseline, method: Method, phrase: str, word: str
) -> Prepared:  # fmt: skip
    """The photos, with the method's phrase where their captions or its templates name the concept."""
    if r.mask == "none":
        photos = [replace(p, mask=None) for p in photos]
    if not r.captions:
        photos = [replace(p, caption="") for p in photos]
    prepared = prepare(base, photos, _as_teach(r))
    templates = [t.replace("{}", f"<{r.name}>", 1) for t in method.templates]
    sources = [[ps[0].source] if len(ps) == 1 else templates for ps in prepared.prompts]
    return replace(prepared, prompts=[[_placed(s, r.name, phrase, word) for s in own] for own in sources])


def _placed(source: str, name: str, phrase: str, word: str) -> Prompt:
    """The prompt in which the phrase stands for <name>, and the use is the rare word alone."""
    made = parse(source, {name: phrase})
    return replace(made, uses=tuple(replace(u, end=u.start + len(word)) for u in made.uses))


def _of_the_category(base: Base, painted: Sequence[Photo], r: Baseline) -> Prepared:
    prepared = prepare(base, painted, _as_teach(r, mask="none"))
    return replace(prepared, prompts=[[parse(prompt(r.category), {})]] * len(painted))


def _loss(
    base: Base, method: Method, student: Student, own: Prepared, classes: Prepared | None, r: Baseline
) -> Callable[[Turn, Any], dict[str, Tensor]]:  # fmt: skip
    def loss(turn: Turn, _data: Any) -> dict[str, Tensor]:
        photos = _rows(Batches(base, own, _as_teach(r, batch=turn.size)).at(turn.step), turn.rows)
        others = None
        if classes is not None:  # another seed: not the noise of the photos
            drawn = Batches(base, classes, _as_teach(r, batch=turn.size, seed=(r.seed + 1) % 2**32))
            others = _rows(drawn.at(turn.step), turn.rows)
        return method.loss(student, photos, others, r.prior or 0.0)

    return loss


def _rows(b: Batch, rows: slice) -> Batch:
    return Batch(b.x_t[rows], b.t[rows], b.target[rows], b.mask[rows], b.prompts[rows])


# ---- the run --------------------------------------------------------------------------------------


def _plan(r: Baseline) -> Plan:
    plan: Plan = Plan.make(
        steps=r.steps, batch=r.batch, accumulation=r.accumulation, rate=r.rate, betas=(0.9, 0.999),
        weight_decay=r.weight_decay, warmup=0, decay=0.0, ema=0.0, clip=r.clip, bf16=False, seed=r.seed,
        log_steps=10, save_minutes=r.save_minutes,
    )  # fmt: skip
    return plan


def _identity(base: Base, r: Baseline, word: str, own: Prepared, classes: Prepared | None) -> dict[str, Any]:
    """What must be the same for a run to be resumed, besides its plan."""
    data = hashlib.sha256()
    for prepared in (own, classes):
        if prepared is not None:
            for t in (prepared.latents, prepared.masks):
                data.update(t.cpu().numpy().tobytes())
            data.update(repr([[p.text for p in ps] for ps in prepared.prompts]).encode())
    settings = r.model_dump(mode="json", exclude=FREE)
    return {**settings, "word": word, "base": base.fingerprint, "text_encoder": base.text_hash,
            "data": data.hexdigest()}  # fmt: skip
