"""Photos to a concept: prepares everything that does not change, then runs the loop."""

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

import torch
from PIL import Image
from torch import Tensor

from minikin import events
from minikin.errors import BadRecipe, OutOfMemory
from minikin.images import xmp
from minikin.images.photos import Fit, Photo, fitted
from minikin.models.base import Base
from minikin.models.distilled import refuse_student
from minikin.models.memory import ran_out
from minikin.models.prompt import Prompt
from minikin.perfusion import masks as masking
from minikin.perfusion.category import caution
from minikin.perfusion.concept import Concept
from minikin.perfusion.covariance import Covariance
from minikin.perfusion.key_lock import TEMPLATES, category_encoding, prompt_for
from minikin.perfusion.loop import Loop
from minikin.perfusion.objective import Batch, Student
from minikin.recipes import Teach

EVALUATION = 16  # fixed (photo, noise, timestep) triples


@dataclass(frozen=True)
class Prepared:
    """What the loop needs of the photos, computed once.

    latents  (P, 2, C, h, w)  as they are, and mirrored
    masks    (P, 2, 1, h, w)
    prompts  per photo, the prompts it may be shown with
    """

    fits: Sequence[Fit]
    latents: Tensor
    masks: Tensor
    prompts: Sequence[Sequence[Prompt]]


def prepare(base: Base, photos: Sequence[Photo], recipe: Teach) -> Prepared:
    """Encode the photos and find the subject in them."""
    side = recipe.size or base.size_px
    if side % (8 * base.factor) and side % 64:
        raise BadRecipe(f"size must be a multiple of 64 pixels, but it is {side}.")
    fits = [fitted(p, side) for p in photos]
    pixels = torch.stack([torch.from_numpy(f.pixels) for f in fits]).permute(0, 3, 1, 2)
    both = torch.stack([pixels, pixels.flip(-1)], 1).float() / 127.5 - 1  # (P, 2, 3, H, W)
    latents = torch.cat([base.to_latents(x).float() for x in torch.split(both.flatten(0, 1), 2)])
    latents = latents.view(len(fits), 2, *latents.shape[1:])
    found = masking.subject_masks(base, fits, latents[:, 0], recipe.category, recipe.mask)
    two = torch.stack([found, found.flip(-1)], 1).unsqueeze(2)
    return Prepared(fits, latents, two.to(latents), [_prompts(p, recipe) for p in photos])


def _prompts(photo: Photo, recipe: Teach) -> list[Prompt]:
    """The photo's own caption with the thing named in it, or else the templates."""
    caption = re.sub(r"[<>()\[\]\\]", " ", photo.caption.replace(f"<{recipe.name}>", "{}"))
    if "{}" not in caption:
        caption = re.sub(rf"\b(an? )?{re.escape(recipe.category)}\b", "{}", caption, count=1)
    if caption.count("{}") == 1:
        return [prompt_for(caption, recipe.name, recipe.category)]
    return [prompt_for(t, recipe.name, recipe.category) for t in TEMPLATES]


class Batches:
    """Deterministic batches: what step `k` sees depends on (seed, k) alone."""

    def __init__(self, base: Base, prepared: Prepared, recipe: Teach) -> None:
        self.base, self.p, self.recipe = base, prepared, recipe
        self.scheduler = base.noise
        self.n_train = int(self.scheduler.config.num_train_timesteps)

    def at(self, step: int) -> Batch:
        g = torch.Generator().manual_seed((self.recipe.seed << 20) + step + 1)
        n = self.recipe.batch
        photo = torch.randint(len(self.p.fits), (n,), generator=g)
        mirrored = torch.randint(2, (n,), generator=g) * int(self.recipe.flip)
        # one timestep from each n-th of the range: uniform, with less variance
        t = ((torch.arange(n) + torch.rand(n, generator=g)) / n * self.n_train).long()
        choice = torch.randint(10_000, (n,), generator=g).tolist()
        return self._batch(photo, mirrored, t.clamp(max=self.n_train - 1), choice, g)

    def evaluation(self) -> list[Batch]:
        """EVALUATION fixed triples, in batches of the training size."""
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
        t = t.to(x0.device)
        x_t = self.scheduler.add_noise(x0, eps, t)
        if self.base.prediction == "v_prediction":
            target = self.scheduler.get_velocity(x0, eps, t)
        elif self.base.prediction == "epsilon":
            target = eps
        else:
            raise BadRecipe(f"This base predicts '{self.base.prediction}', which is not supported.")
        own = [self.p.prompts[i] for i in photo.tolist()]
        prompts = [ps[c % len(ps)] for ps, c in zip(own, choice, strict=True)]
        return Batch(x_t, t, target, mask, prompts)


def teach(
    base: Base, photos: Sequence[Photo], recipe: Teach, c: Covariance | None, *,
    checkpoint: Path | None = None, resume: bool = False, save_every: int = 25,
    stop: Event | None = None, sample: Callable[[Concept], Image.Image] | None = None,
) -> Iterator[events.Event]:  # fmt: skip
    """Teach; the last event is `Done` with the Concept. Interrupting leaves a usable concept.

    Yields Note, Progress, and Image for the mask overlay and the samples.
    checkpoint  where to keep the state of the run; with `resume`, where to go on from
    stop        ends teaching after the step at hand when it is set
    sample      paints an image with the concept as it stands, every `recipe.sample_every` steps
    """
    with base.frozen(), _frugal(base, recipe):
        started = time.monotonic()
        check(base, recipe)
        prepared = prepare(base, photos, recipe)
        own = sum(f.mask is not None for f in prepared.fits)
        yield events.Note(
            f"Photos: {len(photos)}, {own} with a mask of their own" + (
                f"; the others' masks: {recipe.mask}." if own < len(photos) else "."
            )
        )  # fmt: skip
        if doubt := caution(base, recipe.category):
            yield events.Note(doubt, warning=True)
        overlay = masking.overlay_sheet([f.pixels for f in prepared.fits], prepared.masks[:, 0, 0].cpu())
        yield events.Picture(xmp.made(overlay, xmp.NONE), "masks")
        student = Student(base, recipe, category_encoding(base, recipe.category), c.inverse if c else None)
        batches = Batches(base, prepared, recipe)
        total = recipe.steps or recipe.max_steps
        loop = Loop(student, batches.at, batches.evaluation(), max_steps=total, fixed=recipe.steps is not None)
        facts = _facts(recipe, len(photos), c)
        run = facts | _identity(base, prepared, recipe, c)
        if resume and checkpoint and checkpoint.exists():
            loop.resume(checkpoint, run)
            yield events.Note(f"Going on after step {loop.progress.step}.")
        elif resume:
            yield events.Note(f"There is no checkpoint at {checkpoint}; starting anew.", warning=True)
        interrupted = False
        c_hash = c.hash if c else ""
        for step in loop:
            if checkpoint and step.step % save_every == 0:
                loop.save(checkpoint, run)
            yield events.Progress("teaching", step.step, total, f"loss {step.loss:.4f}")
            if sample and recipe.sample_every and step.step % recipe.sample_every == 0:
                image = sample(student.concept(c_hash, facts))
                yield events.Picture(image, f"step-{step.step:04d}")
            if stop and stop.is_set():
                interrupted = True
                if checkpoint:
                    loop.save(checkpoint, run)
                break
        loop.finish()
        p = loop.progress
        measured = {
            "steps": p.step, "best_step": p.best_step or p.step, "interrupted": interrupted,
            "seconds": round(time.monotonic() - started, 2), "evaluation": [round(v, 5) for v in p.history],
            "skipped": p.skipped,
        }  # fmt: skip
        yield events.Done(student.concept(c_hash, facts | {"steps": p.step}), measured)


@contextmanager
def _frugal(base: Base, recipe: Teach) -> Iterator[None]:
    """Gradient checkpointing for images of 512 px or more; a full memory becomes a sentence."""
    ours = (recipe.size or base.size_px) >= 512 and not base.unet.is_gradient_checkpointing
    if ours:
        base.unet.enable_gradient_checkpointing()
    try:
        yield
    except RuntimeError as e:
        if not ran_out(e):
            raise
        raise OutOfMemory(
            f"Not enough memory on {base.device} for batch {recipe.batch} at "
            f"{recipe.size or base.size_px} px. Try --batch {max(1, recipe.batch // 2)} or a smaller --size."
        ) from e
    finally:
        if ours:
            base.unet.disable_gradient_checkpointing()


def check(base: Base, recipe: Teach) -> None:
    """Raise BadRecipe when this base cannot be taught this."""
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
    """What must be the same for a run to be resumed, besides its settings."""
    photos = hashlib.sha256()
    for t in (p.latents, p.masks):
        photos.update(t.cpu().numpy().tobytes())
    return {
        "name": recipe.name, "category": recipe.category, "base": base.fingerprint,
        "text_encoder": base.text_hash, "covariance": c.hash if c else "", "photos": photos.hexdigest(),
    }  # fmt: skip


def _facts(recipe: Teach, n_photos: int, c: Covariance | None) -> dict[str, Any]:
    """What goes into the concept file about how it was made: no paths, no names, no captions."""
    keep = (
        "mode",
        "batch",
        "value_rate",
        "keep",
        "word_rate",
        "beta",
        "tau",
        "positions",
        "mask",
        "flip",
        "size",
        "seed",
    )
    out = {k: getattr(recipe, k) for k in keep}
    if recipe.keys != "locked":
        out["keys"] = recipe.keys
    return out | {"photos": n_photos, "captions": c.n_captions if c else 0}
