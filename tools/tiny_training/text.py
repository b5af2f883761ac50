"""Stage `text`: the text encoder, trained on captions alone, before there are images.

Four losses: every position predicts its token; a noun predicts its category, its look and, from the second
on, its slot (encoders/fields.py); the end token predicts the whole scene; and positions with the same token
in a caption and its minimal pair are encoded the same (labels.py). The prediction heads are dropped
afterwards. With `--from` the encoder also stays near its initial weights, so that the U-Net need not be
trained anew.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from tools.tiny_training.images import world_of
from tools.tiny_training.job import Job, adopt, digest, save_part
from tools.tiny_training.labels import CATEGORIES, CHOICES, LOOKS, UNKNOWN, Batch, Captions
from tools.tiny_training.recipes import Text
from torch import Tensor, nn

from minikin import events
from minikin.tiny.encoders.fields import SLOTS
from minikin.tiny.encoders.network import keep_tensor_names
from minikin.training.config import StepContext
from minikin.training.trainer import Losses, Trainer

NOUN_ANSWERS = (len(CATEGORIES), len(LOOKS), len(SLOTS))
TOKEN_POSITIONS = 700  # positions a step whose token is predicted
WEIGHTS = {"token": 0.5, "noun": 1.0, "whole": 0.5, "minimal pair": 2.0, "drift": 0.5}


class Learner(nn.Module):
    """The text encoder with the heads that are used in training only."""

    def __init__(self, text_encoder: Any, tokens: int, width: int) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.token = nn.Linear(width, tokens)
        self.noun = nn.Linear(width, sum(NOUN_ANSWERS))
        self.whole = nn.Linear(width, len(CATEGORIES) + len(LOOKS) + sum(len(c) for c in CHOICES))
        keep_tensor_names(self, {"text_encoder": "tower"})  # word: name in checkpoints since 0.1


def stage(job: Job) -> Iterator[events.Event]:
    """Train the text encoder and write it to text/text_encoder."""
    from transformers import AutoTokenizer, CLIPTextModel

    r = job.recipe.text
    if job.takes("text"):
        yield events.Note(f"text: {adopt(job, 'text_encoder', job.text_encoder)}")
        return
    device = torch.device(job.device)
    tokenizer = AutoTokenizer.from_pretrained(job.need(job.tokenizer, "tokenizer"))
    torch.manual_seed(r.plan.seed)
    if job.source:
        text_encoder = CLIPTextModel.from_pretrained(
            job.adopted("text_encoder"), use_safetensors=True, dtype=torch.float32
        )
    else:
        text_encoder = build(r, tokenizer)
    learner = Learner(text_encoder, len(tokenizer), r.width).to(device)
    facts = {"layers": r.layers, "width": r.width, "tokenizer": digest(job.tokenizer)}
    facts["source"] = digest(job.source / "text_encoder") if job.source else None
    trainer = Trainer(
        job.folder("text"), learner, job.plan("text", r.plan), device=device, facts=facts, stage="text"
    )
    names = (job.recipe.world if job.recipe.world != "wide" else "small", "wide")
    worlds = [world_of(name, job.recipe.images.backdrops, job.art) for name in names]
    captions = Captions(worlds, tokenizer, r.context)
    held = captions.batch(StepContext(0, 256, (0,)), "test").to(device)

    before = copy.deepcopy(text_encoder).to(device).eval().requires_grad_(False) if job.source else None

    def loss(ctx: StepContext, batch: Batch) -> Losses:
        return losses(trainer, learner, batch.to(device), ctx.generator, before)

    yield from trainer.train(loss, prepare=captions.batch, evaluate=lambda: accuracies(trainer, learner, held))
    with trainer.averaged_weights():
        save_part(text_encoder, job.text_encoder)
    yield events.Note(f"text: written to {job.text_encoder} ({digest(job.text_encoder)})")


def build(r: Text, tokenizer: Any) -> Any:
    """A CLIPTextModel of the recipe's shape."""
    from transformers import CLIPTextConfig, CLIPTextModel

    special = {f"{k}_token_id": getattr(tokenizer, f"{k}_token_id") for k in ("bos", "eos", "pad")}
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=r.width,
            intermediate_size=4 * r.width,
            num_hidden_layers=r.layers,
            num_attention_heads=r.heads,
            max_position_embeddings=r.context,
            projection_dim=r.width,
            **special,
        )
    )


def losses(
    trainer: Trainer, learner: Learner, b: Batch, generator: torch.Generator, before: nn.Module | None = None
) -> Losses:
    """The losses of a batch and their weighted sum; `before` is the initial encoder, to stay near."""
    with trainer.autocast():
        h = learner.text_encoder(
            input_ids=torch.cat([b.ids, b.minimal_pairs, b.noise])
        ).last_hidden_state.float()
    n = len(b.ids)
    captions, minimal_pairs, noise = h[:n], h[n : 2 * n], h[2 * n :]
    parts = {
        "token": _own_token(
            learner, torch.cat([captions, noise]), torch.cat([b.ids, b.noise]), b.end, generator
        ),
        "noun": _noun(learner, captions, b),
        "whole": _whole(learner, captions, b),
        "minimal pair": ((captions - minimal_pairs).pow(2).mean(-1) * b.is_same).sum()
        / b.is_same.sum().clamp(min=1),
    }
    if before is not None:
        with trainer.autocast():
            old = before(input_ids=b.ids).last_hidden_state.float()
        parts["drift"] = (captions - old).pow(2).mean()
    total = sum((WEIGHTS[k] * v for k, v in parts.items()), torch.zeros((), device=h.device))
    return {"loss": total, **parts}


def _own_token(learner: Learner, h: Tensor, ids: Tensor, end: Tensor, generator: torch.Generator) -> Tensor:
    """Cross entropy of the token at random positions other than the end."""
    places = (ids != ids[0, int(end[0])]).nonzero()
    chosen = places[torch.randperm(len(places), generator=generator)[:TOKEN_POSITIONS].to(places.device)]
    rows, positions = chosen.unbind(1)
    return F.cross_entropy(learner.token(h[rows, positions]), ids[rows, positions])


def _noun(learner: Learner, h: Tensor, b: Batch) -> Tensor:
    if not len(b.nouns):
        return h.sum() * 0
    kind, look, slot = learner.noun(h[b.nouns[:, 0], b.nouns[:, 1]]).split(NOUN_ANSWERS, -1)
    loss = F.cross_entropy(kind, b.kinds) + F.cross_entropy(look, b.looks)
    if (b.slots != UNKNOWN).any():
        loss = loss + F.cross_entropy(slot, b.slots, ignore_index=UNKNOWN)
    return loss


def _at_end(learner: Learner, h: Tensor, b: Batch) -> tuple[Tensor, ...]:
    """Objects, colours, and one part for each of CHOICES, predicted by the end token."""
    at = h[torch.arange(len(h), device=h.device), b.end]
    out: tuple[Tensor, ...] = learner.whole(at).split((len(CATEGORIES), len(LOOKS), *map(len, CHOICES)), -1)
    return out


def _whole(learner: Learner, h: Tensor, b: Batch) -> Tensor:
    objects, colours, *choices = _at_end(learner, h, b)
    several = F.binary_cross_entropy_with_logits(objects, b.objects, reduction="none").sum(1).mean()
    several = (
        several + 0.5 * F.binary_cross_entropy_with_logits(colours, b.colours, reduction="none").sum(1).mean()
    )
    single = [F.cross_entropy(c, b.choices[:, i]) for i, c in enumerate(choices)]
    return several + 0.4 * torch.stack(single).sum()


def accuracies(trainer: Trainer, learner: Learner, b: Batch) -> Mapping[str, float]:
    """Accuracies of the heads on held-out scenes, and the mean squared distance of minimal pairs."""
    with trainer.autocast():
        h = learner.text_encoder(input_ids=torch.cat([b.ids, b.minimal_pairs])).last_hidden_state.float()
    captions, minimal_pairs = h.chunk(2)
    kind, _, slot = learner.noun(captions[b.nouns[:, 0], b.nouns[:, 1]]).split(NOUN_ANSWERS, -1)
    _, _, place, _, layout, *_, first, second, third = _at_end(learner, captions, b)
    several = b.choices[:, -2] != len(CATEGORIES)
    standing = torch.stack([s.argmax(1) for s in (first, second, third)], 1)
    apart = ((captions - minimal_pairs).pow(2).mean(-1) * b.is_same).sum() / b.is_same.sum().clamp(min=1)
    return {
        "noun": float((kind.argmax(1) == b.kinds).float().mean()),
        "slot": float((slot.argmax(1) == b.slots)[b.slots != UNKNOWN].float().mean()),
        "all slots": float((standing == b.choices[:, -3:]).all(1)[several].float().mean()),
        "layout": float((layout.argmax(1) == b.choices[:, 2]).float().mean()),
        "background": float((place.argmax(1) == b.choices[:, 0]).float().mean()),
        "minimal pairs apart": float(apart),
    }
