"""tiny.build.prune: fewer tokens, the same tokens for every caption of the worlds."""

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
from minikin.tiny.encoders.dual_encoder import Judge

TINY = Path(minikin.tiny.__file__).parent
KNOWN = ("a cat on a hat", "the chat of that cat")
RARE = ("catamaran catamaran", "a hatchet", "thatcher")


@pytest.fixture(scope="module")
def learned() -> tuple[dict[str, int], list[prune.Merge]]:
    return learn(iter([*KNOWN * 20, *RARE * 3]), 560)


def words_of(texts: tuple[str, ...]) -> set[str]:
    return {w for t in texts for w in split(t)}


def test_needed_merges_stay_and_the_rarest_go(learned: tuple[dict[str, int], list[prune.Merge]]) -> None:
    old, merges = learned
    needed = {m for w in words_of(KNOWN) for m in prune.applied(w, {m: i for i, m in enumerate(merges)})}
    free = [m for m in merges if m not in needed]
    assert len(free) > 8
    for drop in (0, 3, len(free)):
        kept = prune.pruned(merges, drop, words_of(KNOWN))
        assert [m for m in merges if m not in free[len(free) - drop :]] == kept
        new = prune.renumbered(old, kept)
        assert list(new.values()) == list(range(len(old) - drop)) and new[END] == len(new) - 1
        assert [t for t in old if t in new] == list(new)
        before, after = opened(old, merges, 16), opened(new, kept, 16)
        assert [before.tokenize(t) for t in KNOWN] == [after.tokenize(t) for t in KNOWN]
        same = [before.tokenize(t) == after.tokenize(t) for t in RARE]
        assert all(same) if not drop else not all(same)
    with pytest.raises(BadRecipe, match=f"Between 0 and {len(free)}"):
        prune.pruned(merges, len(free) + 1, words_of(KNOWN))


def test_applied_is_what_the_tokenizer_does(learned: tuple[dict[str, int], list[prune.Merge]]) -> None:
    old, merges = learned
    tokenizer, ranks = opened(old, merges, 64), {m: i for i, m in enumerate(merges)}
    for text in (*KNOWN, *RARE):
        for word in split(text):
            made = prune.applied(word, ranks)
            assert len(word) - len(made) == len(tokenizer.tokenize(word)), word


def test_the_shipped_model_pruned_again_says_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of the text tower and of the judge go with their tokens: to the last bit the same encodings."""
    from transformers import AutoTokenizer, CLIPTextModel

    texts = ["a photo of a cat on a hill", "two chairs at the beach, the left one red"]
    monkeypatch.setattr(prune, "world_words", lambda: words_of(tuple(texts)))
    judge = TINY / "judges" / "weights" / "judge.safetensors"
    was = json.loads((TINY / "weights" / "text_encoder" / "config.json").read_text())
    size = was["vocab_size"] - 1000
    prune.main(TINY / "weights", judge, tmp_path, size)

    told = []
    for folder in (TINY / "weights", tmp_path):
        t = AutoTokenizer.from_pretrained(folder / "tokenizer")
        tower = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
        ids = t(texts, padding="max_length", max_length=32, truncation=True, return_tensors="pt").input_ids
        assert ids.max() == tower.config.eos_token_id == len(t) - 1 == tower.config.vocab_size - 1
        with torch.no_grad():
            told.append(tower(ids).last_hidden_state)
    assert torch.equal(*told)
    config = json.loads((tmp_path / "text_encoder" / "config.json").read_text())
    assert config["vocab_size"] == size
    assert {k for k in was if was[k] != config[k]} == {
        "vocab_size", "bos_token_id", "eos_token_id", "pad_token_id",
    }  # fmt: skip

    read = [Judge.open(), Judge.open(tmp_path / judge.name, tmp_path / "tokenizer")]
    assert torch.equal(*(j.text(texts) for j in read))
    grey = np.full((1, 64, 64, 3), 128, np.uint8)
    assert torch.equal(*(j.likeness(grey) for j in read))
    saved = judge.stat().st_size - (tmp_path / judge.name).stat().st_size
    assert abs(saved - 1000 * (128 + 2)) < 64, "eight bits a number and a scale a row"


def test_what_is_no_tokenizer_is_told(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    for text in ("{", "[]", '{"model": {"vocab": {}}}'):
        file.write_text(text)
        with pytest.raises(BadModelFile, match="no tokenizer"):
            prune.read(file)
    with pytest.raises(BadModelFile, match="no tokenizer"):
        prune.read(tmp_path / "none.json")


def test_a_judge_of_another_kind_is_refused(tmp_path: Path) -> None:
    folder = TINY / "weights" / "tokenizer"
    shutil.copy(TINY / "judges" / "weights" / "classifier.safetensors", tmp_path / "judge.safetensors")
    with pytest.raises(Exception, match="classifier"):
        prune.judge_with(tmp_path / "judge.safetensors", np.arange(4), folder)


@pytest.mark.slow
def test_every_word_of_the_worlds_is_as_whole_as_before() -> None:
    """No pair of the captions' words that the merges of the shipped tokenizer would join is left apart."""
    _, merges = prune.read(TINY / "weights" / "tokenizer" / "tokenizer.json")
    ranks = {m: i for i, m in enumerate(merges)}
    whole = {w for w in prune.world_words() if len(w) - len(prune.applied(w, ranks)) == 1}
    assert len(whole) > 340 and {"elephant", "hat", "striped"} <= whole
