"""Stage `tokenizer`: byte-level BPE with CLIP's conventions, trained on captions.

Half of the text is captions of the world, half general captions (minikin.perfusion.corpus), so that
prompts about other subjects become words rather than letters. Like CLIP's own, the vocabulary begins with
the 256 byte symbols, then the same at the end of a word, then the merges, then the two special tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tools.tiny_training.job import Job, adopt, save_part

from minikin import events
from minikin.tiny.captions import caption

BEGIN, END, WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"
PRIVATE = 0xE000  # first code point of the private use area
CAPTION_SEED = 21  # of the scenes
# CLIP's split: contractions, runs of letters, single digits, runs of anything else
SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def stage(job: Job) -> Iterator[events.Event]:
    """Write tokenizer/tokenizer, a folder that transformers opens."""
    if job.takes("tokenizer"):
        yield events.Note(f"tokenizer: {adopt(job, 'tokenizer', job.tokenizer)}")
        return
    if job.tokenizer.exists():
        yield events.Note(f"tokenizer: {job.tokenizer} is there.")
        return
    r = job.recipe.tokenizer
    vocabulary, merges = learn(texts(job, r.captions), r.size)
    save_part(opened(vocabulary, merges, job.recipe.text.context), job.tokenizer)
    yield events.Note(f"tokenizer: {len(vocabulary)} tokens, written to {job.tokenizer}")


def texts(job: Job, n: int) -> Iterator[str]:
    """`n` captions of the world, its names, and `n` general captions."""
    from tools.tiny_training.images import world_of

    from minikin.perfusion import corpus
    from minikin.tiny import vocabulary as words

    world = world_of(job.recipe.world, job.recipe.images.backdrops, job.art)
    for i in range(n):
        yield caption(world.scene(CAPTION_SEED, i), np.random.default_rng((CAPTION_SEED, i))).text
    for c in words.CATEGORIES.values():
        yield from [" ".join((c.name, c.plural, *c.synonyms))] * max(1, n // 150)
    yield from corpus.captions(n)


def learn(lines: Iterator[str], size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A vocabulary of at most `size` tokens, and its merges in order; equal texts give equal results.

    The last letter of a word is replaced by a letter of its own, from a complete alphabet. If the trainer
    added the end of a word itself, it would number these letters in the order of a hash table, and ties
    between merges would be resolved differently in every run.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    last = {s: chr(PRIVATE + i) for i, s in enumerate(symbols)}
    plain = {**{s: s for s in symbols}, **{v: k + WORD_END for k, v in last.items()}}
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(vocab_size=size - 2, initial_alphabet=list(plain), show_progress=False)
    learner.train_from_iterator((" ".join(w[:-1] + last[w[-1]] for w in split(t)) for t in lines), trainer)
    merge_list = json.loads(learner.to_str())["model"]["merges"]
    pairs = [m if isinstance(m, list) else m.split(" ") for m in merge_list]
    merges = [(a, "".join(plain[c] for c in b)) for a, b in pairs]
    tokens = list(dict.fromkeys([*plain.values(), *(a + b for a, b in merges), BEGIN, END]))
    return {t: i for i, t in enumerate(tokens)}, merges


def split(text: str) -> list[str]:
    """The words of a text in byte symbols, as CLIP splits them."""
    from tokenizers import Regex, normalizers, pre_tokenizers

    clean = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    words = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return [w for w, _ in words.pre_tokenize_str(clean.normalize_str(text))]


def opened(vocabulary: dict[str, int], merges: list[tuple[str, str]], context: int) -> Any:
    """The CLIPTokenizer with these merges, loaded from the two files of CLIP's format."""
    import tempfile

    from transformers import CLIPTokenizer

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
        lines = ["#version: 0.2", *(" ".join(m) for m in merges)]
        (folder / "merges.txt").write_text("\n".join(lines) + "\n")
        return CLIPTokenizer.from_pretrained(folder, model_max_length=context, pad_token=END)
