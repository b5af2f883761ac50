"""Vocabulary pruning without an effect on any caption of the worlds: `python -m tools.tiny_training.prune`.

The tokenizer is trained on captions of the worlds and on general captions, the networks on captions of the
worlds alone. So the rarest words of the general captions, which are the last merges, have embeddings that no
image ever trained. These merges are dropped from the end, except those that a caption of a world needs. Every
such caption keeps its tokens and each token its row, so it is encoded bit for bit as before. A dropped word is
read in smaller parts; every byte keeps its token.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from tools.tiny_training.job import save_part
from tools.tiny_training.tokenizer import BEGIN, END, WORD_END, opened, split
from torch import Tensor

from minikin.errors import BadModelFile, BadRecipe
from minikin.files import atomic_write
from minikin.tiny.encoders import weights
from minikin.tiny.encoders.dual_encoder import KIND, Tokens

Merge = tuple[str, str]
SCENES = 20_000  # of each world; the words of 2,000 are already those of 8,000
ROWS = "reader.words.weight"  # token embeddings in the dual encoder's file


def main(
    model: Annotated[Path, typer.Argument(help="a diffusers folder with tokenizer and text_encoder")],
    dual_encoder: Annotated[
        Path, typer.Argument(help="weight file of the dual encoder with the same tokenizer")
    ],
    out: Annotated[Path, typer.Option(help="folder for tokenizer, text_encoder and the weight file")],
    size: Annotated[int, typer.Option(help="tokens that are left")] = 3584,
) -> None:
    """Drop the rarest words that no caption of the worlds and no baseline uses."""
    from transformers import CLIPTextModel

    old, merges = read(model / "tokenizer" / "tokenizer.json")
    kept_merges = pruned(merges, len(old) - size, world_words())
    new = renumbered(old, kept_merges)
    rows = np.array([old[t] for t in new])

    text_encoder = CLIPTextModel.from_pretrained(model / "text_encoder", use_safetensors=True, dtype="auto")
    tokenizer = opened(new, kept_merges, text_encoder.config.max_position_embeddings)
    for name in ("bos", "eos", "pad"):
        setattr(text_encoder.config, f"{name}_token_id", getattr(tokenizer, f"{name}_token_id"))
    words = text_encoder.get_input_embeddings().weight.data[rows].clone()
    text_encoder.resize_token_embeddings(len(new), mean_resizing=False).weight.data.copy_(words)
    save_part(tokenizer, out / "tokenizer")
    save_part(text_encoder, out / "text_encoder")
    atomic_write(out / dual_encoder.name, dual_encoder_with(dual_encoder, rows, out / "tokenizer"))
    typer.echo(f"{len(old)} tokens, {len(new)} left, written to {out}")


def read(file: Path) -> tuple[dict[str, int], list[Merge]]:
    """Vocabulary and merges of a tokenizer.json. Raises BadModelFile."""
    try:
        model = json.loads(file.read_text(encoding="utf-8"))["model"]
        merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
        return model["vocab"], [(a, b) for a, b in merges]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise BadModelFile(f"{file} is no tokenizer.json of CLIP's format ({type(e).__name__}: {e}).") from e


def world_words() -> set[str]:
    """All words of captions and names of both worlds, and the baselines' rare words, in byte symbols."""
    from tools.tiny_training.images import world_of
    from tools.tiny_training.recipes import Images
    from tools.tiny_training.tokenizer import CAPTION_SEED

    from minikin.baselines.methods import METHODS
    from minikin.tiny import vocabulary as named
    from minikin.tiny.captions import caption

    needed_words: set[str] = set()
    for name in ("small", "wide"):
        world = world_of(name, Images().backdrops, None)
        for i in range(SCENES):
            rng = np.random.default_rng((CAPTION_SEED, i))
            needed_words.update(split(caption(world.scene(CAPTION_SEED, i), rng).text))
    for c in named.CATEGORIES.values():
        needed_words.update(split(" ".join((c.name, c.plural, *c.synonyms))))
    for m in METHODS.values():
        needed_words.update(split(" ".join(m.rare)))
    return needed_words


def applied(word: str, ranks: dict[Merge, int]) -> list[Merge]:
    """The merges that byte-pair encoding applies to a word, in order."""
    parts, applied_merges = [*word[:-1], word[-1] + WORD_END], []
    while best := min((p for p in pairwise(parts) if p in ranks), key=ranks.__getitem__, default=None):
        applied_merges.append(best)
        joined: list[str] = []
        for part in parts:
            if joined and (joined[-1], part) == best:
                joined[-1] += part
            else:
                joined.append(part)
        parts = joined
    return applied_merges


def pruned(merges: Sequence[Merge], drop: int, words: Iterable[str]) -> list[Merge]:
    """The merges without the last `drop` of those that no word needs.

    A merge that no word applies has no effect on them: a word always applies its first possible merge.
    Raises BadRecipe when fewer than `drop` merges can be dropped.
    """
    ranks = {m: i for i, m in enumerate(merges)}
    needed = {m for w in words for m in applied(w, ranks)}
    free = [m for m in merges if m not in needed]
    if not 0 <= drop <= len(free):
        raise BadRecipe(
            f"Between 0 and {len(free)} of the {len(merges)} merges can be dropped, not {drop}: the words of "
            "the worlds need the others."
        )
    gone = set(free[len(free) - drop :])
    return [m for m in merges if m not in gone]


def renumbered(old: dict[str, int], merges: Sequence[Merge]) -> dict[str, int]:
    """The vocabulary of the merges in the old order: bytes, merges, the two special tokens."""
    merged = {a + b for a, b in merges}
    symbols = sorted(old, key=old.__getitem__)[:512]
    tokens = merged.union(symbols, (BEGIN, END))
    return {t: i for i, t in enumerate(t for t in sorted(old, key=old.__getitem__) if t in tokens)}


def dual_encoder_with(path: Path, rows: np.ndarray, tokenizer: Path) -> bytes:
    """The dual encoder's file with these rows of its token embeddings, for that tokenizer; still int8."""
    from safetensors import safe_open
    from safetensors.torch import save

    weights.read(path, KIND)  # raises an error for a damaged file
    with safe_open(path, "pt") as f:
        facts: dict[str, Any] = json.loads(f.metadata()["minikin"])
        tensors: dict[str, Tensor] = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118 - not a dict
    for name in (ROWS, ROWS + weights.SCALE):
        tensors[name] = tensors[name][rows].contiguous()
    facts["reader"]["vocabulary"], facts["tokenizer"] = len(rows), Tokens(tokenizer).digest
    written: bytes = save(tensors, {"minikin": json.dumps(facts)})
    return written


if __name__ == "__main__":
    from tools.tiny_training.errors import exit_on_error

    with exit_on_error():
        typer.run(main)
