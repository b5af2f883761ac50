"""Stage `classifier`: answers to every field, and a likeness of things, apart from the judge's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from tools.tiny_training import encoder_metrics
from tools.tiny_training.augmentations import (
    Batch,
    Glimpses,
    answer_loss,
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
from minikin.tiny.encoders.classifier import KIND, Classifier, facts_of
from minikin.tiny.encoders.fields import Field, fields_of
from minikin.tiny.encoders.network import ClassifierNet, EyeShape
from minikin.tiny.world import World
from minikin.training.plan import Plan, Turn
from minikin.training.run import Run

EYE = EyeShape(channels=(96, 160))
DIMENSIONS = 128
_PLAN = Plan(
    steps=3200, batch=40, optimizer="muon", rate=1.5e-3, weight_decay=0.02, warmup=100, decay=0.6,
    ema=0.998, seed=1,
)  # fmt: skip
PLANS = {
    "cpu": _PLAN,
    "gpu": _PLAN.model_copy(update={"steps": None, "minutes": 2.0, "batch": 512, "rate": 2e-3}),
}
LIKENESS = 0.25  # weight of the contrastive loss; the mean over the fields weighs 1


class Learner(nn.Module):
    """The classifier with what it needs only while learning."""

    def __init__(self, net: ClassifierNet, fields: tuple[Field, ...]) -> None:
        super().__init__()
        self.net = net
        self.point = point_head(EYE.channels[-1], fields)


def stage(job: Job) -> Iterator[events.Event]:
    """Train the classifier and write its file; tiny's own lies in judges/weights."""
    yield from draw(job)
    glimpses, held = material(job)
    folder = job.folder(KIND)
    world = world_of(job.recipe.world, job.recipe.pictures.backdrops, job.art)
    yield from learn(
        folder, folder / f"{KIND}.safetensors", world, glimpses, held, device=torch.device(job.device),
        plan=job.plan(KIND, PLANS[job.recipe.preset]),
    )  # fmt: skip


def learn(
    folder: Path, out: Path, world: World, glimpses: Glimpses, held: Lookalikes, *,
    device: torch.device, plan: Plan,
) -> Iterator[events.Event]:  # fmt: skip
    """Train the classifier in `folder`, going on where it stopped, and write it to the file `out`."""
    torch.manual_seed(plan.seed)
    fields = fields_of(world.spec)
    net = ClassifierNet(EYE, sum(len(f.answers) for f in fields), DIMENSIONS)
    learner = Learner(net, fields).to(device)
    learner.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    facts = facts_of(EYE, fields, DIMENSIONS, world.spec.name)
    run = Run(folder, learner, plan, device=device, facts=facts, stage=KIND)

    def prepare(turn: Turn) -> Batch:
        return glimpses.batch(turn.rng, turn.size)

    def loss(turn: Turn, batch: Batch) -> dict[str, Tensor]:
        labels = {k: v.to(device) for k, v in batch.labels.items()}
        pictures = spoil(batch.pictures, turn.fork(2)).to(device)
        with run.autocast():
            cells = net.eye.cells(pictures)
            seen = net.eye.whole(cells)
            scores = net.answers(seen)
            like = net.likeness(seen[batch.scenes :])
        answers = answer_loss(scores, fields, labels)
        identity = identity_loss(like, batch.identity.to(device))
        pointed = point_loss(cells, learner.point, fields, labels)
        total = answers + pointed + LIKENESS * identity
        return {"loss": total, "answers": answers, "pointed": pointed, "identity": identity}

    test = encoder_metrics.Held.draw(world)

    def evaluate() -> dict[str, float]:
        classifier = Classifier(net, fields)
        found = encoder_metrics.accuracies(classifier.look(test.pictures), test.truth)
        values = {k: right / asked for k, (right, asked) in found.items() if asked}
        return values | {"identity AUC": encoder_metrics.identity_auc(classifier.likeness, held)}

    yield from run.train(loss, prepare=prepare, evaluate=evaluate)
    with run.averaged():
        weights.write(out, KIND, net, facts)
    yield events.Note(f"{KIND}: written to {out} ({out.stat().st_size / 1e6:.1f} MB)")
