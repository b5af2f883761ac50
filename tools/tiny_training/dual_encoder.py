"""Stage `judge`: the image and text towers and the likeness of things, from scenes and lookalikes.

Losses at once: which caption belongs to which image; which views are of the same thing; and,
because contrast alone needs far more examples than two cores see in half an hour, the truth of the
scene told from either tower, and from the places of things, by heads that are thrown away afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tools.tiny_training import encoder_metrics
from tools.tiny_training.augmentations import (
    Batch,
    Glimpses,
    answer_loss,
    caption_loss,
    identity_loss,
    point_head,
    point_loss,
    spoil,
)
from tools.tiny_training.hard_negatives import Lookalikes
from tools.tiny_training.images import world_of
from tools.tiny_training.job import Job
from tools.tiny_training.training_data import draw, material
from torch import Tensor, nn

from minikin import events
from minikin.tiny.encoders import weights
from minikin.tiny.encoders.dual_encoder import KIND, Judge, Tokens, facts_of
from minikin.tiny.encoders.fields import Field, fields_of
from minikin.tiny.encoders.network import EyeShape, JudgeNet, ReaderShape
from minikin.tiny.world import World
from minikin.training.plan import Plan, Turn
from minikin.training.run import Run

EYE = EyeShape(channels=(128, 192))
DIMENSIONS = 128
_PLAN = Plan(
    steps=2600, batch=56, optimizer="muon", rate=1.5e-3, weight_decay=0.02, warmup=100, decay=0.6,
    ema=0.998,
)  # fmt: skip
PLANS = {
    "cpu": _PLAN,
    "gpu": _PLAN.model_copy(update={"steps": None, "minutes": 2.0, "batch": 512, "rate": 2e-3}),
}
TELL = 3.0  # weight of the truth told by either tower; the contrastive losses weigh 1
LARGEST_SCALE = 50.0  # of the caption cosines


class Learner(nn.Module):
    """The judge with what it needs only while learning."""

    def __init__(self, net: JudgeNet, fields: tuple[Field, ...], features: int, width: int) -> None:
        super().__init__()
        self.net = net
        answers = sum(len(f.answers) for f in fields)
        self.tell_seen = nn.Linear(features, answers)
        self.tell_read = nn.Linear(width, answers)
        self.point = point_head(EYE.channels[-1], fields)
        self.log_scale = nn.Parameter(torch.tensor(np.log(10.0), dtype=torch.float32))


def stage(job: Job) -> Iterator[events.Event]:
    """Train the judge and write its file; tiny's own lies in judges/weights."""
    tokens = Tokens(job.need(job.tokenizer, "tokenizer"))
    yield from draw(job)
    glimpses, held = material(job, tokens)
    folder = job.folder(KIND)
    world = world_of(job.recipe.world, job.recipe.pictures.backdrops, job.art)
    yield from learn(
        folder, folder / f"{KIND}.safetensors", world, glimpses, held, device=torch.device(job.device),
        plan=job.plan(KIND, PLANS[job.recipe.preset]), tokens=tokens,
    )  # fmt: skip


def learn(
    folder: Path, out: Path, world: World, glimpses: Glimpses, held: Lookalikes, *,
    device: torch.device, plan: Plan, tokens: Tokens,
) -> Iterator[events.Event]:  # fmt: skip
    """Train the judge in `folder`, going on where it stopped, and write it to the file `out`."""
    torch.manual_seed(plan.seed)
    reader = ReaderShape(tokens.size, tokens.context)
    net = JudgeNet(EYE, reader, tokens.end, DIMENSIONS)
    fields = fields_of(world.spec)
    learner = Learner(net, fields, EYE.features, reader.width).to(device)
    learner.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    facts = facts_of(EYE, reader, DIMENSIONS, tokens, world.spec.name)
    run = Run(folder, learner, plan, device=device, facts=facts, stage=KIND)

    def prepare(turn: Turn) -> Batch:
        return glimpses.batch(turn.rng, turn.size)

    def loss(turn: Turn, batch: Batch) -> dict[str, Tensor]:
        labels = {k: v.to(device) for k, v in batch.labels.items()}
        ids = batch.ids.to(device)
        pictures = spoil(batch.pictures, turn.fork(2)).to(device)
        with run.autocast():
            cells = net.eye.cells(pictures)
            seen = net.eye.whole(cells)
            read = net.reader(ids)
            told = learner.tell_seen(seen), learner.tell_read(read)
            image, text = net.image(seen[: batch.scenes]), net.joined(read)
            like = net.likeness(seen[batch.scenes :])
        scale = learner.log_scale.exp().clamp(max=LARGEST_SCALE)
        spoken = {k: v[: batch.scenes] for k, v in labels.items()}
        parts = {
            "caption": caption_loss(image, text, ids, scale),
            "identity": identity_loss(like, batch.identity.to(device)),
            "told_seen": answer_loss(told[0], fields, labels),
            "told_read": answer_loss(told[1], fields, spoken),
            "pointed": point_loss(cells, learner.point, fields, labels),
        }
        told_all = parts["told_seen"] + parts["told_read"] + parts["pointed"]
        total = parts["caption"] + parts["identity"] + TELL * told_all
        return {"loss": total, **parts}

    test = encoder_metrics.Held.draw(world)

    def evaluate() -> dict[str, float]:
        judge = Judge(net, tokens)
        return {
            "caption of 50": encoder_metrics.caption_of(judge, test.pictures, test.captions),
            "identity AUC": encoder_metrics.identity_auc(judge.likeness, held),
        }

    yield from run.train(loss, prepare=prepare, evaluate=evaluate)
    with run.averaged():
        weights.write(out, KIND, net, facts)
    yield events.Note(f"{KIND}: written to {out} ({out.stat().st_size / 1e6:.1f} MB)")
