"""Stage `classifier`: answers to every field, and a subject encoder independent of the dual encoder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from tools.tiny_training import encoder_metrics
from tools.tiny_training.augmentations import (
    Batch,
    EncoderBatches,
    answer_loss,
    corrupt,
    identity_loss,
    position_head,
    position_loss,
)
from tools.tiny_training.hard_negatives import HardNegatives
from tools.tiny_training.images import world_of
from tools.tiny_training.job import Job
from tools.tiny_training.training_data import draw_held_out, encoder_data
from torch import Tensor, nn

from minikin import events
from minikin.tiny.encoders import weights
from minikin.tiny.encoders.classifier import KIND, Classifier, facts_of
from minikin.tiny.encoders.fields import Field, fields_of
from minikin.tiny.encoders.network import ClassifierNet, ImageEncoderShape, keep_tensor_names
from minikin.tiny.world import World
from minikin.training.config import StepContext, TrainingConfig
from minikin.training.trainer import Trainer

IMAGE_SHAPE = ImageEncoderShape(channels=(96, 160))
DIMENSIONS = 128
_PLAN = TrainingConfig(
    steps=3200,
    batch=40,
    optimizer="muon",
    lr=1.5e-3,
    weight_decay=0.02,
    warmup=100,
    decay=0.6,
    ema=0.998,
    seed=1,
)
PLANS = {
    "cpu": _PLAN,
    "gpu": _PLAN.model_copy(update={"steps": None, "minutes": 2.0, "batch": 512, "lr": 2e-3}),
}
IDENTITY_WEIGHT = 0.25  # of the contrastive loss; the mean over the fields weighs 1


class Learner(nn.Module):
    """The classifier with the head that is used in training only."""

    def __init__(self, net: ClassifierNet, fields: tuple[Field, ...]) -> None:
        super().__init__()
        self.net = net
        self.position = position_head(IMAGE_SHAPE.channels[-1], fields)
        keep_tensor_names(self, {"position": "point"})  # of checkpoints since format 1


def stage(job: Job) -> Iterator[events.Event]:
    """Train the classifier and write its weight file; tiny's is in src/minikin/tiny/encoders/weights."""
    yield from draw_held_out(job)
    batches, held = encoder_data(job)
    folder = job.folder(KIND)
    world = world_of(job.recipe.world, job.recipe.images.backdrops, job.art)
    yield from learn(
        folder,
        folder / f"{KIND}.safetensors",
        world,
        batches,
        held,
        device=torch.device(job.device),
        plan=job.plan(KIND, PLANS[job.recipe.preset]),
    )


def learn(
    folder: Path,
    out: Path,
    world: World,
    batches: EncoderBatches,
    held: HardNegatives,
    *,
    device: torch.device,
    plan: TrainingConfig,
) -> Iterator[events.Event]:
    """Train the classifier in `folder`, from its checkpoint if there is one, and write it to `out`."""
    torch.manual_seed(plan.seed)
    fields = fields_of(world.spec)
    net = ClassifierNet(IMAGE_SHAPE, sum(len(f.answers) for f in fields), DIMENSIONS)
    learner = Learner(net, fields).to(device)
    learner.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    facts = facts_of(IMAGE_SHAPE, fields, DIMENSIONS, world.spec.name)
    trainer = Trainer(folder, learner, plan, device=device, facts=facts, stage=KIND)

    def prepare(ctx: StepContext) -> Batch:
        return batches.batch(ctx.rng, ctx.batch_size)

    def loss(ctx: StepContext, batch: Batch) -> dict[str, Tensor]:
        labels = {k: v.to(device) for k, v in batch.labels.items()}
        images = corrupt(batch.images, ctx.step_generator(2)).to(device)
        with trainer.autocast():
            feature_map = net.image_encoder.feature_map(images)
            features = net.image_encoder.pooled(feature_map)
            scores = net.answers(features)
            subject = net.subject(features[batch.scenes :])
        answers = answer_loss(scores, fields, labels)
        identity = identity_loss(subject, batch.identity.to(device))
        position = position_loss(feature_map, learner.position, fields, labels)
        total = answers + position + IDENTITY_WEIGHT * identity
        return {"loss": total, "answers": answers, "position": position, "identity": identity}

    test = encoder_metrics.HeldOut.draw(world)

    def evaluate() -> dict[str, float]:
        classifier = Classifier(net, fields)
        counts = encoder_metrics.accuracies(classifier.predict(test.images), test.truth)
        values = {field: correct / n for field, (correct, n) in counts.items() if n}
        return values | {"identity AUC": encoder_metrics.identity_auc(classifier.encode_subjects, held)}

    yield from trainer.train(loss, prepare=prepare, evaluate=evaluate)
    with trainer.averaged_weights():
        weights.write(out, KIND, net, facts)
    yield events.Note(f"{KIND}: written to {out} ({out.stat().st_size / 1e6:.1f} MB)")
