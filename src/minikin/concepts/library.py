"""Where concepts are found: the current folder first, then the user's own library."""

from __future__ import annotations

from pathlib import Path

from minikin.concepts.concept import Concept, check_name
from minikin.concepts.file import load
from minikin.errors import BadConceptFile, UnknownName
from minikin.files import data_folder


def library_folder() -> Path:
    return data_folder() / "concepts"


def folders() -> list[Path]:
    return [Path.cwd(), library_folder()]


def names() -> dict[str, Path]:
    """File of every concept by file name; the current folder wins. Contents are not checked."""
    found: dict[str, Path] = {}
    for folder in reversed(folders()):
        for path in sorted(folder.glob("*.safetensors")) if folder.is_dir() else []:
            if _looks_like_concept(path):
                found[path.stem] = path
    return found


def find(name: str) -> Concept:
    """The concept `name`; raises UnknownName with the nearest names, or BadConceptFile."""
    check_name(name)
    path = names().get(name)
    if path is None:
        raise UnknownName(
            "concept", name, names(),
            f"Concepts are NAME.safetensors files in this folder or in {library_folder()}.",
        )  # fmt: skip
    concept = load(path)
    return concept if concept.name == name else concept.renamed(name)


def resolve(ref: str) -> Path:
    """A concept's file from its name or path; raises UnknownName or BadConceptFile."""
    path = Path(ref)
    if path.suffix == ".safetensors" or path.exists():
        if not path.is_file():
            raise BadConceptFile(f"There is no concept file {path}.")
        return path
    found = names().get(ref)
    if found is None:
        raise UnknownName("concept", ref, names())
    return found


def _looks_like_concept(path: Path) -> bool:
    try:
        with open(path, "rb") as f:
            return b"minikin.format" in f.read(65536)
    except OSError:
        return False
