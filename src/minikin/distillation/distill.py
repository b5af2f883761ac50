"""Distillation of a base into a few-step student, by any method: data, training trainer, result file.

    for event in distill(base, Distill.make(method="tdm", data="captions.txt"), Path("out")): ...

All files are below `out`: latents/ (computed once), checkpoint.safetensors, log.jsonl, curve.png,
samples/, tensorboard/ if that is installed, and the result. Training is a `Trainer`: seeded by step and
resumable bit for bit. Several processes started by `torchrun` or `accelerate launch` train one model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from minikin import events
from minikin.distillation import concept_captions, export, initial_lora, sources
from minikin.distillation import data as examples
from minikin.distillation.add import Adversarial
from minikin.distillation.features import NORM_GROUP
from minikin.distillation.lcm import Consistency
from minikin.distillation.objective import DistillationContext, Objective, Reference, SamplerSpec
from minikin.distillation.sampling import few_steps, float32_decoder, images
from minikin.distillation.solver import Schedule
from minikin.distillation.student import Encoder, teacher
from minikin.distillation.tdm import DistributionMatching
from minikin.errors import BadRecipe
from minikin.images.sheet import contact_sheet
from minikin.models import precision
from minikin.models.base import Base
from minikin.models.distilled import refuse_student
from minikin.models.presets import CONVENTIONS
from minikin.recipes import Distill
from minikin.training import tensorboard
from minikin.training.config import TrainingConfig
from minikin.training.distributed import process_group
from minikin.training.trainer import Trainer

METHODS: dict[str, Callable[[DistillationContext], Objective]] = {
    "lcm": Consistency,
    "lcm-lora": Consistency,
    "turbo": Adversarial,
    "tdm": DistributionMatching,
}
LCM_SKIP = 20  # timesteps of a teacher's step, of the published students
SAMPLES = 8  # images of a preview sheet
# fields of a recipe that may change between a run and its resumption
FREE = {
    "base",
    "data",
    "concepts",
    "start",
    "count",
    "steps",
    "minutes",
    "decay",
    "accumulation",
    "half",
    "device",
    "save_minutes",
    "sample_minutes",
}


def distill(base: Base, recipe: Distill, out: Path, *, resume: bool = False) -> Iterator[events.Event]:
    """Distil a base; the last event is Done with the path of the LoRA or of the model's folder.

    resume  go on from the checkpoint in `out`; when False, a checkpoint there is an error
    Ctrl-C saves a checkpoint and the result so far, then raises KeyboardInterrupt.
    Raises BadRecipe, BadPhoto, AssetError, Diverged, OutOfMemory, StorageError.
    """
    r = recipe.resolved(base.architecture == "tiny")
    check(base, r)
    yield from _checkpoint(out, resume)
    quick = precision.has_fast_bfloat16(base.device)
    autocast = (base.device.type == "cuda" and quick) if r.autocast is None else r.autocast
    if autocast and not quick:
        yield events.Note(
            f"The {base.device.type} here only imitates bfloat16: without --autocast this is quicker.",
            warning=True,
        )
    with process_group(base.device) as ranks, base.frozen(), float32_decoder(base):
        check_batch_split(r, r.accumulation * ranks.count)
        schedule = Schedule.of(base)
        teacher_network = teacher(base, schedule, autocast=autocast)
        needs_latents = r.method != "tdm" or r.gan > 0
        source = sources.find(r.data, r.count)
        encoder = Encoder(base, concept_captions.find(base, r.concepts, source, r.negative))
        dataset = None
        for event in examples.load(
            encoder, teacher_network, source, r, out / "latents", ranks, with_latents=needs_latents
        ):
            if isinstance(event, events.Done):
                dataset = event.result
            else:
                yield event
        assert dataset is not None
        yield events.Note(f"{r.method}: {len(dataset)} examples, student {r.student}, batch {r.batch}.")
        context = DistillationContext(base, r, schedule, teacher_network, encoder, dataset)
        objective, reference = METHODS[r.method](context), Reference(context)

        def evaluate() -> dict[str, float]:
            return {
                **objective.measure(),
                "to teacher": reference.error(objective.student, objective.sampler_spec()),
            }

        trainer = Trainer(
            out,
            objective.networks,
            _config(r),
            device=base.device,
            stage=r.method,
            groups=objective.groups(),
            facts=_identity(encoder, r, dataset.identity) | {"autocast": autocast},
        )
        if ranks.is_first:
            trainer.metrics_log.writer = tensorboard.writer(out / "tensorboard")
        painter = _painter(encoder, objective, dataset)
        try:
            yield from trainer.train(
                objective.loss, prepare=objective.draw, evaluate=evaluate, sample=painter, after=objective.after
            )
        except KeyboardInterrupt:
            if ranks.is_first:
                path = _write(trainer, base, r, objective, out)
                yield events.Note(f"{r.method}: the student so far is {path}; go on with --resume.")
            raise
        path = _write(trainer, base, r, objective, out) if ranks.is_first else out
        s = trainer.state
        facts = {"steps": s.step, "seen": s.seen, "seconds": round(s.seconds, 1), "skipped": s.skipped}
        yield events.Done(path, facts | {"batch": s.batch, "examples": len(dataset)})


def check(base: Base, recipe: Distill) -> None:
    """Raises BadRecipe when this base cannot be a teacher."""
    base.require_unet("Distillation")
    if base.is_inpainting:
        raise BadRecipe(
            f"'{base.name}' is an inpainting model and cannot be distilled here. Distil the ordinary model of "
            "its family; adapters then work with both."
        )
    refuse_student(base, "as a teacher it would pass on its few-step faults", "Distil")


def check_batch_split(r: Distill, pieces: int) -> None:
    """Raises BadRecipe when batch norm over parts of a batch would differ from that over the whole batch."""
    size = (r.batch or 0) // pieces
    if r.method == "turbo" and r.features != "teacher" and pieces > 1 and size % NORM_GROUP:
        raise BadRecipe(
            f"With --features {r.features} batch norm is over {NORM_GROUP} examples, but a batch of {r.batch} "
            f"in {pieces} pieces (accumulation times processes) has {size} in each. Use a multiple of "
            f"{NORM_GROUP * pieces}."
        )


def _checkpoint(out: Path, resume: bool) -> Iterator[events.Note]:
    there = (out / "checkpoint.safetensors").exists()
    if there and not resume:
        raise BadRecipe(
            f"{out} holds an earlier run. Go on with it by --resume, or choose another --out to start anew."
        )
    if resume and not there:
        yield events.Note(f"There is no checkpoint in {out}; starting anew.", warning=True)


def _config(r: Distill) -> TrainingConfig:
    config: TrainingConfig = TrainingConfig.make(
        steps=r.steps,
        minutes=r.minutes,
        batch=r.batch,
        accumulation=r.accumulation,
        lr=r.lr,
        betas=(0.9, 0.999),
        weight_decay=r.weight_decay,
        warmup=r.warmup,
        decay=r.decay,
        floor=0.02,
        ema=r.ema,
        clip=r.clip,
        bf16=False,
        seed=r.seed,
        log_steps=10,
        save_minutes=r.save_minutes,
        sample_minutes=r.sample_minutes,
    )
    return config


def _identity(encoder: Encoder, r: Distill, data: str) -> dict[str, Any]:
    """Facts that must be the same for a run to be resumed."""
    base = encoder.base
    settings = r.model_dump(mode="json", exclude=FREE)
    if r.start:
        settings["start"] = initial_lora.digest(initial_lora.find(base, r.start))
    if encoder.concepts is not None:
        settings["concepts"] = concept_captions.digest(encoder.concepts)
    return {**settings, "base": base.fingerprint, "dtype": str(base.dtype), "data": data}


def _painter(encoder: Encoder, objective: Objective, data: examples.Examples) -> Callable[[], Image.Image]:
    """A function that paints the preview sheet: the same captions and the same noise every time."""
    base = encoder.base

    def paint() -> Image.Image:
        g = torch.Generator().manual_seed(1)
        captions = [data.captions[i * len(data) // SAMPLES][0] for i in range(min(SAMPLES, len(data)))]
        shape = (len(captions), *data.shape)

        def noise() -> torch.Tensor:
            return torch.randn(shape, generator=g).to(base.device)

        spec: SamplerSpec = objective.sampler_spec()
        latents = few_steps(
            objective.student,
            noise(),
            encoder(captions),
            spec.times,
            renoise=spec.renoise,
            noise=noise,
            scale=spec.scale,
        )
        return contact_sheet(images(base, latents), captions, columns=4)

    return paint


def _write(trainer: Trainer, base: Base, r: Distill, objective: Objective, out: Path) -> Path:
    """Write the EMA of the student, with its sampler spec in the header; returns the path."""
    spec = objective.sampler_spec()
    facts: dict[str, Any] = {
        "preset": r.method,
        "base": base.fingerprint,
        "architecture": base.architecture,
        "licence": base.licence,
        "times": list(spec.times),
        "steps": len(spec.times),
        "sampler": "renoise" if spec.renoise else "ddim",
        "guidance": spec.scale,
        "trained_steps": trainer.state.step,
        "seen": trainer.state.seen,
        "recipe": r.model_dump(mode="json", exclude=FREE),
    }
    if r.start:
        facts["start"] = Path(r.start).stem
    convention = r.times
    if r.method in ("lcm", "lcm-lora"):
        convention = "lcm" if r.skip == LCM_SKIP else ""  # LCMScheduler visits the usual grid
    if convention in CONVENTIONS:
        facts["timesteps"] = convention
    with trainer.averaged_weights():
        return export.write(objective.student, base, out, facts, half=r.half)
