"""Where concepts are found: the current folder first, then the user's own library."""

from __future__ import annotations

from pathlib import Path

from minikin.concepts.concept import Concept, check_name
from minikin.concepts.file import load
from minikin.errors import BadConceptFile, BadRecipe, UnknownName
from minikin.files import atomic_write, data_folder


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


def keep(path: Path) -> Path:
    """Copy a concept file into the user's library under its own name; raises BadConceptFile."""
    concept = load(path)
    target = library_folder() / f"{concept.name}.safetensors"
    if target.exists() and target.read_bytes() != path.read_bytes():
        raise BadRecipe(
            f"Your library has another concept '{concept.name}' ({target}). Remove it first: "
            f"minikin concepts remove {concept.name}."
        )
    return atomic_write(target, path.read_bytes())


def remove(name: str) -> Path:
    """Take a concept out of the user's library; raises UnknownName."""
    check_name(name)
    target = library_folder() / f"{name}.safetensors"
    if not target.is_file():
        mine = [p.stem for p in library_folder().glob("*.safetensors")]
        raise UnknownName("concept of your library", name, mine, "Files in this folder are yours to delete.")
    target.unlink()
    return target


def _looks_like_concept(path: Path) -> bool:
    try:
        with open(path, "rb") as f:
            return b"minikin.format" in f.read(65536)
    except OSError:
        return False
