"""Data sources and cached latents of distillation: every format, and an error for every mistake."""

from __future__ import annotations

import errno
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from minikin import events
from minikin.distillation import data, sources
from minikin.distillation.data import Examples, load
from minikin.distillation.distill import check_batch_split
from minikin.distillation.solver import Schedule
from minikin.distillation.sources import find, squared
from minikin.distillation.student import Encoder, teacher
from minikin.errors import AssetError, BadPhoto, BadRecipe, StorageError, UnknownName
from minikin.models.base import Base
from minikin.recipes import Distill
from minikin.training.distributed import Ranks
from tests.helpers.distillings import CAPTIONS, captions_file, image_folder


def png(side: int = 32, colour: int = 90) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((side, side, 3), colour, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def tar_of(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


# ---- kinds of data ---------------------------------------------------------------------------------


def test_a_folder_with_captions_beside(tmp_path: Path) -> None:
    source = find(str(image_folder(tmp_path / "p", 3)))
    assert source.has_images and len(source) == 3
    assert [source.captions(i) for i in range(3)] == [[c] for c in CAPTIONS[:3]]
    assert source.image(1).size == (64, 64)
    assert len(find(str(tmp_path / "p"), 2)) == 2


def test_a_folder_with_metadata(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "sub" / "b.png").write_bytes(png())
    rows = [
        {"file_name": "a.png", "text": "a cat"},
        {"file_name": "sub/b.png", "caption": ["a dog", "a hound"]},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    source = find(str(tmp_path))
    assert [source.captions(i) for i in range(2)] == [["a cat"], ["a dog", "a hound"]]


def test_tar_files(tmp_path: Path) -> None:
    """Member names are never used as paths; captions are text or JSON, in any order."""
    tar_of(
        tmp_path / "0.tar",
        {
            "x/1.txt": b"a cat",
            "x/1.png": png(colour=10),
            "2.png": png(colour=200),
            "2.json": b'{"caption": "a dog"}',
        },
    )
    tar_of(tmp_path / "1.tar", {"../../evil.png": png(), "../../evil.txt": b"a bird"})
    source = find(str(tmp_path))
    assert [source.captions(i) for i in range(3)] == [["a cat"], ["a dog"], ["a bird"]]
    assert [np.asarray(source.image(i))[0, 0, 0] for i in range(2)] == [10, 200]
    assert sorted(f.name for f in tmp_path.iterdir()) == ["0.tar", "1.tar"]


def test_captions_alone(tmp_path: Path) -> None:
    source = find(str(captions_file(tmp_path)))
    assert not source.has_images and len(source) == len(CAPTIONS)
    (tmp_path / "c.jsonl").write_text('{"text": "a cat"}\n\n{"prompt": ["a dog", "a hound"]}\n')
    assert [find(str(tmp_path / "c.jsonl")).captions(i) for i in range(2)] == [["a cat"], ["a dog"]]


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ("broken", "Expecting value"),
        ("[1]", "it is a list"),
        ('{"text": 5}', "text is 5, not a text"),
        ('{"caption": {"a": 1}}', 'caption is {"a": 1}, not a text'),
        ('{"text": ["a", true]}', "not a text"),
    ],
)
def test_rows_without_captions_are_named(tmp_path: Path, row: str, why: str) -> None:
    """In a caption file, in metadata.jsonl and in a .tar: never dropped in silence, never a traceback."""
    (tmp_path / "c.jsonl").write_text(f'{{"text": "a cat"}}\n{row}\n')
    with pytest.raises(BadRecipe, match=r"c\.jsonl line 2 is not a JSON object with a caption") as error:
        find(str(tmp_path / "c.jsonl"))
    assert why in str(error.value)
    tar_of(tmp_path / "t.tar", {"1.png": png(), "1.json": row.encode()})
    with pytest.raises(BadRecipe, match=r"t\.tar:1\.json is not a JSON object"):
        find(str(tmp_path / "t.tar"))
    folder = image_folder(tmp_path / "p", 1)
    (folder / "metadata.jsonl").write_text(row.replace("{", '{"file_name": "0.png", ', 1))
    with pytest.raises(BadRecipe, match=r"metadata\.jsonl line 1 is not an object"):
        find(str(folder))


def test_scenes_as_a_data_source() -> None:
    source = find("scenes:small", 3)
    assert len(source) == 3 and len(source.captions(0)) == 4
    assert source.image(2).size == (128, 128)
    with pytest.raises(UnknownName, match="world 'smal'"):
        find("scenes:smal")


# ---- what is wrong with it -------------------------------------------------------------------------


def test_images_without_captions_are_named(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "p", 3)
    (folder / "1.txt").unlink()
    with pytest.raises(BadPhoto, match=r"1 of 3 images have no caption, for example 1\.png\. Put NAME\.txt"):
        find(str(folder))
    path = tar_of(tmp_path / "t.tar", {"7.png": png()})
    with pytest.raises(BadPhoto, match=r"1 of 1 images have no caption, for example 7\.png"):
        find(str(path))


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda p: p / "none", BadRecipe, "no folder or file"),
        (lambda p: p, BadPhoto, "holds no images"),
        (lambda p: tar_of(p / "t.tar", {"a.txt": b"x"}), BadPhoto, "no images"),
        (lambda p: (p / "b.tar", (p / "b.tar").write_bytes(b"junk" * 999))[0], BadRecipe, "as a .tar"),
        (lambda p: (p / "c.txt", (p / "c.txt").write_text("\n \n"))[0], BadRecipe, "no captions"),
        (lambda p: (p / "d.csv", (p / "d.csv").write_text("x"))[0], BadRecipe, "is not training data"),
    ],
)
def test_unusable_data(tmp_path: Path, make: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        find(str(make(tmp_path)))


def test_a_broken_line_of_metadata_is_named(tmp_path: Path) -> None:
    folder = image_folder(tmp_path, 1)
    (folder / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "x"}\n{"file": 1}\n')
    with pytest.raises(BadRecipe, match="line 2 is not an object with file_name"):
        find(str(folder))


def test_images_of_the_wrong_size() -> None:
    """Large images are cropped to the centre, images below half the size are refused."""
    wide = Image.new("RGB", (300, 100), "white")
    wide.paste("black", (100, 0, 200, 100))
    assert np.asarray(squared(wide, 64, "wide")).max() == 0
    with pytest.raises(BadPhoto, match="300x100 pixels, but training is at 512: at least 256"):
        squared(wide, 512, "wide")
    clear = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    assert np.asarray(squared(clear, 64, "clear")).min() == 255


def test_a_damaged_image_is_named(tmp_path: Path) -> None:
    source = find(str(tar_of(tmp_path / "t.tar", {"a.png": png()[:60], "a.txt": b"a cat"})))
    with pytest.raises(BadPhoto, match=r"t\.tar:a\.png cannot be read"):
        source.image(0)


# ---- latents ---------------------------------------------------------------------------------------


def loaded(base: Base, where: str, folder: Path, *, with_latents: bool = True, **recipe: Any) -> Examples:
    r = Distill.make(method="lcm-lora", data=where, teacher_steps=2, **recipe).resolved(False)
    work = load(
        Encoder(base),
        teacher(base, Schedule.of(base)),
        find(where),
        r,
        folder,
        Ranks(),
        with_latents=with_latents,
    )
    done = None
    for done in work:
        pass
    assert isinstance(done, events.Done)
    examples: Examples = done.result
    return examples


@pytest.fixture
def small_shards(monkeypatch: Any) -> None:
    monkeypatch.setattr(data, "SHARD", 2)


@pytest.mark.usefixtures("small_shards")
def test_latents_are_computed_once(bases: dict[str, Base], tmp_path: Path, monkeypatch: Any) -> None:
    """Latents are the VAE's, in float16; a second run opens no image; missing files are computed."""
    base, folder = bases["sd15"], image_folder(tmp_path / "p", 5)
    first = loaded(base, str(folder), tmp_path / "latents")
    pair = (
        torch.stack([torch.full((3, 64, 64), 40 * k + 20, dtype=torch.uint8) for k in (2, 3)]).float() / 127.5
        - 1
    )
    assert first.latents is not None
    # a file holds two: equal to the bit only against a batch of the same shape
    assert torch.equal(first.latents[2:4], base.to_latents(pair).half())
    files = sorted((tmp_path / "latents").glob("*.safetensors"))
    assert len(files) == 3
    files[1].unlink()
    opened: list[int] = []
    image = sources.Folder.image
    monkeypatch.setattr(sources.Folder, "image", lambda self, i: opened.append(i) or image(self, i))
    second = loaded(base, str(folder), tmp_path / "latents")
    assert sorted(opened) == [2, 3]
    assert second.latents is not None and torch.equal(first.latents, second.latents)


@pytest.mark.usefixtures("small_shards")
def test_other_data_in_the_same_folder_is_refused(bases: dict[str, Base], tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "p", 3)
    loaded(bases["sd15"], str(folder), tmp_path / "latents")
    (folder / "0.txt").write_text("another caption")
    with pytest.raises(BadRecipe, match=r"latents of other data \(source differ\)"):
        loaded(bases["sd15"], str(folder), tmp_path / "latents")


def test_a_damaged_latents_file_is_named(bases: dict[str, Base], tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "p", 2)
    loaded(bases["sd15"], str(folder), tmp_path / "latents")
    torn = tmp_path / "latents" / "00000.safetensors"
    torn.write_bytes(torn.read_bytes()[:50])
    with pytest.raises(AssetError, match="Delete this one file"):
        loaded(bases["sd15"], str(folder), tmp_path / "latents")


def test_a_full_disk(bases: dict[str, Base], tmp_path: Path, monkeypatch: Any) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    folder = image_folder(tmp_path / "p", 2)
    monkeypatch.setattr("minikin.files.os.fsync", full)
    with pytest.raises(StorageError, match="the disk is full"):
        loaded(bases["sd15"], str(folder), tmp_path / "latents")


def test_teacher_generates_images_for_captions(bases: dict[str, Base], tmp_path: Path) -> None:
    """Equal seeds give equal images, other seeds different ones, whatever the batch."""
    path = captions_file(tmp_path, [*CAPTIONS, *CAPTIONS])
    examples = loaded(bases["sd21"], str(path), tmp_path / "1", seed=1)
    again = loaded(bases["sd21"], str(path), tmp_path / "2", seed=1)
    other = loaded(bases["sd21"], str(path), tmp_path / "3", seed=2)
    assert examples.latents is not None and again.latents is not None and other.latents is not None
    assert torch.equal(examples.latents, again.latents) and not torch.equal(examples.latents, other.latents)
    assert not torch.equal(examples.latents[0], examples.latents[len(CAPTIONS)])
    assert torch.isfinite(examples.latents).all()


def test_captions_alone_open_no_image(bases: dict[str, Base], tmp_path: Path, monkeypatch: Any) -> None:
    folder = image_folder(tmp_path / "p", 3)
    monkeypatch.setattr(sources.Folder, "image", None)
    examples = loaded(bases["sd15"], str(folder), tmp_path / "latents", with_latents=False)
    assert examples.latents is None and examples.shape == (4, 8, 8) and len(examples) == 3


def test_size_the_unet_cannot_take_is_refused(bases: dict[str, Base], tmp_path: Path) -> None:
    with pytest.raises(BadRecipe, match="size must be a multiple of 16 for this base, but it is 72; use 64"):
        loaded(bases["sd15"], str(image_folder(tmp_path / "p", 1)), tmp_path / "latents", size=72)


def test_a_too_small_image_is_named(bases: dict[str, Base], tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "p", 2, side=20)
    with pytest.raises(BadPhoto, match=r"0\.png is 20x20 pixels, but training is at 64"):
        loaded(bases["sd15"], str(folder), tmp_path / "latents", size=64)


def test_batch_split_that_changes_batch_norm_is_refused() -> None:
    """DINOv2's heads normalise 8 examples together; the latent heads do not."""
    dino = Distill.make(method="turbo", data="x", features="dinov2", batch=32)
    check_batch_split(dino, 4)
    with pytest.raises(BadRecipe, match=r"batch of 32 in 8 pieces .* has 4 in each. Use a multiple of 64"):
        check_batch_split(dino, 8)
    check_batch_split(Distill.make(method="turbo", data="x", batch=32), 8)
