"""The one loop of distillation: base and data to a student in few steps, whatever the method.

    for event in distill(base, Distill.make(method="tdm", data="captions.txt"), Path("out")): ...

Writes everything below `out`: latents/ (computed once), checkpoint.safetensors, log.jsonl, curve.png,
samples/, tensorboard/ where that is installed, and the result. The training itself is `Run`: seeded by
step, resumable bit for bit, unharmed by kills and full disks. Several processes started by `torchrun`
or `accelerate launch` train one model together.
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
from minikin.distillation.features import NORMED
from minikin.distillation.lcm import Consistency
from minikin.distillation.objective import Objective, Reference, Setting, Way
from minikin.distillation.sampling import few_steps, pictures, wide_decoder
from minikin.distillation.solver import Schedule
from minikin.distillation.student import Encoder, teacher
from minikin.distillation.tdm import Matching
from minikin.errors import BadRecipe
from minikin.images.sheet import contact_sheet
from minikin.models import precision
from minikin.models.base import Base
from minikin.models.distilled import refuse_student
from minikin.models.presets import CONVENTIONS
from minikin.recipes import Distill
from minikin.training.distributed import joined
from minikin.training.plan import Plan
from minikin.training.run import Run
from minikin.training.tensorboard import board

METHODS: dict[str, Callable[[Setting], Objective]] = {
    "lcm": Consistency, "lcm-lora": Consistency, "turbo": Adversarial, "tdm": Matching,
}  # fmt: skip
LCM_SKIP = 20  # of the published students
SAMPLES = 8  # images of the sheet painted on the way
# of a recipe: what may change between a run and its resumption
FREE = {
    "base", "data", "concepts", "start", "count", "steps", "minutes", "decay", "accumulation", "half", "device",
    "save_minutes", "sample_minutes",
}  # fmt: skip


def distill(base: Base, recipe: Distill, out: Path, *, resume: bool = False) -> Iterator[events.Event]:
    """Distil; the last event is Done with the path of the result.

    resume  go on from the checkpoint in `out`; without it a checkpoint there is an error
    Ctrl-C saves a checkpoint and the result so far, then raises KeyboardInterrupt.
    Raises BadRecipe, BadPhoto, AssetError, Diverged, OutOfMemory, StorageError.
    """
    r = recipe.settled(base.architecture == "tiny")
    check(base, r)
    yield from _checkpoint(out, resume)
    quick = precision.quick(base.device)
    autocast = (base.device.type == "cuda" and quick) if r.autocast is None else r.autocast
    if autocast and not quick:
        yield events.Note(
            f"The {base.device.type} here only imitates bfloat16: without --autocast this is quicker.",
            warning=True,
        )
    with joined(base.device) as ranks, base.frozen(), wide_decoder(base):
        check_pieces(r, r.accumulation * ranks.count)
        schedule = Schedule.of(base)
        own = teacher(base, schedule, autocast=autocast)
        wanted = r.method != "tdm" or r.gan > 0
        source = sources.find(r.data, r.count)
        encoder = Encoder(base, concept_captions.find(base, r.concepts, source, r.negative))
        loaded = None
        for event in examples.load(encoder, own, source, r, out / "latents", ranks, pictures=wanted):
            if isinstance(event, events.Done):
                loaded = event.result
            else:
                yield event
        assert loaded is not None
        yield events.Note(f"{r.method}: {len(loaded)} examples, student {r.student}, batch {r.batch}.")
        setting = Setting(base, r, schedule, own, encoder, loaded)
        objective, reference = METHODS[r.method](setting), Reference(setting)

        def evaluate() -> dict[str, float]:
            return {**objective.measure(), "to teacher": reference.error(objective.student, objective.way())}

        run = Run(
            out, objective.learner, _plan(r), device=base.device, stage=r.method, groups=objective.groups(),
            facts=_identity(encoder, r, loaded.identity) | {"autocast": autocast},
        )  # fmt: skip
        if ranks.first:
            run.journal.also = board(out / "tensorboard")
        painter = _painter(encoder, objective, loaded)
        try:
            yield from run.train(
                objective.loss, prepare=objective.draw, evaluate=evaluate, sample=painter,
                after=objective.after,
            )  # fmt: skip
        except KeyboardInterrupt:
            if ranks.first:
                path = _write(run, base, r, objective, out)
                yield events.Note(f"{r.method}: the student so far is {path}; go on with --resume.")
            raise
        path = _write(run, base, r, objective, out) if ranks.first else out
        s = run.state
        facts = {"steps": s.step, "seen": s.seen, "seconds": round(s.seconds, 1), "skipped": s.skipped}
        yield events.Done(path, facts | {"batch": s.batch, "examples": len(loaded)})


def check(base: Base, recipe: Distill) -> None:
    """Raise BadRecipe when this base cannot be a teacher."""
    if base.is_inpainting:
        raise BadRecipe(
            f"'{base.name}' is an inpainting model and cannot be distilled here. Distil the ordinary model of "
            "its family; adapters then work with both."
        )
    refuse_student(base, "as a teacher it would pass on its few-step faults", "Distil")


def check_pieces(r: Distill, pieces: int) -> None:
    """Raise BadRecipe when pieces of a batch would be normed otherwise than the whole batch is."""
    size = (r.batch or 0) // pieces
    if r.method == "turbo" and r.features != "teacher" and pieces > 1 and size % NORMED:
        raise BadRecipe(
            f"With --features {r.features} {NORMED} examples are normed together, but a batch of {r.batch} in "
            f"{pieces} pieces (accumulation times processes) has {size} in each. Use a multiple of "
            f"{NORMED * pieces}."
        )


def _checkpoint(out: Path, resume: bool) -> Iterator[events.Note]:
    there = (out / "checkpoint.safetensors").exists()
    if there and not resume:
        raise BadRecipe(
            f"{out} holds an earlier run. Go on with it by --resume, or choose another --out to start anew."
        )
    if resume and not there:
        yield events.Note(f"There is no checkpoint in {out}; starting anew.", warning=True)


def _plan(r: Distill) -> Plan:
    plan: Plan = Plan.make(
        steps=r.steps, minutes=r.minutes, batch=r.batch, accumulation=r.accumulation, rate=r.rate,
        betas=(0.9, 0.999), weight_decay=r.weight_decay, warmup=r.warmup, decay=r.decay, floor=0.02, ema=r.ema,
        clip=r.clip, bf16=False, seed=r.seed, log_steps=10, save_minutes=r.save_minutes,
        sample_minutes=r.sample_minutes,
    )  # fmt: skip
    return plan


def _identity(encoder: Encoder, r: Distill, data: str) -> dict[str, Any]:
    """What must be the same for a run to be resumed."""
    base = encoder.base
    settings = r.model_dump(mode="json", exclude=FREE)
    if r.start:
        settings["start"] = initial_lora.digest(initial_lora.find(base, r.start))
    if encoder.concepts is not None:
        settings["concepts"] = concept_captions.digest(encoder.concepts)
    return {**settings, "base": base.fingerprint, "dtype": str(base.dtype), "data": data}


def _painter(encoder: Encoder, objective: Objective, data: examples.Examples) -> Callable[[], Image.Image]:
    """Paints the same few captions from the same noise every time."""
    base = encoder.base

    def paint() -> Image.Image:
        g = torch.Generator().manual_seed(1)
        captions = [data.captions[i * len(data) // SAMPLES][0] for i in range(min(SAMPLES, len(data)))]
        shape = (len(captions), *data.shape)

        def noise() -> torch.Tensor:
            return torch.randn(shape, generator=g).to(base.device)

        way: Way = objective.way()
        latents = few_steps(
            objective.student, noise(), encoder(captions), way.times, renoise=way.renoise, noise=noise,
            scale=way.scale,
        )  # fmt: skip
        return contact_sheet(pictures(base, latents), captions, columns=4)

    return paint


def _write(run: Run, base: Base, r: Distill, objective: Objective, out: Path) -> Path:
    """The averaged student as an ordinary file, with how to use it in its header."""
    way = objective.way()
    facts: dict[str, Any] = {
        "preset": r.method, "base": base.fingerprint, "architecture": base.architecture,
        "licence": base.licence, "times": list(way.times), "steps": len(way.times),
        "sampler": "renoise" if way.renoise else "ddim", "guidance": way.scale, "trained_steps": run.state.step,
        "seen": run.state.seen, "recipe": r.model_dump(mode="json", exclude=FREE),
    }  # fmt: skip
    if r.start:
        facts["start"] = Path(r.start).stem
    convention = r.times
    if r.method in ("lcm", "lcm-lora"):
        convention = "lcm" if r.skip == LCM_SKIP else ""  # LCMScheduler visits the usual grid
    if convention in CONVENTIONS:
        facts["timesteps"] = convention
    with run.averaged():
        return export.write(objective.student, base, out, facts, half=r.half)
