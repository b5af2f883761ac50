"""Stage `text`: the text tower, from captions alone, before any image is painted.

Four losses: every position tells its own token; a noun tells its category, its look and, at the second
of a pair, its side; the end token tells the whole scene; and positions that are the same in a caption
and its twin are encoded the same (truth.py). The heads that tell are thrown away. A tower that goes on
from another (`--from`) also stays near it, so that the U-Net that reads it need not begin again.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from tools.tiny_training.images import world_of
from tools.tiny_training.job import Job, adopt, digest, save_part
from tools.tiny_training.labels import CATEGORIES, CHOICES, LOOKS, SIDES, UNKNOWN, Batch, Captions
from tools.tiny_training.recipes import Text
from torch import Tensor, nn

from minikin import events
from minikin.training.plan import Turn
from minikin.training.run import Losses, Run

TOLD_BY_NOUN = (len(CATEGORIES), len(LOOKS), len(SIDES))
TOLD = 700  # positions a step whose own token is asked for
WEIGHTS = {"token": 0.5, "noun": 1.0, "whole": 0.5, "twin": 2.0, "moved": 0.5}


class Learner(nn.Module):
    """The tower with the heads it needs only while learning."""

    def __init__(self, tower: Any, tokens: int, width: int) -> None:
        super().__init__()
        self.tower = tower
        self.token = nn.Linear(width, tokens)
        self.noun = nn.Linear(width, sum(TOLD_BY_NOUN))
        self.whole = nn.Linear(width, len(CATEGORIES) + len(LOOKS) + sum(len(c) for c in CHOICES))


def stage(job: Job) -> Iterator[events.Event]:
    """Train the tower and write it to text/text_encoder."""
    from transformers import AutoTokenizer, CLIPTextModel

    r = job.recipe.text
    if job.takes("text"):
        yield events.Note(f"text: {adopt(job, 'text_encoder', job.text_encoder)}")
        return
    device = torch.device(job.device)
    tokenizer = AutoTokenizer.from_pretrained(job.need(job.tokenizer, "tokenizer"))
    torch.manual_seed(r.plan.seed)
    if job.source:
        tower = CLIPTextModel.from_pretrained(
            job.adopted("text_encoder"), use_safetensors=True, dtype=torch.float32
        )
    else:
        tower = build(r, tokenizer)
    learner = Learner(tower, len(tokenizer), r.width).to(device)
    facts = {"layers": r.layers, "width": r.width, "tokenizer": digest(job.tokenizer)}
    facts["source"] = digest(job.source / "text_encoder") if job.source else None
    run = Run(job.folder("text"), learner, job.plan("text", r.plan), device=device, facts=facts, stage="text")
    worlds = [world_of(name, job.recipe.pictures.backdrops, job.art) for name in ("small", "wide")]
    captions = Captions(worlds, tokenizer, r.context)
    held = captions.batch(Turn(0, 256, (0,)), "test").to(device)

    before = copy.deepcopy(tower).to(device).eval().requires_grad_(False) if job.source else None

    def loss(turn: Turn, batch: Batch) -> Losses:
        return losses(run, learner, batch.to(device), turn.generator, before)

    yield from run.train(loss, prepare=captions.batch, evaluate=lambda: told(run, learner, held))
    with run.averaged():
        save_part(tower, job.text_encoder)
    yield events.Note(f"text: written to {job.text_encoder} ({digest(job.text_encoder)})")


def build(r: Text, tokenizer: Any) -> Any:
    """A CLIPTextModel of the recipe's shape."""
    from transformers import CLIPTextConfig, CLIPTextModel

    special = {f"{k}_token_id": getattr(tokenizer, f"{k}_token_id") for k in ("bos", "eos", "pad")}
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=r.width, intermediate_size=4 * r.width,
            num_hidden_layers=r.layers, num_attention_heads=r.heads, max_position_embeddings=r.context,
            projection_dim=r.width, **special,
        )
    )  # fmt: skip


def losses(
    run: Run, learner: Learner, b: Batch, generator: torch.Generator, before: nn.Module | None = None
) -> Losses:
    """The losses of a batch and their weighted sum; `before` is the tower to stay near."""
    with run.autocast():
        h = learner.tower(input_ids=torch.cat([b.ids, b.twins, b.noise])).last_hidden_state.float()
    n = len(b.ids)
    said, twin, noise = h[:n], h[n : 2 * n], h[2 * n :]
    parts = {
        "token": _own_token(learner, torch.cat([said, noise]), torch.cat([b.ids, b.noise]), b.end, generator),
        "noun": _noun(learner, said, b),
        "whole": _whole(learner, said, b),
        "twin": ((said - twin).pow(2).mean(-1) * b.alike).sum() / b.alike.sum().clamp(min=1),
    }
    if before is not None:
        with run.autocast():
            old = before(input_ids=b.ids).last_hidden_state.float()
        parts["moved"] = (said - old).pow(2).mean()
    total = sum((WEIGHTS[k] * v for k, v in parts.items()), torch.zeros((), device=h.device))
    return {"loss": total, **parts}


def _own_token(learner: Learner, h: Tensor, ids: Tensor, end: Tensor, generator: torch.Generator) -> Tensor:
    """Cross entropy of the position's own token, at some positions that are not the end."""
    places = (ids != ids[0, int(end[0])]).nonzero()
    chosen = places[torch.randperm(len(places), generator=generator)[:TOLD].to(places.device)]
    rows, positions = chosen.unbind(1)
    return F.cross_entropy(learner.token(h[rows, positions]), ids[rows, positions])


def _noun(learner: Learner, h: Tensor, b: Batch) -> Tensor:
    if not len(b.nouns):
        return h.sum() * 0
    kind, look, side = learner.noun(h[b.nouns[:, 0], b.nouns[:, 1]]).split(TOLD_BY_NOUN, -1)
    told = F.cross_entropy(kind, b.kinds) + F.cross_entropy(look, b.looks)
    if (b.sides != UNKNOWN).any():
        told = told + F.cross_entropy(side, b.sides, ignore_index=UNKNOWN)
    return told


def _at_end(learner: Learner, h: Tensor, b: Batch) -> tuple[Tensor, ...]:
    """Objects, colours, and one part for each of CHOICES, told by the end token."""
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


def told(run: Run, learner: Learner, b: Batch) -> Mapping[str, float]:
    """Shares told rightly on scenes that were held out, and how unlike twins are."""
    with run.autocast():
        h = learner.tower(input_ids=torch.cat([b.ids, b.twins])).last_hidden_state.float()
    said, twin = h.chunk(2)
    kind, _, side = learner.noun(said[b.nouns[:, 0], b.nouns[:, 1]]).split(TOLD_BY_NOUN, -1)
    _, _, place, *_, left, right = _at_end(learner, said, b)
    pairs = b.choices[:, -1] != len(CATEGORIES)
    both = (left.argmax(1) == b.choices[:, -2]) & (right.argmax(1) == b.choices[:, -1])
    apart = ((said - twin).pow(2).mean(-1) * b.alike).sum() / b.alike.sum().clamp(min=1)
    return {
        "noun": float((kind.argmax(1) == b.kinds).float().mean()),
        "side": float((side.argmax(1) == b.sides)[b.sides != UNKNOWN].float().mean()),
        "left and right": float(both[pairs].float().mean()),
        "background": float((place.argmax(1) == b.choices[:, 0]).float().mean()),
        "twins apart": float(apart),
    }
