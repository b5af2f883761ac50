"""Data sources of distillation: captioned images in a folder or in tar files, captions alone, scenes.

A source is a sequence of examples with one or more captions each. Images are decoded when they are
needed, with the same limits as photos; archives are never extracted to disk.

    folder         images with NAME.txt beside them, or metadata.jsonl with file_name and text
    tar            WebDataset: KEY.jpg with KEY.txt or KEY.json (caption or text); one or many files
    captions       a .txt file with one caption a line, or .jsonl with text; the teacher makes the images
    scenes:small   scenes of the world that tiny was trained on
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from PIL import Image

from minikin import strict_json
from minikin.errors import BadPhoto, BadRecipe
from minikin.images.photos import ENDINGS, MAX_BYTES, decoded, is_litter, on_white
from minikin.images.plain_text import decode_text

MAX_CAPTION = 2000  # characters; a prompt has some 300
TEXT_KEYS = ("text", "caption", "prompt", "txt")


class Source(Protocol):
    """Training examples by index. `has_images` is False when there are captions only."""

    has_images: bool

    def __len__(self) -> int: ...
    def captions(self, i: int) -> list[str]: ...
    def name(self, i: int) -> str: ...
    def image(self, i: int) -> Image.Image: ...

    @property
    def identity(self) -> str:
        """Equal for equal data; the pixels themselves are not read for it."""
        ...


def find(data: str, count: int | None = None) -> Source:
    """The source that `data` names, limited to its first `count` examples. Raises BadRecipe or BadPhoto."""
    kind, _, name = data.partition(":")
    if kind == "scenes" and name:
        from minikin.distillation.scenes import Scenes

        return Scenes(name, count or 8192)
    path = Path(os.path.expanduser(data))
    if os.path.isdir(path):
        tars = sorted(path.glob("*.tar"))
        return Tars(tars, count) if tars else Folder(path, count)
    if not os.path.isfile(path):
        raise BadRecipe(
            f"There is no folder or file {data}. --data takes a folder of captioned images, .tar files, a "
            ".txt or .jsonl file of captions, or scenes:small."
        )
    if path.suffix == ".tar":
        return Tars([path], count)
    if path.suffix in (".txt", ".jsonl"):
        return Captions(path, count)
    raise BadRecipe(f"{path.name} is not training data. Expected a folder, or a .tar, .txt or .jsonl file.")


def squared(image: Image.Image, side: int, name: str) -> Image.Image:
    """Centre crop of an image, resized to `side` pixels. Raises BadPhoto below half of that size."""
    image = on_white(image)
    short = min(image.size)
    if 2 * short < side:
        raise BadPhoto(
            f"{name} is {image.width}x{image.height} pixels, but training is at {side}: at least {side // 2} "
            "are needed. Take it out, or choose a smaller --size."
        )
    left, top = (image.width - short) // 2, (image.height - short) // 2
    middle = image.crop((left, top, left + short, top + short))
    return middle.resize((side, side), Image.Resampling.LANCZOS)


class Folder:
    """Captioned images of a folder and its subfolders, by name."""

    has_images = True

    def __init__(self, path: Path, count: int | None) -> None:
        files = sorted(f for f in path.rglob("*") if _is_image(f))[:count]
        if not files:
            raise BadPhoto(
                f"{path} holds no images ({', '.join(ENDINGS)}) and no .tar files. Put images with "
                "captions (NAME.txt) there, or give a file of captions."
            )
        self.path, self.files = path, files
        table = _table(path / "metadata.jsonl")
        captions = [table.get(f.relative_to(path).as_posix()) or _beside(f) for f in files]
        _need_all([f.relative_to(path).as_posix() for f in files], captions, "NAME.txt beside it")
        self._captions = captions

    def __len__(self) -> int:
        return len(self.files)

    def captions(self, i: int) -> list[str]:
        return self._captions[i]

    def name(self, i: int) -> str:
        return self.files[i].relative_to(self.path).as_posix()

    def image(self, i: int) -> Image.Image:
        return decoded(self.files[i], self.name(i))

    @property
    def identity(self) -> str:
        facts = [(f.relative_to(self.path).as_posix(), f.stat().st_size) for f in self.files]
        return _digest(facts, self._captions)


class Tars:
    """WebDataset .tar files. Only their tables of contents and captions are read on opening."""

    has_images = True

    def __init__(self, paths: Iterable[Path], count: int | None) -> None:
        self._at: list[tuple[Path, str, int, int]] = []  # file, name, offset, bytes of every image
        self._captions: list[list[str]] = []
        for path in paths:
            self._index(path)
        if not self._at:
            raise BadPhoto("The .tar files hold no images. Expected KEY.jpg with KEY.txt or KEY.json.")
        self._at, self._captions = self._at[:count], self._captions[:count]
        _need_all([name for _, name, _, _ in self._at], self._captions, "KEY.txt or KEY.json with it")

    def _index(self, path: Path) -> None:
        images: dict[str, tuple[str, int, int]] = {}
        texts: dict[str, list[str]] = {}
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    stem, _, ending = member.name.rpartition(".")
                    if not member.isreg() or is_litter(PurePosixPath(member.name).name):
                        continue
                    if f".{ending.lower()}" in ENDINGS:
                        images[stem] = (member.name, member.offset_data, member.size)
                    elif ending in ("txt", "json") and member.size < MAX_BYTES:
                        file = tar.extractfile(member)
                        assert file is not None
                        text = _decoded_text(file.read(), f"{path.name}:{member.name}")
                        captions = (
                            _of_json(text, f"{path.name}:{member.name}") if ending == "json" else _clean([text])
                        )
                        texts.setdefault(stem, []).extend(captions)
        except (tarfile.TarError, OSError, EOFError) as e:
            raise BadRecipe(f"{path.name} cannot be read as a .tar file ({e}). Make it again.") from e
        for stem, (name, offset, size) in images.items():
            self._at.append((path, name, offset, size))
            self._captions.append(texts.get(stem, []))

    def __len__(self) -> int:
        return len(self._at)

    def captions(self, i: int) -> list[str]:
        return self._captions[i]

    def name(self, i: int) -> str:
        path, name, _, _ = self._at[i]
        return f"{path.name}:{name}"

    def image(self, i: int) -> Image.Image:
        path, _, offset, size = self._at[i]
        with open(path, "rb") as f:
            f.seek(offset)
            return decoded(f.read(min(size, MAX_BYTES + 1)), self.name(i))

    @property
    def identity(self) -> str:
        return _digest([(p.name, n, s) for p, n, _, s in self._at], self._captions)


class Captions:
    """Captions without images: enough for tdm; for other methods the teacher makes an image for each."""

    has_images = False

    def __init__(self, path: Path, count: int | None) -> None:
        try:
            text = _decoded_text(path.read_bytes(), str(path))
        except OSError as e:
            raise BadRecipe(f"The captions {path} cannot be read: {e}. Expected UTF-8, one a line.") from e
        rows = text.split("\n")  # not splitlines: a caption may hold one of Unicode's other separators
        captions = _clean(rows)
        if path.suffix == ".jsonl":
            numbered = ((r, f"{path.name} line {k}") for k, r in enumerate(rows, 1) if r.strip())
            captions = [c for row, where in numbered for c in _of_json(row, where)[:1]]
        self._captions = captions[:count]
        if not self._captions:
            raise BadRecipe(f"{path} holds no captions. Expected one a line.")

    def __len__(self) -> int:
        return len(self._captions)

    def captions(self, i: int) -> list[str]:
        return [self._captions[i]]

    def name(self, i: int) -> str:
        return f"caption {i + 1}"

    def image(self, i: int) -> Image.Image:
        raise AssertionError("captions have no images")

    @property
    def identity(self) -> str:
        return _digest(self._captions)


def _need_all(names: list[str], captions: list[list[str]], how: str) -> None:
    bare = [n for n, c in zip(names, captions, strict=True) if not c]
    if bare:
        raise BadPhoto(
            f"{len(bare)} of {len(names)} images have no caption, for example {bare[0]}. Put {how}, or take "
            "them out: distilling without captions would unlearn the prompt."
        )


def _table(path: Path) -> dict[str, list[str]]:
    """Captions by file name, from metadata.jsonl."""
    if not path.is_file():
        return {}
    captions = {}
    for number, line in enumerate(_decoded_text(path.read_bytes(), str(path)).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = strict_json.loads(line, kind=dict)
            captions[str(row["file_name"])] = _texts(row)
        except (ValueError, KeyError, TypeError) as e:
            raise BadRecipe(
                f"{path} line {number} is not an object with file_name and text ({e}). Correct or remove it."
            ) from None
    return captions


def _beside(image: Path) -> list[str]:
    text = image.with_suffix(".txt")
    return _clean([_decoded_text(text.read_bytes(), str(text))]) if text.is_file() else []


def _decoded_text(data: bytes, where: str) -> str:
    try:
        return decode_text(data)
    except UnicodeError:
        raise BadRecipe(
            f"{where} is in an old encoding that does not say which it is. Save it as UTF-8."
        ) from None


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in ENDINGS and not is_litter(file.name) and file.is_file()


def _of_json(text: str, where: str) -> list[str]:
    """Captions of one JSON object. Raises BadRecipe for anything else."""
    try:
        return _texts(strict_json.loads(text, kind=dict))
    except (ValueError, TypeError) as e:
        raise BadRecipe(
            f'{where} is not a JSON object with a caption ({e}). Expected {{"text": "..."}} or a list of '
            "such texts; correct or remove it."
        ) from None


def _texts(row: Mapping[str, Any]) -> list[str]:
    """Captions of a row. Raises TypeError when the value is neither a text nor a list of texts."""
    for key in TEXT_KEYS:
        value = row.get(key)
        if value:
            several = [value] if isinstance(value, str) else value
            if not isinstance(several, list) or not all(isinstance(v, str) for v in several):
                raise TypeError(f"{key} is {json.dumps(value)[:40]}, not a text")
            return _clean(several)
    return []


def _clean(captions: Iterable[str]) -> list[str]:
    return [" ".join(c.split())[:MAX_CAPTION] for c in captions if c.strip()]


def _digest(*facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
