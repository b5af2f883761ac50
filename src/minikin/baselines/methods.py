"""All baselines by name, and their results as folders."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

from minikin import strict_json
from minikin.baselines import sizes
from minikin.baselines.custom_diffusion import CustomDiffusion
from minikin.baselines.dreambooth import DreamBooth
from minikin.baselines.dreambooth_lora import DreamBoothLora
from minikin.baselines.method import Method
from minikin.baselines.result import BaselineResult
from minikin.baselines.textual_inversion import TextualInversion
from minikin.errors import BadConceptFile, UnknownName
from minikin.files import atomic_write
from minikin.models.base import Base
from minikin.models.identity import Origin

METHODS: dict[str, Method] = {
    "textual-inversion": TextualInversion(),
    "dreambooth": DreamBooth(),
    "dreambooth-prior": DreamBooth(),
    "dreambooth-lora": DreamBoothLora(),
    "custom-diffusion": CustomDiffusion(),
}
CARD = "baseline.json"  # method, words and base of the files beside it
ON_CARD = ("method", "name", "category", "word", "phrase", "facts")


def method(name: str) -> Method:
    """A method by name. Raises UnknownName."""
    if name not in METHODS:
        raise UnknownName("method", name, METHODS)
    return METHODS[name]


def save(base: Base, result: BaselineResult, folder: Path) -> list[Path]:
    """Write the method's own files and a card; returns the files without it. Raises StorageError."""
    files = method(result.method).write(base, result, folder)
    card = {k: getattr(result, k) for k in ON_CARD} | {"origin": asdict(result.origin)}
    card["files"] = [str(f.relative_to(folder)) for f in files]
    atomic_write(folder / CARD, json.dumps(card, indent=1, default=str).encode())
    return files


def load(base: Base, folder: Path) -> BaselineResult:
    """Read what `save` wrote. Raises BadConceptFile for missing or damaged files, or another base."""
    try:
        card = strict_json.read(folder / CARD, kind=dict)
        result = BaselineResult(**{k: card[k] for k in ON_CARD}, origin=Origin(**card["origin"]))
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise BadConceptFile(
            f"{folder} holds no result of `minikin baseline` that can be read ({type(e).__name__}: {e}). Teach "
            "it again."
        ) from e
    return replace(result, **vars(method(result.method).read(base, folder, result.name)))


def n_bytes(name: str, shapes: sizes.Shapes, rank: int = 4) -> int:
    """Bytes of a method's numbers in float32 on a base of these shapes."""
    return 4 * method(name).count(shapes, rank)


def size_table(name: str, base: Base, rank: int = 4) -> dict[str, int]:
    """Bytes in float32 on this base ("own") and on the real SD 1.5 and SDXL."""
    real = {family: n_bytes(name, sizes.of_family(family), rank) for family in sizes.REAL}
    return {"own": n_bytes(name, sizes.of(base), rank), **real}
