"""Photos to a baseline's result, with the photos, noise, templates and training loop of concepts.

    for event in teach(base, photos, Baseline.make(method="dreambooth-lora", ...), Path("out")): ...

Writes below `out`: the files other tools read, baseline.json, log.jsonl and curve.png; and a checkpoint
while the run is not finished. The loop is `Trainer`: seeded by step, resumable bit for bit, and Ctrl-C saves.
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
from minikin.baselines.class_images import class_images, prompt
from minikin.baselines.method import Method
from minikin.baselines.result import BaselineResult, token_ids
from minikin.baselines.student import CHECKPOINTING_FROM, Student
from minikin.errors import BadPhoto, BadRecipe
from minikin.images.photos import Photo
from minikin.models.base import Base
from minikin.models.prompt import Prompt, parse
from minikin.perfusion.concept import check_category, check_name
from minikin.perfusion.objective import Batch
from minikin.perfusion.train import (
    Batches,
    Prepared,
    photos_digest,
    prepare,
    unused_captions,
    unverified_note,
)
from minikin.perfusion.train import check as check_base
from minikin.recipes import Baseline, Teach
from minikin.training.config import StepContext, TrainingConfig
from minikin.training.networks import TrainableNetworks, trainable_parameters
from minikin.training.trainer import CHECKPOINT, ParamGroup, Trainer

# options that may change between a run and its resumption
FREE = {"base", "name", "steps", "accumulation", "class_images", "save_minutes", "device"}

Snapshot = Callable[[int, BaselineResult], None]


def teach(
    base: Base, photos: Sequence[Photo], recipe: Baseline, out: Path, *, resume: bool = False,
    snapshot: Snapshot | None = None, snapshot_steps: Sequence[int] = (),
) -> Iterator[events.Event]:  # fmt: skip
    """Teach by a baseline; the last event is Done with the `BaselineResult`.

    resume    go on from the checkpoint in `out`; without it a run there is an error
    snapshot  is called after the steps in `snapshot_steps` with the step and the result so far
    Ctrl-C saves a checkpoint, then raises KeyboardInterrupt.
    Raises UnknownName, BadRecipe, BadPhoto, Diverged, OutOfMemory, StorageError.
    """
    r = recipe.resolved(base.architecture == "tiny")
    word = check(base, photos, r)
    yield from _check_folder(out, resume)
    method = methods.method(r.method)
    class_photos = yield from _class_images(base, r)
    started = time.monotonic()
    with base.frozen():
        phrase = method.phrase(word, r.category)
        prepared = _prepare_photos(base, photos, r, method, phrase, word)
        classes = _prepare_classes(base, class_photos, r) if class_photos else None
        student = method.student(base, r, word)
        if prepared.latents.shape[-1] * base.vae_scale_factor >= CHECKPOINTING_FROM:
            student.unet.enable_gradient_checkpointing()
        n_trained = sum(p.numel() for p in trainable_parameters(student))
        yield events.Note(f"{r.method}: {n_trained:,} numbers, {len(photos)} photos as '{phrase}'.")
        if r.captions and (warning := unused_captions(photos, _as_teach(r))):
            yield events.Note(warning, warning=True)

        def result(step: int) -> BaselineResult:
            facts = {**r.model_dump(mode="json", exclude=FREE), "steps": step, "photos": len(photos)}
            tensors = vars(method.tensors(student))
            return BaselineResult(
                r.method, r.name, r.category, word, phrase, base.origin, facts=facts, **tensors
            )

        def after(ctx: StepContext) -> None:
            if snapshot and ctx.step + 1 in snapshot_steps:
                snapshot(ctx.step + 1, result(ctx.step + 1))

        trainer = Trainer(
            out, TrainableNetworks({"student": student}), _config(r), device=base.device, stage=r.method,
            groups=[ParamGroup(trainable_parameters(student), r.lr or 0.0, r.clip)],
            facts=_identity(base, r, word, prepared), former_facts=_former_identity(prepared, classes),
        )  # fmt: skip
        if trainer.unverified:
            yield events.Note(unverified_note(out), warning=True)
        loss = _loss(base, method, student, prepared, classes, r)
        try:
            yield from trainer.train(loss, after=after)
        except KeyboardInterrupt:
            yield events.Note(f"{r.method}: stopped after step {trainer.state.step}; go on with --resume.")
            raise
        final = result(trainer.state.step)
    files = methods.save(base, final, out)
    (out / CHECKPOINT).unlink(missing_ok=True)
    preparing = time.monotonic() - started - trainer.state.seconds
    yield events.Done(
        final, _costs(base, r, trainer, files) | {"preparing": round(preparing, 2), "trained": n_trained}
    )


def _class_images(base: Base, r: Baseline) -> Generator[events.Event, None, list[Photo]]:
    """Generate the class images, for methods with prior preservation."""
    photos: list[Photo] = []
    if r.prior:
        assert r.class_images is not None
        for event in class_images(base, r.category, r.class_images):
            if isinstance(event, events.Done):
                photos = event.result
            else:
                yield event
    return photos


def _costs(base: Base, r: Baseline, trainer: Trainer, files: Sequence[Path]) -> dict[str, Any]:
    """Steps, time and files of a finished run."""
    s = trainer.state
    return {
        "steps": s.step, "seconds": round(s.seconds, 2), "skipped": s.skipped,
        "files": [str(f) for f in files], "bytes": sum(f.stat().st_size for f in files),
        "sizes": methods.size_table(r.method, base, r.rank),
    }  # fmt: skip


def check(base: Base, photos: Sequence[Photo], recipe: Baseline) -> str:
    """The rare word of this recipe on this base; raises BadPhoto or BadRecipe when it cannot be taught."""
    if not photos:
        raise BadPhoto("There are no photos. Give a folder with 3 to 6 images of the same thing.")
    base.require_unet(f"Baseline {recipe.method}")
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


def _check_folder(out: Path, resume: bool) -> Iterator[events.Note]:
    """Raise BadRecipe when `out` holds an earlier run that is not to be resumed."""
    exists = (out / CHECKPOINT).exists()
    if (exists and not resume) or (out / methods.CARD).exists():
        how = "Go on with it by --resume, or choose" if exists else "Choose"
        raise BadRecipe(f"{out} holds an earlier run. {how} another --out to start anew.")
    if resume and not exists:
        yield events.Note(f"There is no checkpoint in {out}; starting anew.", warning=True)


# ---- data -----------------------------------------------------------------------------------------


def _as_teach(r: Baseline, **other: Any) -> Teach:
    """The options for photos and batches, as a recipe of concept training."""
    shared = ("name", "category", "batch", "mask", "flip", "size", "seed")
    recipe: Teach = Teach.make(**{k: getattr(r, k) for k in shared} | other)
    return recipe


def _prepare_photos(
    base: Base, photos: Sequence[Photo], r: Baseline, method: Method, phrase: str, word: str
) -> Prepared:  # fmt: skip
    """The photos; in captions and templates the method's phrase stands for the concept."""
    if r.mask == "none":
        photos = [replace(p, mask=None) for p in photos]
    if not r.captions:
        photos = [replace(p, caption="") for p in photos]
    prepared = prepare(base, photos, _as_teach(r))
    templates = [t.replace("{}", f"<{r.name}>", 1) for t in method.templates]
    sources = [[ps[0].source] if len(ps) == 1 else templates for ps in prepared.prompts]
    return replace(prepared, prompts=[[_place(s, r.name, phrase, word) for s in group] for group in sources])


def _place(source: str, name: str, phrase: str, word: str) -> Prompt:
    """The prompt in which the phrase stands for <name>, and the use is the rare word alone."""
    parsed = parse(source, {name: phrase})
    return replace(parsed, uses=tuple(replace(u, end=u.start + len(word)) for u in parsed.uses))


def _prepare_classes(base: Base, class_photos: Sequence[Photo], r: Baseline) -> Prepared:
    prepared = prepare(base, class_photos, _as_teach(r, mask="none"))
    return replace(prepared, prompts=[[parse(prompt(r.category), {})]] * len(class_photos))


def _loss(
    base: Base, method: Method, student: Student, prepared: Prepared, classes: Prepared | None, r: Baseline
) -> Callable[[StepContext, Any], dict[str, Tensor]]:  # fmt: skip
    """The method's loss on the batch of a step."""
    batches = Batches(base, prepared, _as_teach(r))
    # another seed: not the noise of the photos
    class_batches = classes and Batches(base, classes, _as_teach(r, seed=(r.seed + 1) % 2**32))

    def loss(ctx: StepContext, _data: Any) -> dict[str, Tensor]:
        size, rollbacks = ctx.batch_size, ctx.rollbacks
        photos = _rows(batches.at(ctx.step, size, rollbacks), ctx.rows)
        others = _rows(class_batches.at(ctx.step, size, rollbacks), ctx.rows) if class_batches else None
        return method.loss(student, photos, others, r.prior or 0.0)

    return loss


def _rows(b: Batch, rows: slice) -> Batch:
    return Batch(b.x_t[rows], b.t[rows], b.target[rows], b.mask[rows], b.prompts[rows])


# ---- the run --------------------------------------------------------------------------------------


def _config(r: Baseline) -> TrainingConfig:
    config: TrainingConfig = TrainingConfig.make(
        steps=r.steps, batch=r.batch, accumulation=r.accumulation, lr=r.lr, betas=(0.9, 0.999),
        weight_decay=r.weight_decay, warmup=0, decay=0.0, ema=0.0, clip=r.clip, bf16=False, seed=r.seed,
        log_steps=10, save_minutes=r.save_minutes,
    )  # fmt: skip
    return config


def _identity(base: Base, r: Baseline, word: str, prepared: Prepared) -> dict[str, Any]:
    """Facts that must be equal for a run to be resumed, besides its configuration.

    They hold on every machine; class images, which the base generates, are known by the settings.
    """
    settings = r.model_dump(mode="json", exclude=FREE)
    return {**settings, "word": word, "base": base.fingerprint, "text_encoder": base.text_hash,
            "pixels": photos_digest(prepared)}  # fmt: skip


def _former_identity(prepared: Prepared, classes: Prepared | None) -> dict[str, Any]:
    """The fact of checkpoints written before `photos_digest`, which other machines compute otherwise."""
    data = hashlib.sha256()
    for part in (prepared, classes):
        if part is not None:
            for t in (part.latents, part.masks):
                data.update(t.cpu().numpy().tobytes())
            data.update(repr([[p.text for p in ps] for ps in part.prompts]).encode())
    return {"data": data.hexdigest()}
