"""The concept file: sizes at true scale, round trips, and every refusal with its words."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from minikin import Concept
from minikin.errors import BadConceptFile, BadRecipe, StorageError
from minikin.models.attention import layout
from minikin.models.identity import Origin
from minikin.models.loading.architectures import ARCHITECTURES
from minikin.perfusion import concept_file
from minikin.perfusion import strict_safetensors as io
from minikin.perfusion.concept import check_category, check_name


def concept(family: str = "sd15", mode: str = "gated", words: int = 1) -> Concept:
    """A random concept with the true layer widths of a family."""
    a = ARCHITECTURES[family]
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(a.unet)
    g = torch.Generator().manual_seed(0)
    delta = {s.path: torch.randn(s.width, generator=g) for s in layout(unet).layers}
    gated = mode == "gated"
    width = a.unet["cross_attention_dim"]
    return Concept(
        name="tom", category="cat", mode=mode,  # type: ignore[arg-type]
        origin=Origin(a.name, "f" * 64, "e" * 64, "CreativeML OpenRAIL-M", "d" * 145),
        word_deltas=tuple(torch.randn(words, t["hidden_size"], generator=g) for t in a.texts) if gated else (),
        i_star=(i := torch.randn(width, generator=g)) if gated else torch.zeros(1),
        dual=i / i.abs().max() if gated else torch.zeros(1),
        delta=delta, c_hash="c" * 64 if gated else "",
        recipe={"mode": mode, "steps": 200, "batch": 8, "value_rate": 0.03, "seed": 0, "photos": 5},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("mode", "family", "int8", "cap"),
    [
        ("gated", "sd15", False, 32_000), ("gated", "sd15", True, 20_000), ("gated", "sd21", False, 33_000),
        ("gated", "sdxl", None, 100_000), ("value", "sd15", False, 26_500), ("value", "sd15", True, 14_100),
        ("value", "sd21", False, 26_500), ("value", "sdxl", None, 85_000),
    ],
)  # fmt: skip
def test_size_caps(mode: str, family: str, int8: bool | None, cap: int) -> None:
    """Header included, as docs/concept-file.md has them."""
    assert len(concept_file.to_bytes(concept(family, mode=mode), int8=int8)) <= cap


@pytest.mark.parametrize("words", [1, 2, 3])
def test_sdxl_fits_with_categories_of_several_tokens(words: int) -> None:
    """ "teddy bear" has two tokens."""
    assert len(concept_file.to_bytes(concept("sdxl", words=words))) <= 100_000


def test_preview_fits_or_is_left_out() -> None:
    small, large = b"\xff\xd8" + bytes(12_000), b"\xff\xd8" + bytes(90_000)
    with_small = concept_file.to_bytes(replace(concept(), preview=small))
    assert len(with_small) <= concept_file.MAX_BYTES and concept_file.from_bytes(with_small).preview == small
    with_large = concept_file.to_bytes(replace(concept(), preview=large))
    assert len(with_large) <= concept_file.MAX_BYTES and concept_file.from_bytes(with_large).preview == b""


@pytest.mark.parametrize("mode", ["gated", "value"])
@pytest.mark.parametrize("int8", [False, True])
def test_round_trip(mode: str, int8: bool, tmp_path: Path) -> None:
    """What is read is what was written, to half precision (or half a step of int8)."""
    c = concept("sdxl", mode, words=2)
    read = Concept.load(c.save(tmp_path / "tom.safetensors", int8=int8))
    assert (read.name, read.category, read.mode, read.origin) == (c.name, c.category, c.mode, c.origin)
    assert read.gate == c.gate and read.recipe == c.recipe and read.c_hash == c.c_hash
    assert list(read.delta) == list(c.delta)
    step = max(float(d.abs().max()) for d in c.delta.values()) / 127
    for path, d in c.delta.items():
        assert torch.allclose(read.delta[path], d, atol=0.51 * step if int8 else 2e-3)
    for a, b in zip(read.word_deltas, c.word_deltas, strict=True):
        assert torch.allclose(a, b, atol=float(b.abs().max()) / 250 if int8 else 2e-3)


def test_mode_value_is_stored_under_the_name_that_older_versions_read() -> None:
    data = concept_file.to_bytes(concept(mode="value"))
    _, meta = io.parse(data, "tom.safetensors")
    assert meta["minikin.mode"] == "row" and concept_file.from_bytes(data).mode == "value"


def test_equal_concepts_give_equal_files() -> None:
    assert concept_file.to_bytes(concept()) == concept_file.to_bytes(concept())


def test_the_safetensors_library_reads_it(tmp_path: Path) -> None:
    from safetensors import safe_open

    path = concept().save(tmp_path / "tom.safetensors")
    with safe_open(path, "pt") as f:
        meta = f.metadata()
        assert set(f.keys()) == {"delta", "dual", "i_star", "word.0"}
        assert f.get_tensor("delta").shape == (12_480,)
    assert meta["modelspec.trigger_phrase"] == "<tom>"
    assert meta["modelspec.architecture"] == "stable-diffusion-v1/minikin"
    assert meta["modelspec.sai_model_spec"] == "1.0.1"


def rebuilt(change: Any) -> bytes:
    """A valid file with its header changed by `change(header)`."""
    data = concept_file.to_bytes(concept())
    (n,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + n])
    body = change(header) or data[8 + n :]
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def edited(**values: str) -> bytes:
    return rebuilt(lambda h: h["__metadata__"].update({f"minikin.{k}": v for k, v in values.items()}))


def entry(**values: Any) -> bytes:
    return rebuilt(lambda h: h["delta"].update(values))


def rescaled(words: int, scales: int, **more: torch.Tensor) -> bytes:
    """An int8 file whose `words` word vectors have another number of scales."""
    tensors, meta = io.parse(concept_file.to_bytes(concept(words=words), int8=True), "x")
    return io.serialize(tensors | {"wordscale.0": torch.ones(scales)} | more, meta)


DAMAGE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not in the safetensors format"),
    "pickle": (b"\x80\x04\x95" + bytes(200), "Pickle-based files"),
    "zip": (b"PK\x03\x04" + bytes(200), "Pickle-based files"),
    "cut in the header": (concept_file.to_bytes(concept())[:300], "incomplete"),
    "cut in the body": (concept_file.to_bytes(concept())[:-100], "its tensors end at byte"),
    "trailing bytes": (concept_file.to_bytes(concept()) + b"xx", "its tensors end at byte"),
    "huge header": (struct.pack("<Q", 2**40) + b"{}", "header claims"),
    "not JSON": (struct.pack("<Q", 5) + b"{a:1}" + bytes(4), "not valid JSON"),
    "deep JSON": (struct.pack("<Q", 60_000) + b'{"a":' * 12_000, "is not whole"),
    "twice": (struct.pack("<Q", 13) + b'{"a":1,"a":2}', "a key occurs twice"),
    "other version": (edited(format="7"), "has format 7; this Minikin reads up to 1"),
    "format 0": (edited(format="0"), "has format 0, which does not exist"),
    "format -3": (edited(format="-3"), "has format -3, which does not exist"),
    "three scales for two words": (rescaled(2, 3), "wordscale.0 does not fit the word's 2 vectors"),
    "three scales for one word": (rescaled(1, 3), "wordscale.0 does not fit the word's 1 vectors"),
    "a word that is no table": (rescaled(1, 7, **{"word.0": torch.ones(7, dtype=torch.int8)}), "wordscale.0"),
    "endless index": (edited(index='[["m.0",16,Infinity]]'), "Infinity is no number of JSON"),
    "huge gate": (edited(gate='{"beta":1' + "0" * 400 + ',"tau":0.1}'), "OverflowError"),
    "foreign": (io.serialize({"lora": torch.zeros(3)}, {}), "not a Minikin concept"),
    "bad mode": (edited(mode="evil"), "mode 'evil'"),
    "bad name": (edited(name="../../etc"), "cannot be a concept's name"),
    "bad gate": (edited(gate='{"beta":0.5,"tau":-1}'), "tau -1"),
    "bad index": (edited(index='[["d0.0",5,1]]'), "the index lists 5 value differences, the file has 12480"),
    "bad layer": (edited(index='[["vae",12480,1]]'), "a layer named"),
    "too many layers": (edited(index='[["d0.0",1,1000000000000]]'), "not 1 to 1000 layers"),
    "layer twice": (edited(index='[["m.0",6240,1],["m.0",6240,1]]'), "a layer occurs twice"),
    "odd dtype": (entry(dtype="F64"), "has the type 'F64'"),
    "odd shape": (entry(shape=[2**60, 0]), "has the shape"),
    "wrong shape": (entry(shape=[7]), "invalid shape"),
    "overlap": (entry(data_offsets=[4, 24_964]), "lies at bytes"),
    "negative": (entry(data_offsets=[-4, 24_956]), "no valid place"),
    "path name": (rebuilt(lambda h: h.update({"../x": h.pop("delta")})), "a tensor is named"),
    "gate is not a number": (edited(gate='{"beta":NaN,"tau":0.1}'), "NaN is no number of JSON"),
    "recipe is a list": (edited(recipe="[]"), "not an object"),
    "deep metadata": (edited(index="[" * 20_000), "not a sound concept file"),
    "shared state": (rebuilt(lambda h: h.update({"c_inv": h.pop("i_star")})), "not a sound concept file"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_files_are_refused_in_words(case: str) -> None:
    data, words = DAMAGE[case]
    with pytest.raises(BadConceptFile) as e:
        concept_file.from_bytes(data, "tom.safetensors")
    assert words in str(e.value) and "tom.safetensors" in str(e.value)


def test_nan_is_neither_written_nor_read() -> None:
    c = concept()
    broken = replace(c, i_star=torch.full((768,), float("nan")))
    with pytest.raises(BadConceptFile, match="holds NaN or Inf; it was not written"):
        concept_file.to_bytes(broken)
    good = concept_file.to_bytes(c)
    half_nan = bytes(good[:-2]) + b"\xff\x7f"
    with pytest.raises(BadConceptFile, match="holds NaN or Inf"):
        concept_file.from_bytes(half_nan)


def test_absurd_magnitude_is_refused() -> None:
    c = concept()
    loud = replace(c, delta={k: d * 0 + 3e4 for k, d in c.delta.items()})
    with pytest.raises(BadConceptFile, match="plausible"):
        concept_file.from_bytes(concept_file.to_bytes(loud))


def test_too_large_for_half_precision() -> None:
    c = concept()
    loud = replace(c, delta={k: d * 0 + 1e6 for k, d in c.delta.items()})
    with pytest.raises(BadConceptFile, match="half precision"):
        concept_file.to_bytes(loud, int8=False)


def test_disk_full_keeps_the_old_file(tmp_path: Path, monkeypatch: Any) -> None:
    """ENOSPC in the middle of a write: a message, the old file whole, no litter."""
    import errno
    import os

    path = concept().save(tmp_path / "tom.safetensors")
    before = path.read_bytes()

    def full(_fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="the disk is full"):
        replace(concept(), category="dog").save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["tom.safetensors"]


def test_read_only_folder(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="was not written"):
        concept().save(Path("/proc/nowhere/tom.safetensors"))


@pytest.mark.parametrize("name", ["", "Tom", "1tom", "to m", "../x", "a" * 41, "töm", "tom:1", "<tom>"])
def test_odd_names(name: str) -> None:
    with pytest.raises(BadRecipe, match="cannot be a concept's name"):
        check_name(name)


@pytest.mark.parametrize(
    ("category", "words"),
    [("", "is empty"), ("  ", "is empty"), ("x" * 61, "61 characters long"),
     ("cat\n", "characters that no word"),
     ("<cat>", "characters that no word"), ("a,b", "characters that no word")],
)  # fmt: skip
def test_odd_categories(category: str, words: str) -> None:
    with pytest.raises(BadRecipe) as e:
        check_category(category)
    assert words in str(e.value)
