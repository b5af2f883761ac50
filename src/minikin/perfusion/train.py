"""Photos to a concept: prepare what does not change, then train.

Every step draws its images, noise and timesteps from (seed, step) alone. A fixed evaluation set decides when
the concept has been learned and which step was best (DVAR: Voronov et al. 2023, arXiv:2302.04841); the loop
itself is training/trainer.py.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from minikin import events
from minikin.errors import BadRecipe, Diverged, OutOfMemory
from minikin.images import xmp
from minikin.images.photos import Fit, Photo, fitted
from minikin.models.base import Base
from minikin.models.distilled import refuse_student
from minikin.models.loading.lock import opening
from minikin.models.memory import is_out_of_memory
from minikin.models.prompt import Prompt
from minikin.perfusion import masks as masking
from minikin.perfusion.category import unknown_word_warning
from minikin.perfusion.concept import FILE_MODES, Concept
from minikin.perfusion.covariance import Covariance
from minikin.perfusion.key_lock import TEMPLATES, category_encoding, prompt_for
from minikin.perfusion.objective import Batch, TrainableConcept
from minikin.recipes import Teach
from minikin.recipes.teach import MODE_NOTES
from minikin.training.trainer import StepContext, Trainer, TrainingConfig

EVALUATION = 16  # fixed (photo, noise, timestep) triples
EVALUATE_STEPS = 10
PATIENCE = 6  # evaluations
MIN_GAIN = 0.004  # relative gain of the last PATIENCE evaluations below which training has converged
FP16_LOSS_SCALE = 2.0**14  # gradients of a mean over 10^5 numbers vanish in float16
SAVE_STEPS = 25


@dataclass(frozen=True)
class Prepared:
    """Latents, masks and prompts of the photos, computed once.

    latents  (P, 2, C, h, w)  as they are, and mirrored
    masks    (P, 2, 1, h, w)
    prompts  per photo, the prompts it may be trained with
    """

    fits: Sequence[Fit]
    latents: Tensor
    masks: Tensor
    prompts: Sequence[Sequence[Prompt]]


def prepare(base: Base, photos: Sequence[Photo], recipe: Teach) -> Prepared:
    """Encode the photos and find the subject in them. Raises BadRecipe for a size the base cannot have."""
    side = recipe.size or base.size_px
    if side % (8 * base.vae_scale_factor) and side % 64:
        raise BadRecipe(f"size must be a multiple of 64 pixels, but it is {side}.")
    fits = [fitted(p, side) for p in photos]
    pixels = torch.stack([torch.from_numpy(f.pixels) for f in fits]).permute(0, 3, 1, 2)
    both = torch.stack([pixels, pixels.flip(-1)], 1).float() / 127.5 - 1  # (P, 2, 3, H, W)
    latents = torch.cat([base.to_latents(x).float() for x in torch.split(both.flatten(0, 1), 2)])
    latents = latents.view(len(fits), 2, *latents.shape[1:])
    masks = masking.subject_masks(base, fits, latents[:, 0], recipe.category, recipe.mask)
    masks = torch.stack([masks, masks.flip(-1)], 1).unsqueeze(2)
    return Prepared(fits, latents, masks.to(latents), [_prompts(p, recipe) for p in photos])


def _prompts(photo: Photo, recipe: Teach) -> list[Prompt]:
    """The photo's caption with the concept in the place of its name or category, or else the templates."""
    caption = re.sub(r"[<>()\[\]\\]", " ", photo.caption.replace(f"<{recipe.name}>", "{}"))
    if "{}" not in caption:
        caption = re.sub(rf"\b(an? )?{re.escape(recipe.category)}\b", "{}", caption, count=1)
    if caption.count("{}") == 1:
        return [prompt_for(caption, recipe.name, recipe.category)]
    return [prompt_for(t, recipe.name, recipe.category) for t in TEMPLATES]


def unused_captions(photos: Sequence[Photo], recipe: Teach) -> str:
    """A warning that quotes the captions which `_prompts` passes over; "" where it passes over none."""
    unused = [p.caption for p in photos if p.caption.strip() and len(_prompts(p, recipe)) > 1]
    if not unused:
        return ""
    quoted = ", ".join(f"'{caption[:60]}'" for caption in unused[:3])
    others = f" and {len(unused) - 3} more" if len(unused) > 3 else ""
    return (
        f"These captions are not used, since they do not say '{recipe.category}', or <{recipe.name}> once: "
        f"{quoted}{others}. Add the word, or leave them out."
    )


class Batches:
    """Deterministic batches: those of step `k` depend on (seed, k) alone."""

    def __init__(self, base: Base, prepared: Prepared, recipe: Teach) -> None:
        self.base, self.p, self.recipe = base, prepared, recipe
        self.schedule, self.n_train = base.schedule, base.schedule.n_train

    def at(self, step: int, size: int | None = None, rollbacks: int = 0) -> Batch:
        """The batch of a step (from 0); after a roll-back it is another one."""
        g = torch.Generator().manual_seed((self.recipe.seed << 20) + (rollbacks << 18) + step + 1)
        n = size or self.recipe.batch
        photo = torch.randint(len(self.p.fits), (n,), generator=g)
        mirrored = torch.randint(2, (n,), generator=g) * int(self.recipe.flip)
        # one timestep from each n-th of the range: uniform, with less variance
        t = ((torch.arange(n) + torch.rand(n, generator=g)) / n * self.n_train).long()
        choice = torch.randint(10_000, (n,), generator=g).tolist()
        return self._batch(photo, mirrored, t.clamp(max=self.n_train - 1), choice, g)

    def evaluation(self) -> list[Batch]:
        """The fixed triples of photo, noise and timestep, in batches of the training size."""
        g = torch.Generator().manual_seed(20_23)
        out, size = [], min(self.recipe.batch, EVALUATION)
        times = ((torch.arange(EVALUATION) + 0.5) / EVALUATION * self.n_train).long()
        for i in range(0, EVALUATION, size):
            k = torch.arange(i, min(i + size, EVALUATION))
            photo, mirrored = k % len(self.p.fits), torch.zeros_like(k)
            spread = times[(k * 5) % EVALUATION]  # every batch sees all noise levels
            out.append(self._batch(photo, mirrored, spread, k.tolist(), g))
        return out

    def _batch(
        self, photo: Tensor, mirrored: Tensor, t: Tensor, choice: list[int], g: torch.Generator
    ) -> Batch:
        x0 = self.p.latents[photo, mirrored]
        mask = self.p.masks[photo, mirrored]
        eps = torch.randn(x0.shape, generator=g).to(x0)
        t = self.schedule.timesteps(t).to(x0.device)
        x_t, target = self.schedule.noised(x0, eps, t), self.schedule.target(x0, eps, t)
        choices = [self.p.prompts[i] for i in photo.tolist()]
        prompts = [ps[c % len(ps)] for ps, c in zip(choices, choice, strict=True)]
        return Batch(x_t, t, target, mask, prompts)


def teach(
    base: Base, photos: Sequence[Photo], recipe: Teach, c: Covariance | None, *,
    checkpoint: Path | None = None, resume: bool = False, save_every: int = SAVE_STEPS,
    stop: Event | None = None, sample: Callable[[Concept], Image.Image] | None = None,
) -> Iterator[events.Event]:  # fmt: skip
    """Teach; the last event is `Done` with the Concept. Interrupting leaves a usable concept.

    Yields Note, Progress, and ImageReady for the mask overlay and the samples.
    checkpoint  where to keep the state of the run; with `resume`, where to go on from
    stop        ends teaching after the step at hand when it is set; signals are the caller's to handle
    sample      paints an image with the concept as it stands, every `recipe.sample_every` steps
    Raises BadRecipe, AssetError, Diverged, OutOfMemory, StorageError.
    """
    with base.frozen(), _save_memory(base, recipe):
        started = time.monotonic()
        check(base, recipe)
        yield events.Note(MODE_NOTES[recipe.mode])
        prepared = prepare(base, photos, recipe)
        yield from _about_photos(base, photos, prepared, recipe)
        category = category_encoding(base, recipe.category)
        with opening():
            concept = TrainableConcept(base, recipe, category, c.inverse if c else None)
        record = _record(recipe, len(photos), c)
        trainer = Trainer(
            None, concept, _config(base, recipe, save_every), device=base.device, stage="teaching",
            groups=concept.param_groups(), path=checkpoint, resume=resume,
            facts=Teach.current(record) | _identity(base, prepared, recipe, c),
            former_facts=_former_identity(prepared, c),
        )  # fmt: skip
        if trainer.unverified:
            yield events.Note(unverified_note(checkpoint), warning=True)
        if resume and not trainer.resumed:
            yield events.Note(f"There is no checkpoint at {checkpoint}; starting anew.", warning=True)
        c_hash = c.hash if c else ""
        for event in _train(trainer, concept, Batches(base, prepared, recipe), stop):
            yield event
            step = event.done if isinstance(event, events.Progress) else 0
            if sample and step and recipe.sample_every and step % recipe.sample_every == 0:
                yield events.ImageReady(sample(concept.to_concept(c_hash, record)), f"step-{step:04d}")
        trainer.restore_best()
        s = trainer.state
        measured = {
            "steps": s.step, "best_step": s.best_step or s.step, "interrupted": trainer.interrupted,
            "seconds": round(time.monotonic() - started, 2), "evaluation": [round(v, 5) for v in s.history],
            "skipped": s.skipped,
        }  # fmt: skip
        yield events.Done(concept.to_concept(c_hash, record | {"steps": s.step}), measured)


def _about_photos(
    base: Base, photos: Sequence[Photo], prepared: Prepared, recipe: Teach
) -> Iterator[events.Event]:
    """Notes on masks, category and captions, and the masks as an image."""
    n, with_mask = len(prepared.fits), sum(f.mask is not None for f in prepared.fits)
    others = f"; the others' masks: {recipe.mask}." if with_mask < n else "."
    yield events.Note(f"Photos: {n}, {with_mask} with a mask of their own{others}")
    if warning := unknown_word_warning(base, recipe.category):
        yield events.Note(warning, warning=True)
    if warning := unused_captions(photos, recipe):
        yield events.Note(warning, warning=True)
    overlay = masking.overlay_sheet([f.pixels for f in prepared.fits], prepared.masks[:, 0, 0].cpu())
    yield events.ImageReady(xmp.with_source_type(overlay, xmp.NONE), "masks")


def _train(
    trainer: Trainer, concept: TrainableConcept, batches: Batches, stop: Event | None
) -> Iterator[events.Event]:  # fmt: skip
    """Run the training loop with the concept's loss."""
    evaluation = batches.evaluation()
    encodings: list[Tensor | None] = [None]  # the concept's, of the step at hand

    def loss(ctx: StepContext, _: None) -> dict[str, Tensor]:
        value, encodings[0] = concept.loss(batches.at(ctx.step, ctx.batch_size, ctx.rollbacks))
        return {"loss": value}

    def update_i_star(_: StepContext) -> None:
        concept.update_i_star(encodings[0])

    def evaluate() -> dict[str, float]:
        return {"loss": sum(float(concept.loss(b)[0]) for b in evaluation) / len(evaluation)}

    try:
        yield from trainer.train(loss, evaluate=evaluate, after=update_i_star, stop=stop or Event())
    except Diverged as e:
        raise Diverged(f"{e} Or try --dtype float32, or other photos.") from e


def _config(base: Base, recipe: Teach, save_steps: int) -> TrainingConfig:
    """AdamW without weight decay at constant rates; early stopping unless the steps are fixed."""
    fixed = recipe.steps is not None
    return TrainingConfig(
        steps=recipe.steps or recipe.max_steps, batch=recipe.batch, lr=recipe.value_lr, betas=(0.9, 0.999),
        weight_decay=0.0, fused=False, warmup=0, decay=0.0, ema=0.0, clip=None, bf16=False, seed=recipe.seed,
        loss_scale=FP16_LOSS_SCALE if base.dtype is torch.float16 else 1.0, progress_seconds=0.0,
        save_steps=save_steps, evaluate_steps=EVALUATE_STEPS, patience=None if fixed else PATIENCE,
        min_gain=MIN_GAIN, keep_best=not fixed,
    )  # fmt: skip


@contextmanager
def _save_memory(base: Base, recipe: Teach) -> Iterator[None]:
    """Gradient checkpointing for images of 512 px or more. Raises OutOfMemory with advice."""
    ours = (recipe.size or base.size_px) >= 512 and not base.denoiser.is_gradient_checkpointing
    if ours:
        base.denoiser.enable_gradient_checkpointing()
    try:
        yield
    except RuntimeError as e:
        if not is_out_of_memory(e):
            raise
        raise OutOfMemory(
            f"Not enough memory on {base.device} for batch {recipe.batch} at "
            f"{recipe.size or base.size_px} px. Try --batch {max(1, recipe.batch // 2)} or a smaller --size."
        ) from e
    finally:
        if ours:
            base.denoiser.disable_gradient_checkpointing()


def check(base: Base, recipe: Teach) -> None:
    """Raise BadRecipe when the base cannot be taught this concept."""
    if base.is_inpainting:
        raise BadRecipe(
            f"'{base.name}' is an inpainting model. Teach on the ordinary model of its family; the concept "
            "can then be used with both."
        )
    refuse_student(
        base,
        "teaching's loss asks for small steps, which it has unlearnt; a concept of its original works on it",
        "Teach on",
    )
    n = base.count_tokens(recipe.category)
    if n > 8:
        raise BadRecipe(
            f"The category '{recipe.category}' takes {n} tokens; use a shorter everyday word such as 'cat'."
        )


def _identity(base: Base, p: Prepared, recipe: Teach, c: Covariance | None) -> dict[str, Any]:
    """Facts that must be equal for a run to be resumed, besides its settings."""
    return {
        "name": recipe.name, "category": recipe.category, "base": base.fingerprint,
        "text_encoder": base.text_hash, "corpus": c.corpus or c.hash if c else "", "pixels": photos_digest(p),
    }  # fmt: skip


def photos_digest(p: Prepared) -> str:
    """SHA-256 of the photos as they are trained with: pixels, masks of their own, prompts.

    It does not depend on the machine. Latents do: their last bits differ with the number of threads and the
    build of PyTorch.
    """
    digest = hashlib.sha256()
    for fit, prompts in zip(p.fits, p.prompts, strict=True):
        for part in (fit.pixels, fit.mask, fit.valid):
            part = np.zeros(0) if part is None else part
            values = part if part.dtype == np.uint8 else (part * 255).round().astype(np.uint8)
            digest.update(repr(values.shape).encode() + values.tobytes())
        digest.update(repr([prompt.source for prompt in prompts]).encode())
    return digest.hexdigest()


def unverified_note(where: Path | None) -> str:
    """A warning that a checkpoint of an earlier version does not say whether the photos are the same."""
    return (
        f"The checkpoint {where} is of an earlier version, which cannot tell on another machine, or with "
        "another PyTorch or number of threads, whether the photos are the same. Going on with those given."
    )


def _former_identity(p: Prepared, c: Covariance | None) -> dict[str, Any]:
    """Facts of checkpoints written before `photos_digest`, which other machines compute otherwise."""
    digest = hashlib.sha256()
    for t in (p.latents, p.masks):
        digest.update(t.cpu().numpy().tobytes())
    return {"photos": digest.hexdigest(), "covariance": c.hash if c else ""}


def _record(recipe: Teach, n_photos: int, c: Covariance | None) -> dict[str, Any]:
    """How the concept was trained, for its file: no paths, no names, no captions.

    The keys are the file format's, which has the option names of version 0.1.
    """
    options = ("batch", "beta", "tau", "positions", "mask", "flip", "size", "seed")
    record = {k: getattr(recipe, k) for k in options} | {
        "mode": FILE_MODES[recipe.mode], "value_rate": recipe.value_lr, "word_rate": recipe.word_lr,
        "keep": recipe.prior_weight, "photos": n_photos, "captions": c.n_captions if c else 0,
    }  # fmt: skip
    return record if recipe.keys == "locked" else record | {"keys": recipe.keys}
