"""A file of prompts as pieces of work: streamed, never held.

One JSON object a line: the fields of `recipes.Paint`, and an `id` that comes back in the manifest.

    {"prompt": "a photo of <tom> on the beach", "seed": 7}
    {"id": "b-2", "prompt": "a photo of <rex>", "n": 4, "steps": 8}

What a line does not say is said by the run. A line that is wrong is an error of that line alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from minikin.errors import BadRecipe, MinikinError, UnknownName
from minikin.models.prompt import concept_tags
from minikin.perfusion import library
from minikin.perfusion.concept import check_name
from minikin.recipes import Paint

LONGEST = 100_000  # bytes of a line
OF_THE_RUN = ("base", "batch", "device", "dtype", "size")  # said once, for all lines; size as width and height
KNOWN_CONCEPTS = 100_000  # hashes kept while a run goes on: 20 MB


class Line(NamedTuple):
    """One line of the file.

    number    counted from 1
    asked     a digest of everything it asks for, the contents of its concepts included
    recipe    fields of `Paint`; None where `error` says what is wrong
    concepts  file and SHA-256 of each concept it names
    """

    number: int
    id: str | None
    asked: str
    recipe: dict[str, Any] | None
    concepts: dict[str, tuple[str, str]]
    error: dict[str, str] | None = None


class Prompts:
    """The lines of a file, with what the run says for all of them.

    values    fields of `Paint` for lines that do not have them
    concepts  folder of their files; None for the current folder and the library
    """

    def __init__(self, path: Path, values: Mapping[str, Any], concepts: Path | None = None) -> None:
        self.path, self.concepts = path, concepts
        self.values = {k: v for k, v in values.items() if v is not None}
        self.base = Paint.make(prompt="", **self.values).base
        self._file_of = lru_cache(KNOWN_CONCEPTS)(self._found)

    def count(self) -> int:
        """Lines that say something."""
        return sum(1 for _ in self._raw())

    def chunks(self, size: int) -> Iterator[list[Line]]:
        """The lines, `size` consecutive ones at a time; always the same ones together."""
        lines = (self._line(number, raw) for number, raw in self._raw())
        while chunk := list(islice(lines, size)):
            yield chunk

    def _raw(self) -> Iterator[tuple[int, bytes]]:
        try:
            with open(self.path, "rb") as f:
                number = 0
                while raw := f.readline(LONGEST + 1):
                    number += 1
                    if len(raw) > LONGEST and not raw.endswith(b"\n"):
                        while (rest := f.readline(LONGEST)) and not rest.endswith(b"\n"):
                            pass
                    if raw.strip():
                        yield number, raw
        except OSError as e:
            raise BadRecipe(f"The prompts {self.path} cannot be read: {e.strerror}.") from e

    def _line(self, number: int, raw: bytes) -> Line:
        id_: str | None = None
        try:
            told = self._told(raw)
            id_ = None if told.get("id") is None else str(told.pop("id"))[:200]
            recipe: Paint = Paint.make(**{**self.values, **told})
            names = concept_tags(f"{recipe.prompt} {recipe.negative}")
            concepts = {name: self._file_of(name) for name in names}
            values = recipe.model_dump(mode="json", exclude_defaults=True, exclude={"batch", "device", "dtype"})
            asked = _digest([values, self.base, {n: sha for n, (_, sha) in concepts.items()}])
            return Line(number, id_, asked, values, concepts)
        except MinikinError as e:
            return Line(number, id_, _digest(raw.decode("utf-8", "replace")), None, {}, failure(e))

    def _told(self, raw: bytes) -> dict[str, Any]:
        if len(raw) > LONGEST:
            raise BadRecipe(f"The line is longer than {LONGEST:,} bytes.")
        try:
            told = json.loads(raw)
        except (ValueError, RecursionError):
            told = None
        if not isinstance(told, dict) or not isinstance(told.get("prompt"), str):
            raise BadRecipe('Expected a JSON object with a prompt, for example {"prompt": "a cat", "seed": 7}.')
        for name in OF_THE_RUN:
            if name in told and (name != "base" or told[name] != self.base):
                raise BadRecipe(f"{name} is said once for the whole run, not in a line; take it out.")
        return told

    def _found(self, name: str) -> tuple[str, str]:
        path = library.resolve(check_name(name)) if self.concepts is None else self._in_folder(name)
        try:
            return str(path.resolve()), hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError as e:
            raise BadRecipe(f"{path} cannot be read: {e.strerror}.") from e

    def _in_folder(self, name: str) -> Path:
        assert self.concepts is not None
        path = self.concepts / f"{check_name(name)}.safetensors"
        if not path.is_file():
            alike = [p.stem for p in islice(self.concepts.glob(f"{name[0]}*.safetensors"), 200)]
            raise UnknownName(
                "concept", name, alike, f"Concepts are NAME.safetensors files in {self.concepts}."
            )
        return path


def failure(e: Exception) -> dict[str, str]:
    """What a record says of an error."""
    if isinstance(e, MinikinError):
        return {"code": e.code, "message": str(e)}
    return {"code": "internal_error", "message": f"{type(e).__name__}: {e}"}


def _digest(value: Any) -> str:
    told = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(told.encode("utf-8", "surrogatepass")).hexdigest()[:32]
