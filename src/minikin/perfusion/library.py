"""Concept files by name: in the current folder, then in the user's library."""

from __future__ import annotations

import os
from pathlib import Path

from minikin.errors import BadConceptFile, BadRecipe, UnknownName
from minikin.files import atomic_write, data_folder, is_unicode, sweep_orphans
from minikin.perfusion.concept import NAME, Concept, check_name
from minikin.perfusion.index import Index, IndexEntry

MANY = 200  # files in a folder from which on the index is used


def library_folder() -> Path:
    return data_folder() / "concepts"


def folders() -> list[Path]:
    return [Path.cwd(), library_folder()]


def names() -> dict[str, Path]:
    """Path of every concept by file name; the current folder takes precedence. Contents are not validated."""
    return {name: path for folder in reversed(folders()) for name, path in _names(folder).items()}


def _names(folder: Path) -> dict[str, Path]:
    paths = sorted(p for p in folder.glob("*.safetensors") if is_unicode(p.name)) if folder.is_dir() else []
    if len(paths) > MANY:
        return {entry.name: entry.path for entry in Index().search(folder)}
    return {path.stem: path for path in paths if _looks_like_concept(path)}


def search(
    text: str = "", *, category: str = "", limit: int | None = None, hashed: bool = False
) -> list[IndexEntry]:
    """Concepts sorted by name; the current folder takes precedence.

    text, category  part of the name, and category; "" for any
    hashed          include the SHA-256 of the files
    """
    index, by_name = Index(), dict[str, IndexEntry]()
    for folder in reversed(folders()):
        entries = index.search(folder, text, category=category, limit=limit, hashed=hashed)
        by_name |= {entry.name: entry for entry in entries}
    return [by_name[name] for name in sorted(by_name)][:limit]


def count(text: str = "", *, category: str = "") -> int:
    """Number of files that `search` reads without a limit; a name in both folders counts twice."""
    index = Index()
    return sum(index.count(folder, text, category=category) for folder in folders())


def locate(name: str) -> Path | None:
    """Path of the concept file of this name, or None; no other file is opened."""
    paths = (folder / f"{name}.safetensors" for folder in folders())
    return next((p for p in paths if p.is_file() and _looks_like_concept(p)), None)


def similar_names(name: str) -> list[str]:
    """Candidates for a misspelt name: all names, or those with the same first letters if there are many."""
    candidates = [entry.name for entry in search(name[:1])] if count() > MANY else list(names())
    if len(candidates) > MANY:
        candidates = [n for n in candidates if n[:2] == name[:2]]
    return candidates[:MANY]


def _unknown(name: str) -> UnknownName:
    return UnknownName(
        "concept",
        name,
        similar_names(name),
        f"Concepts are NAME.safetensors files in this folder or in {library_folder()}.",
    )


def find(name: str) -> Concept:
    """Load a concept by name; raises UnknownName with the nearest names, or BadConceptFile."""
    check_name(name)
    path = locate(name)
    if path is None:
        raise _unknown(name)
    from minikin.perfusion.concept_file import load

    concept = load(path)
    return concept if concept.name == name else concept.renamed(name)


def resolve(ref: str) -> Path:
    """Path of a concept file from its name or path; raises UnknownName or BadConceptFile."""
    path = Path(ref)
    if path.suffix == ".safetensors" or os.path.exists(path):  # not path.exists(): it raises for long names
        if not os.path.isfile(path):
            raise BadConceptFile(f"There is no concept file {path}.")
        return path
    by_name = locate(ref) if NAME.fullmatch(ref) else None
    if by_name is None:
        raise _unknown(ref)
    return by_name


def add(path: Path) -> Path:
    """Copy a concept file into the user's library as NAME.safetensors; raises BadConceptFile, BadRecipe."""
    from minikin.perfusion.concept_file import load  # needs PyTorch, which names and searches do not

    concept = load(path)
    target = library_folder() / f"{concept.name}.safetensors"
    if target.exists() and target.read_bytes() != path.read_bytes():
        raise BadRecipe(
            f"Your library has another concept '{concept.name}' ({target}). Remove it first: "
            f"minikin concepts remove {concept.name}."
        )
    sweep_orphans(target.parent)
    return atomic_write(target, path.read_bytes())


def put_newest(data: bytes, name: str) -> tuple[Path, str]:
    """Write a concept file into the user's library as the newest of its name.

    Returns its path, and the name that an earlier one of that name has from now on; "" where there was none.
    A file of that name in the current folder would be used in place of this one, so this one gets a name of
    its own then. Raises StorageError.
    """
    folder = library_folder()
    target, earlier = folder / f"{name}.safetensors", ""
    if target.is_file() and target.read_bytes() == data:
        return target, ""
    here = Path.cwd() / target.name
    if here.is_file() and _looks_like_concept(here) and here.read_bytes() != data:
        target = folder / f"{_free_name(f'{name[:33]}-new')}.safetensors"
    elif target.is_file():
        earlier = _free_name(f"{name[:33]}-old")
        atomic_write(folder / f"{earlier}.safetensors", target.read_bytes())
    sweep_orphans(folder)
    return atomic_write(target, data), earlier


def _free_name(name: str) -> str:
    """A name that no file has, here or in the library: NAME, NAME-2, NAME-3, ..."""
    tried, k = name, 2
    while any((folder / f"{tried}.safetensors").exists() for folder in folders()):
        tried, k = f"{name}-{k}", k + 1
    return tried


def follow(path: Path, name: str, before: bytes | None, *, new: bool = True) -> bool:
    """Put a concept that was written to `path` into the user's library, too, where the page finds it.

    before  the file's content until now; a copy of it in the library is replaced
    new     whether it is put there when the library has no concept of that name
    Returns False, and changes nothing, when the library has another concept of that name. Raises StorageError.
    """
    target = library_folder() / f"{name}.safetensors"
    data = path.read_bytes()
    stored = target.read_bytes() if target.is_file() else None
    if stored not in (None, before, data):
        return False
    if stored != data and (new or stored is not None):
        atomic_write(target, data)
    return True


def path_in_library(name: str) -> Path | None:
    """Path of the file of this name in the user's library, or None."""
    path = library_folder() / f"{name}.safetensors"
    return path if path.is_file() else None


def remove(name: str) -> Path:
    """Delete a concept from the user's library; raises UnknownName."""
    check_name(name)
    target = library_folder() / f"{name}.safetensors"
    if not target.is_file():
        stored = [p.stem for p in library_folder().glob("*.safetensors")]
        raise UnknownName("concept of your library", name, stored, "Files in this folder are yours to delete.")
    target.unlink()
    return target


def _looks_like_concept(path: Path) -> bool:
    try:
        with open(path, "rb") as f:
            return b"minikin.format" in f.read(65536)
    except OSError:
        return False
