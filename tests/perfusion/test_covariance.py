"""Covariance C: valid tokens only, float64, cached by text-encoder hash; concepts record its hash."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from minikin import Studio
from minikin.errors import BadRecipe
from minikin.models.base import Base
from minikin.models.prompt import Prompt
from minikin.perfusion import corpus
from minikin.perfusion.covariance import Covariance, covariance, estimate, read_captions


def test_only_valid_tokens_count(bases: dict[str, Base]) -> None:
    """Against a plain loop over BOS..EOS, in float64; padding must not enter."""
    base, texts = bases["sd15"], ["a cat", "a photo of a dog on the beach", ""]
    c = estimate(base, texts)
    total, n = torch.zeros_like(c.c), 0
    for text in texts:
        ids = base.tokenizers[0](text).input_ids
        rows = base.encode([Prompt(text, text)]).e[0, : len(ids)].detach().double()
        total += rows.T @ rows
        n += len(ids)
    assert c.n_tokens == n == 4 + 10 + 2
    assert torch.allclose(c.c, total / n, rtol=1e-5)
    assert c.c.dtype is torch.float64


def test_sd2_pads_are_not_valid(bases: dict[str, Base]) -> None:
    """SD 2 pads with token 0, which is not EOS: the first EOS ends the valid part."""
    out = bases["sd21"].encode([Prompt("a cat", "a cat")])
    assert out.valid.sum() == 4


def test_inverse_is_symmetric_positive_and_conditioned(bases: dict[str, Base]) -> None:
    c = estimate(bases["sd15"], corpus.captions(300))
    assert torch.linalg.eigvalsh(c.inverse.double()).min() > 0
    assert c.condition > 1
    small = Covariance(torch.diag(torch.tensor([1.0, 1e-12], dtype=torch.float64)), 1, 1)
    assert small.inverse.abs().max() < 1.1 / (0.5 * small.ridge)


def test_cache_is_used_and_survives_damage(bases: dict[str, Base], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("MINIKIN_CACHE", str(tmp_path))
    texts = corpus.captions(150)
    first = covariance(bases["sd15"], texts)
    (path,) = (tmp_path / "covariance").glob("*.safetensors")
    calls: list[int] = []
    again = covariance(bases["sd15"], texts, progress=lambda done, total: calls.append(done))
    assert not calls and again.hash == first.hash
    path.write_bytes(b"damaged")
    assert covariance(bases["sd15"], texts).hash == first.hash


def test_corpus_is_fixed_varied_and_large() -> None:
    """The same captions everywhere (their hash is pinned), all different, of varied length."""
    import hashlib

    lines = corpus.captions(5000)
    assert len(set(lines)) == 5000
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest().startswith(PINNED)
    lengths = [len(line.split()) for line in lines]
    assert min(lengths) <= 3 and max(lengths) >= 20
    assert len({w for line in lines for w in line.split()}) > 700


PINNED = "429dc8800fac526d"


def test_a_concept_needs_no_covariance_to_be_used(
    bases: dict[str, Base], photos: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    """Taught with its own captions here, used where neither they nor any cache exist."""
    monkeypatch.setenv("MINIKIN_CACHE", str(tmp_path / "here"))
    captions = tmp_path / "captions.txt"
    captions.write_text("\n".join(corpus.captions(1000)[700:]))
    here = Studio(bases["sd15"])
    tom = here.teach(photos, name="tom", category="cat", mode="gated", steps=1, batch=1, captions=str(captions))
    assert (
        tom.c_hash == covariance(bases["sd15"], read_captions(captions)).hash != covariance(bases["sd15"]).hash
    )
    path = tom.save(tmp_path / "tom.safetensors")
    monkeypatch.setenv("MINIKIN_CACHE", str(tmp_path / "elsewhere"))
    there = Studio(bases["sd15"])
    there.add(str(path))
    a, b = (np.asarray(s.paint("<tom>", steps=2)[0], int) for s in (here, there))
    assert np.abs(a - b).max() <= 1
    assert not (tmp_path / "elsewhere").exists()


def test_captions_files(tmp_path: Path) -> None:
    with pytest.raises(BadRecipe, match="cannot be read"):
        read_captions(tmp_path / "none.txt")
    (tmp_path / "few.txt").write_text("one\ntwo\n")
    with pytest.raises(BadRecipe, match="holds 2 captions"):
        read_captions(tmp_path / "few.txt")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadRecipe, match="Expected UTF-8"):
        read_captions(tmp_path / "binary.txt")
