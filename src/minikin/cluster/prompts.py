"""A file of prompts, read as a stream.

One JSON object per line: the fields of `recipes.Paint`, and an `id` that is copied into the run log.

    {"prompt": "a photo of <tom> on the beach", "seed": 7}
    {"id": "b-2", "prompt": "a photo of <rex>", "n": 4, "steps": 8}

Fields that a line leaves out come from the run. An invalid line is an error of that line alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from minikin import strict_json
from minikin.errors import BadRecipe, MinikinError, UnknownName
from minikin.models.prompt import concept_tags
from minikin.perfusion import library
from minikin.perfusion.concept import check_name
from minikin.recipes import Paint

MAX_LINE = 100_000  # bytes of a line
RUN_OPTIONS = ("base", "batch", "device", "dtype", "size")  # set once for all lines; size as width and height
KNOWN_CONCEPTS = 100_000  # hashes kept while a run goes on: 20 MB


class PromptLine(NamedTuple):
    """One line of the file.

    number    counted from 1
    asked     a digest of everything it asks for, the contents of its concepts included
    recipe    fields of `Paint`; None where `error` says what is wrong
    concepts  file and SHA-256 of each concept it names
    """

    number: int
    id: str | None
    digest: str
    recipe: dict[str, Any] | None
    concepts: dict[str, tuple[str, str]]
    error: dict[str, str] | None = None


class Prompts:
    """The lines of a file, with the run's fields for all of them.

    values    fields of `Paint` for lines that do not have them
    concepts  folder of their files; None for the current folder and the library
    """

    def __init__(self, path: Path, values: Mapping[str, Any], concepts: Path | None = None) -> None:
        self.path, self.concepts = path, concepts
        self.values = {k: v for k, v in values.items() if v is not None}
        self.base = Paint.make(prompt="", **self.values).base
        self._file_of = lru_cache(KNOWN_CONCEPTS)(self._file_and_hash)

    def count(self) -> int:
        """Number of lines that are not blank."""
        return sum(1 for _ in self._raw())

    def chunks(self, size: int) -> Iterator[list[PromptLine]]:
        """The lines, `size` consecutive ones at a time; always the same ones together."""
        lines = (self._line(number, raw) for number, raw in self._raw())
        while chunk := list(islice(lines, size)):
            yield chunk

    def _raw(self) -> Iterator[tuple[int, bytes]]:
        try:
            with open(self.path, "rb") as f:
                number = 0
                while raw := f.readline(MAX_LINE + 1):
                    number += 1
                    if len(raw) > MAX_LINE and not raw.endswith(b"\n"):
                        while (rest := f.readline(MAX_LINE)) and not rest.endswith(b"\n"):
                            pass
                    if raw.strip():
                        yield number, raw
        except OSError as e:
            raise BadRecipe(f"The prompts {self.path} cannot be read: {e.strerror}.") from e

    def _line(self, number: int, raw: bytes) -> PromptLine:
        id_: str | None = None
        try:
            fields = self._parse(raw)
            id_ = None if fields.get("id") is None else str(fields.pop("id"))[:200]
            recipe: Paint = Paint.make(**{**self.values, **fields})
            names = concept_tags(f"{recipe.prompt} {recipe.negative}")
            concepts = {name: self._file_of(name) for name in names}
            values = recipe.model_dump(mode="json", exclude_defaults=True, exclude={"batch", "device", "dtype"})
            digest = _digest([values, self.base, {n: sha for n, (_, sha) in concepts.items()}])
            return PromptLine(number, id_, digest, values, concepts)
        except MinikinError as e:
            return PromptLine(number, id_, _digest(raw.decode("utf-8", "replace")), None, {}, failure(e))

    def _parse(self, raw: bytes) -> dict[str, Any]:
        if len(raw) > MAX_LINE:
            raise BadRecipe(f"The line is longer than {MAX_LINE:,} bytes.")
        try:
            fields = strict_json.loads(raw, kind=dict)
        except strict_json.BadJson:
            fields = {}
        if not isinstance(fields.get("prompt"), str):
            raise BadRecipe('Expected a JSON object with a prompt, for example {"prompt": "a cat", "seed": 7}.')
        for name in RUN_OPTIONS:
            if name in fields and (name != "base" or fields[name] != self.base):
                raise BadRecipe(f"{name} is set once for the whole run, not in a line; remove it.")
        return fields

    def _file_and_hash(self, name: str) -> tuple[str, str]:
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
    """The entry of an error in a record."""
    if isinstance(e, MinikinError):
        return {"code": e.code, "message": str(e)}
    return {"code": "internal_error", "message": f"{type(e).__name__}: {e}"}


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]
