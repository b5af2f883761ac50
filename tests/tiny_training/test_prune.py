"""Vocabulary pruning: fewer tokens, and the same tokens for every caption of the worlds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tools.tiny_training import prune
from tools.tiny_training.tokenizer import END, learn, opened, split

import minikin.tiny
from minikin.errors import BadModelFile, BadRecipe
from minikin.tiny.encoders import weights
from minikin.tiny.encoders.dual_encoder import KIND, DualEncoder

TINY = Path(minikin.tiny.__file__).parent
FREQUENT = ("a cat on a hat", "the chat of that cat")
RARE = ("catamaran catamaran", "a hatchet", "thatcher")


@pytest.fixture(scope="module")
def learned() -> tuple[dict[str, int], list[prune.Merge]]:
    return learn(iter([*FREQUENT * 20, *RARE * 3]), 560)


def words_of(texts: tuple[str, ...]) -> set[str]:
    return {w for t in texts for w in split(t)}


def test_needed_merges_stay_and_the_rarest_go(learned: tuple[dict[str, int], list[prune.Merge]]) -> None:
    old, merges = learned
    needed = {m for w in words_of(FREQUENT) for m in prune.applied(w, {m: i for i, m in enumerate(merges)})}
    free = [m for m in merges if m not in needed]
    assert len(free) > 8
    for drop in (0, 3, len(free)):
        kept_merges = prune.pruned(merges, drop, words_of(FREQUENT))
        assert [m for m in merges if m not in free[len(free) - drop :]] == kept_merges
        new = prune.renumbered(old, kept_merges)
        assert list(new.values()) == list(range(len(old) - drop)) and new[END] == len(new) - 1
        assert [t for t in old if t in new] == list(new)
        before, after = opened(old, merges, 16), opened(new, kept_merges, 16)
        assert [before.tokenize(t) for t in FREQUENT] == [after.tokenize(t) for t in FREQUENT]
        same = [before.tokenize(t) == after.tokenize(t) for t in RARE]
        assert all(same) if not drop else not all(same)
    with pytest.raises(BadRecipe, match=f"Between 0 and {len(free)}"):
        prune.pruned(merges, len(free) + 1, words_of(FREQUENT))


def test_applied_is_what_the_tokenizer_does(learned: tuple[dict[str, int], list[prune.Merge]]) -> None:
    old, merges = learned
    tokenizer, ranks = opened(old, merges, 64), {m: i for i, m in enumerate(merges)}
    for text in (*FREQUENT, *RARE):
        for word in split(text):
            merges_of_word = prune.applied(word, ranks)
            assert len(word) - len(merges_of_word) == len(tokenizer.tokenize(word)), word


def test_pruned_shipped_model_encodes_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text encoder and dual encoder lose the rows of dropped tokens; encodings are equal to the bit."""
    from transformers import AutoTokenizer, CLIPTextModel

    texts = ["a photo of a cat on a hill", "two chairs at the beach, the left one red"]
    monkeypatch.setattr(prune, "world_words", lambda: words_of(tuple(texts)))
    weight_file = weights.embedded(KIND)
    was = json.loads((TINY / "weights" / "text_encoder" / "config.json").read_text())
    size = was["vocab_size"] - 1000
    prune.main(TINY / "weights", weight_file, tmp_path, size)

    encodings = []
    for folder in (TINY / "weights", tmp_path):
        t = AutoTokenizer.from_pretrained(folder / "tokenizer")
        text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
        ids = t(texts, padding="max_length", max_length=32, truncation=True, return_tensors="pt").input_ids
        assert ids.max() == text_encoder.config.eos_token_id == len(t) - 1 == text_encoder.config.vocab_size - 1
        with torch.no_grad():
            encodings.append(text_encoder(ids).last_hidden_state)
    assert torch.equal(*encodings)
    config = json.loads((tmp_path / "text_encoder" / "config.json").read_text())
    assert config["vocab_size"] == size
    assert {k for k in was if was[k] != config[k]} == {
        "vocab_size",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
    }

    encoders = [DualEncoder.open(), DualEncoder.open(tmp_path / weight_file.name, tmp_path / "tokenizer")]
    assert torch.equal(*(j.encode_texts(texts) for j in encoders))
    grey = np.full((1, 64, 64, 3), 128, np.uint8)
    assert torch.equal(*(j.encode_subjects(grey) for j in encoders))
    saved_bytes = weight_file.stat().st_size - (tmp_path / weight_file.name).stat().st_size
    assert abs(saved_bytes - 1000 * (128 + 2)) < 64, "eight bits a number and a scale a row"


def test_file_that_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    for text in ("{", "[]", '{"model": {"vocab": {}}}'):
        file.write_text(text)
        with pytest.raises(BadModelFile, match="no tokenizer.json"):
            prune.read(file)
    with pytest.raises(BadModelFile, match="no tokenizer.json"):
        prune.read(tmp_path / "none.json")


def test_weights_of_another_kind_are_refused(tmp_path: Path) -> None:
    folder = TINY / "weights" / "tokenizer"
    shutil.copy(TINY / "encoders" / "weights" / "classifier.safetensors", tmp_path / "weights.safetensors")
    with pytest.raises(Exception, match="classifier"):
        prune.dual_encoder_with(tmp_path / "weights.safetensors", np.arange(4), folder)


@pytest.mark.slow
def test_words_of_the_worlds_stay_single_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pair of the captions' words that the merges of the shipped tokenizer would join is left apart."""
    monkeypatch.setattr(prune, "SCENES", 2000)  # they have the same words as 20,000
    _, merges = prune.read(TINY / "weights" / "tokenizer" / "tokenizer.json")
    ranks = {m: i for i, m in enumerate(merges)}
    whole = {w for w in prune.world_words() if len(w) - len(prune.applied(w, ranks)) == 1}
    assert len(whole) > 340 and {"elephant", "hat", "striped"} <= whole
