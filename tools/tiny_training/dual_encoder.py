"""Stage `dual-encoder`: image encoder, text encoder and subject projection, from scenes and hard negatives.

Three kinds of losses: which caption belongs to which image; which images show the same subject; and the
labels of the scene from image features, from text features and from the feature map, by heads that are
dropped afterwards. With contrastive losses alone, training would need far more examples than two cores
process in half an hour.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tools.tiny_training import encoder_metrics
from tools.tiny_training.augmentations import (
    Batch,
    EncoderBatches,
    answer_loss,
    caption_loss,
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
from minikin.tiny.encoders.dual_encoder import KIND, DualEncoder, Tokens, facts_of
from minikin.tiny.encoders.fields import Field, fields_of
from minikin.tiny.encoders.network import DualEncoderNet, ImageEncoderShape, TextEncoderShape, keep_tensor_names
from minikin.tiny.world import World
from minikin.training.config import StepContext, TrainingConfig
from minikin.training.trainer import Trainer

IMAGE_SHAPE = ImageEncoderShape(channels=(128, 192))
DIMENSIONS = 128
_PLAN = TrainingConfig(
    steps=2600, batch=56, optimizer="muon", lr=1.5e-3, weight_decay=0.02, warmup=100, decay=0.6, ema=0.998
)
PLANS = {
    "cpu": _PLAN,
    "gpu": _PLAN.model_copy(update={"steps": None, "minutes": 2.0, "batch": 512, "lr": 2e-3}),
}
ANSWER_WEIGHT = 3.0  # of each loss of labels; the contrastive losses weigh 1
LARGEST_SCALE = 50.0  # of the caption cosines
STAGE = "dual-encoder"


class Learner(nn.Module):
    """The dual encoder with the heads that are used in training only."""

    def __init__(self, net: DualEncoderNet, fields: tuple[Field, ...], features: int, width: int) -> None:
        super().__init__()
        self.net = net
        answers = sum(len(f.answers) for f in fields)
        self.image_answers = nn.Linear(features, answers)
        self.text_answers = nn.Linear(width, answers)
        self.position = position_head(IMAGE_SHAPE.channels[-1], fields)
        self.log_scale = nn.Parameter(torch.tensor(np.log(10.0), dtype=torch.float32))
        names = {"image_answers": "tell_seen", "text_answers": "tell_read", "position": "point"}
        keep_tensor_names(self, names)  # of checkpoints since format 1


def stage(job: Job) -> Iterator[events.Event]:
    """Train the dual encoder and write its weight file; tiny's are in src/minikin/tiny/encoders/weights."""
    tokens = Tokens(job.need(job.tokenizer, "tokenizer"))
    yield from draw_held_out(job)
    batches, held = encoder_data(job, tokens)
    folder = job.folder(STAGE)
    world = world_of(job.recipe.world, job.recipe.images.backdrops, job.art)
    yield from learn(
        folder,
        folder / f"{KIND}.safetensors",
        world,
        batches,
        held,
        device=torch.device(job.device),
        plan=job.plan(STAGE, PLANS[job.recipe.preset]),
        tokens=tokens,
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
    tokens: Tokens,
) -> Iterator[events.Event]:
    """Train the dual encoder in `folder`, from its checkpoint if there is one, and write it to `out`."""
    torch.manual_seed(plan.seed)
    text_shape = TextEncoderShape(tokens.size, tokens.context)
    net = DualEncoderNet(IMAGE_SHAPE, text_shape, tokens.end, DIMENSIONS)
    fields = fields_of(world.spec)
    learner = Learner(net, fields, IMAGE_SHAPE.features, text_shape.width).to(device)
    learner.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    facts = facts_of(IMAGE_SHAPE, text_shape, DIMENSIONS, tokens, world.spec.name)
    trainer = Trainer(folder, learner, plan, device=device, facts=facts, stage=STAGE)

    def prepare(ctx: StepContext) -> Batch:
        return batches.batch(ctx.rng, ctx.batch_size)

    def loss(ctx: StepContext, batch: Batch) -> dict[str, Tensor]:
        labels = {k: v.to(device) for k, v in batch.labels.items()}
        caption_labels = {k: v[: batch.scenes] for k, v in labels.items()}
        ids = batch.ids.to(device)
        images = corrupt(batch.images, ctx.step_generator(2)).to(device)
        with trainer.autocast():
            feature_map = net.image_encoder.feature_map(images)
            image_features = net.image_encoder.pooled(feature_map)
            text_features = net.text_encoder(ids)
            image_scores = learner.image_answers(image_features)
            text_scores = learner.text_answers(text_features)
            image = net.image(image_features[: batch.scenes])
            text = net.projected_text(text_features)
            subject = net.subject(image_features[batch.scenes :])
        scale = learner.log_scale.exp().clamp(max=LARGEST_SCALE)
        parts = {
            "caption": caption_loss(image, text, ids, scale),
            "identity": identity_loss(subject, batch.identity.to(device)),
            "image answers": answer_loss(image_scores, fields, labels),
            "text answers": answer_loss(text_scores, fields, caption_labels),
            "position": position_loss(feature_map, learner.position, fields, labels),
        }
        answers = parts["image answers"] + parts["text answers"] + parts["position"]
        total = parts["caption"] + parts["identity"] + ANSWER_WEIGHT * answers
        return {"loss": total, **parts}

    test = encoder_metrics.HeldOut.draw(world)

    def evaluate() -> dict[str, float]:
        encoder = DualEncoder(net, tokens)
        fit = encoder.fit(test.images, test.captions)
        return {
            "caption of 50": encoder_metrics.caption_accuracy(fit, test.captions),
            "identity AUC": encoder_metrics.identity_auc(encoder.encode_subjects, held),
        }

    yield from trainer.train(loss, prepare=prepare, evaluate=evaluate)
    with trainer.averaged_weights():
        weights.write(out, KIND, net, facts)
    yield events.Note(f"{STAGE}: written to {out} ({out.stat().st_size / 1e6:.1f} MB)")
