"""All baselines by name, their results as folders, and how large those are."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

from minikin.baselines import sizes
from minikin.baselines.custom_diffusion import CustomDiffusion
from minikin.baselines.dreambooth import DreamBooth
from minikin.baselines.dreambooth_lora import DreamBoothLora
from minikin.baselines.method import Method
from minikin.baselines.result import Learned
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
CARD = "baseline.json"  # beside the files other tools read: what they are


def method(name: str) -> Method:
    """A method by name. Raises UnknownName."""
    if name not in METHODS:
        raise UnknownName("method", name, METHODS)
    return METHODS[name]


def save(base: Base, learned: Learned, folder: Path) -> list[Path]:
    """Write the method's own files and a card; returns the files without it. Raises StorageError."""
    files = method(learned.method).write(base, learned, folder)
    keep = ("method", "name", "category", "word", "phrase", "facts")
    card = {k: getattr(learned, k) for k in keep} | {"origin": asdict(learned.origin)}
    card["files"] = [str(f.relative_to(folder)) for f in files]
    atomic_write(folder / CARD, json.dumps(card, indent=1, default=str).encode())
    return files


def load(base: Base, folder: Path) -> Learned:
    """What `save` wrote. Raises BadConceptFile when it is missing, damaged or of another shape."""
    try:
        card = json.loads((folder / CARD).read_text())
        known = {k: card[k] for k in ("method", "name", "category", "word", "phrase", "facts")}
        learned = Learned(**known, origin=Origin(**card["origin"]))
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise BadConceptFile(
            f"{folder} holds no result of `minikin baseline` that can be read ({type(e).__name__}: {e}). Teach "
            "it again."
        ) from e
    return replace(learned, **vars(method(learned.method).read(base, folder, learned.name)))


def n_bytes(name: str, shapes: sizes.Shapes, rank: int = 4) -> int:
    """Bytes of a method's numbers in float32 on a base of these shapes."""
    return 4 * method(name).count(shapes, rank)


def size_table(name: str, base: Base, rank: int = 4) -> dict[str, int]:
    """Bytes in float32 on this base ("own") and on the real SD 1.5 and SDXL."""
    real = {family: n_bytes(name, sizes.of_family(family), rank) for family in sizes.REAL}
    return {"own": n_bytes(name, sizes.of(base), rank), **real}
